"""Qwen3-Next: what all models must do is in tests/contract; this file declares what it does it with, and tests its states.

Tests of caches and conversations run qwen35's text case for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cases import Case, Converted
from tiny import COMMON

# Two heads of v share a key; three of four layers are recurrent, and one more stands behind the one with attention. With heads of 16 some outputs
# are near zero before they are normed: transformers' own float32 is then 1.7e-5 of the range from its float64, with 32 it is 2.5e-6.
DELTA = {"linear_conv_kernel_dim": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 3, "linear_num_value_heads": 6}
TEXT = {**COMMON, **DELTA, "num_hidden_layers": 5, "head_dim": 32}
MIXTURE = {"num_experts": 12, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96}
RECURRENT = [True, True, True, False, True]
DELTA_KEYS = {"ssm.conv_kernel": 4, "ssm.state_size": 32, "ssm.group_count": 3, "ssm.time_step_rank": 6, "ssm.inner_size": 192,
              "attention.recurrent_layers": RECURRENT, "full_attention_interval": 4}
KEYS = {"block_count": 5, "context_length": 256, "embedding_length": 96, "feed_forward_length": 160, "vocab_size": 512, "attention.head_count": 6,
        "attention.head_count_kv": 2, "attention.key_length": 32, "attention.value_length": 32, "attention.layer_norm_rms_epsilon": np.float32(1e-6),
        "rope.dimension_count": 8, "rope.freq_base": 10000.0, **DELTA_KEYS}
MIXTURE_KEYS = {"expert_count": 12, "expert_used_count": 4, "expert_feed_forward_length": 64, "expert_shared_feed_forward_length": 96}


def norm_mean(name: str) -> float:
    """Norms multiply by 1 + weight, but for those of delta nets."""
    return float("linear_attn" in name)


def plain(name: str, value: np.ndarray) -> tuple[str | None, np.ndarray]:
    """A tensor as any file of these architectures has it, and its name where gguf-py does not know it."""
    if name.endswith("A_log"):
        return None, -np.exp(value)
    if name.endswith("dt_bias"):
        return f"blk.{name.split('.')[2]}.ssm_dt.bias", value
    if "conv1d" in name:
        return None, value[:, 0]
    return None, value + np.float32("norm" in name and "linear_attn" not in name)


def tensor(name: str, value: np.ndarray, config: dict[str, Any]) -> Any:
    """q, k and v of all heads, then the gates, out of one matrix that has them head by head."""
    if "in_proj_qkvz" not in name:
        return plain(name, value)
    parts = np.split(value.reshape(3, -1, 96), (32, 64, 128), axis=1)
    q, k, v, z = (p.reshape(-1, 96) for p in parts)
    return [(f"blk.{name.split('.')[2]}.attn_qkv.weight", np.concatenate([q, k, v])), (f"blk.{name.split('.')[2]}.attn_gate.weight", z)]


CASES = (Case("qwen3_next", "qwen3next", "Qwen3NextConfig", "Qwen3NextForCausalLM", "qwen2", {**TEXT, **MIXTURE}, norm_mean=norm_mean, recurrent=True, heads=True, cached_as="qwen3_5_text",
              converted=Converted({**KEYS, **MIXTURE_KEYS}, names="QWEN3NEXT", tensor=tensor)),)
