"""Granite, dense, with experts and with one that all rows share: what all models must do is in tests/contract; this file declares what it does it with."""

from __future__ import annotations

from typing import Any

import numpy as np

from cases import Case, Converted
from test_llama import interleaved
from tiny import COMMON, ROPES

KEYS = {"block_count": 3, "context_length": 256, "embedding_length": 96, "feed_forward_length": 160,
        "vocab_size": 512, "attention.head_count": 6, "attention.head_count_kv": 2, "attention.key_length": 16,
        "attention.value_length": 16, "attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "rope.dimension_count": 16, "rope.freq_base": 10000.0, "embedding_scale": 12.0, "logit_scale": 6.0,
        "residual_scale": np.float32(0.22), "attention.scale": np.float32(0.2)}
EXPERTS = {"expert_count": 6, "expert_used_count": 3}
MULTIPLIERS = {"embedding_multiplier": 12.0, "logits_scaling": 6.0, "residual_multiplier": 0.22, "attention_multiplier": 0.2}
OWN = {**COMMON, **MULTIPLIERS, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}


def parted(name: str, value: np.ndarray, config: dict[str, Any]) -> Any:
    """Gate and up are one matrix in the checkpoint, an expert's too; names that gguf-py has for none of the two."""
    layer = f"blk.{name.split('.')[2]}." if "layers" in name else ""
    if "input_linear" in name:
        kind, axis = ("exps", 1) if "moe" in name else ("shexp", 0)
        return [(f"{layer}ffn_{part}_{kind}.weight", half) for part, half in zip(("gate", "up"), np.split(value, 2, axis))]
    if "output_linear" in name:
        return f"{layer}ffn_down_{'exps' if 'moe' in name else 'shexp'}.weight", value
    return interleaved(name, value, config)


GRANITE = Case(
    "granite", "granite", "GraniteConfig", "GraniteForCausalLM", "gpt-2", OWN, cached_as="llama",
    variants={"granite": {}, "granite-untied-yarn": {"tie_word_embeddings": False, "rope_parameters": ROPES["yarn"]}},
    converted=Converted(KEYS, names="GRANITE", tensor=interleaved, narrow="bf16"))

GRANITEMOE = Case(
    "granitemoe", "granitemoe", "GraniteMoeConfig", "GraniteMoeForCausalLM", "gpt-2",
    {**OWN, "num_local_experts": 6, "num_experts_per_tok": 3}, cached_as="llama",
    converted=Converted({**KEYS, **EXPERTS}, names="GRANITE_MOE", tensor=parted))

SHARED = Case(
    "granitemoeshared", "granitemoe", "GraniteMoeSharedConfig", "GraniteMoeSharedForCausalLM", "gpt-2",
    {**OWN, "num_local_experts": 6, "num_experts_per_tok": 3, "shared_intermediate_size": 64}, cached_as="llama",
    converted=Converted({**KEYS, **EXPERTS, "expert_shared_feed_forward_length": 64}, names="GRANITE_MOE", tensor=parted))

CASES = (GRANITE, GRANITEMOE, SHARED)
