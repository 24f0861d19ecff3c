"""What models that compare pictures with texts, and those that class pictures, share: pictures of one size, texts of layers behind norms.

Follows transformers 5.23: `image_processing_backends.py` (`PilBackend`), `modeling_clip.py`, `modeling_siglip.py`.
Axes: m rows of all texts, p texts, n rows of a picture, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pyengine import ops
from pyengine.errors import InvalidModelError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Tensor
from pyengine.media.views import Limits, View
from pyengine.models.architecture import ImageTower, TextTower
from pyengine.models.encoders.clip import Tower, TowerConfig
from pyengine.nn.encoder import EncoderBlock, head_count, known_activation, only_pictures, whole_numbers
from pyengine.nn.layers import Embedding, LayerNorm, Linear, mlp_width
from pyengine.nn.texts import Texts

if TYPE_CHECKING:
    from pyengine.media.image import Image


@dataclass(frozen=True)
class Preparation:
    """How a picture becomes a square: resized, then cut around its middle, or what is missing there made black.

    resize  (shorter side,), the other in proportion; or (height, width)
    crop    sides of what is cut out; None: nothing is
    """

    resize: tuple[int, ...]
    crop: int | None
    resample: int

    @classmethod
    def read(cls, v: Hparams, c: TowerConfig) -> Preparation:
        """Read the keys "vision.resize" and "vision.crop"; without them, of CLIP's first files, what its processor does. Raises: InvalidModelError."""
        crop = v.get("vision.crop", None if "vision.resize" in v else c.tile, int)
        resize = whole_numbers(v, "vision.resize", (c.tile,))
        if len(resize) not in (1, 2) or min(resize) < 1 or crop not in (None, c.tile) or crop is None and resize != (c.tile,) * 2:
            raise InvalidModelError(f"{v.key('vision')}: pictures resized to {list(resize)} and cut to {crop} are no squares of {c.tile} pixels")
        return cls(resize, crop, c.resample)

    def pixels(self, image: Image) -> np.ndarray:
        """Prepare a picture: uint8 [side, side, 3]."""
        from pyengine.media.image import resize                                         # Pillow takes 20 ms to import

        width, height = image.size
        if len(self.resize) == 2:
            rows, columns = self.resize
        else:
            short, long = self.resize[0], int(self.resize[0] * max(width, height) / min(width, height))
            rows, columns = (long, short) if width <= height else (short, long)
        found = resize(image.pixels, rows, columns, self.resample)
        return found if self.crop is None else middle(found, self.crop)


def middle(pixels: np.ndarray, side: int) -> np.ndarray:
    """Cut a square out of the middle of [h, w, 3]; where it is larger, what is missing is black. As transformers' `center_crop`."""
    for axis in range(2):
        missing = side - pixels.shape[axis]
        if missing > 0:
            before = math.ceil(missing / 2)
            pixels = np.pad(pixels, [(before, missing - before) if i == axis else (0, 0) for i in range(3)])
        start = (pixels.shape[axis] - side) // 2
        pixels = pixels.take(range(start, start + side), axis)
    return pixels


class SquareImage(ImageTower):
    """An image encoder over a square of pixels; a subclass says what is made of its rows."""

    def __init__(self, v: Hparams, w: Weights, *, post_norm: bool, any_grid: bool = False):
        c = TowerConfig.read(v, w)
        self.tower = Tower(w["v"], c, post_norm=post_norm, whole=True, any_grid=any_grid)
        self.prepared, self.width, self.eps, self.n_heads = Preparation.read(v, c), c.width, c.eps, c.n_heads
        self.n = c.side**2 + self.tower.front

    def most_rows(self) -> int:
        """Return the rows of every picture."""
        return self.n

    def n_rows(self, width: int, height: int) -> int:
        """Return the rows of every picture."""
        return self.n

    def process(self, media: Image, limits: Limits) -> View:
        """Turn a picture into the inputs of a run. Raises: RequestError for a video, and options."""
        only_pictures(media)
        side = self.tower.config.side
        return View(lambda: {"patches": self.tower.patches(self.prepared.pixels(media))}, {}, np.arange(self.n, dtype=np.int32)[None], self.n,
                    (1, side, side))

    def states(self, g: Graph) -> Tensor:
        """Build what the layers give, [n, D]."""
        c = self.tower.config
        return self.tower(g.input("patches", (c.side**2, 3 * c.patch**2)))


def rows_of(x: Tensor, first: int, stop: int) -> Tensor:
    """Return some rows of a picture, [stop - first, D]."""
    return ops.contiguous(ops.slice(x, axis=0, start=first, stop=stop))


@dataclass(frozen=True)
class TextConfig:
    """Numbers of a text encoder."""

    n_layers: int
    width: int
    d_ff: int
    n_heads: int
    eps: float
    act: str                         # of ops.unary


class PreNormText(TextTower):
    """A text encoder of layers behind norms with learned positions; a subclass says what is made of its rows."""

    def __init__(self, h: Hparams, w: Weights, *, act: str, eps: float):
        """Bind the tensors "t.*" by the keys "text.*". act, eps: of files without the keys."""
        d, t = h.size("text.embedding_length"), w["t"]
        c = self.config = TextConfig(h.size("text.block_count"), d, mlp_width(t["blk", 0], d), head_count(h, d, "text.attention.head_count", step=1),
                                     h.number("text.attention.layer_norm_epsilon", eps, above=0.0), known_activation(h, "text.hidden_act", act))
        shape = t["token_embd"].shape("weight")
        if shape is None or len(shape) != 2:
            raise InvalidModelError(f"{w.place}: 't.token_embd.weight' is no matrix of the file")
        self.width, self.n_ids, self.n_ctx = d, shape[0], h.size("text.context_length")
        self.tokens, self.places = Embedding(t["token_embd"], self.n_ids, d), Embedding(t["position_embd"], self.n_ctx, d)
        self.blocks = [EncoderBlock(t["blk", i], c) for i in range(c.n_layers)]
        self.post = LayerNorm(t["post_ln"], d, c.eps)

    def states(self, texts: Texts) -> Tensor:
        """Build the last hidden states, [m, D]."""
        x = self.tokens(texts.ids) + self.places(texts.positions)                          # [m, D]
        for block in self.blocks:
            x = block.among(x, texts)
        return self.post(x)


class ClassHead:
    """A head of classes: a product, whose number of rows is that of the classes."""

    def __init__(self, w: Weights, width: int):
        shape = w.shape("weight")
        if shape is None or len(shape) != 2:
            raise InvalidModelError(f"{w.place}: 'weight' is no matrix of the file")
        self.n_classes, self.product = shape[0], Linear(w, width, shape[0])

    def __call__(self, x: Tensor) -> Tensor:                                               # [1, D] -> [1, C]
        return self.product(x)

    def of_mean(self, x: Tensor, first: np.ndarray | Tensor, end: np.ndarray | Tensor) -> Tensor:
        """Build the scores [1, C] of the mean of rows first <= i < end of x [n, D]; both are I32 [1]."""
        return self.product(ops.mean_rows(x, first, end))


def labels_of(h: Hparams, n_classes: int) -> tuple[str, ...]:
    """Read the names of a file's classes, () without them. Raises: InvalidModelError."""
    found: Sequence[str] | None = h.get("classifier.output_labels", None, list)
    if found is not None and not all(isinstance(name, str) for name in found):
        raise InvalidModelError(f"{h.key('classifier.output_labels')} is no list of texts")
    if found and len(found) != n_classes:
        raise InvalidModelError(f"{h.key('classifier.output_labels')} names {len(found)} classes, the head has {n_classes}")
    return tuple(found or ())
