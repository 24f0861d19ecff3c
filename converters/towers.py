"""What converters of models that compare pictures with texts, and of those that class pictures, share: keys, tensors, how pictures are prepared.

Keys "<arch>.text.*" and "<arch>.vision.*", as llama.cpp and clip.cpp name those of "clip". Axes: D width, F feed-forward width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from pyengine.errors import InvalidModelError, UnsupportedModelError

from .checkpoint import Config, malformed_is
from .contract import Entry, FLOAT32, layer_norm, linear
from .tokenizer import Vocabulary
from .vision import ACTIVATIONS, image_settings, pre_norm_layer, square, write_colours

TWO = {"0": "LABEL_0", "1": "LABEL_1"}         # transformers' PreTrainedConfig, where a config names no classes


def part(root: Config, name: str, defaults: dict[str, Any]) -> Config:
    """Return the config of a text or image encoder within a model's; "<name>_dict" of old ones counts before "<name>"."""
    with malformed_is(f"{root.file}: '{name}' is of the wrong kind"):
        old = root.get(f"{name}_dict")
        values = {**(root.get(name) or {}), **({} if old is None else {**defaults, **old})}
    return Config(values, defaults, root.file)


def processor_of(images: Config, *names: str) -> None:
    """Refuse the settings of another image processor than these. Raises: UnsupportedModelError."""
    said = images.get("image_processor_type") or images.get("feature_extractor_type")
    plain = said if said is None else str(said).removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if plain is not None and plain not in names:
        raise UnsupportedModelError(f"{images.file}: pictures go through a {said}; {' or '.join(names)} is supported")


def preparation(images: Config, to_square: bool) -> tuple[list[int], int | None]:
    """Return what pictures are resized to, [shorter side] or [height, width], and the side of the square that is cut out, None without.

    to_square: a size that is one number is that of both sides. Raises: InvalidModelError, UnsupportedModelError.
    """
    with malformed_is(f"{images.file}: 'size' or 'crop_size' is of the wrong kind"):
        size, crop = images.need("size"), images.get("crop_size")
        if isinstance(size, int):
            size = {"height": size, "width": size} if to_square else {"shortest_edge": size}
        if isinstance(size, list):
            size = {"height": size[0], "width": size[1]}
        size = {name: n for name, n in size.items() if n is not None}
        if set(size) not in ({"shortest_edge"}, {"height", "width"}):
            raise UnsupportedModelError(f"{images.file}: 'size' is {size}; a shortest_edge, or height and width are supported")
        resize = [int(size[name]) for name in ("shortest_edge", "height", "width") if name in size]
        if not images.get("do_center_crop"):
            return resize, None
        sides = {crop["height"], crop["width"]} if isinstance(crop, dict) else {*crop} if isinstance(crop, list) else {crop}
    if len(sides) != 1 or not all(type(n) is int and n > 0 for n in (*sides, *resize)):
        raise UnsupportedModelError(f"{images.file}: 'crop_size' is {crop}; squares are supported")
    return resize, sides.pop()


