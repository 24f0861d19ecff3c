"""Qwen 2 and 2.5: the llama layout with biases on q, k and v and half-split ("neox") rope: `qwen2` in GGUF.

Follows transformers `configuration_qwen2.py`. Axes: D hidden, F feed-forward, H/K heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from .contract import converts, linear
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
        self.window = c.get("sliding_window") if c.need("use_sliding_window") else None
        kinds = c.get("layer_types")
        if kinds is None:
            kinds = ["sliding_attention" if self.window is not None and i >= c.need("max_window_layers")
                     else "full_attention" for i in range(self.n_layers)]
        self.sliding = [kind == "sliding_attention" for kind in kinds]

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_rope_dimension_count(self.head_dim)
        write_rope_scaling(out, self.rope, self.config, ("linear", "yarn"))
        write_window(out, self.window, self.sliding)

    def layer(self, i: int, b: str, m: str) -> Tensors:
        d, f, q, kv = self.d_model, self.d_ff, self.q_width, self.kv_width
        yield self.norm(f"{b}.attn_norm", f"{m}.input_layernorm", d)
        yield from linear(f"{b}.attn_q", f"{m}.self_attn.q_proj", q, d, bias=True)
        yield from linear(f"{b}.attn_k", f"{m}.self_attn.k_proj", kv, d, bias=True)
        yield from linear(f"{b}.attn_v", f"{m}.self_attn.v_proj", kv, d, bias=True)
        yield from linear(f"{b}.attn_output", f"{m}.self_attn.o_proj", d, q)
        yield self.norm(f"{b}.ffn_norm", f"{m}.post_attention_layernorm", d)
        yield from linear(f"{b}.ffn_gate", f"{m}.mlp.gate_proj", f, d)
        yield from linear(f"{b}.ffn_up", f"{m}.mlp.up_proj", f, d)
        yield from linear(f"{b}.ffn_down", f"{m}.mlp.down_proj", d, f)
