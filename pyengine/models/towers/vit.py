"""ViT: pictures as rows of patches behind a class token, whose last hidden state is the vector and goes through the head of classes.

Dosovitskiy et al. 2020, arXiv:2010.11929. Follows transformers 5.23 `modeling_vit.py`, `image_processing_pil_vit.py`. Keys "vit.vision.*" and tensors "v.*" as
those of CLIP, "cls.output" and "vit.classifier.output_labels" as llama.cpp's of classifiers. The layer that ViTModel calls its pooler is left out.
Axes: n rows of a picture, D hidden, C classes.
"""

from __future__ import annotations

from typing import ClassVar

from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Tensor
from pyengine.models.architecture import CLASSES, HIDDEN, Towers, VECTORS
from pyengine.models.encoders.towers import ClassHead, labels_of, rows_of, SquareImage


class Picture(SquareImage):
    """The image encoder and its head of classes, where the file has one."""

    pooling = "cls"
    any_grid: ClassVar[bool] = False
    parts: ClassVar[int] = 1             # rows that the head reads side by side

    def __init__(self, h: Hparams, w: Weights):
        super().__init__(h, w, post_norm=True, any_grid=self.any_grid)
        self.d_out = self.width
        if "cls" in w:
            self.head = ClassHead(w["cls", "output"], self.parts * self.width)
            self.n_classes = self.head.n_classes

    def summary(self, x: Tensor) -> Tensor:
        """Build what the head reads of the last hidden states [n, D]."""
        return rows_of(x, 0, 1)                                                            # [1, D]

    def declare(self, g: Graph, rows: int) -> dict[str, Tensor]:
        """Build the graph of one run."""
        x = self.states(g)                                                                 # [n, D]
        found = {HIDDEN: x, VECTORS: rows_of(x, 0, 1)}
        return {**found, CLASSES: self.head(self.summary(x))} if self.n_classes else found  # [1, C]


class Model(Towers):
    """A ViT."""

    kind: ClassVar[type[Picture]] = Picture

    def __init__(self, h: Hparams, w: Weights):
        self.image = self.kind(h, w)
        self.labels = labels_of(h, self.image.n_classes)
