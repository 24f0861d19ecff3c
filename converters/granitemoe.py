"""Granite with experts, also with one that all rows share: `granitemoe` in GGUF.

Follows transformers `configuration_granitemoe.py`, `configuration_granitemoeshared.py`. Gate and up of an expert are one matrix in the
checkpoint, the gate first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gguf import GGUFWriter

from .contract import FLOAT32, Entry, converts
from .granite import Granite


@converts("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM")
class GraniteMoe(Granite):
    arch = "granitemoe"
    defaults: dict[str, Any] = {**Granite.defaults, "num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 0}

    @property
    def d_shared(self) -> int:
        """Width of the expert that all rows share; 0 where there is none."""
        return self.config.get("shared_intermediate_size") or 0

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_expert_count(self.config.count("num_local_experts"))
        out.add_expert_used_count(self.config.count("num_experts_per_tok"))
        if self.d_shared:
            out.add_expert_shared_feed_forward_length(self.d_shared)

    def feed_forward(self, b: str, m: str) -> Iterator[Entry]:
        d, f, n, s = self.d_model, self.d_ff, self.config.count("num_local_experts"), self.d_shared
        moe, own = f"{m}.block_sparse_moe", f"{m}.shared_mlp"
        yield Entry(f"{b}.ffn_gate_inp.weight", f"{moe}.router.layer.weight", (n, d), instead=FLOAT32)
        for name, first in (("gate", 0), ("up", f)):
            yield Entry(f"{b}.ffn_{name}_exps.weight", f"{moe}.input_linear.weight", (n, f, d), stored=(n, 2 * f, d), middle=first)
        yield Entry(f"{b}.ffn_down_exps.weight", f"{moe}.output_linear.weight", (n, d, f))
        if s:
            for name, first in (("gate", 0), ("up", s)):
                yield Entry(f"{b}.ffn_{name}_shexp.weight", f"{own}.input_linear.weight", (s, d), stored=(2 * s, d), first_row=first)
            yield Entry(f"{b}.ffn_down_shexp.weight", f"{own}.output_linear.weight", (d, s))
