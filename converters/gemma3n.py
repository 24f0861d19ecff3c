"""Gemma 3n with its encoder of pictures, MobileNet-V5: `gemma3n` in GGUF, projector "gemma3nv". The encoder of sounds is left out.

Follows transformers `configuration_gemma3n.py`, `processing_gemma3n.py` and timm's `mobilenetv5.py`; keys and names as llama.cpp's
`conversion/gemma.py` has them: those of the blocks are timm's. A checkpoint says no widths of the encoder, which are its tensors'.
Axes: V encoder width, D text width.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from pyengine.errors import InvalidModelError, UnsupportedModelError

from .checkpoint import Config, tensors_beside
from .contract import FLOAT32, NO_BLOCKS, Entry, converts
from .decoder import Tensors
from .gemma3n_text import Gemma3nText
from .vision import image_settings, write_encoder_keys

# transformers' Gemma3nConfig, Gemma3nVisionConfig and the released processor where a checkpoint may be silent
DEFAULTS: dict[str, Any] = {"vision_soft_tokens_per_image": 256, "boi_token_id": 255_999, "eoi_token_id": 262_144, "image_token_id": 262_145}
VISION: dict[str, Any] = {"architecture": "mobilenetv5_300m_enc", "hidden_size": 2048, "vocab_size": 128, "vocab_offset": 262_144, "rms_norm_eps": 1e-6,
                          "model_args": None}
IMAGES: dict[str, Any] = {"do_normalize": False, "resample": 2, "size": {"height": 768, "width": 768}}
# what llama.cpp's files say of an encoder that has neither patches of one size nor layers of one width
UNREAD: dict[str, Any] = {"hidden_act": "gelu_pytorch_tanh"}
LAYERS, HEADS = 128, 8

TOWER = "vision_tower.timm_model."
PROJECTOR = {"embedding": "embedding", "hard_emb_norm": "hard_embedding_norm", "soft_emb_norm": "soft_embedding_norm",
             "input_projection": "embedding_projection"}


@converts("Gemma3nForConditionalGeneration")
class Gemma3n(Gemma3nText):
    renames = ((r"^model\.language_model\.", "model."), (r"^model\.(vision_tower|audio_tower|embed_vision|embed_audio)\.", r"\1."))
    leaves = ((r"^(audio_tower|embed_audio)\.", "the encoder of sounds is left out: the file takes texts and pictures"),)

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        r = self.root = Config(config, DEFAULTS, file)
        v = self.vision = Config(config.get("vision_config") or {}, VISION, file)
        names = {re.sub(r"^model\.", "", name): tuple(stored.shape) for name, stored in tensors_beside(file).items()}
        self.tower = {name.removeprefix(TOWER): shape for name, shape in sorted(names.items()) if name.startswith(TOWER)}
        if not self.tower:
            return
        v.refuse_unless("architecture", "mobilenetv5_300m_enc")
        v.refuse_unless("model_args", None, {})
        self.end_row = r.token("eoi_token_id") - v.count("vocab_offset")
        if not 0 <= self.end_row < v.count("vocab_size"):
            raise InvalidModelError(f"{file}: 'eoi_token_id' is {r.token('eoi_token_id')}, which is none of the encoder's "
                                    f"{v.count('vocab_size')} tokens from {v.count('vocab_offset')} on")

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        if not self.tower:
            return
        r, v = self.root, self.vision
        images = image_settings(r.file.parent, IMAGES)
        side, tokens, width = images.need("size").get("height"), r.count("vision_soft_tokens_per_image"), v.count("hidden_size")
        if type(side) is not int or images.need("size").get("width") != side:
            raise UnsupportedModelError(f"{images.file}: 'size' is {images.need('size')}; a square is needed")
        as_they_are = Config({**images.values, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}, images.defaults, images.file)
        write_encoder_keys(
            out, Config({"patch_size": max(1, side // tokens)}, UNREAD, v.file), as_they_are, projector="gemma3nv", image_size=side, d_model=width,
            d_ff=4 * width, n_layers=LAYERS, n_heads=HEADS, eps=v.need("rms_norm_eps"), d_text=self.d_model)
        out.add_uint32("clip.vision.tokens_per_image", tokens)
        out.add_uint32("clip.vision.image_end_row", self.end_row)
        out.add_uint32("clip.vision.image_token_id", r.token("image_token_id"))
        out.add_uint32("clip.vision.image_start_token_id", r.token("boi_token_id"))

    def tensors(self) -> Tensors:
        yield from super().tensors()
        for name, shape in self.tower.items():
            ours = re.sub(r"^blocks\.", "blk.", name)
            if name == "conv_stem.conv.bias":                                      # [1, C, 1, 1], as llama.cpp adds it
                n = math.prod(shape)
                yield Entry(f"v.{ours}", TOWER + name, (1, n, 1, 1), np.arange(n)[None], stored=shape, instead=FLOAT32)
            else:
                yield Entry(f"v.{ours}", TOWER + name, shape, instead=FLOAT32 if name.startswith("conv_stem") else NO_BLOCKS)
        width = self.vision.count("hidden_size")
        for name, source in PROJECTOR.items() if self.tower else ():
            shape = {"embedding": (self.vision.count("vocab_size"), width), "input_projection": (self.d_model, width)}.get(name, (width,))
            yield Entry(f"mm.{name}.weight", f"embed_vision.{source}.weight", shape)
