"""GLM-4 (0414): four norms a layer, half of each head rotated, biases on q, k and v, gate and up in one matrix: `glm4` in GGUF.

Follows transformers `configuration_glm4.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from .contract import converts, linear
from .decoder import Decoder, Tensors
from .rope import rope_parameters, write_rope_scaling

# transformers' Glm4Config where a config.json may be silent
DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1.5625e-7, "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": True, "head_dim": 128,
                            "partial_rotary_factor": 0.5}
ROPE_BASE = 10_000.0


@converts("Glm4ForCausalLM")
class Glm4(Decoder):
    arch = "glm4"
    defaults, rope_base = DEFAULTS, ROPE_BASE

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        self.config.refuse_unless("hidden_act", "silu")
        self.n_rot = int(self.head_dim * self.rope["partial_rotary_factor"])

    def read_rope(self) -> dict[str, Any]:
        return rope_parameters(self.config, self.rope_base, part=True)

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_rope_dimension_count(self.n_rot)
        write_rope_scaling(out, self.rope, self.config, ("linear", "yarn"))

    def layer(self, i: int, b: str, m: str) -> Tensors:
        d, f = self.d_model, self.d_ff
        yield self.norm(f"{b}.attn_norm", f"{m}.input_layernorm", d)
        yield from self.attention(b, f"{m}.self_attn", self.config.need("attention_bias"), out_bias=False)
        yield self.norm(f"{b}.post_attention_norm", f"{m}.post_self_attn_layernorm", d)
        yield self.norm(f"{b}.ffn_norm", f"{m}.post_attention_layernorm", d)
        yield from linear(f"{b}.ffn_up", f"{m}.mlp.gate_up_proj", 2 * f, d)
        yield from linear(f"{b}.ffn_down", f"{m}.mlp.down_proj", d, f)
        yield self.norm(f"{b}.post_ffw_norm", f"{m}.post_mlp_layernorm", d)
