"""SigLIP and SigLIP 2: a text encoder and an image encoder whose vectors are compared, each label for itself.

Papers arXiv:2303.15343, arXiv:2502.14786. Follows transformers 5.23: `modeling_siglip.py`, `modeling_siglip2.py`, `image_processing_pil_siglip2.py`. Keys
"siglip.text.*" and "siglip.vision.*", tensors "t.*" and "v.*", as those of CLIP; keys of our own:

    siglip.text.padding           "right" or "left": where padding makes each text context_length tokens long, which layers see like any others
    siglip.vision.max_patches     of NaFlex: a picture keeps its shape, in at most so many patches; without it pictures are squares

Vectors of texts are made of the last position, those of pictures of rows that a learned query attends to. A file of classes has no texts and no such query: the
mean of a picture's rows goes through the head "cls.output". Last hidden states of a picture come behind the last
norm; NaFlex has those of its patches only. The square grid of NaFlex's position embeddings is resized to a picture's (bilinear, smoothed where it
shrinks) by a product.
Axes: m rows of all texts, p texts, n rows of a picture, D hidden, V of vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyengine import ops
from pyengine.dtype import dtype
from pyengine.errors import InvalidModelError, RequestError, UnsupportedModelError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import DerivedRef, Weights
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Dim, Tensor
from pyengine.media.views import Limits, View
from pyengine.models.architecture import CLASSES, HIDDEN, ImageTower, Towers, VECTORS
from pyengine.models.encoders.clip import TowerConfig
from pyengine.models.encoders.towers import ClassHead, labels_of, PreNormText, SquareImage
from pyengine.nn.encoder import BlockSizes, by_table, cut_patches, EncoderAttention, EncoderBlock, EncoderFeedForward, levels, only_pictures, whole_option
from pyengine.nn.grids import largest_grid, triangles
from pyengine.nn.layers import constant, LayerNorm, Linear, PatchEmbedding
from pyengine.nn.texts import HEAD, Texts

if TYPE_CHECKING:
    from pyengine.media.image import Image

EPS = 1e-6                           # transformers' SiglipTextConfig, for files without the key


class Text(PreNormText):
    """The text encoder: every token sees all of them, padding too."""

    pooling = HEAD

    def __init__(self, h: Hparams, w: Weights):
        super().__init__(h, w, act="gelu_pytorch_tanh", eps=EPS)
        shape = w["t", "head"].shape("weight")
        if shape is None or len(shape) != 2:
            raise InvalidModelError("'t.head.weight' is no matrix of the file")
        self.d_out = shape[0]
        self.head = Linear(w["t", "head"], self.width, self.d_out)
        self.padded = h.need("text.padding", str)
        if self.padded not in ("left", "right"):
            raise UnsupportedModelError(f"{h.key('text.padding')} is {self.padded!r}; left and right are supported")

    def place(self, ids: Sequence[int]) -> int:
        """Return the last position."""
        return len(ids) - 1

    def declare(self, texts: Texts) -> dict[str, Tensor]:
        """Build the graph of one run."""
        x = self.states(texts)                                                             # [m, D]
        return {HIDDEN: x, VECTORS: self.head(texts.pooled(x, "last"))}                    # [p, V]


class PoolingHead:
    """Attention of one learned query to all rows, and a feed-forward (arXiv:1810.00825)."""

    def __init__(self, w: Weights, c: BlockSizes):
        self.query = constant(w.tensor("probe", (c.width,)), dtype("F32"))
        self.attention, self.norm = EncoderAttention(w, c.width, c.n_heads), LayerNorm(w["ln"], c.width, c.eps)
        self.feed_forward = EncoderFeedForward(w, c.width, c.d_ff, c.act)

    def __call__(self, x: Tensor, lo: np.ndarray | Tensor, hi: np.ndarray | Tensor) -> Tensor:      # [n, D] -> [1, D]
        y = self.attention(self.query.reshape(1, -1), lo, hi, across=(x, x))
        return y + self.feed_forward(self.norm(y))


class Ends:
    """What is made of the last hidden states: the vector, or scores of classes."""

    def __init__(self, w: Weights, c: BlockSizes):
        self.classes = ClassHead(w["cls", "output"], c.width) if "cls" in w else None
        self.head = PoolingHead(w["v", "head"], c) if self.classes is None else None
        self.n_classes = self.classes.n_classes if self.classes else 0

    def __call__(self, x: Tensor, first: np.ndarray | Tensor, end: np.ndarray | Tensor) -> dict[str, Tensor]:
        if self.classes is not None:
            return {HIDDEN: x, CLASSES: self.classes.of_mean(x, first, end)}               # [1, C]
        return {HIDDEN: x, VECTORS: self.head(x, first, end)}                              # [1, D]


class Square(SquareImage):
    """The image encoder over a square of pixels."""

    pooling = HEAD

    def __init__(self, h: Hparams, w: Weights):
        super().__init__(h, w, post_norm=True)
        self.d_out, self.ends = self.width, Ends(w, self.tower.config)
        self.n_classes = self.ends.n_classes

    def declare(self, g: Graph, rows: int) -> dict[str, Tensor]:
        """Build the graph of one run."""
        return self.ends(self.states(g), np.zeros(1, np.int32), np.full(1, self.n, np.int32))


class NaFlex(ImageTower):
    """The image encoder over the patches of a picture's own shape."""

    pooling = HEAD

    def __init__(self, h: Hparams, w: Weights):
        c = self.config = TowerConfig.read(h, w)
        self.most, self.width, self.d_out = h.size("vision.max_patches"), c.width, c.width
        self.levels = levels(c.mean, c.std)                                                # [3, 256]
        v = w["v"]
        self.patch = PatchEmbedding(v["patch_embd"], c.width, 3, c.patch)
        position = v["position_embd"].tensor("weight", (c.side**2, c.width))
        self.position = constant(DerivedRef(position.name, (c.width, c.side**2), (position,), lambda a: a.T))
        self.blocks = [EncoderBlock(v["blk", i], c) for i in range(c.n_layers)]
        self.post, self.ends = LayerNorm(v["post_ln"], c.width, c.eps), Ends(w, c)
        self.n_classes = self.ends.n_classes

    def most_rows(self) -> int:
        """Return the patches of the largest picture."""
        return self.most

    def n_rows(self, width: int, height: int) -> int:
        """Return the patches of a picture of this size."""
        lines, columns = largest_grid(width, height, self.config.patch, self.most)
        return lines * columns

    def process(self, media: Image, limits: Limits) -> View:
        """Turn a picture into the inputs of a run. Option: max_num_patches. Raises: RequestError for others, and for a video."""
        only_pictures(media, "max_num_patches")
        lines, columns = largest_grid(*media.size, self.config.patch, min(whole_option(media, "max_num_patches", self.most), self.most))
        n = lines * columns
        if n > self.most:
            raise RequestError(f"a picture of {media.size[0]} x {media.size[1]} pixels is too narrow: it takes {n} patches, and the model at most {self.most}")
        return View(lambda: self._inputs(media, lines, columns), {"n": n}, np.arange(n, dtype=np.int32)[None], n, (1, lines, columns))

    def _inputs(self, image: Image, lines: int, columns: int) -> dict[str, np.ndarray]:
        """Resize a picture, cut it, and weigh the position embeddings."""
        from pyengine.media.image import resize                                            # Pillow takes 20 ms to import

        c, n = self.config, lines * columns
        x = cut_patches(resize(image.pixels, lines * c.patch, columns * c.patch, c.resample), (lines, columns), c.patch)
        blend = np.einsum("ya,xb->yxab", triangles(c.side, lines), triangles(c.side, columns)).reshape(n, c.side**2)
        return {"patches": by_table(self.levels, x).reshape(n, -1), "blend": blend, "lo": np.zeros(n, np.int32), "hi": np.full(n, n, np.int32),
                "all": np.array([0, n], np.int32)}

    def declare(self, g: Graph, rows: int) -> dict[str, Tensor]:
        """Build the graph of one run; "blend" weighs all position embeddings for each patch."""
        c, n = self.config, Dim("n", rows)
        lo, hi = (g.input(name, (n,), "I32") for name in ("lo", "hi"))
        x = self.patch(g.input("patches", (n, 3 * c.patch**2)))                            # [n, D]
        x = x + ops.linear(g.input("blend", (n, c.side**2)), [self.position])[0]
        for block in self.blocks:
            x = block(x, lo, hi)
        places = g.input("all", (2,), "I32")
        first, end = (ops.slice(places, axis=0, start=i, stop=i + 1) for i in range(2))
        return self.ends(self.post(x), first, end)


class Model(Towers):
    """A SigLIP model of both kinds, or one of classes."""

    independent = True

    def __init__(self, h: Hparams, w: Weights):
        self.image = NaFlex(h, w) if "vision.max_patches" in h else Square(h, w)
        if self.image.n_classes:
            self.labels, self.scores = labels_of(h, self.image.n_classes), "softmax"
            return
        self.text = Text(h, w)
        if self.text.d_out != self.image.d_out:
            raise InvalidModelError(f"vectors of texts have {self.text.d_out} numbers, those of pictures {self.image.d_out}")
        self.numbers = [w.tensor(name, (1,)) for name in ("logit_scale", "logit_bias")]

    def scale(self) -> tuple[float, float]:
        """Return the factor and the bias of similarities."""
        if self.text is None:
            return super().scale()
        factor, bias = (float(ref.floats()[0]) for ref in self.numbers)
        return math.exp(factor), bias
