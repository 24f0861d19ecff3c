"""Qwen3: what all models must do is in tests/contract; this file declares what it does it with."""

from __future__ import annotations

import numpy as np

from cases import Case, Converted
from hollow import Decoder, Full
from tiny import COMMON, ROPES

KEYS = {"block_count": 3, "context_length": 256, "embedding_length": 96, "feed_forward_length": 160,
        "vocab_size": 512, "attention.head_count": 6, "attention.head_count_kv": 2, "attention.key_length": 32,
        "attention.value_length": 32, "attention.layer_norm_rms_epsilon": np.float32(1e-6),
        "rope.dimension_count": 32, "rope.freq_base": 10000.0}

CASES = (Case(
    "qwen3", "qwen3", "Qwen3Config", "Qwen3ForCausalLM", "qwen2", {**COMMON, "head_dim": 32, "tie_word_embeddings": True},
    cached_as="qwen2", also=("Qwen3Model", "Qwen3ForSequenceClassification"),     # without its head, with one of a score: tests/engine/test_ranks.py
    variants={"qwen3": {}, "qwen3-untied": {"tie_word_embeddings": False}},
    converted=Converted(KEYS, names="QWEN3", narrow="bf16", tensors={"qwen3": {}, "qwen3-untied": {"tie_word_embeddings": False}},
                        runs={"qwen3": {}, "qwen3-yarn": {"rope_parameters": ROPES["yarn-attn"]}}),
    full={"qwen3-8b": Full(Decoder("qwen3", 36, 4096, 12288, 32, 8, 128, 151936, 40960, head_norms=True))}),)
