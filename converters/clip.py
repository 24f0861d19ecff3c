"""CLIP's and SigLIP's encoders as other models have them beside their text: their sizes, their keys and their tensors.

Follows transformers `configuration_clip.py`, `configuration_siglip.py`. Keys and names as in llama.cpp's `convert_image_encoder_to_gguf.py`;
layers behind the last one that is taken are left out. Axes: V encoder width, F its feed-forward width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gguf import GGUFWriter

from pyengine.errors import InvalidModelError, UnsupportedModelError

from .checkpoint import Config
from .contract import FLOAT32, Entry, layer_norm
from .vision import behind_layers, pre_norm_layer, write_encoder_keys

# transformers' CLIPVisionConfig and SiglipVisionConfig where a checkpoint may be silent
CLIP: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "num_channels": 3,
                        "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
SIGLIP: dict[str, Any] = {**CLIP, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
TOWER = "vision_tower"


class Clip:
    """The encoder, of which the inputs of some layers are taken."""

    def __init__(self, root: Config, config: dict[str, Any]):
        """Read its sizes and which of its layers are taken. Raises: InvalidModelError, UnsupportedModelError."""
        kind, file = config.get("model_type", "clip_vision_model"), root.file
        if kind not in ("clip_vision_model", "siglip_vision_model"):
            raise UnsupportedModelError(f"{file}: the encoder is {kind!r}; this converter knows clip_vision_model and siglip_vision_model")
        self.classed = kind == "clip_vision_model"                              # it has a class token
        v = self.vision = Config(config, CLIP if self.classed else SIGLIP, file)
        v.refuse_unless("num_channels", 3)
        self.width, self.d_ff, self.n_layers, self.n_heads, self.patch_size, self.image_size = (v.count(n) for n in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size"))
        root.refuse_unless("vision_feature_select_strategy", "default" if self.classed else "full")       # the class token's row is left out
        found = root.need("vision_feature_layer")
        layers = [found] if isinstance(found, int) else list(found)
        self.features = [i if i >= 0 else self.n_layers + 1 + i for i in layers]
        if not self.features or not all(0 <= i <= self.n_layers for i in self.features):
            raise InvalidModelError(f"{file}: 'vision_feature_layer' is {found} for {self.n_layers} layers")
        self.taken = max(1, *self.features)                                     # layers of the file

    def write_keys(self, out: GGUFWriter, images: Config, projector: str, d_text: int) -> None:
        """Write the keys "clip.*" that all such encoders have."""
        write_encoder_keys(
            out, self.vision, images, projector=projector, image_size=self.image_size, d_model=self.width, d_ff=self.d_ff,
            n_layers=self.taken, n_heads=self.n_heads, eps=self.vision.need("layer_norm_eps"), d_text=d_text)
        out.add_array("clip.vision.feature_layer", self.features)

    def unused(self) -> set[str]:
        """Return names of tensors behind what is taken."""
        left = {entry.source for i in range(self.taken, self.n_layers) for entry in self.layer(i)}
        return left | {f"{TOWER}.embeddings.position_ids"} | behind_layers(TOWER)

    def layer(self, i: int) -> Iterator[Entry]:
        """List a layer of the encoder."""
        yield from pre_norm_layer(f"v.blk.{i}", f"{TOWER}.encoder.layers.{i}", self.width, self.d_ff)

    def tensors(self) -> Iterator[Entry]:
        """List the encoder's tensors."""
        v, p, n, at = self.width, self.patch_size, (self.image_size // self.patch_size) ** 2, f"{TOWER}.embeddings"
        yield Entry("v.patch_embd.weight", f"{at}.patch_embedding.weight", (v, 3, p, p), instead=FLOAT32)
        if self.classed:
            yield Entry("v.class_embd", f"{at}.class_embedding", (v,))
            yield from layer_norm("v.pre_ln", f"{TOWER}.pre_layrnorm", v)
        else:
            yield Entry("v.patch_embd.bias", f"{at}.patch_embedding.bias", (v,))
        yield Entry("v.position_embd.weight", f"{at}.position_embedding.weight", (n + self.classed, v), instead=FLOAT32)
        for i in range(self.taken):
            yield from self.layer(i)