class SquareTower:
    """The image encoder over a square of pixels: sizes, keys, tensors of CLIP's and SigLIP's names."""

    def __init__(self, vision: Config, images: Config, to_square: bool = False):
        """Read its sizes. Raises: InvalidModelError, UnsupportedModelError."""
        self.vision, self.images = vision, images
        vision.refuse_unless("num_channels", 3)
        vision.refuse_unless("hidden_act", *ACTIVATIONS)
        self.width, self.n_layers, self.n_heads = (vision.count(n) for n in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        self.patch, self.trained = square(vision, "patch_size"), square(vision, "image_size")
        self.resize, self.crop = preparation(images, to_square)
        self.tile = self.crop or self.resize[0]
        if self.crop is None and self.resize != [self.tile] * 2:
            raise UnsupportedModelError(f"{images.file}: pictures are resized to {self.resize} and not cut to a square")

    def on_trained_square(self) -> None:
        """Refuse pictures of another size than the positions'. Raises: UnsupportedModelError."""
        if self.tile != self.trained:
            raise UnsupportedModelError(f"{self.images.file}: pictures have {self.tile} pixels a side, and the encoder's positions {self.trained}")

    def write_keys(self, out: GGUFWriter, arch: str, d_ff: int, act: str | None = None) -> None:
        """Write the keys "<arch>.vision.*"."""
        start = f"{arch}.vision"
        for name, value in (("image_size", self.tile), ("patch_size", self.patch), ("embedding_length", self.width), ("feed_forward_length", d_ff),
                            ("block_count", self.n_layers), ("attention.head_count", self.n_heads)):
            out.add_uint32(f"{start}.{name}", value)
        out.add_float32(f"{start}.attention.layer_norm_epsilon", self.vision.need("layer_norm_eps"))
        out.add_string(f"{start}.hidden_act", act or self.vision.need("hidden_act"))
        out.add_array(f"{start}.resize", self.resize)
        if self.crop is not None:
            out.add_uint32(f"{start}.crop", self.crop)
        write_colours(out, self.images, arch)

    def embeddings(self, at: str, classed: bool) -> Iterator[Entry]:
        """List the embeddings of patches and positions; classed: with a class token, and no bias of patches."""
        d, p = self.width, self.patch
        yield Entry("v.patch_embd.weight", f"{at}.patch_embedding.weight", (d, 3, p, p), instead=FLOAT32)
        if classed:
            yield Entry("v.class_embd", f"{at}.class_embedding", (d,))
        else:
            yield Entry("v.patch_embd.bias", f"{at}.patch_embedding.bias", (d,))
        yield Entry("v.position_embd.weight", f"{at}.position_embedding.weight", ((self.trained // p) ** 2 + classed, d), instead=FLOAT32)

    def layers(self, source: str, d_ff: int) -> Iterator[Entry]:
        """List the layers, and the norm behind them."""
        for i in range(self.n_layers):
            yield from pre_norm_layer(f"v.blk.{i}", f"{source}.encoder.layers.{i}", self.width, d_ff)
        yield from layer_norm("v.post_ln", f"{source}.post_layernorm", self.width)


class TextEncoder:
    """The text encoder of CLIP's and SigLIP's names: sizes, keys, tensors."""

    def __init__(self, text: Config):
        self.config = text
        text.refuse_unless("hidden_act", *ACTIVATIONS)
        self.width, self.d_ff, self.n_layers, self.n_heads, self.vocab_size, self.n_ctx = (text.count(n) for n in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings"))

    def write_keys(self, out: GGUFWriter, arch: str) -> None:
        """Write the keys "<arch>.text.*"."""
        start = f"{arch}.text"
        for name, value in (("context_length", self.n_ctx), ("embedding_length", self.width), ("feed_forward_length", self.d_ff),
                            ("block_count", self.n_layers), ("attention.head_count", self.n_heads)):
            out.add_uint32(f"{start}.{name}", value)
        out.add_float32(f"{start}.attention.layer_norm_epsilon", self.config.need("layer_norm_eps"))
        out.add_string(f"{start}.hidden_act", self.config.need("hidden_act"))

    def tensors(self) -> Iterator[Entry]:
        """List its tensors."""
        d, source = self.width, "text_model"
        yield Entry("t.token_embd.weight", f"{source}.embeddings.token_embedding.weight", (self.vocab_size, d))
        yield Entry("t.position_embd.weight", f"{source}.embeddings.position_embedding.weight", (self.n_ctx, d), instead=FLOAT32)
        for i in range(self.n_layers):
            yield from pre_norm_layer(f"t.blk.{i}", f"{source}.encoder.layers.{i}", d, self.d_ff)
        yield from layer_norm("t.post_ln", f"{source}.final_layer_norm", d)


def labels(root: Config, n: int) -> list[str]:
    """Return the names of n classes, in order, [] where the config has none of its own. Raises: InvalidModelError."""
    said = root.get("id2label")
    if said is None:
        return []
    with malformed_is(f"{root.file}: 'id2label' is of the wrong kind"):
        names = {int(i): str(name) for i, name in said.items()}
    if set(names) != set(range(n)):
        raise InvalidModelError(f"{root.file}: 'id2label' names {len(names)} classes, the head has {n}")
    return [names[i] for i in range(n)]


def class_names(config: dict[str, Any], file: Path) -> list[str]:
    """Return the names of a classifier's classes, in order. Raises: InvalidModelError."""
    said = config.get("id2label", TWO)
    return labels(Config({"id2label": said}, {}, file), len(said) if isinstance(said, dict) else 0)


class ImageClassifier(ABC):
    """An image encoder with a head of classes behind the mean of its patches, and no texts. A subclass, or a model that it stands before, reads the
    encoder (`tower`) and lists what stands before its layers (`patches`)."""

    whole = True
    renames = ()
    vocab_size = 0
    arch: str
    images: dict[str, Any]
    processor: str
    sizes: dict[str, Any]

    def __init__(self, config: dict[str, Any], file: Path):
        vision, images = part(Config(config, {}, file), "vision_config", self.sizes), image_settings(file.parent, self.images)
        processor_of(images, self.processor)
        self.vision, self.d_ff, self.labels = self.tower(vision, images), vision.count("intermediate_size"), class_names(config, file)

    def tower(self, vision: Config, images: Config) -> SquareTower:
        """Read the image encoder's sizes."""
        tower = SquareTower(vision, images)
        tower.on_trained_square()
        return tower

    def change_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Take none: it reads no texts."""
        vocabulary.model = "none"

    def write_keys(self, out: GGUFWriter) -> None:
        """Write the keys of the encoder, and the names of the classes."""
        out.add_bool(f"{self.arch}.has_vision_encoder", True)
        self.vision.write_keys(out, self.arch, self.d_ff)
        out.add_array(f"{self.arch}.classifier.output_labels", self.labels)

    def unused(self) -> set[str]:
        """Return the names of tensors that are left out: none."""
        return set()

    @abstractmethod
    def patches(self) -> Iterator[Entry]:
        """List the embeddings of patches and positions, and what else stands before the layers."""

    def tensors(self) -> Iterator[Entry]:
        """List the tensors."""
        yield from self.patches()
        yield from self.vision.layers("vision_model", self.d_ff)
        yield from linear("cls.output", "classifier", len(self.labels), self.vision.width, bias=True)
