"""Qwen3-MoE: what all models must do is in tests/contract; this file declares what it does it with."""

from __future__ import annotations

import numpy as np

from cases import Case, Converted
from tiny import COMMON

KEYS = {"block_count": 3, "context_length": 256, "embedding_length": 96, "feed_forward_length": 160,
        "vocab_size": 512, "attention.head_count": 6, "attention.head_count_kv": 2, "attention.key_length": 32,
        "attention.value_length": 32, "attention.layer_norm_rms_epsilon": np.float32(1e-6),
        "rope.dimension_count": 32, "rope.freq_base": 10000.0, "expert_count": 12, "expert_used_count": 4,
        "expert_feed_forward_length": 64}

CASES = (Case(
    "qwen3moe", "qwen3moe", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", "qwen2",
    {**COMMON, "head_dim": 32, "num_experts": 12, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "norm_topk_prob": True},
    cached_as="qwen2",
    variants={"qwen3moe": {"num_experts_per_tok": 3}},       # with 4, two experts of a row are 3e-5 apart: f16 swaps them
    converted=Converted(KEYS, names="QWEN3MOE")),)
