"""Qwen2 with experts: qwen2's attention, experts and one that all rows share in every layer: `qwen2moe` in GGUF.

Follows transformers `configuration_qwen2_moe.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from .checkpoint import Config
from .contract import FLOAT32, Entry, Stack, converts
from .decoder import Tensors
from .qwen2 import Qwen2

# transformers' Qwen2MoeConfig where a config.json may be silent
DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "use_sliding_window": False,
                            "sliding_window": 4096, "max_window_layers": 28, "decoder_sparse_step": 1, "moe_intermediate_size": 1408,
                            "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "num_experts": 60, "norm_topk_prob": False,
                            "mlp_only_layers": None, "qkv_bias": True}


def write_expert_keys(out: GGUFWriter, c: Config) -> None:
    """Write the sizes of experts and of the one that all rows share."""
    out.add_expert_count(c.count("num_experts"))
    out.add_expert_used_count(c.count("num_experts_per_tok"))
    out.add_expert_feed_forward_length(c.count("moe_intermediate_size"))
    out.add_expert_shared_feed_forward_length(c.count("shared_expert_intermediate_size"))


@converts("Qwen2MoeForCausalLM")
class Qwen2Moe(Qwen2):
    arch = "qwen2moe"
    defaults = DEFAULTS

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        c = self.config
        for name, *allowed in (("norm_topk_prob", False), ("decoder_sparse_step", 1), ("mlp_only_layers", None, []), ("qkv_bias", True),
                               ("use_sliding_window", False)):
            c.refuse_unless(name, *allowed)
        self.n_experts, self.d_expert, self.d_shared = (c.count(n) for n in ("num_experts", "moe_intermediate_size", "shared_expert_intermediate_size"))

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        write_expert_keys(out, self.config)

    def layer(self, i: int, b: str, m: str) -> Tensors:
        d, f = self.d_model, self.d_expert
        yield self.norm(f"{b}.attn_norm", f"{m}.input_layernorm", d)
        yield from self.attention(b, f"{m}.self_attn", bias=True, out_bias=False)
        yield self.norm(f"{b}.ffn_norm", f"{m}.post_attention_layernorm", d)
        yield Entry(f"{b}.ffn_gate_inp.weight", f"{m}.mlp.gate.weight", (self.n_experts, d), instead=FLOAT32)
        for name, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
            parts = (Entry(name, f"{m}.mlp.experts.{e}.{name}_proj.weight", shape) for e in range(self.n_experts))
            yield Stack(f"{b}.ffn_{name}_exps.weight", tuple(parts))
        yield from self.gated(b, f"{m}.mlp.shared_expert", self.d_shared, kind="_shexp")
        yield Entry(f"{b}.ffn_gate_inp_shexp.weight", f"{m}.mlp.shared_expert_gate.weight", (1, d), instead=FLOAT32)
