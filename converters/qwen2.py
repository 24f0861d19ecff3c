"""Qwen 2 and 2.5: the llama layout with biases on q, k and v and half-split ("neox") rope: `qwen2` in GGUF.

Follows transformers `configuration_qwen2.py`. Axes: D hidden, F feed-forward, H/K heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from .contract import converts
from .decoder import Decoder, Tensors, write_window
from .rope import write_rope_scaling

# transformers' Qwen2Config where a config.json may be silent
DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False,
                            "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
ROPE_BASE = 10_000.0        # PreTrainedConfig.default_theta


@converts("Qwen2ForCausalLM")
class Qwen2(Decoder):
    arch = "qwen2"
    defaults, rope_base = DEFAULTS, ROPE_BASE

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        c = self.config
        c.refuse_unless("hidden_act", "silu")
        self.n_rot = int(self.head_dim * self.rope["partial_rotary_factor"])
        self.window = c.get("sliding_window") if c.need("use_sliding_window") else None
        kinds = c.get("layer_types")
        if kinds is None:
            kinds = ["sliding_attention" if self.window is not None and i >= c.need("max_window_layers")
                     else "full_attention" for i in range(self.n_layers)]
        self.sliding = [kind == "sliding_attention" for kind in kinds]

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_rope_dimension_count(self.n_rot)
        write_rope_scaling(out, self.rope, self.config, ("linear", "yarn"))
        write_window(out, self.window, self.sliding)

    def layer(self, i: int, b: str, m: str) -> Tensors:
        d = self.d_model
        yield self.norm(f"{b}.attn_norm", f"{m}.input_layernorm", d)
        yield from self.attention(b, f"{m}.self_attn", bias=True, out_bias=False)
        yield self.norm(f"{b}.ffn_norm", f"{m}.post_attention_layernorm", d)
        yield from self.gated(b, f"{m}.mlp", self.d_ff)
