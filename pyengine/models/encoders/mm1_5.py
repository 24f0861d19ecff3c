"""MM1.5: CLIP over sub-images of a grid that fits the picture, then the whole; Honeybee's C-Abstractor brings each to a fixed number of rows.

Papers arXiv:2409.20566, section 3.4; arXiv:2312.06742, section 4 and appendix. No weights or code of MM1.5 were published. What its paper leaves
open is chosen here: features are those of CLIP's last layer, without the class token; pictures are padded with the mean colour around the middle;
sub-images have no tokens between them. Names of the projector's parts are Honeybee's, in its blocks layer norms over channels.

    picture -> the grid of sub-images that covers it with the least padding, or, where none does, loses the least resolution
    prompt: rows of the sub-images in reading order, rows of the whole

Coordinates of boxes and points are tokens of the vocabulary like any others; the graph knows none of them.
Axes: n patches of a sub-image, t rows, V hidden, C of the projector; D hidden of the decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from pyengine import ops
from pyengine.dtype import dtype
from pyengine.errors import ContextOverflowError, InvalidModelError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Tensor
from pyengine.media.views import Limits, Processed, View
from pyengine.models.architecture import Encoder, EncoderFiles
from pyengine.models.encoders.clip import MEAN, STD
from pyengine.models.encoders.llava import fitted
from pyengine.nn.convolution import adaptive_average, Bottleneck
from pyengine.nn.encoder import (
    by_table, common, cut_patches, EncoderBlock, EncoderConfig, levels, only_pictures, PIXELS, special_token, TILES,
    whole_option)
from pyengine.nn.layers import constant, LayerNorm, Linear, PatchEmbedding

if TYPE_CHECKING:
    from pyengine.media.image import Image
    from pyengine.media.video import Video

BICUBIC, EPS = 3, 1e-5               # Pillow's number; CLIP's
LEAST, MOST = 4, 9                   # sub-images: the paper's dynamic splitting
MARKER = "<image>"


@dataclass(frozen=True)
class VisionConfig(EncoderConfig):
    """Numbers of one encoder, its projector and its image processor, from the metadata."""

    side: int                        # of a sub-image in patches
    to: int                          # rows along a side
    inner: int                       # C
    depth: int                       # blocks before the average, and behind it
    norm_eps: float                  # of the projector
    tiles: tuple[int, int]           # sub-images of a picture, least and most

    @classmethod
    def read(cls, h: Hparams, v: Hparams, w: Weights) -> VisionConfig:
        """Read the keys "clip.*". Raises: InvalidModelError, UnsupportedModelError."""
        patch = v.size("vision.patch_size")
        made = cls(
            **common(h, v, w, gelu="gelu", eps=EPS, colours=(MEAN, STD), resample=BICUBIC), side=v.size("vision.image_size", most=PIXELS) // patch,
            to=v.size("vision.projector.query_side"), inner=v.size("vision.projector.embedding_length"),
            depth=v.size("vision.projector.block_count"), norm_eps=v.number("vision.projector.layer_norm_epsilon", above=0.0),
            tiles=(v.size("vision.preproc_min_tiles", LEAST), v.size("vision.preproc_max_tiles", MOST, most=TILES)))
        if not 1 <= made.to <= made.side:
            raise InvalidModelError(f"{v.key('vision')}: {made.side} patches along a side are averaged to {made.to}")
        if made.tiles[0] > made.tiles[1]:
            raise InvalidModelError(f"{v.key('vision')}: {made.tiles[0]} sub-images at least, but {made.tiles[1]} at most")
        return made


def grid(width: int, height: int, tile: int, least: int, most: int) -> tuple[int, int]:
    """Choose (lines, columns) of sub-images: arXiv:2409.20566, section 3.4; of equals the fewest, then the fewest lines."""
    grids = sorted(((y, x) for y in range(1, most + 1) for x in range(1, most // y + 1) if y * x >= least), key=lambda g: (g[0] * g[1], g[0]))

    def kept(g: tuple[int, int]) -> int:
        w, h = fitted(width, height, g[1] * tile, g[0] * tile)
        return w * h

    covering = [g for g in grids if g[0] * tile >= height and g[1] * tile >= width]
    if covering:
        return min(covering, key=lambda g: g[0] * g[1] * tile * tile - kept(g))
    return min(grids, key=lambda g: abs(width * height - kept(g)))


class Vision(Encoder):
    """Encoder, projector and processor. Nothing about a picture is kept here."""

    def __init__(self, files: EncoderFiles):
        h, v, w, token = files
        c = self.config = VisionConfig.read(h, v, w)
        self.markers = {"image": (special_token(v, "image", token, MARKER),)}
        self.levels = levels(c.mean, c.std)                                             # [3, 256]
        v_, mm, f32, n = w["v"], w["mm"], dtype("F32"), c.side**2
        self.own = constant(v_.tensor("class_embd", (c.width,)), f32)
        self.patch = PatchEmbedding(v_["patch_embd"], c.width, 3, c.patch)
        self.position = constant(v_["position_embd"].tensor("weight", (n + 1, c.width)), f32)
        self.pre = LayerNorm(v_["pre_ln"], c.width, c.eps)
        self.blocks = [EncoderBlock(v_["blk", i], c) for i in range(c.n_layers)]
        self.places = constant(mm["position_embd"].tensor("weight", (n, c.width)), f32)
        squeezed = (c.width, *[c.inner] * (c.depth - 1)), (c.inner,) * c.depth          # widths that come in
        self.stages = [[Bottleneck(mm["net", s, "blk", i], n_in, c.inner, round(n_in / 4), c.norm_eps) for i, n_in in enumerate(widths)]
                       for s, widths in enumerate(squeezed)]
        self.first, self.second = Linear(mm[0], c.inner, c.d_out), Linear(mm[2], c.d_out, c.d_out)

    def most_rows(self, n_ctx: int) -> int:
        """Return the rows of one run."""
        return self.config.to**2

    def n_rows(self, width: int, height: int) -> int:
        """Return the soft tokens of a picture of this size, all sub-images and the whole together."""
        c = self.config
        lines, columns = grid(width, height, c.side * c.patch, *c.tiles)
        return c.to**2 * (lines * columns + (lines * columns > 1))

    def declare(self, g: Graph, rows: int) -> Tensor:
        """Declare the rows [t, D] of "patches" [n, 3 * p * p]."""
        c, n = self.config, self.config.side**2
        x = ops.concat([self.own.reshape(1, c.width), self.patch(g.input("patches", (n, 3 * c.patch**2)))], axis=0)    # [n + 1, V]
        x, lo, hi = self.pre(x + self.position), np.zeros(n + 1, np.int32), np.full(n + 1, n + 1, np.int32)
        for block in self.blocks:
            x = block(x, lo, hi)
        x = ops.contiguous(ops.slice(x, axis=0, start=1, stop=n + 1)) + self.places     # [n, V]
        for block in self.stages[0]:
            x = block(x, c.side)                                                        # [n, C]
        x = adaptive_average(x, c.side, c.to)                                           # [t, C]
        for block in self.stages[1]:
            x = block(x, c.to)
        return self.second(ops.silu(self.first(x)))                                     # [t, D]

    # -- processor ------------------------------------------------------------------------------------------------------------

    def process(self, media: Image | Video, limits: Limits) -> Processed:
        """Turn a picture into sub-images and the whole.

        Option: max_tiles. Raises: RequestError for videos and other options; ContextOverflowError if its rows exceed the context.
        """
        only_pictures(media, "max_tiles")
        c, tile = self.config, self.config.side * self.config.patch
        most = whole_option(media, "max_tiles", c.tiles[1])
        lines, columns = grid(*media.size, tile, min(c.tiles[0], most), most)
        n = lines * columns + (lines * columns > 1)
        if n * c.to**2 > limits.n_ctx:
            raise ContextOverflowError(f"a picture of {media.size[0]} x {media.size[1]} pixels takes {n} sub-images of {c.to**2} positions, but the context "
                                       f"holds {limits.n_ctx}; load with a larger n_ctx, or give a smaller max_tiles")
        canvas = cache(lambda: self._padded(media.pixels, lines, columns))
        views = [self._view(lambda y=y, x=x: canvas()[y : y + tile, x : x + tile]) for y in range(0, lines * tile, tile) for x in range(0, columns * tile, tile)]
        if len(views) > 1:
            views.append(self._view(lambda: self._padded(media.pixels, 1, 1)))
        return Processed(tuple(views), media.size, fitted(*media.size, columns * tile, lines * tile))

    def _padded(self, pixels: np.ndarray, lines: int, columns: int) -> np.ndarray:
        """Fit a picture into a canvas of sub-images, the mean colour around it."""
        from pyengine.media.image import resize                                         # Pillow takes 20 ms to import

        c, tile = self.config, self.config.side * self.config.patch
        canvas = np.empty((lines * tile, columns * tile, 3), np.uint8)
        canvas[:] = (c.mean.astype(np.float64) * 255).astype(np.uint8)
        w, h = fitted(pixels.shape[1], pixels.shape[0], columns * tile, lines * tile)
        top, left = (lines * tile - h) // 2, (columns * tile - w) // 2
        canvas[top : top + h, left : left + w] = resize(pixels, h, w, c.resample)
        return canvas

    def _view(self, pixels: Callable[[], np.ndarray]) -> View:
        """Make one run of the encoder over a sub-image [tile, tile, 3]."""
        c = self.config

        def inputs() -> dict[str, np.ndarray]:
            x = cut_patches(pixels(), c.side, c.patch)
            return {"patches": by_table(self.levels, x).reshape(len(x), -1)}

        return View(inputs, {}, np.arange(c.to**2, dtype=np.int32)[None], c.to**2)
