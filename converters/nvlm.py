"""NVLM: Qwen 2 beside InternViT-6B, as InternVL's authors save it, projector "nvlm_d" in GGUF; and `nvlm` with cross-attention.

Follows the authors' `configuration_nvlm_d.py`, `modeling_nvlm_d.py` (nvidia/NVLM-D-72B), whose config.json calls its text model "llama" and has
Qwen2ForCausalLM among its classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from pyengine.errors import InvalidModelError, UnsupportedModelError

from .contract import Entry, converts
from .decoder import Tensors
from .internvl import InternVl

DEFAULTS: dict[str, Any] = {"max_dynamic_patch": 6, "ps_version": "v1", "use_thumbnail": False, "dynamic_image_size": False}     # NVLM_D_Config


@converts("NVLM_D")
class NvlmD(InternVl):
    projector, special = "nvlm_d", {"image": "<|vision_pad|>"}

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__({**DEFAULTS, **config}, file)
        for name in ("use_thumbnail", "dynamic_image_size"):
            self.root.refuse_unless(name, True)

    def text_kind(self, text: dict[str, Any]) -> str:
        return "qwen2" if "Qwen2ForCausalLM" in (text.get("architectures") or ()) else super().text_kind(text)

    def products(self, units: int, bias: bool) -> Iterator[Entry]:
        return super().products(self.text.d_ff, False)


@converts("NVLM_X", "NVLM_H")
class NvlmAcross(NvlmD):
    """The variants with gated cross-attention, of which no weights were published: config.json as NVLM-D's, `cross_attention_layers` says before
    which of the decoder's layers such a one stands, and these are `language_model.model.cross_layers`."""

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        self.arch, self.hybrid = "nvlm", "NVLM_H" in config["architectures"]
        at = self.root.need("cross_attention_layers")
        if not at or any(type(i) is not int or not 0 <= i < self.text.n_layers for i in at) or sorted(set(at)) != at:
            raise InvalidModelError(f"{file}: 'cross_attention_layers' is {at}: rising numbers below {self.text.n_layers} are needed")
        if self.text.window is not None:
            raise UnsupportedModelError(f"{file}: a sliding window; this converter knows none beside cross-attention")
        self.places = [i + sum(j <= i for j in at) for i in range(self.text.n_layers)]          # of the decoder's own layers among all
        self.across = sorted(set(range(self.text.n_layers + len(at))) - set(self.places))

    def write_keys(self, out: GGUFWriter) -> None:
        own, self.text.n_layers = self.text.n_layers, self.text.n_layers + len(self.across)
        super().write_keys(out)
        self.text.n_layers = own
        out.add_array(f"{self.arch}.attention.cross_attention_layers", self.across)
        out.add_bool(f"{self.arch}.attention.cross_hybrid", self.hybrid)

    def tensors(self) -> Tensors:
        for entry in super().tensors():
            blk, _, rest = entry.name.partition(".")
            number, _, name = rest.partition(".")
            yield replace(entry, name=f"blk.{self.places[int(number)]}.{name}") if blk == "blk" else entry
        t, d = self.text, self.d_model
        for j, place in enumerate(self.across):
            b, m = f"blk.{place}", f"model.cross_layers.{j}"
            yield t.norm(f"{b}.attn_norm", f"{m}.input_layernorm", d)
            for name, shape in (("q_proj", (t.q_width, d)), ("k_proj", (t.kv_width, d)), ("v_proj", (t.kv_width, d)), ("o_proj", (d, t.q_width))):
                yield Entry(f"{b}.cross_attn_{name}.weight", f"{m}.cross_attn.{name}.weight", shape)
            for name in ("attn_gate", "mlp_gate"):
                yield Entry(f"{b}.cross_attn_{name}", f"{m}.{name}", (1,))
            yield t.norm(f"{b}.ffn_norm", f"{m}.post_attention_layernorm", d)
            yield from t.gated(b, f"{m}.mlp", t.d_ff)
