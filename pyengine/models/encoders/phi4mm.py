"""Phi-4-multimodal's encoder of pictures: SigLIP over squares, means of 2 x 2 rows, learned separators, two products with a GELU between.

Paper arXiv:2503.01743. Follows transformers 5.23: `modeling_phi4_multimodal.py`, `image_processing_phi4_multimodal.py`.

    picture -> fitted into the grid of squares that holds it, or, beyond 36 of them, the one of the nearest shape; white on the right and below
    prompt: lines of rows through all squares, cut where the picture ends, each with a separator; another separator; the lines of the whole
    picture, squeezed into one square, each with the first separator

A square is a run of the encoder. Patches without a pixel of the picture come last and no patch attends to them; they count only in the means
at the picture's edge, at the first position. Squares that are all white are left out. Rows are taken behind the last layer but one.
transformers resizes with torchvision's bilinear filter, the authors' code with Pillow's, as here; the whole is resampled from the values of
the squares' pixels by a cubic filter that is not widened (a = -0.75), as in both. differs: the sums of that filter are made in another order.
Axes: n patches of a square, t rows and two separators, V hidden; D hidden of the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from pyengine import ops
from pyengine.dtype import dtype
from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Tensor
from pyengine.media.views import Limits, Piece, Processed, View
from pyengine.models.architecture import Encoder, EncoderFiles
from pyengine.nn.encoder import (
    buckets, by_table, common, cut_patches, EncoderBlock, EncoderConfig, grouped, levels, only_pictures, PIXELS, special_token,
    TILES, whole_option)
from pyengine.nn.layers import constant, Linear, PatchEmbedding

if TYPE_CHECKING:
    from pyengine.media.image import Image
    from pyengine.media.video import Video

HALF, BILINEAR = (0.5, 0.5, 0.5), 2  # transformers Phi4MultimodalImageProcessor: mean and deviation; Pillow's number of the filter
EPS, MOST = 1e-6, 36                 # squares of a picture
WHITE, LEAST = 255, 10               # pixels of a side of a resized picture
CUBIC = -0.75                        # of torch.nn.functional.interpolate


@dataclass(frozen=True)
class VisionConfig(EncoderConfig):
    """Numbers of one encoder, its projector and its image processor, from the metadata."""

    square: int                      # side in pixels
    most: int                        # squares of a picture

    @property
    def side(self) -> int:
        """Patches along a side of a square."""
        return self.square // self.patch

    @property
    def half(self) -> int:
        """Rows along a side of a square."""
        return self.side // 2

    @classmethod
    def read(cls, h: Hparams, v: Hparams, w: Weights) -> VisionConfig:
        """Read the keys "clip.*". Raises: InvalidModelError, UnsupportedModelError."""
        made = cls(
            **common(h, v, w, gelu="gelu_pytorch_tanh", eps=EPS, colours=(HALF, HALF), resample=BILINEAR),
            square=v.size("vision.image_size", most=PIXELS), most=v.size("vision.preproc_max_tiles", MOST, most=TILES))
        if made.square % made.patch or made.side % 2:
            raise InvalidModelError(f"{v.key('vision')}: squares of {made.square} pixels have no even number of patches of {made.patch} pixels a side")
        return made


def best_grid(width: int, height: int, square: int, most: int) -> tuple[int, int]:
    """Choose (columns, lines) of squares: those that hold the picture, or, if they are more than `most`, the nearest shape.

    Source: `find_closest_aspect_ratio` in transformers' `image_processing_phi4_multimodal.py`; of equal shapes a larger one is taken while
    the picture has more than half of its pixels.
    """
    columns, lines = math.ceil(width / square), math.ceil(height / square)
    if columns * lines <= most:
        return columns, lines
    best, least = (1, 1), math.inf
    for grid in _grids(most):
        apart = abs(width / height - grid[0] / grid[1])
        if apart < least or apart == least and width * height > 0.5 * square * square * grid[0] * grid[1]:
            best, least = grid, apart
    return best


@cache
def _grids(most: int) -> tuple[tuple[int, int], ...]:
    """List the grids of up to `most` squares by their number."""
    return tuple(sorted({(i, j) for i in range(1, most + 1) for j in range(1, most // i + 1)}, key=lambda grid: grid[0] * grid[1]))


def resampled(x: np.ndarray, n: int, axis: int) -> np.ndarray:
    """Resize an axis of float32 values to n by a cubic filter that is not widened, with edges repeated."""
    size = x.shape[axis]
    at = (np.arange(n, dtype=np.float32) + np.float32(0.5)) * np.float32(size / n) - np.float32(0.5)
    first = np.floor(at)
    t = at - first
    near, far = lambda d: ((CUBIC + 2) * d - (CUBIC + 3)) * d * d + 1, lambda d: ((CUBIC * d - 5 * CUBIC) * d + 8 * CUBIC) * d - 4 * CUBIC  # noqa: E731
    shape = tuple(n if i == axis else 1 for i in range(x.ndim))
    out = np.zeros((), np.float32)
    for offset, weight in zip(range(-1, 3), (far(t + 1), near(t), near(1 - t), far(2 - t))):
        taken = np.take(x, np.clip(first + offset, 0, size - 1).astype(np.int64), axis=axis)
        out = out + taken * weight.astype(np.float32).reshape(shape)
    return out


class Fit:
    """How a picture of width x height pixels lies in its squares: (columns, lines) of them, pixels (w, h) after the resize, and patches with
    a pixel of it along both sides. Raises: RequestError for a picture of which too little remains."""

    def __init__(self, c: VisionConfig, width: int, height: int, most: int):
        self.columns, self.lines = best_grid(width, height, c.square, most)
        canvas_w, canvas_h = self.columns * c.square, self.lines * c.square
        across, down = canvas_w / width, canvas_h / height
        self.w, self.h = (canvas_w, int(height * across)) if across < down else (int(width * down), canvas_h)
        if min(self.w, self.h) < LEAST:
            raise RequestError(f"a picture of {width} x {height} pixels: fitted into {canvas_w} x {canvas_h}, less than {LEAST} pixels remain of "
                               "its shorter side; cut it")
        self.patches_w = self.columns * c.side - (canvas_w - self.w) // c.patch
        self.patches_h = self.lines * c.side - (canvas_h - self.h) // c.patch

    @property
    def rows_w(self) -> int:
        """Rows of a line."""
        return -(-self.patches_w // 2)

    @property
    def rows_h(self) -> int:
        """Lines of rows."""
        return -(-self.patches_h // 2)


class Vision(Encoder):
    """Encoder, projector, processor and special token. Nothing about a picture is kept here."""

    def __init__(self, files: EncoderFiles):
        h, v, w, token = files
        c = self.config = VisionConfig.read(h, v, w)
        self.markers = {"image": (special_token(v, "image", token, "<|endoftext10|>"),)}
        self.rows = c.half**2 + 2                                                       # a separator, rows, the other separator
        self.order = grouped(c.side, 2)
        self.levels = levels(c.mean, c.std)                                             # [3, 256]
        v_, mm, f32 = w["v"], w["mm"], dtype("F32")
        self.patch = PatchEmbedding(v_["patch_embd"], c.width, 3, c.patch)
        self.position = constant(v_["position_embd"].tensor("weight", (c.side**2, c.width)))
        self.blocks = [EncoderBlock(v_["blk", i], c) for i in range(c.n_layers)]
        self.between, self.line_end = (constant(mm.tensor(name, (1, c.width)), f32) for name in ("glb_sep", "sub_sep"))
        self.first, self.second = Linear(mm[0], c.width, c.d_out), Linear(mm[2], c.d_out, c.d_out)

    def most_rows(self, n_ctx: int) -> int:
        """Return the rows of one run."""
        return self.rows

    def n_rows(self, width: int, height: int) -> int:
        """Return the soft tokens of a picture of this size, separators too."""
        return self._n_rows(Fit(self.config, width, height, self.config.most))

    def _n_rows(self, fit: Fit) -> int:
        half = self.config.half
        return fit.rows_h * (fit.rows_w + 1) + 1 + half * (half + 1)

    def declare(self, g: Graph, rows: int) -> Tensor:
        """Declare the rows [t + 2, D] of "patches" [n, 3 * p * p], those that patches attend to first; "order" has them group by group."""
        c, n = self.config, self.config.side**2
        lo, hi = (g.input(name, (n,), "I32") for name in ("lo", "hi"))
        x = self.patch(g.input("patches", (n, 3 * c.patch**2)))                         # [n, V]
        x = x + ops.rows(self.position, g.input("places", (n,), "I32"))
        for block in self.blocks:
            x = block(x, lo, hi)
        x = ops.rows(x, g.input("order", (n,), "I32")).reshape(c.half**2, 4 * c.width)
        a, b, d, e = (ops.slice(x, axis=1, start=i * c.width, stop=(i + 1) * c.width) for i in range(4))
        x = ops.scale(a + b + d + e, factor=0.25)                                       # [t, V]
        x = ops.concat([self.between, x, self.line_end], axis=0)                        # [t + 2, V]
        return self.second(ops.gelu(self.first(x)))                                     # [t + 2, D]

    # -- processor ------------------------------------------------------------------------------------------------------------

    def process(self, media: Image | Video, limits: Limits) -> Processed:
        """Turn a picture into runs over squares, and lay out their rows.

        Option: dynamic_hd, the most squares. Raises: RequestError for videos, other options and pictures of which too little remains;
        ContextOverflowError if its rows exceed the context.
        """
        only_pictures(media, "dynamic_hd")
        c, half = self.config, self.config.half
        fit = Fit(c, *media.size, whole_option(media, "dynamic_hd", c.most))
        taken = self._n_rows(fit)
        if taken > limits.n_ctx:
            raise ContextOverflowError(f"a picture of {media.size[0]} x {media.size[1]} pixels takes {taken} positions, but the context holds "
                                       f"{limits.n_ctx}; load with a larger n_ctx, or give a smaller dynamic_hd")
        canvas = cache(lambda: self._canvas(media.pixels, fit))
        whole = self._view(lambda: self._whole(canvas()), c.side, c.side)
        squares = {(i, j): self._square(canvas, fit, i, j) for i in range(-(-fit.rows_h // half)) for j in range(-(-fit.rows_w // half))}
        end = Piece(whole, self.rows - 1, self.rows)
        parts: list[Piece] = []
        for line in range(fit.rows_h):
            i, inner = divmod(line, half)
            for j in range(-(-fit.rows_w // half)):
                n, start = min(half, fit.rows_w - j * half), 1 + inner * half
                parts.append(Piece(squares[i, j], start, start + n))
            parts.append(end)
        parts.append(Piece(whole, 0, 1))
        for line in range(half):
            parts += [Piece(whole, 1 + line * half, 1 + (line + 1) * half), end]
        return Processed(tuple(parts), media.size, (fit.w, fit.h))

    def _canvas(self, pixels: np.ndarray, fit: Fit) -> np.ndarray:
        """Resize a picture into its squares, white around it: uint8 [lines * square, columns * square, 3]."""
        from pyengine.media.image import resize                                         # Pillow takes 20 ms to import

        canvas = np.full((fit.lines * self.config.square, fit.columns * self.config.square, 3), WHITE, np.uint8)
        canvas[: fit.h, : fit.w] = resize(pixels, fit.h, fit.w, self.config.resample)
        return canvas

    def _values(self, pixels: np.ndarray) -> np.ndarray:
        """Normalize pixels uint8 [.., n, 3]: float32 [.., 3, n]."""
        return by_table(self.levels, np.moveaxis(pixels, -1, -2))

    def _whole(self, canvas: np.ndarray) -> np.ndarray:
        """Resize the canvas to one square: float32 [n, 3, p * p]."""
        c = self.config
        x = resampled(resampled(self._values(canvas), c.square, 0), c.square, 2)         # [square, 3, square]
        return x.reshape(c.side, c.patch, 3, c.side, c.patch).transpose(0, 3, 2, 1, 4).reshape(c.side**2, 3, c.patch**2)

    def _square(self, canvas: Callable[[], np.ndarray], fit: Fit, i: int, j: int) -> View:
        """Make the run over a square of the canvas."""
        c = self.config
        y, x = i * c.square, j * c.square

        def patches() -> np.ndarray:
            return by_table(self.levels, cut_patches(canvas()[y : y + c.square, x : x + c.square], c.side, c.patch))

        return self._view(patches, min(c.side, fit.patches_h - i * c.side), min(c.side, fit.patches_w - j * c.side))

    def _view(self, patches: Callable[[], np.ndarray], lines: int, columns: int) -> View:
        """Make one run over patches float32 [n, 3, p * p], of which those of some lines and columns have a pixel of the picture."""
        side, rows = self.config.side, np.arange(self.rows, dtype=np.int32)[None]

        def inputs() -> dict[str, np.ndarray]:
            there = np.zeros((side, side), bool)
            there[:lines, :columns] = True
            taken = np.argsort(~there.reshape(-1), kind="stable")                       # those that are attended to first
            places = np.zeros((side, side), np.int32)
            places[:lines, :columns] = buckets(lines, side)[:, None] * side + buckets(columns, side)
            n = np.full(side * side, lines * columns, np.int32)
            return {"patches": patches()[taken].reshape(side * side, -1), "places": places.reshape(-1)[taken], "lo": n * 0, "hi": n,
                    "order": np.argsort(taken, kind="stable")[self.order].astype(np.int32)}

        return View(inputs, {}, rows, self.rows, (1, lines, columns))
