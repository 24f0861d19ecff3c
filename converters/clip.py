"""CLIP and MetaCLIP 2 whole, `clip` in GGUF; and CLIP's and SigLIP's encoders as other models have them beside their text: their sizes, keys and tensors.

Follows transformers `configuration_clip.py`, `configuration_metaclip_2.py`, `configuration_siglip.py`, `image_processing_pil_clip.py`; a whole one is as
clip.cpp's files. Keys and names as in llama.cpp's `convert_image_encoder_to_gguf.py`;
layers behind the last one that is taken are left out. Axes: V encoder width, F its feed-forward width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from pyengine.errors import InvalidModelError, UnsupportedModelError

from .checkpoint import Config
from .contract import converts, Entry, FLOAT32, layer_norm, linear
from .decoder import Tensors
from .towers import ImageClassifier, part, processor_of, SquareTower, TextEncoder
from .vision import behind_layers, image_settings, pre_norm_layer, write_encoder_keys

# transformers' CLIPVisionConfig and SiglipVisionConfig where a checkpoint may be silent
CLIP: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "num_channels": 3,
                        "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
SIGLIP: dict[str, Any] = {**CLIP, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
TOWER = "vision_tower"

# CLIPTextConfig and CLIPConfig, CLIPImageProcessorPil
TEXT: dict[str, Any] = {"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
                        "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49407}
IMAGES: dict[str, Any] = {"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True, "resample": 3,
                          "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
OLD_END = 2                          # of configurations that pool at the highest id


@converts("CLIPModel")
class ClipModel:
    """Both encoders and what compares them."""

    arch = "clip"
    whole = True
    renames = ()
    highest: int | None = OLD_END    # as end of texts, it stands for the highest id

    def __init__(self, config: dict[str, Any], file: Path):
        root = self.config = Config(config, {"projection_dim": 512}, file)
        images = image_settings(file.parent, IMAGES)
        processor_of(images, "CLIPImageProcessor")
        self.text = TextEncoder(part(root, "text_config", TEXT))
        vision = part(root, "vision_config", CLIP)
        self.vision, self.d_ff, self.d_out = SquareTower(vision, images), vision.count("intermediate_size"), root.count("projection_dim")
        self.vision.on_trained_square()
        self.end = self.text.config.token("eos_token_id")

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    def write_keys(self, out: GGUFWriter) -> None:
        acts = [c.need("hidden_act") for c in (self.text.config, self.vision.vision)]
        for name, value in (("has_text_encoder", True), ("has_vision_encoder", True), ("use_gelu", acts[1] == "gelu")):
            out.add_bool(f"clip.{name}", value)
        self.text.write_keys(out, self.arch)
        self.vision.write_keys(out, self.arch, self.d_ff)
        for name in ("text", "vision"):
            out.add_uint32(f"clip.{name}.projection_dim", self.d_out)
        if self.end != self.highest:
            out.add_uint32("clip.text.end_token_id", self.end)

    def unused(self) -> set[str]:
        return set()

    def tensors(self) -> Tensors:
        yield from self.text.tensors()
        yield from self.vision.embeddings("vision_model.embeddings", classed=True)
        yield from layer_norm("v.pre_ln", "vision_model.pre_layrnorm", self.vision.width)
        yield from self.vision.layers("vision_model", self.d_ff)
        yield from linear("text_projection", "text_projection", self.d_out, self.text.width)
        yield from linear("visual_projection", "visual_projection", self.d_out, self.vision.width)
        yield Entry("logit_scale", "logit_scale", (1,), stored=())


@converts("MetaClip2Model")
class MetaClip2Model(ClipModel):
    """The same with XLM-R's vocabulary, whose end token is 2 (Chuang et al. 2025, arXiv:2507.22062)."""

    highest = None


@converts("CLIPForImageClassification", "MetaClip2ForImageClassification")
class ClipClasses(ImageClassifier):
    """The image encoder with a head of classes."""

    arch, processor = "clip", "CLIPImageProcessor"
    images, sizes = IMAGES, CLIP

    def patches(self) -> Tensors:
        yield from self.vision.embeddings("vision_model.embeddings", classed=True)
        yield from layer_norm("v.pre_ln", "vision_model.pre_layrnorm", self.vision.width)


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
