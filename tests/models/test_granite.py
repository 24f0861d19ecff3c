"""Granite: what all models must do is in tests/contract; this file declares what it does it with."""

from __future__ import annotations

import numpy as np

from cases import Case, Converted
from hollow import Decoder, Full
from test_llama import interleaved
from tiny import COMMON, ROPES

KEYS = {"block_count": 3, "context_length": 256, "embedding_length": 96, "feed_forward_length": 160,
        "vocab_size": 512, "attention.head_count": 6, "attention.head_count_kv": 2, "attention.key_length": 16,
        "attention.value_length": 16, "attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "rope.dimension_count": 16, "rope.freq_base": 10000.0, "embedding_scale": 12.0, "logit_scale": 6.0,
        "residual_scale": np.float32(0.22), "attention.scale": np.float32(0.2)}
MULTIPLIERS = {"embedding_multiplier": 12.0, "logits_scaling": 6.0, "residual_multiplier": 0.22, "attention_multiplier": 0.2}
OWN = {**COMMON, **MULTIPLIERS, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}


GRANITE = Case(
    "granite", "granite", "GraniteConfig", "GraniteForCausalLM", "gpt-2", OWN, cached_as="llama",
    variants={"granite": {}, "granite-untied-yarn": {"tie_word_embeddings": False, "rope_parameters": ROPES["yarn"]}},
    converted=Converted(KEYS, names="GRANITE", tensor=interleaved, narrow="bf16"),
    full={"granite-3.3-8b": Full(Decoder("granite", 40, 4096, 12800, 32, 8, 128, 49159, 131072, tied=True, keys={
        "logit_scale": 16.0, "residual_scale": 0.22, "embedding_scale": 12.0, "attention.scale": 0.0078125}))})

CASES = (GRANITE,)
