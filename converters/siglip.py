"""SigLIP and SigLIP 2, squares and NaFlex: `siglip` in GGUF. Follows transformers `configuration_siglip.py`, `configuration_siglip2.py`,
`image_processing_pil_siglip.py`, `image_processing_pil_siglip2.py`, `tokenization_siglip.py`, `tokenization_siglip2.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from pyengine.errors import UnsupportedModelError

from .checkpoint import Config, read_json
from .clip import SIGLIP
from .contract import converts, Entry, FLOAT32, layer_norm, linear
from .decoder import Tensors
from .tokenizer import Vocabulary
from .towers import ImageClassifier, part, processor_of, SquareTower, TextEncoder
from .vision import feed_forward, flat_patches, image_settings

# transformers' SiglipTextConfig, SiglipVisionConfig, Siglip2VisionConfig, and their image processors
TEXT: dict[str, Any] = {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                        "max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
VISION: dict[str, Any] = {**SIGLIP, "vision_use_head": True, "num_patches": 256}
IMAGES: dict[str, Any] = {"size": {"height": 224, "width": 224}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
NAFLEX: dict[str, Any] = {**IMAGES, "resample": 2, "patch_size": 16, "max_num_patches": 256}


@converts("SiglipModel")
class Siglip:
    """Both encoders and what compares them; pictures are squares."""

    arch = "siglip"
    whole = True
    renames = ()
    images, processor = IMAGES, "SiglipImageProcessor"

    def __init__(self, config: dict[str, Any], file: Path):
        root, self.folder = Config(config, {}, file), file.parent
        self.text, vision = TextEncoder(part(root, "text_config", TEXT)), part(root, "vision_config", VISION)
        vision.refuse_unless("vision_use_head", True)
        images = image_settings(file.parent, self.images)
        processor_of(images, self.processor)
        self.d_ff, self.d_out = vision.count("intermediate_size"), self.text.config.get("projection_size") or self.text.width
        self.vision = self.tower(vision, images)
        self.said = read_json(file.parent / "tokenizer_config.json")
        self.side = self._side(file.parent)

    def _side(self, folder: Path) -> str:
        """Return where texts are padded: the settings' word, the tokenizer's own, or that of its class."""
        found = self.said.get("padding_side") or (read_json(folder / "tokenizer.json").get("padding") or {}).get("direction")
        usual = "left" if str(self.said.get("tokenizer_class")).startswith(("Siglip2", "Gemma")) else "right"
        return str(found or usual).lower()

    def tower(self, vision: Config, images: Config) -> SquareTower:
        """Read the image encoder's sizes."""
        tower = SquareTower(vision, images)
        tower.on_trained_square()
        return tower

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    def change_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Add what the model's own tokenizers do with a text."""
        if vocabulary.model == "t5":
            vocabulary.lowercase, vocabulary.remove_punctuation = bool(self.said.get("do_lower_case", True)), True
            vocabulary.add_eos = True
        elif self.said.get("tokenizer_class") == "Siglip2Tokenizer":
            vocabulary.lowercase = True

    def write_keys(self, out: GGUFWriter) -> None:
        for name in ("text", "vision"):
            out.add_bool(f"{self.arch}.has_{name}_encoder", True)
        self.text.write_keys(out, self.arch)
        self.vision.write_keys(out, self.arch, self.d_ff)
        out.add_string(f"{self.arch}.text.padding", self.side)

    def unused(self) -> set[str]:
        return set()

    def patches(self) -> Iterator[Entry]:
        """List the embeddings of patches and positions."""
        return self.vision.embeddings("vision_model.embeddings", classed=False)

    def tensors(self) -> Tensors:
        d, head = self.vision.width, "vision_model.head"
        yield from self.text.tensors()
        yield from linear("t.head", "text_model.head", self.d_out, self.text.width, bias=True)
        yield from self.patches()
        yield from self.vision.layers("vision_model", self.d_ff)
        yield Entry("v.head.probe", f"{head}.probe", (1, 1, d), instead=FLOAT32)
        yield Entry("v.head.attn_qkv.weight", f"{head}.attention.in_proj_weight", (3 * d, d))
        yield Entry("v.head.attn_qkv.bias", f"{head}.attention.in_proj_bias", (3 * d,))
        yield from linear("v.head.attn_out", f"{head}.attention.out_proj", d, d, bias=True)
        yield from layer_norm("v.head.ln", f"{head}.layernorm", d)
        yield from feed_forward("v.head", f"{head}.mlp", d, self.d_ff, {"ffn_up": "fc1", "ffn_down": "fc2"})
        for name in ("logit_scale", "logit_bias"):
            yield Entry(name, name, (1,))


class FlexibleTower(SquareTower):
    """The image encoder over patches of a picture's own shape."""

    def __init__(self, vision: Config, images: Config):
        places, patch = vision.count("num_patches"), vision.count("patch_size")
        side = math.isqrt(places)
        if side**2 != places or images.count("patch_size") != patch:
            raise UnsupportedModelError(f"{vision.file}: {places} position embeddings and patches of {patch} pixels ({images.get('patch_size')} of the "
                                        "processor); a square and one size are supported")
        self.most = images.count("max_num_patches")
        pixels = side * patch
        super().__init__(Config({**vision.values, "image_size": pixels}, vision.defaults, vision.file),
                         Config({**images.values, "size": {"height": pixels, "width": pixels}}, images.defaults, images.file))

    def write_keys(self, out: GGUFWriter, arch: str, d_ff: int, act: str | None = None) -> None:
        super().write_keys(out, arch, d_ff, act)
        out.add_uint32(f"{arch}.vision.max_patches", self.most)


def flexible_patches(v: SquareTower) -> Iterator[Entry]:
    """List the embeddings of patches and positions of such an encoder."""
    at = "vision_model.embeddings"
    yield from flat_patches(at, v.width, v.patch)
    yield Entry("v.position_embd.weight", f"{at}.position_embedding.weight", ((v.trained // v.patch) ** 2, v.width), instead=FLOAT32)


@converts("Siglip2Model")
class Siglip2(Siglip):
    """The same with pictures of their own shape."""

    images, processor = NAFLEX, "Siglip2ImageProcessor"
    vision: FlexibleTower

    def tower(self, vision: Config, images: Config) -> SquareTower:
        return FlexibleTower(vision, images)

    def patches(self) -> Iterator[Entry]:
        return flexible_patches(self.vision)


class SiglipHead(ImageClassifier):
    """What stands in the place of texts and of what compares them: the head of classes. The query of vectors is left out."""

    sizes = VISION

    def unused(self) -> set[str]:
        at, parts = "vision_model.head", ("weight", "bias")
        return {f"{at}.probe", *(f"{at}.attention.in_proj_{part}" for part in parts),
                *(f"{at}.{name}.{part}" for name in ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2") for part in parts)}


@converts("SiglipForImageClassification")
class SiglipClasses(SiglipHead):
    """The image encoder over squares with a head of classes."""

    arch, images, processor = Siglip.arch, Siglip.images, Siglip.processor

    def patches(self) -> Iterator[Entry]:
        return self.vision.embeddings("vision_model.embeddings", classed=False)


@converts("Siglip2ForImageClassification")
class Siglip2Classes(SiglipHead):
    """The same with pictures of their own shape."""

    arch, images, processor = Siglip2.arch, Siglip2.images, Siglip2.processor

    def tower(self, vision: Config, images: Config) -> SquareTower:
        return FlexibleTower(vision, images)

    def patches(self) -> Iterator[Entry]:
        return flexible_patches(self.vision)
