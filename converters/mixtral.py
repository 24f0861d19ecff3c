"""Mixtral: `llama` in GGUF, with `expert_count` and the experts of a layer in one tensor.

Follows transformers `configuration_mixtral.py`, and the names that its checkpoints have: w1 is the gate, w3 up, w2 down.
"""

from __future__ import annotations

from collections.abc import Iterator

from gguf import GGUFWriter

from .contract import FLOAT32, Entry, Stack, converts
from .llama import DEFAULTS, Llama


@converts("MixtralForCausalLM")
class Mixtral(Llama):
    defaults = {**DEFAULTS, "rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2}
    rope_base = 1e6         # MixtralConfig.default_theta

    def write_keys(self, out: GGUFWriter) -> None:
        self.config.refuse_unless("sliding_window", None)
        super().write_keys(out)
        out.add_expert_count(self.config.count("num_local_experts"))
        out.add_expert_used_count(self.config.count("num_experts_per_tok"))

    def feed_forward(self, b: str, m: str) -> Iterator[Entry | Stack]:
        d, f, n = self.d_model, self.d_ff, self.config.count("num_local_experts")
        moe = f"{m}.block_sparse_moe"
        yield Entry(f"{b}.ffn_gate_inp.weight", f"{moe}.gate.weight", (n, d), instead=FLOAT32)
        for name, source, shape in (("gate", "w1", (f, d)), ("up", "w3", (f, d)), ("down", "w2", (d, f))):
            name = f"{b}.ffn_{name}_exps.weight"
            yield Stack(name, tuple(Entry(name, f"{moe}.experts.{e}.{source}.weight", shape) for e in range(n)))
