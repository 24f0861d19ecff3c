"""Gemma 2: four norms a layer, sliding and global layers in turn, soft caps: `gemma2` in GGUF.

Follows transformers `configuration_gemma2.py`. The file's norm weights are 1 + w, llama.cpp's convention. llama.cpp hard-codes the pattern
of layers and the scale of scores; the file carries them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from .contract import converts
from .decoder import Decoder, Tensors, write_window
from .rope import write_rope_scaling

# transformers' Gemma2Config where a config.json may be silent
DEFAULTS: dict[str, Any] = {
    "vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "attention_bias": False, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "use_bidirectional_attention": None,
}
ROPE_BASE = 10_000.0


@converts("Gemma2ForCausalLM")
class Gemma2(Decoder):
    arch = "gemma2"
    defaults, rope_base, norm_offset = DEFAULTS, ROPE_BASE, 1.0

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        c = self.config
        c.refuse_unless("hidden_activation", "gelu_pytorch_tanh")
        c.refuse_unless("attention_bias", False)
        c.refuse_unless("use_bidirectional_attention", False, None)
        kinds = c.get("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in range(self.n_layers)]
        self.sliding = [kind == "sliding_attention" for kind in kinds]

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        c = self.config
        out.add_attention_scale(c.need("query_pre_attn_scalar") ** -0.5)
        write_rope_scaling(out, self.rope, c, ("linear",))
        write_window(out, c.count("sliding_window"), self.sliding)
        out.add_attn_logit_softcapping(c.get("attn_logit_softcapping") or 0.0)
        out.add_final_logit_softcapping(c.get("final_logit_softcapping") or 0.0)

    def layer(self, i: int, b: str, m: str) -> Tensors:
        d = self.d_model
        yield self.norm(f"{b}.attn_norm", f"{m}.input_layernorm", d)
        yield from self.attention(b, f"{m}.self_attn")
        yield self.norm(f"{b}.post_attention_norm", f"{m}.post_attention_layernorm", d)
        yield self.norm(f"{b}.ffn_norm", f"{m}.pre_feedforward_layernorm", d)
        yield from self.gated(b, f"{m}.mlp", self.d_ff)
        yield self.norm(f"{b}.post_ffw_norm", f"{m}.post_feedforward_layernorm", d)
