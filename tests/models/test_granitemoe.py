"""Granite with experts, and with one that all rows share: what all models must do is in tests/contract; this file declares what it does it with."""

from __future__ import annotations

from typing import Any

import numpy as np

from cases import Case, Converted
from test_granite import KEYS, OWN
from test_llama import interleaved

EXPERTS = {"expert_count": 6, "expert_used_count": 3}


def parted(name: str, value: np.ndarray, config: dict[str, Any]) -> Any:
    """Gate and up are one matrix in the checkpoint, an expert's too; names that gguf-py has for none of the two."""
    layer = f"blk.{name.split('.')[2]}." if "layers" in name else ""
    if "input_linear" in name:
        kind, axis = ("exps", 1) if "moe" in name else ("shexp", 0)
        return [(f"{layer}ffn_{part}_{kind}.weight", half) for part, half in zip(("gate", "up"), np.split(value, 2, axis))]
    if "output_linear" in name:
        return f"{layer}ffn_down_{'exps' if 'moe' in name else 'shexp'}.weight", value
    return interleaved(name, value, config)


GRANITEMOE = Case(
    "granitemoe", "granitemoe", "GraniteMoeConfig", "GraniteMoeForCausalLM", "gpt-2",
    {**OWN, "num_local_experts": 6, "num_experts_per_tok": 3}, cached_as="llama",
    converted=Converted({**KEYS, **EXPERTS}, names="GRANITE_MOE", tensor=parted))

SHARED = Case(
    "granitemoeshared", "granitemoe", "GraniteMoeSharedConfig", "GraniteMoeSharedForCausalLM", "gpt-2",
    {**OWN, "num_local_experts": 6, "num_experts_per_tok": 3, "shared_intermediate_size": 64}, cached_as="llama",
    converted=Converted({**KEYS, **EXPERTS, "expert_shared_feed_forward_length": 64}, names="GRANITE_MOE", tensor=parted))

CASES = (GRANITEMOE, SHARED)
