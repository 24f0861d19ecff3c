"""LLaVA's encoders: CLIP or SigLIP, rows of one layer or of several joined, two products with a GELU between; pictures in one square
(LLaVA 1.5) or in tiles of the best of some resolutions, and once more whole (LLaVA-NeXT, Granite Vision).

Papers arXiv:2310.03744 (LLaVA 1.5), arXiv:2502.09927 (Granite Vision); LLaVA-NeXT has a report only. Follows transformers 5.23:
`modeling_llava.py`, `modeling_llava_next.py`, `modeling_clip.py`, `modeling_siglip.py`, `image_processing_pil_llava(_next).py`.

    one square    1.5: padded to a square with the mean colour, or its middle cut out -> a row for each patch
    tiles         whole picture squeezed into a square: its rows; then the lines of all tiles together without what is padding, and after
                  each line one row more, `image_newline`

A tile is a run of the encoder; each run gives image_newline as its last row, which the ends of lines take. llama.cpp's files hold the
layers up to the last one that is needed, keys "clip.vision.feature_layer" where there are several or it is said, and "mlp" as the
projector. differs from transformers 5: its LLaVA-NeXT has a head of its own and leaves out Granite's scale of logits, which
GraniteForCausalLM, transformers 4 and llama.cpp have. differs from llama.cpp: padding is black in tiles, pictures are resized by Pillow's bicubic filter, both as transformers does.
Axes: n patches of a tile, V hidden, F rows joined, H heads; D hidden of the decoder.
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
from pyengine.errors import ContextOverflowError, InvalidModelError, UnsupportedModelError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Tensor
from pyengine.media.views import Limits, Piece, Processed, View
from pyengine.models.architecture import Encoder, EncoderFiles
from pyengine.nn.encoder import (
    activation, by_table, cut_patches, EncoderAttention, EncoderFeedForward,
    head_count, known_activation, levels, mean_and_std, n_layers, only_pictures,
    resample_filter, special_token)
from pyengine.nn.layers import constant, LayerNorm, Linear, mlp_width, PatchEmbedding

if TYPE_CHECKING:
    from pyengine.media.image import Image
    from pyengine.media.video import Video

# Constants for files without the key: transformers LlavaImageProcessorPil, CLIPVisionConfig
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3                          # Pillow's number
EPS = 1e-5
MARKER = "<image>"


@dataclass(frozen=True)
class VisionConfig:
    """Numbers of one encoder, its projector and its image processor, from the metadata."""

    n_layers: int
    width: int
    d_ff: int
    n_heads: int
    d_out: int                       # of the decoder
    eps: float
    act: str                         # of ops.unary
    projector_act: str
    features: tuple[int, ...]        # layers whose inputs are joined; n_layers: what the last one gives
    side: int                        # of a tile in patches
    patch: int                       # in pixels
    grids: tuple[tuple[int, int], ...]       # resolutions (height, width) in tiles; none: one square
    crop: bool                       # the middle of a picture is one square, else it is padded
    mean: np.ndarray
    std: np.ndarray
    resample: int

    @classmethod
    def read(cls, h: Hparams, v: Hparams, w: Weights) -> VisionConfig:
        """Read the keys "clip.*". Raises: InvalidModelError, UnsupportedModelError."""
        width, count = v.size("vision.embedding_length"), n_layers(v, w)
        side, patch = v.size("vision.image_size") // v.size("vision.patch_size"), v.size("vision.patch_size")
        mean, std = mean_and_std(v, MEAN, STD)
        aspect = v.get("vision.image_aspect_ratio", "pad", str)
        if aspect not in ("pad", "crop", "anyres"):
            raise UnsupportedModelError(f"{v.arch}.vision.image_aspect_ratio is {aspect!r}; pad, crop and anyres are supported")
        return cls(
            n_layers=count, width=width, d_ff=mlp_width(w["v", "blk", 0], width), n_heads=head_count(v, width), d_out=h.size("embedding_length"),
            eps=v.number("vision.attention.layer_norm_epsilon", EPS), act=activation(v, "gelu"),
            projector_act=known_activation(v, "vision.projector.hidden_act", "gelu"), features=_features(v, count), side=side, patch=patch,
            grids=_grids(v, v.size("vision.image_size")), crop=aspect == "crop", mean=mean, std=std, resample=resample_filter(v, BICUBIC))


def _features(v: Hparams, count: int) -> tuple[int, ...]:
    """Read which layers' inputs are taken; without the key, what the last layer of the file gives."""
    found = v.get("vision.feature_layer", None, np.ndarray)
    if found is None:
        return (count,)
    layers = tuple(int(i) for i in found)
    if not layers or not all(0 <= i <= count for i in layers):
        raise InvalidModelError(f"{v.arch}.vision.feature_layer is {list(layers)}, but the file has {count} layers")
    return layers


