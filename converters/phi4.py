"""Phi-4-reasoning-vision: phi3 with SigLIP 2 (NaFlex) beside it, projector "phi4" in GGUF.

Follows the authors' config and llama.cpp's `conversion/phi.py`, whose keys and names these are; the last layer, behind what is taken, is
left out. transformers has the parts (`configuration_siglip2.py`, `configuration_phi3.py`), not the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from pyengine.errors import InvalidModelError, UnsupportedModelError

from .checkpoint import Config
from .contract import FLOAT32, Entry, converts, linear
from .decoder import Tensors
from .phi3 import Phi3
from .vision import behind_layers, flat_patches, image_settings, pre_norm_layer, write_encoder_keys

# transformers' Siglip2VisionConfig, and the authors' processor, where a checkpoint may be silent
VISION: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "num_channels": 3,
                          "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_patches": 256}
IMAGES: dict[str, Any] = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 2}
LEAST, MOST = 256, 3600              # patches of a picture
TOWER = "vision_tower"


@converts("Phi4ForCausalLMV")
class Phi4Vision(Phi3):
    renames = ((r"^model\.vision_tower\.vision_tower\.vision_model\.", f"{TOWER}."), (r"^model\.mm_projector\.", "mm_projector."))

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        r = self.root = Config(config, {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}, file)
        for name, allowed in (("mm_projector_type", "mlp2x_gelu"), ("mm_vision_select_layer", -2)):
            r.refuse_unless(name, allowed)
        s = self.images = image_settings(file.parent, IMAGES)
        # the patch size stands here or there
        v = self.vision = Config(r.need("vision_config"), {**VISION, "patch_size": s.get("patch_size") or VISION["patch_size"]}, file)
        v.refuse_unless("num_channels", 3)
        self.v_model, self.v_ff, self.v_layers, self.v_heads, self.patch_size, self.n_places = (v.count(n) for n in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "num_patches"))
        self.side = math.isqrt(self.n_places)
        if self.side**2 != self.n_places or self.v_layers < 2 or s.get("patch_size") not in (None, self.patch_size):
            raise UnsupportedModelError(f"{file}: {self.n_places} position embeddings, {self.v_layers} layers and patches of {self.patch_size} pixels "
                                        f"({s.get('patch_size')} of its processor); this converter knows a square, two layers or more, and one size")
        self.least, self.most = (Config({name: s.get(name) or config.get(name) or usual}, {}, s.file).count(name)
                                 for name, usual in (("min_num_patches", LEAST), ("max_num_patches", MOST)))
        if self.least > self.most:
            raise InvalidModelError(f"{s.file}: pictures of {self.least} to {self.most} patches")

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        write_encoder_keys(
            out, self.vision, self.images, projector="phi4", image_size=self.side * self.patch_size, d_model=self.v_model, d_ff=self.v_ff,
            n_layers=self.v_layers - 1, n_heads=self.v_heads, eps=self.vision.need("layer_norm_eps"), d_text=self.d_model)
        out.add_vision_min_pixels(self.least * self.patch_size**2)
        out.add_vision_max_pixels(self.most * self.patch_size**2)

    def unused(self) -> set[str]:
        behind = {entry.source for i in range(self.v_layers - 1, self.v_layers) for entry in self.encoder_layer(i)}
        return super().unused() | behind | behind_layers(TOWER)

    def encoder_layer(self, i: int) -> Iterator[Entry]:
        """List a layer of the encoder."""
        return pre_norm_layer(f"v.blk.{i}", f"{TOWER}.encoder.layers.{i}", self.v_model, self.v_ff)

    def tensors(self) -> Tensors:
        yield from super().tensors()
        v, d, at = self.v_model, self.d_model, f"{TOWER}.embeddings"

        yield from flat_patches(at, v, self.patch_size)
        yield Entry("v.position_embd.weight", f"{at}.position_embedding.weight", (self.n_places, v), instead=FLOAT32)
        for i in range(self.v_layers - 1):
            yield from self.encoder_layer(i)
        yield from linear("mm.0", "mm_projector.0", d, v, bias=True)
        yield from linear("mm.2", "mm_projector.2", d, d, bias=True)
