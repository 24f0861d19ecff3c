"""Qwen3 with experts: `qwen3moe` in GGUF. Follows transformers `configuration_qwen3_moe.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from .contract import FLOAT32, Entry, Stack, converts
from .decoder import Tensors
from .qwen3 import Qwen3

# transformers' Qwen3MoeConfig where a config.json may be silent
DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
                            "use_sliding_window": False, "sliding_window": 4096, "num_experts_per_tok": 8,
                            "moe_intermediate_size": 768, "norm_topk_prob": False, "decoder_sparse_step": 1,
                            "mlp_only_layers": None}


@converts("Qwen3MoeForCausalLM")
class Qwen3Moe(Qwen3):
    arch = "qwen3moe"
    defaults = DEFAULTS

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        c = self.config
        c.refuse_unless("norm_topk_prob", True)             # there is no key for gates that are not normalised
        c.refuse_unless("decoder_sparse_step", 1)
        c.refuse_unless("mlp_only_layers", None, [])
        self.n_experts = c.count("num_experts" if c.get("num_experts") is not None else "num_local_experts")
        self.d_expert = c.count("moe_intermediate_size")

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_expert_count(self.n_experts)
        out.add_expert_used_count(self.config.count("num_experts_per_tok"))
        out.add_expert_feed_forward_length(self.d_expert)

    def feed_forward(self, b: str, m: str) -> Tensors:
        d, f = self.d_model, self.d_expert
        yield Entry(f"{b}.ffn_gate_inp.weight", f"{m}.gate.weight", (self.n_experts, d), instead=FLOAT32)
        for name, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
            parts = (Entry(name, f"{m}.experts.{n}.{name}_proj.weight", shape) for n in range(self.n_experts))
            yield Stack(f"{b}.ffn_{name}_exps.weight", tuple(parts))