def _grids(v: Hparams, tile: int) -> tuple[tuple[int, int], ...]:
    """Read the resolutions of tiles: pairs (height, width) in pixels, in one list."""
    found = v.get("vision.image_grid_pinpoints", None, np.ndarray)
    sides = [] if found is None else [int(n) for n in found]
    if len(sides) % 2 or any(n < tile or n % tile for n in sides):
        raise InvalidModelError(f"{v.arch}.vision.image_grid_pinpoints is {sides}: pairs of multiples of {tile} are needed")
    return tuple((sides[i] // tile, sides[i + 1] // tile) for i in range(0, len(sides), 2))


def best_grid(width: int, height: int, grids: tuple[tuple[int, int], ...], tile: int) -> tuple[int, int]:
    """Choose (lines, columns) of tiles: most pixels of the picture are kept, then fewest are wasted; of equals the first.

    Source: `select_best_resolution` in transformers' `image_processing_utils.py`.
    """
    def measure(grid: tuple[int, int]) -> tuple[int, int]:
        h, w = grid[0] * tile, grid[1] * tile
        scale = min(w / width, h / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - h * w

    return max(grids, key=measure)


def fitted(width: int, height: int, w: int, h: int) -> tuple[int, int]:
    """Compute (width, height) of a picture in a canvas of w x h pixels: `get_patch_output_size` of transformers."""
    across, down = w / width, h / height
    if across < down:
        return w, min(math.ceil(height * across), h)
    return min(math.ceil(width * down), w), h


def unpadded(width: int, height: int, columns: int, lines: int) -> tuple[int, int]:
    """Compute (columns, lines) that are cut off at each side of the rows of all tiles: `unpad_image` in `modeling_llava_next.py`."""
    if width / height > columns / lines:
        return 0, (lines - int(round(height * (columns / width), 7))) // 2
    return (columns - int(round(width * (lines / height), 7))) // 2, 0


class VisionBlock:
    """Attention of all patches of a tile to each other and a feed-forward, each after a layer norm and added to its input."""

    def __init__(self, w: Weights, c: VisionConfig):
        self.norm1, self.norm2 = LayerNorm(w["ln1"], c.width, c.eps), LayerNorm(w["ln2"], c.width, c.eps)
        self.attention = EncoderAttention(w, c.width, c.n_heads)
        self.feed_forward = EncoderFeedForward(w, c.width, c.d_ff, c.act)

    def __call__(self, x: Tensor, lo: np.ndarray, hi: np.ndarray) -> Tensor:            # [n, V]
        x = x + self.attention(self.norm1(x), lo, hi)
        return x + self.feed_forward(self.norm2(x))


class Vision(Encoder):
    """Encoder, projector and processor. Nothing about a picture is kept here."""

    def __init__(self, files: EncoderFiles):
        h, v, w, token = files
        c = self.config = VisionConfig.read(h, v, w)
        try:
            self.markers = {"image": (special_token(v, "image", token, MARKER),)}
        except InvalidModelError:                                                       # Vicuna's vocabulary has no token for pictures
            self.markers = {"image": ()}
        self.levels = levels(c.mean, c.std)                                             # [3, 256]
        v_, f32, n = w["v"], dtype("F32"), c.side**2
        own = v_.optional("class_embd", (c.width,))
        self.own = constant(own, f32) if own else None                                  # CLIP's class token, whose row is left out
        self.patch = PatchEmbedding(v_["patch_embd"], c.width, 3, c.patch)
        self.position = constant(v_["position_embd"].tensor("weight", (n + (own is not None), c.width)), f32)
        self.pre = LayerNorm(v_["pre_ln"], c.width, c.eps) if "pre_ln" in v_ else None
        self.blocks = [VisionBlock(v_["blk", i], c) for i in range(c.n_layers)]
        self.first = Linear(w["mm", 0], c.width * len(c.features), c.d_out)
        self.second = Linear(w["mm", 2], c.d_out, c.d_out)
        newline = w["model"].optional("image_newline", (c.d_out,))
        self.newline = constant(newline._replace(shape=(1, c.d_out)), f32) if newline else None
        if c.grids and self.newline is None:
            raise InvalidModelError("tensor 'model.image_newline' is missing, which pictures in tiles need")
        for part in ("weight", "bias"):                                                 # of the last layer's norm, which is behind what is taken
            v_["post_ln"].optional(part, (c.width,))

    @property
    def tile_rows(self) -> int:
        """Rows of one run: its patches, and the end of a line where there are tiles."""
        return self.config.side**2 + (self.newline is not None)

    def most_rows(self, n_ctx: int) -> int:
        """Return the rows of one run."""
        return self.tile_rows

    def n_rows(self, width: int, height: int) -> int:
        """Return the soft tokens of a picture of this size, those of all tiles that are not padding, with ends of lines."""
        c = self.config
        if not c.grids:
            return c.side**2
        lines, columns = best_grid(width, height, c.grids, c.side * c.patch)
        across, down = unpadded(width, height, columns * c.side, lines * c.side)
        return c.side**2 + (lines * c.side - 2 * down) * (columns * c.side - 2 * across + 1)

    def declare(self, g: Graph, rows: int) -> Tensor:
        """Declare the rows [tile_rows, D] of "patches" [n, 3 * p * p]."""
        c, n = self.config, self.config.side**2
        x = self.patch(g.input("patches", (n, 3 * c.patch**2)))                         # [n, V]
        if self.own is not None:
            x = ops.concat([self.own.reshape(1, c.width), x], axis=0)                   # [n + 1, V]
            n += 1
        x = x + self.position
        x = self.pre(x) if self.pre else x
        lo, hi = np.zeros(n, np.int32), np.full(n, n, np.int32)
        given = [x]
        for block in self.blocks:
            given.append(block(given[-1], lo, hi))
        taken = [given[i] for i in c.features]
        x = taken[0] if len(taken) == 1 else ops.concat(taken, axis=1)                  # [n, F]
        if self.own is not None:
            x = ops.contiguous(ops.slice(x, axis=0, start=1, stop=n))
        y = self.second(ops.unary(self.first(x), kind=c.projector_act))                 # [n, D]
        return y if self.newline is None else ops.concat([y, self.newline], axis=0)

    # -- processor ------------------------------------------------------------------------------------------------------------

    def process(self, media: Image | Video, limits: Limits) -> Processed:
        """Turn a picture into runs over squares, and lay out their rows.

        Raises: RequestError for videos and options; ContextOverflowError if its rows exceed the context.
        """
        from pyengine.media.image import resize                                         # Pillow takes 20 ms to import

        only_pictures(media)
        c, (width, height) = self.config, media.size
        tile, n = c.side * c.patch, c.side**2
        if not c.grids:
            view = self._view(lambda: self._square(media.pixels))
            return Processed((Piece(view, 0, n),), media.size, (tile, tile))
        lines, columns = best_grid(width, height, c.grids, tile)
        across, down = unpadded(width, height, columns * c.side, lines * c.side)
        taken = self.n_rows(width, height)
        if taken > limits.n_ctx:
            raise ContextOverflowError(f"a picture of {width} x {height} pixels takes {taken} positions, but the context holds {limits.n_ctx}; "
                                       "load with a larger n_ctx, or make the picture smaller")
        whole = self._view(lambda: resize(media.pixels, tile, tile, c.resample))
        canvas = cache(lambda: self._padded(media.pixels, lines, columns))
        tiles = [self._view(lambda y=y, x=x: canvas()[y : y + tile, x : x + tile])
                 for y in range(0, lines * tile, tile) for x in range(0, columns * tile, tile)]
        parts: list[Piece] = [Piece(whole, 0, n)]
        for line in range(down, lines * c.side - down):
            row, inner = divmod(line, c.side)
            for column in range(columns):
                start = max(across - column * c.side, 0)
                stop = min(columns * c.side - across - column * c.side, c.side)
                if start < stop:
                    parts.append(Piece(tiles[row * columns + column], inner * c.side + start, inner * c.side + stop))
            parts.append(Piece(whole, n, n + 1))
        return Processed(tuple(parts), media.size, fitted(width, height, columns * tile, lines * tile))

    def _view(self, pixels: Callable[[], np.ndarray]) -> View:
        """Make one run of the encoder over a square [tile, tile, 3]."""
        rows = np.arange(self.tile_rows, dtype=np.int32)[None]
        return View(lambda: {"patches": self._patches(pixels())}, {}, rows, self.tile_rows)

    def _square(self, pixels: np.ndarray) -> np.ndarray:
        """Make a picture one square: padded with the mean colour, or its middle."""
        from pyengine.media.image import resize                                         # Pillow takes 20 ms to import

        c, tile, (height, width) = self.config, self.config.side * self.config.patch, pixels.shape[:2]
        if c.crop:
            w, h = (tile, tile * height // width) if width <= height else (tile * width // height, tile)
            top, left = (h - tile) // 2, (w - tile) // 2
            return resize(pixels, h, w, c.resample)[top : top + tile, left : left + tile]
        side = max(width, height)
        square = np.empty((side, side, 3), np.uint8)
        square[:] = (c.mean.astype(np.float64) * 255).astype(np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = pixels
        return resize(square, tile, tile, c.resample)

    def _padded(self, pixels: np.ndarray, lines: int, columns: int) -> np.ndarray:
        """Fit a picture into a canvas of tiles, black around it."""
        from pyengine.media.image import resize                                         # Pillow takes 20 ms to import

        c, tile = self.config, self.config.side * self.config.patch
        canvas = np.zeros((lines * tile, columns * tile, 3), np.uint8)
        w, h = fitted(pixels.shape[1], pixels.shape[0], columns * tile, lines * tile)
        top, left = (lines * tile - h) // 2, (columns * tile - w) // 2
        canvas[top : top + h, left : left + w] = resize(pixels, h, w, c.resample)
        return canvas

    def _patches(self, pixels: np.ndarray) -> np.ndarray:
        """Cut patches: pixels uint8 [tile, tile, 3] -> F32 [n, 3 * p * p]."""
        x = cut_patches(pixels, self.config.side, self.config.patch)
        return by_table(self.levels, x).reshape(len(x), -1)
