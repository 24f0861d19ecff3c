"""ViT, with or without its head of classes: `vit` in GGUF. Follows transformers `configuration_vit.py`, `image_processing_pil_vit.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from gguf import GGUFWriter

from .checkpoint import Config
from .contract import converts, Entry, FLOAT32, layer_norm, linear
from .decoder import Tensors
from .tokenizer import Vocabulary
from .towers import class_names, processor_of, SquareTower
from .vision import feed_forward, image_settings

# transformers' ViTConfig, ViTImageProcessorPil
VIT: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu",
                       "layer_norm_eps": 1e-12, "image_size": 224, "patch_size": 16, "num_channels": 3, "qkv_bias": True}
IMAGES: dict[str, Any] = {"size": 224, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_center_crop": False}


@converts("ViTModel", "ViTForImageClassification")
class Vit:
    """The encoder, and the head where the checkpoint is a classifier."""

    arch, processor = "vit", "ViTImageProcessor"
    whole = True
    renames = ((r"^(vit|dinov2|dinov2_with_registers)\.", ""),)
    defaults, images = VIT, IMAGES
    to_square, parts = True, 1
    norms: ClassVar[tuple[str, str]] = ("layernorm_before", "layernorm_after")
    vocab_size = 0

    def __init__(self, config: dict[str, Any], file: Path):
        root = self.config = Config(config, self.defaults, file)
        images = image_settings(file.parent, self.images)
        processor_of(images, self.processor)
        self.vision = SquareTower(root, images, self.to_square)
        self.classes = config["architectures"][0].endswith("ForImageClassification")
        self.labels = class_names(config, file) if self.classes else []
        self.read()

    def read(self) -> None:
        """Read the width of feed-forwards."""
        self.d_ff, self.act = self.config.count("intermediate_size"), self.config.need("hidden_act")
        self.vision.on_trained_square()

    def change_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Take none: it reads no texts."""
        vocabulary.model = "none"

    def write_keys(self, out: GGUFWriter) -> None:
        out.add_bool(f"{self.arch}.has_vision_encoder", True)
        self.vision.write_keys(out, self.arch, self.d_ff, self.act)
        if self.labels:
            out.add_array(f"{self.arch}.classifier.output_labels", self.labels)

    def unused(self) -> set[str]:
        return {"pooler.dense.weight", "pooler.dense.bias", "embeddings.mask_token"}

    def tensors(self) -> Tensors:
        v, at = self.vision, "embeddings"
        d, p, n = v.width, v.patch, (v.trained // v.patch) ** 2 + 1
        yield Entry("v.class_embd", f"{at}.cls_token", (1, 1, d), instead=FLOAT32)
        yield Entry("v.patch_embd.weight", f"{at}.patch_embeddings.projection.weight", (d, 3, p, p), instead=FLOAT32)
        yield Entry("v.patch_embd.bias", f"{at}.patch_embeddings.projection.bias", (d,))
        yield Entry("v.position_embd.weight", f"{at}.position_embeddings", (1, n, d), instead=FLOAT32)
        for i in range(v.n_layers):
            yield from self.layer(f"v.blk.{i}", f"encoder.layer.{i}")
        yield from layer_norm("v.post_ln", "layernorm", d)
        if self.classes:
            yield from linear("cls.output", "classifier", len(self.labels), self.parts * d, bias=True)

    def layer(self, block: str, source: str) -> Iterator[Entry]:
        """List a layer."""
        d, bias = self.vision.width, bool(self.config.need("qkv_bias"))
        yield from layer_norm(f"{block}.ln1", f"{source}.{self.norms[0]}", d)
        for name, theirs in (("attn_q", "query"), ("attn_k", "key"), ("attn_v", "value")):
            yield from linear(f"{block}.{name}", f"{source}.attention.attention.{theirs}", d, d, bias)
        yield from linear(f"{block}.attn_out", f"{source}.attention.output.dense", d, d, bias=True)
        yield from layer_norm(f"{block}.ln2", f"{source}.{self.norms[1]}", d)
        yield from self.feed_forward(block, source)

    def feed_forward(self, block: str, source: str) -> Iterator[Entry]:
        """List a layer's feed-forward."""
        return feed_forward(block, source, self.vision.width, self.d_ff, {"ffn_up": "intermediate.dense", "ffn_down": "output.dense"})
