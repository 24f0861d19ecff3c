"""OLMoE: olmo2's attention between llama's norms, and experts in every layer: `olmoe` in GGUF.

Follows transformers `configuration_olmoe.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from .contract import FLOAT32, Entry, Stack, converts
from .decoder import Tensors
from .olmo2 import DEFAULTS, Olmo2


@converts("OlmoeForCausalLM")
class Olmoe(Olmo2):
    arch = "olmoe"
    defaults = {**DEFAULTS, "num_experts_per_tok": 8, "num_experts": 64, "norm_topk_prob": False}

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        self.config.refuse_unless("norm_topk_prob", False)      # there is no key for gates that are normalised

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_expert_count(self.config.count("num_experts"))
        out.add_expert_used_count(self.config.count("num_experts_per_tok"))

    def layer(self, i: int, b: str, m: str) -> Tensors:
        d, f, n = self.d_model, self.d_ff, self.config.count("num_experts")
        yield self.norm(f"{b}.attn_norm", f"{m}.input_layernorm", d)
        yield from self.attention(b, f"{m}.self_attn")
        yield from self.wide_norms(b, f"{m}.self_attn")
        yield self.norm(f"{b}.ffn_norm", f"{m}.post_attention_layernorm", d)
        yield Entry(f"{b}.ffn_gate_inp.weight", f"{m}.mlp.gate.weight", (n, d), instead=FLOAT32)
        for name, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
            yield Stack(f"{b}.ffn_{name}_exps.weight", tuple(Entry(name, f"{m}.mlp.experts.{e}.{name}_proj.weight", shape) for e in range(n)))
