"""Llama's layout: Llama, Mistral with windows and Mixtral with experts, and the scalings of rope.

What all models must do is in tests/contract; this file declares what it does it with.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cases import Case, Converted
from hollow import Decoder, Full
from tiny import COMMON, ROPES

KEYS = {"block_count": 3, "context_length": 256, "embedding_length": 96, "feed_forward_length": 160,
        "vocab_size": 512, "attention.head_count": 6, "attention.head_count_kv": 2, "attention.key_length": 16,
        "attention.value_length": 16, "attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "rope.dimension_count": 16, "rope.freq_base": 10000.0}


def interleaved(name: str, value: np.ndarray, config: dict[str, Any]) -> tuple[str | None, np.ndarray]:
    """Rows of q and k as llama.cpp documents them: heads [2, d/2] -> [d/2, 2]."""
    for part, n_heads in (("q_proj", config["num_attention_heads"]), ("k_proj", config["num_key_value_heads"])):
        if part in name:
            heads = value.reshape(n_heads, 2, len(value) // n_heads // 2, -1)
            value = heads.swapaxes(1, 2).reshape(value.shape)
    return None, value


LLAMA = Case(
    "llama", "llama", "LlamaConfig", "LlamaForCausalLM", "llama-bpe", {**COMMON, "rms_norm_eps": 1e-5},
    also=("LlamaForCausalLMEagle3", "Eagle3Speculator", "Eagle3DraftModel"),                # which tests/engine/test_heads.py tests
    variants={"llama": {}, "llama-bias-head_dim-tied": {"attention_bias": True, "head_dim": 32, "tie_word_embeddings": True},
              **{f"llama-{name}": {"rope_parameters": dict(rope)} for name, rope in ROPES.items()}},
    converted=Converted(
        KEYS, names="LLAMA", tensor=interleaved, narrow="f16",
        tensors={"llama": {}, "llama-biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
                 "llama-tied": {"tie_word_embeddings": True}},
        runs={"llama": {}, "llama-biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
              "llama-tied": {"tie_word_embeddings": True},
              **{f"llama-{name}": {"rope_parameters": rope} for name, rope in ROPES.items()},
              "llama-longrope-short": {"rope_parameters": {**ROPES["longrope"], "original_max_position_embeddings": 512},
                                       "max_position_embeddings": 2048}}),
    full={"llama-8b": Full(Decoder("llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072)), "llama-405b": Full(Decoder("llama", 126, 16384, 53248, 128, 8, 128, 128256, 131072, n_merges=280147),
                             dtype="Q8_0", part_bytes=40 * 2**30)})

MISTRAL = Case(
    "mistral", "llama", "MistralConfig", "MistralForCausalLM", "tekken",
    {**COMMON, "head_dim": 32, "sliding_window": 6, "rms_norm_eps": 1e-5},
    ring=True, cached_as="gemma3_text", variants={"mistral-sliding": {}},
    converted=Converted(
        {**KEYS, "attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32,
         "attention.sliding_window": 6, "attention.sliding_window_pattern": [True] * 3},
        names="LLAMA", tensor=interleaved, runs={"mistral": {"sliding_window": None}}))

MIXTRAL = Case(
    "mixtral", "llama", "MixtralConfig", "MixtralForCausalLM", "llama-bpe",
    {**COMMON, "rms_norm_eps": 1e-5, "num_local_experts": 5, "num_experts_per_tok": 2},
    cached_as="llama", variants={"mixtral": {}, "mixtral-16-top-3": {"num_local_experts": 16, "num_experts_per_tok": 3, "head_dim": 32}},
    converted=Converted({**KEYS, "rope.freq_base": 1e6, "expert_count": 5, "expert_used_count": 2},
                        names="LLAMA", tensor=interleaved, narrow="f16"))

CASES = (LLAMA, MISTRAL, MIXTRAL)
