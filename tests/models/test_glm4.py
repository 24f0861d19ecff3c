"""GLM-4: what all models must do is in tests/contract; this file declares what it does it with."""

from __future__ import annotations

import numpy as np

from cases import Case, Converted
from tiny import COMMON

KEYS = {"block_count": 3, "context_length": 256, "embedding_length": 96, "feed_forward_length": 160,
        "vocab_size": 512, "attention.head_count": 6, "attention.head_count_kv": 2, "attention.key_length": 32,
        "attention.value_length": 32, "attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "rope.dimension_count": 16, "rope.freq_base": 10000.0}

CASES = (Case(
    "glm4", "glm4", "Glm4Config", "Glm4ForCausalLM", "llama-bpe",
    {**COMMON, "head_dim": 32, "rms_norm_eps": 1e-5, "attention_bias": True, "pad_token_id": 0}, cached_as="llama",
    variants={"glm4": {}, "glm4-no-bias-tied": {"attention_bias": False, "tie_word_embeddings": True}},
    converted=Converted(KEYS, names="GLM4")),)
