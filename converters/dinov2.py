"""DINOv2, with or without registers and its head of classes: `dinov2` in GGUF. Follows transformers `configuration_dinov2.py`,
`configuration_dinov2_with_registers.py`, `image_processing_pil_bit.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

from .contract import converts, Entry, FLOAT32
from .decoder import Tensors
from .vision import feed_forward
from .vit import Vit, VIT

# transformers' Dinov2Config, BitImageProcessorPil
DINOV2: dict[str, Any] = {**VIT, "layer_norm_eps": 1e-6, "patch_size": 14, "mlp_ratio": 4, "use_swiglu_ffn": False}
IMAGES: dict[str, Any] = {"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True, "resample": 3,
                          "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}


@converts("Dinov2Model", "Dinov2ForImageClassification")
class Dinov2(Vit):
    """The encoder, and the head where the checkpoint is a classifier."""

    arch, processor = "dinov2", "BitImageProcessor"
    defaults, images = DINOV2, IMAGES
    to_square, parts = False, 2
    norms = ("norm1", "norm2")

    def read(self) -> None:
        """Read the width of feed-forwards: two thirds of it where they are gated, rounded up to eights."""
        width, self.gated = int(self.vision.width * self.config.need("mlp_ratio")), bool(self.config.need("use_swiglu_ffn"))
        self.d_ff = (int(width * 2 / 3) + 7) // 8 * 8 if self.gated else width
        self.act = "silu" if self.gated else self.config.need("hidden_act")

    def layer(self, block: str, source: str) -> Iterator[Entry]:
        yield from super().layer(block, source)
        for i in (1, 2):
            yield Entry(f"{block}.ls{i}.weight", f"{source}.layer_scale{i}.lambda1", (self.vision.width,))

    def feed_forward(self, block: str, source: str) -> Iterator[Entry]:
        d, f, at = self.vision.width, self.d_ff, f"{source}.mlp"
        if not self.gated:
            yield from feed_forward(block, at, d, f, {"ffn_up": "fc1", "ffn_down": "fc2"})
            return
        for entry in feed_forward(block, at, d, f, {"ffn_gate": "weights_in", "ffn_up": "weights_in", "ffn_down": "weights_out"}):
            first = f if ".ffn_up." in entry.name else 0                                   # rows of the gate come first
            yield entry if ".ffn_down." in entry.name else replace(entry, stored=(2 * f, *entry.shape[1:]), first_row=first)


@converts("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification")
class Dinov2WithRegisters(Dinov2):
    """The same with registers behind the class token."""

    defaults: ClassVar[dict[str, Any]] = {**DINOV2, "patch_size": 16, "num_register_tokens": 4}

    def tensors(self) -> Tensors:
        n = self.config.count("num_register_tokens")
        yield from super().tensors()
        yield Entry("v.register_embd", "embeddings.register_tokens", (1, n, self.vision.width), instead=FLOAT32)
