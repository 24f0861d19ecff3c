"""OLMo 2: what all models must do is in tests/contract; this file declares what it does it with."""

from __future__ import annotations

import numpy as np

from cases import Case, Converted
from tiny import COMMON, ROPES

KEYS = {"block_count": 3, "context_length": 256, "embedding_length": 96, "feed_forward_length": 160,
        "vocab_size": 512, "attention.head_count": 6, "attention.head_count_kv": 2, "attention.key_length": 16,
        "attention.value_length": 16, "attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "rope.dimension_count": 16, "rope.freq_base": 10000.0}

OLMO2 = Case(
    "olmo2", "olmo2", "Olmo2Config", "Olmo2ForCausalLM", "dbrx", {**COMMON, "rms_norm_eps": 1e-5}, cached_as="qwen2",
    variants={"olmo2": {}, "olmo2-yarn": {"rope_parameters": ROPES["yarn"]}},
    converted=Converted(KEYS, names="OLMO2", narrow="bf16"))

CASES = (OLMO2,)
