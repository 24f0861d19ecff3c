"""Persimmon: what all models must do is in tests/contract; this file declares what it does it with."""

from __future__ import annotations

from typing import Any

import numpy as np

from cases import Case, Converted
from tiny import COMMON, ROPES

TEXT = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}
KEYS = {"block_count": 3, "context_length": 256, "embedding_length": 96, "feed_forward_length": 160, "vocab_size": 512,
        "attention.head_count": 6, "attention.layer_norm_epsilon": np.float32(1e-5), "rope.dimension_count": 8, "rope.freq_base": 10000.0}
NAMES = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.dense": "attn_output", "self_attn.q_layernorm": "attn_q_norm",
         "self_attn.k_layernorm": "attn_k_norm", "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down"}
WHOLE = {"lm_head": "output", "model.embed_tokens": "token_embd", "model.final_layernorm": "output_norm"}


def parted(name: str, value: np.ndarray, config: dict[str, Any]) -> Any:
    """A head's q, k and v lie together in the checkpoint (`modeling_persimmon.py`: _split_heads)."""
    own, _, kind = name.rpartition(".")
    if own in WHOLE:
        return f"{WHOLE[own]}.{kind}", value
    _, _, layer, own = own.split(".", 3)
    if own != "self_attn.query_key_value":
        return f"blk.{layer}.{NAMES[own]}.{kind}", value
    heads = value.reshape(6, 3, 16, *value.shape[1:])
    return [(f"blk.{layer}.attn_{part}.{kind}", heads[:, i].reshape(96, *value.shape[1:])) for i, part in enumerate("qkv")]


CASES = (Case(
    "persimmon", "persimmon", "PersimmonConfig", "PersimmonForCausalLM", "spm", TEXT, cached_as="llama",
    variants={"persimmon": {}, "persimmon-plain": {"qk_layernorm": False, "tie_word_embeddings": True, "num_attention_heads": 4,
                                                   "rope_parameters": {"rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 1.0}},
              "persimmon-linear": {"rope_parameters": {**ROPES["linear"], "partial_rotary_factor": 0.5}}},
    converted=Converted(KEYS, names="LLAMA", tensor=parted, runs={})),)
