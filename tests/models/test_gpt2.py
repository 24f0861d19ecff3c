"""GPT-2: what all models must do is in tests/contract; this file declares what it does it with."""

from __future__ import annotations

from typing import Any

import numpy as np

from cases import Case, Converted

KEYS = {"block_count": 3, "context_length": 256, "embedding_length": 96, "feed_forward_length": 160, "vocab_size": 512,
        "attention.head_count": 6, "attention.layer_norm_epsilon": np.float32(1e-5)}
NAMES = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv",
         "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}


def turned(name: str, value: np.ndarray, config: dict[str, Any]) -> tuple[str | None, np.ndarray]:
    """Matrices are [in, out] in the checkpoint; a language model's head is tied."""
    parts = name.removeprefix("transformer.").split(".")
    own, kind = ".".join(parts[2:-1] if parts[0] == "h" else parts[:-1]), parts[-1]
    return f"{f'blk.{parts[1]}.' if parts[0] == 'h' else ''}{NAMES[own]}.{kind}", value.T if "c_" in own else value


CASES = (Case(
    "gpt2", "gpt2", "GPT2Config", "GPT2LMHeadModel", "gpt-2",
    {"vocab_size": 512, "n_embd": 96, "n_inner": 160, "n_layer": 3, "n_head": 6, "n_positions": 256}, cached_as="llama",
    converted=Converted(KEYS, names="GPT2", tensor=turned, error=4e-4)),)   # measured: 2e-4; llama.cpp looks GELU up in a table of float16
