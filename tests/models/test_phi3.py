"""Phi-3 and Phi-4: what all models must do is in tests/contract; this file declares what it does it with."""

from __future__ import annotations

import numpy as np

from cases import Case, Converted
from tiny import COMMON, ROPES

KEYS = {"block_count": 3, "context_length": 256, "embedding_length": 96, "feed_forward_length": 160,
        "vocab_size": 512, "attention.head_count": 6, "attention.head_count_kv": 2, "attention.key_length": 16,
        "attention.value_length": 16, "attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "rope.dimension_count": 16, "rope.freq_base": 10000.0}
PART = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}

CASES = (Case(
    "phi3", "phi3", "Phi3Config", "Phi3ForCausalLM", "spm", {**COMMON, "rms_norm_eps": 1e-5, "pad_token_id": 0}, cached_as="llama",
    variants={"phi3": {}, "phi3-part": {"rope_parameters": PART, "partial_rotary_factor": 0.75}, "phi3-sliding": {"sliding_window": 6},
              "phi3-longrope": {"rope_parameters": {**ROPES["longrope"], "partial_rotary_factor": 1.0}, "original_max_position_embeddings": 64}},
    converted=Converted(KEYS, names="PHI3", narrow="bf16")),)
