"""Persimmon: layer norms with biases, q, k and v of a head together in one matrix: `persimmon` in GGUF.

Follows transformers `configuration_persimmon.py`. The file has matrices of their own for q, k and v.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from .contract import Entry, converts, layer_norm, linear
from .decoder import Decoder, Tensors
from .rope import rope_parameters, write_rope_scaling

# transformers' PersimmonConfig where a config.json may be silent
DEFAULTS: dict[str, Any] = {"vocab_size": 262_144, "hidden_size": 4096, "intermediate_size": 16_384, "num_hidden_layers": 36,
                            "num_attention_heads": 64, "hidden_act": "relu2", "max_position_embeddings": 16_384, "layer_norm_eps": 1e-5,
                            "tie_word_embeddings": False, "qk_layernorm": True}
PART = 0.5                           # of a head that is rotated


@converts("PersimmonForCausalLM")
class Persimmon(Decoder):
    arch = "persimmon"
    defaults, rope_base = DEFAULTS, 10_000.0

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        self.config.refuse_unless("hidden_act", "relu2")
        self.n_rot = int(self.head_dim * self.rope["partial_rotary_factor"])

    def read_rope(self) -> dict[str, Any]:
        self.config.defaults = {**self.config.defaults, "partial_rotary_factor": PART}
        return rope_parameters(self.config, self.rope_base, part=True)

    def write_keys(self, out: GGUFWriter) -> None:
        self.write_sizes(out, self.d_ff)
        out.add_layer_norm_eps(self.config.need("layer_norm_eps"))
        out.add_rope_freq_base(self.rope["rope_theta"])
        out.add_rope_dimension_count(self.n_rot)
        write_rope_scaling(out, self.rope, self.config, ("linear", "yarn"))

    def tensors(self) -> Tensors:
        yield Entry("token_embd.weight", "model.embed_tokens.weight", (self.vocab_size, self.d_model))
        yield from layer_norm("output_norm", "model.final_layernorm", self.d_model)
        if not self.tied:
            yield Entry("output.weight", "lm_head.weight", (self.vocab_size, self.d_model))
        for i in range(self.n_layers):
            yield from self.layer(i, f"blk.{i}", f"model.layers.{i}")

    def fused(self, b: str, m: str) -> Iterator[Entry]:
        """List q, k and v of one matrix [H, 3, E, D], one after the other."""
        d, rows = self.d_model, np.arange(3 * self.d_model).reshape(self.n_heads, 3, self.head_dim)
        for i, name in enumerate(("attn_q", "attn_k", "attn_v")):
            own = rows[:, i].reshape(-1)
            yield Entry(f"{b}.{name}.weight", f"{m}.weight", (d, d), own, stored=(3 * d, d))
            yield Entry(f"{b}.{name}.bias", f"{m}.bias", (d,), own, stored=(3 * d,))

    def layer(self, i: int, b: str, m: str) -> Tensors:
        d, f = self.d_model, self.d_ff
        yield from layer_norm(f"{b}.attn_norm", f"{m}.input_layernorm", d)
        yield from self.fused(b, f"{m}.self_attn.query_key_value")
        if self.config.need("qk_layernorm"):
            yield from layer_norm(f"{b}.attn_q_norm", f"{m}.self_attn.q_layernorm", self.head_dim)
            yield from layer_norm(f"{b}.attn_k_norm", f"{m}.self_attn.k_layernorm", self.head_dim)
        yield from linear(f"{b}.attn_output", f"{m}.self_attn.dense", d, d, bias=True)
        yield from layer_norm(f"{b}.ffn_norm", f"{m}.post_attention_layernorm", d)
        yield from linear(f"{b}.ffn_up", f"{m}.mlp.dense_h_to_4h", f, d, bias=True)
        yield from linear(f"{b}.ffn_down", f"{m}.mlp.dense_4h_to_h", d, f, bias=True)
