"""Phi-3, Phi-3.5 and Phi-4: q, k and v in one matrix, gate and up in another: `phi3` in GGUF.

Follows transformers `configuration_phi3.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from .contract import Constant, converts, linear
from .decoder import Decoder, Tensors, write_window
from .rope import rope_parameters, rope_tensors, write_rope_scaling

# transformers' Phi3Config where a config.json may be silent
DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "sliding_window": None,
                            "original_max_position_embeddings": 4096}
ROPE_BASE = 10_000.0


@converts("Phi3ForCausalLM")
class Phi3(Decoder):
    arch = "phi3"
    defaults, rope_base = DEFAULTS, ROPE_BASE

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        self.config.refuse_unless("hidden_act", "silu")
        self.n_rot = int(self.head_dim * self.rope["partial_rotary_factor"])

    def read_rope(self) -> dict[str, Any]:
        found = rope_parameters(self.config, self.rope_base, part=True)
        if found["rope_type"] in ("su", "yarn"):                 # older names of it, as in `Phi3Config`
            found |= {"rope_type": "longrope", "original_max_position_embeddings": self.config.need("original_max_position_embeddings")}
        return found

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_rope_dimension_count(self.n_rot)
        write_rope_scaling(out, self.rope, self.config, ("longrope",))
        write_window(out, self.config.get("sliding_window"), [True] * self.n_layers)

    def constants(self) -> Iterator[Constant]:
        yield from rope_tensors(self.rope, self.config, self.n_rot)

    def layer(self, i: int, b: str, m: str) -> Tensors:
        d, f = self.d_model, self.d_ff
        yield self.norm(f"{b}.attn_norm", f"{m}.input_layernorm", d)
        yield from linear(f"{b}.attn_qkv", f"{m}.self_attn.qkv_proj", self.q_width + 2 * self.kv_width, d)
        yield from linear(f"{b}.attn_output", f"{m}.self_attn.o_proj", d, self.q_width)
        yield self.norm(f"{b}.ffn_norm", f"{m}.post_attention_layernorm", d)
        yield from linear(f"{b}.ffn_up", f"{m}.mlp.gate_up_proj", 2 * f, d)
        yield from linear(f"{b}.ffn_down", f"{m}.mlp.down_proj", d, f)
