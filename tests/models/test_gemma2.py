"""Gemma 2: what all models must do is in tests/contract; this file declares what it does it with."""

from __future__ import annotations

import numpy as np

from cases import Case, Converted
from hollow import Decoder, Full
from test_gemma3 import named
from tiny import COMMON

KEYS = {"block_count": 3, "context_length": 256, "embedding_length": 96, "feed_forward_length": 160,
        "vocab_size": 512, "attention.head_count": 6, "attention.head_count_kv": 2, "attention.key_length": 32,
        "attention.value_length": 32, "attention.layer_norm_rms_epsilon": np.float32(1e-6),
        "rope.freq_base": 10000.0, "attention.scale": np.float32(24**-0.5), "attention.sliding_window": 6,
        "attention.sliding_window_pattern": [True, False, True], "attn_logit_softcapping": 10.0, "final_logit_softcapping": 8.0}

CASES = (Case(
    "gemma2", "gemma2", "Gemma2Config", "Gemma2ForCausalLM", "spm",
    {**COMMON, "head_dim": 32, "sliding_window": 6, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 10.0, "final_logit_softcapping": 8.0},
    ring=True, cached_as="gemma3_text", norm_mean=lambda name: 0.0,
    variants={"gemma2": {}, "gemma2-no-caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None}},
    converted=Converted(KEYS, names="GEMMA2", tensor=named, error=4e-4,  # measured: 2e-4; llama.cpp looks GELU up in a table of float16
                        runs={"gemma2": {"query_pre_attn_scalar": 32}}),                  # its constant: the size of a head
    full={"gemma-2-9b": Full(Decoder("gemma2", 42, 3584, 14336, 16, 8, 256, 256000, 8192, tied=True, norms=(
        "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), keys={"attention.sliding_window": 4096}))}),)
