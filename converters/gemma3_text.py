"""Gemma 3, text only: four norms a layer, q/k norms, sliding and global layers with rope bases of their own.

`gemma3` in GGUF. Follows transformers `configuration_gemma3.py`, `modeling_gemma3.py`. The file's norm weights are
1 + w, llama.cpp's convention. llama.cpp hard-codes the layer pattern (every 6th layer is global), the local rope base
(10,000) and the query scale (head_dim ** -0.5); the file carries them. Axes: D hidden, F feed-forward, H/K heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from pyengine.errors import UnsupportedModelError

from .contract import converts
from .decoder import Decoder, Tensors, write_window
from .rope import rope_parameters, write_rope_scaling

# transformers' Gemma3TextConfig where a config.json may be silent
DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "attention_bias": False,
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "use_bidirectional_attention": False,
}
PATTERN = 6                                        # every 6th layer is global, where neither list nor count is given
GLOBAL_BASE, LOCAL_BASE = 1_000_000.0, 10_000.0    # Gemma3TextConfig.default_theta


@converts("Gemma3ForCausalLM")
class Gemma3Text(Decoder):
    arch = "gemma3"
    defaults, rope_base, norm_offset = DEFAULTS, GLOBAL_BASE, 1.0
    both_ways: tuple[bool | None, ...] = (False, None)       # what a config may say of seeing in both directions

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        c = self.config
        c.refuse_unless("hidden_activation", "gelu_pytorch_tanh")
        c.refuse_unless("attention_bias", False)
        c.refuse_unless("use_bidirectional_attention", *self.both_ways)
        kinds = c.get("layer_types")
        if kinds is None:
            period = config.get("sliding_window_pattern", PATTERN)
            kinds = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(self.n_layers)]
        self.sliding = [kind == "sliding_attention" for kind in kinds]
        self.local_rope = rope_parameters(c, LOCAL_BASE, "sliding_attention", "rope_local_base_freq", scaled=False)
        if self.local_rope["rope_type"] != "default":
            raise UnsupportedModelError(f"{file}: rope scaling of the sliding layers has no key")

    def read_rope(self) -> dict[str, Any]:
        return rope_parameters(self.config, self.rope_base, "full_attention")

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        c = self.config
        out.add_attention_scale(c.need("query_pre_attn_scalar") ** -0.5)
        out.add_rope_freq_base_swa(self.local_rope["rope_theta"])
        write_rope_scaling(out, self.rope, c, ("linear",))      # of the global layers
        write_window(out, c.count("sliding_window"), self.sliding)
        if c.get("attn_logit_softcapping") is not None:
            out.add_attn_logit_softcapping(c.need("attn_logit_softcapping"))
        if c.get("final_logit_softcapping") is not None:
            out.add_final_logit_softcapping(c.need("final_logit_softcapping"))

    def layer(self, i: int, b: str, m: str) -> Tensors:
        d = self.d_model
        yield self.norm(f"{b}.attn_norm", f"{m}.input_layernorm", d)
        yield from self.attention(b, f"{m}.self_attn", head_norms=True)
        yield self.norm(f"{b}.post_attention_norm", f"{m}.post_attention_layernorm", d)
        yield self.norm(f"{b}.ffn_norm", f"{m}.pre_feedforward_layernorm", d)
        yield from self.gated(b, f"{m}.mlp", self.d_ff)
        yield self.norm(f"{b}.post_ffw_norm", f"{m}.post_feedforward_layernorm", d)
