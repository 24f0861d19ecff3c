"""Qwen2: what all models must do is in tests/contract; this file declares what it does it with."""

from __future__ import annotations

import numpy as np

from cases import Case, Converted
from hollow import Decoder, Full
from tiny import COMMON, ROPES

KEYS = {"block_count": 3, "context_length": 256, "embedding_length": 96, "feed_forward_length": 160,
        "vocab_size": 512, "attention.head_count": 6, "attention.head_count_kv": 2, "attention.key_length": 16,
        "attention.value_length": 16, "attention.layer_norm_rms_epsilon": np.float32(1e-6),
        "rope.dimension_count": 16, "rope.freq_base": 10000.0}

CASES = (Case(
    "qwen2", "qwen2", "Qwen2Config", "Qwen2ForCausalLM", "qwen2", {**COMMON, "tie_word_embeddings": True},
    variants={"qwen2": {}, "qwen2-untied-sliding": {"tie_word_embeddings": False, "use_sliding_window": True, "sliding_window": 6,
                                                    "max_window_layers": 1}},
    converted=Converted(KEYS, names="QWEN2", narrow="bf16", tensors={"qwen2": {}, "qwen2-untied": {"tie_word_embeddings": False}},
                        runs={"qwen2": {}, "qwen2-yarn": {"rope_parameters": ROPES["yarn-attn"]}}),
    full={"qwen2.5-7b": Full(Decoder("qwen2", 28, 3584, 18944, 28, 4, 128, 152064, 32768, biases=True))}),)
