"""Gemma 3n's text model: residual streams, per-layer embeddings, sparse gates, caches that later layers share. `gemma3n` in GGUF.

Follows transformers `configuration_gemma3n.py`, `modeling_gemma3n.py`; keys and names as llama.cpp's `conversion/gemma.py` has them.
Axes: D hidden, F feed-forward, N streams, P per-layer width.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from statistics import NormalDist
from typing import Any

from gguf import GGUFWriter

from pyengine.errors import InvalidModelError, UnsupportedModelError

from .checkpoint import tensors_beside
from .contract import Entry, Stack, converts, linear
from .decoder import Decoder, Tensors, write_window
from .gemma4_text import SHARED
from .rope import rope_parameters

# transformers' Gemma3nTextConfig where a config.json may be silent
DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_400, "hidden_size": 2048, "intermediate_size": 16_384, "num_hidden_layers": 35, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "attention_bias": False, "sliding_window": 512, "final_logit_softcapping": 30.0, "vocab_size_per_layer_input": 262_144,
    "hidden_size_per_layer_input": 256, "altup_active_idx": 0, "altup_correct_scale": True, "altup_num_inputs": 4, "num_kv_shared_layers": 15,
    "laurel_rank": 64,
}
PATTERN, SPARSE_LAYERS, SPARSITY = 5, 10, 0.95     # every 5th layer is global; the first layers of deep models are sparse
GLOBAL_BASE, LOCAL_BASE = 1_000_000.0, 10_000.0


@converts("Gemma3nForCausalLM")
class Gemma3nText(Decoder):
    arch = "gemma3n"
    defaults, rope_base = DEFAULTS, GLOBAL_BASE

    def __init__(self, config: dict[str, Any], file: Path):
        text = config.get("text_config") or config
        widths = text.get("intermediate_size", DEFAULTS["intermediate_size"])
        if isinstance(widths, list):
            if len(set(widths)) != 1:
                raise UnsupportedModelError(f"{file}: 'intermediate_size' differs from layer to layer, for which there is no key")
            text = {**text, "intermediate_size": widths[0]}
        super().__init__(text, file)
        c = self.config
        c.refuse_unless("hidden_activation", "gelu_pytorch_tanh")
        c.refuse_unless("attention_bias", False)
        c.refuse_unless("altup_correct_scale", True)
        kinds = c.get("layer_types") or ["sliding_attention" if (i + 1) % PATTERN else "full_attention" for i in range(self.n_layers)]
        self.sliding = [kind == "sliding_attention" for kind in kinds]
        self.n_own = self.n_layers - c.need("num_kv_shared_layers")
        if not 0 < self.n_own <= self.n_layers or set(self.sliding[self.n_own :]) - set(self.sliding[: self.n_own]):
            raise InvalidModelError(f"{file}: 'num_kv_shared_layers' is {c.need('num_kv_shared_layers')}: layers of all kinds are needed before those")
        n_sparse = SPARSE_LAYERS if self.n_layers > SPARSE_LAYERS else 0
        self.sparsity = c.get("activation_sparsity_pattern") or [SPARSITY * (i < n_sparse) for i in range(self.n_layers)]
        self.n_streams, self.rank, self.d_per_layer, self.n_table = (c.count(name) for name in (
            "altup_num_inputs", "laurel_rank", "hidden_size_per_layer_input", "vocab_size_per_layer_input"))
        if len(self.sparsity) != self.n_layers or len(kinds) != self.n_layers or self.n_table > self.vocab_size:
            raise InvalidModelError(f"{file}: 'layer_types' and 'activation_sparsity_pattern' must have an entry for each of {self.n_layers} layers, and "
                                    f"'vocab_size_per_layer_input' must not be above {self.vocab_size}")
        prefix = re.compile(r"^(model\.language_model|language_model\.model|model)\.")
        self.there = {prefix.sub("", name) for name in tensors_beside(file)}
        self.local_rope = rope_parameters(c, LOCAL_BASE, "sliding_attention", "rope_local_base_freq", scaled=False)
        if self.local_rope["rope_type"] != "default" or self.rope["rope_type"] != "default":
            raise UnsupportedModelError(f"{file}: scaling of rope has no key")

    def read_rope(self) -> dict[str, Any]:
        return rope_parameters(self.config, self.rope_base, "full_attention")

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        c = self.config
        out.add_rope_freq_base_swa(self.local_rope["rope_theta"])
        write_window(out, c.count("sliding_window"), self.sliding)
        out.add_shared_kv_layers(self.n_layers - self.n_own)
        out.add_embedding_length_per_layer_input(self.d_per_layer)
        out.add_altup_active_idx(c.need("altup_active_idx"))
        out.add_altup_num_inputs(self.n_streams)
        out.add_activation_sparsity_scale([NormalDist().inv_cdf(s) if s else -math.inf for s in self.sparsity])
        out.add_final_logit_softcapping(c.get("final_logit_softcapping") or 0.0)

    def unused(self) -> set[str]:
        names = {f"model.layers.{i}.self_attn.{name}.weight" for i in range(self.n_own, self.n_layers) for name in SHARED}
        return super().unused() | names

    def tensors(self) -> Tensors:
        yield from super().tensors()
        d, wide = self.d_model, self.n_layers * self.d_per_layer
        yield Entry("per_layer_token_embd.weight", "model.embed_tokens_per_layer.weight", (self.n_table, wide),
                    padded=(self.vocab_size, wide) if self.n_table < self.vocab_size else None)
        yield from linear("per_layer_model_proj", "model.per_layer_model_projection", wide, d)
        yield self.norm("per_layer_proj_norm", "model.per_layer_projection_norm", self.d_per_layer)
        for name, source in (("altup_proj", "altup_projections"), ("altup_unembd_proj", "altup_unembed_projections")):
            yield Stack(f"{name}.weight", tuple(Entry(name, f"model.{source}.{i}.weight", (d, d)) for i in range(self.n_streams - 1)))

    def layer(self, i: int, b: str, m: str) -> Tensors:
        d, n = self.d_model, self.n_streams
        for name, source in (("attn_norm", "input_layernorm"), ("post_attention_norm", "post_attention_layernorm"), ("ffn_norm", "pre_feedforward_layernorm"),
                             ("post_ffw_norm", "post_feedforward_layernorm"), ("post_norm", "post_per_layer_input_norm"),
                             ("laurel_post_norm", "laurel.post_laurel_norm"), ("altup_router_norm", "altup.router_norm")):
            yield self.norm(f"{b}.{name}", f"{m}.{source}", d)
        for entry in self.attention(b, f"{m}.self_attn", head_norms=True):
            if i < self.n_own or not self.there or entry.source.removeprefix("model.") in self.there:          # llama.cpp wants those that nothing reads
                yield entry
        yield from self.gated(b, f"{m}.mlp", self.d_ff)
        yield from linear(f"{b}.inp_gate", f"{m}.per_layer_input_gate", self.d_per_layer, d)
        yield from linear(f"{b}.proj", f"{m}.per_layer_projection", d, self.d_per_layer)
        yield from linear(f"{b}.laurel_l", f"{m}.laurel.linear_left", self.rank, d)
        yield from linear(f"{b}.laurel_r", f"{m}.laurel.linear_right", d, self.rank)
        for name, source, shape in (("router", "modality_router", (n, d)), ("predict_coef", "prediction_coefs", (n * n, n)),
                                    ("correct_coef", "correction_coefs", (n, n))):
            yield from linear(f"{b}.altup_{name}", f"{m}.altup.{source}", *shape)
        yield Entry(f"{b}.altup_correct_scale.weight", f"{m}.altup.correct_output_scale", (d,))
