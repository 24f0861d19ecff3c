"""InternVL 2, 2.5 and 3: InternViT over tiles, groups of rows joined by a pixel shuffle, a norm and two products with a GELU between.

Papers arXiv:2404.16821, arXiv:2412.05271, arXiv:2504.10479. Follows transformers 5.23: `modeling_internvl.py`, `processing_internvl.py`,
`image_processing_pil_got_ocr2.py`, `video_processing_internvl.py`; the authors' remote code computes the same.

    picture -> resized to the grid of 1 to 12 tiles with the nearest shape -> tiles, and all of it in one more unless there is one
    prompt: <img> rows of the tiles in reading order, rows of the whole </img>
    video: frames, each squeezed into one tile: Frame1: <img> rows </img>, a line each

A tile is a run of the encoder. The class token stands first and its row is left out; the rest is computed group by group, so that the shuffle
is a reshape. Large encoders (6B) have RMS norms, and norms of queries and keys over all heads: the file's tensors say so.
differs: frames are resized by Pillow, as pictures are; transformers has only a torchvision processor for videos. llama.cpp puts the class token last but its position first, so that each patch gets its neighbour's position.
Axes: n patches of a tile, t rows, V hidden; D hidden of the decoder.
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
from pyengine.files.weights import DerivedRef, Weights
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Tensor
from pyengine.media.views import Limits, Processed, View
from pyengine.models.architecture import Encoder, EncoderFiles
from pyengine.nn.encoder import (
    by_table, common, cut_patches, EncoderAttention, EncoderConfig, EncoderFeedForward, grouped, levels, only_pictures, PIXELS,
    special_token, squeezed, TILES, token_or_text, whole_option)
from pyengine.nn.layers import constant, LayerNorm, Linear, mlp_width, PatchEmbedding, RMSNorm

if TYPE_CHECKING:
    from pyengine.media.image import Image
    from pyengine.media.video import Video

# Constants for files without the key: transformers InternVLVisionConfig, GotOcr2ImageProcessorPil with the settings of published checkpoints
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BICUBIC = 3                          # Pillow's number
EPS, QK_EPS, PROJECTOR_EPS = 1e-6, 1e-6, 1e-5
LEAST, MOST = 1, 12                  # tiles
FRAMES = 8                           # taken of a video file: the authors' examples, and transformers'
START, MARKER, END, VIDEO_MARKER = "<img>", "<IMG_CONTEXT>", "</img>", "<video>"


@dataclass(frozen=True)
class VisionConfig(EncoderConfig):
    """Numbers of one encoder, its projector and its image processor, from the metadata."""

    tile: int                        # side in pixels
    group: int                       # side of a group in patches
    tiles: tuple[int, int]           # of a picture, least and most

    @property
    def side(self) -> int:
        """Patches along a side of a tile."""
        return self.tile // self.patch

    @classmethod
    def read(cls, h: Hparams, v: Hparams, w: Weights) -> VisionConfig:
        """Read the keys "clip.*". Raises: InvalidModelError, UnsupportedModelError."""
        made = cls(
            **common(h, v, w, gelu="gelu", eps=EPS, colours=(MEAN, STD), resample=BICUBIC), tile=v.size("vision.image_size", most=PIXELS),
            group=v.size("vision.projector.scale_factor", 2),
            tiles=(v.size("vision.preproc_min_tiles", LEAST), v.size("vision.preproc_max_tiles", MOST, most=TILES)))
        if made.side % made.group or not made.side:
            raise InvalidModelError(f"{v.key('vision')}: {made.side} patches along a side are no groups of {made.group}")
        if made.tiles[0] > made.tiles[1]:
            raise InvalidModelError(f"{v.key('vision')}: {made.tiles[0]} tiles at least, but {made.tiles[1]} at most")
        return made


def grid(width: int, height: int, tile: int, least: int, most: int) -> tuple[int, int]:
    """Choose (lines, columns) of tiles: the nearest shape; of equals the larger one while its area is below twice the picture's.

    Source: `get_optimal_tiled_canvas` in transformers' `image_processing_pil_got_ocr2.py`.
    """
    grids = sorted(((w, h) for w in range(1, most + 1) for h in range(1, most + 1) if least <= w * h <= most), key=lambda g: g[0] * g[1])
    best, nearest = (1, 1), float("inf")
    for w, h in grids:
        off = abs(width / height - w / h)
        if off < nearest or off == nearest and width * height > 0.5 * tile * tile * w * h:
            best, nearest = (w, h), off
    return best[1], best[0]


def middles(total: int, n: int) -> list[int]:
    """Choose n numbers of `total` frames: those in the middles of equal parts; all where n is the total.

    Source: `sample_frames` in transformers' `video_processing_internvl.py`, whose numbers are float32.
    """
    return [int(np.float32(total / n / 2 + i * (total / n))) for i in range(n)]


def norm_of(w: Weights, c: VisionConfig) -> LayerNorm | RMSNorm:
    """Bind a layer norm, or an RMS norm where the file has no bias for it."""
    return LayerNorm(w, c.width, c.eps) if w.shape("bias") else RMSNorm(w, c.width, c.eps)


class VisionBlock:
    """Attention of all patches of a tile and a feed-forward, each behind a norm, scaled by channel, and added to its input."""

    def __init__(self, w: Weights, c: VisionConfig):
        f32 = dtype("F32")
        self.norm1, self.norm2 = norm_of(w["ln1"], c), norm_of(w["ln2"], c)
        self.attention = EncoderAttention(w, c.width, c.n_heads, *(
            RMSNorm(w[name], c.width, QK_EPS) if name in w else None for name in ("attn_q_norm", "attn_k_norm")))
        self.feed_forward = EncoderFeedForward(w, c.width, c.d_ff, c.act)
        self.scale1, self.scale2 = (constant(w[name].tensor("weight", (c.width,)), f32) for name in ("ls1", "ls2"))

    def __call__(self, x: Tensor, lo: np.ndarray, hi: np.ndarray) -> Tensor:            # [n + 1, V]
        x = x + self.attention(self.norm1(x), lo, hi) * self.scale1
        return x + self.feed_forward(self.norm2(x)) * self.scale2


class Vision(Encoder):
    """Encoder, projector, processor and special tokens. Nothing about a picture is kept here."""

    films = True                     # takes videos

    def __init__(self, files: EncoderFiles):
        h, v, w, token = files
        c = self.config = VisionConfig.read(h, v, w)
        self.bind_tokens(v, token)
        self.rows = (c.side // c.group) ** 2
        self.order = grouped(c.side, c.group)
        self.levels = levels(c.mean, c.std)                                             # [3, 256]
        v_, mm, n, wide = w["v"], w["mm", "model", "mlp"], c.side**2, c.width * c.group**2
        self.own = constant(v_.tensor("class_embd", (c.width,)), dtype("F32"))
        self.patch = PatchEmbedding(v_["patch_embd"], c.width, 3, c.patch)
        position, rows = v_["position_embd"].tensor("weight", (n + 1, c.width)), np.concatenate([[0], 1 + self.order])
        self.position = constant(DerivedRef(position.name, position.shape, (position,), lambda a: a[rows]))
        self.blocks = [VisionBlock(v_["blk", i], c) for i in range(c.n_layers)]
        self.norm = LayerNorm(v_["post_ln"], c.width, c.eps) if "post_ln" in v_ else None
        self.projector_norm = LayerNorm(mm[0], wide, PROJECTOR_EPS)
        units = mlp_width(mm, wide, ("1",))
        self.first, self.second = Linear(mm[1], wide, units), Linear(mm[3], units, c.d_out)

    def bind_tokens(self, v: Hparams, token: Callable[[str], int]) -> None:
        """Find the ids of what stands around a picture, and of what a chat template writes for it."""
        video = token_or_text(token, VIDEO_MARKER)
        self.markers = {"image": (special_token(v, "image", token, MARKER),), "video": () if isinstance(video, str) else (video,)}
        self.start, self.end = special_token(v, "image_start", token, START), special_token(v, "image_end", token, END)

    def positions(self, n: int) -> int:
        """Count the positions of a prompt that a picture of n tiles takes."""
        return n * self.rows

    def around(self, views: list[View]) -> tuple[str | int | View, ...]:
        """Put what stands in a prompt around the tiles of a picture, the whole last."""
        return self.start, *views, self.end

    def most_rows(self, n_ctx: int) -> int:
        """Return the rows of one run."""
        return self.rows

    def n_rows(self, width: int, height: int) -> int:
        """Return the soft tokens of a picture of this size, all tiles and the whole together."""
        lines, columns = grid(width, height, self.config.tile, *self.config.tiles)
        return self.rows * (lines * columns + (lines * columns > 1))

    def declare(self, g: Graph, rows: int) -> Tensor:
        """Declare the rows [t, D] of "patches" [n, 3 * p * p]."""
        c, n = self.config, self.config.side**2
        lo, hi = np.zeros(n + 1, np.int32), np.full(n + 1, n + 1, np.int32)
        x = self.patch(g.input("patches", (n, 3 * c.patch**2)))                         # [n, V]
        x = ops.concat([self.own.reshape(1, c.width), x], axis=0) + self.position       # [n + 1, V]
        for block in self.blocks:
            x = block(x, lo, hi)
        x = self.norm(x) if self.norm else x
        x = ops.contiguous(ops.slice(x, axis=0, start=1, stop=n + 1)).reshape(self.rows, c.width * c.group**2)
        return self.second(ops.gelu(self.first(self.projector_norm(x))))                # [t, D]

    # -- processor ------------------------------------------------------------------------------------------------------------

    def process(self, media: Image | Video, limits: Limits) -> Processed:
        """Turn a picture into tiles and the whole between start and end, or frames of a video into a tile each.

        Options: max_tiles, of a picture; num_frames, to take of a video: of a file 8 or all, of a list all.
        Raises: RequestError for other options; ContextOverflowError if its rows exceed the context.
        """
        from pyengine.media.image import resize                                         # Pillow takes 20 ms to import
        from pyengine.media.video import Video

        if self.films and isinstance(media, Video):
            return self._film(media, limits)
        only_pictures(media, "max_tiles")
        c, tile = self.config, self.config.tile
        most = whole_option(media, "max_tiles", c.tiles[1])
        lines, columns = grid(*media.size, tile, min(c.tiles[0], most), most)
        n = lines * columns + (lines * columns > 1)
        if self.positions(n) > limits.n_ctx:
            raise ContextOverflowError(f"a picture of {media.size[0]} x {media.size[1]} pixels takes {n} tiles, {self.positions(n)} positions, but the "
                                       f"context holds {limits.n_ctx}; load with a larger n_ctx, or give a smaller max_tiles")
        canvas = cache(lambda: resize(media.pixels, lines * tile, columns * tile, c.resample))
        views = [self._view(lambda y=y, x=x: canvas()[y : y + tile, x : x + tile]) for y in range(0, lines * tile, tile) for x in range(0, columns * tile, tile)]
        if len(views) > 1:
            views.append(self._view(lambda: resize(media.pixels, tile, tile, c.resample)))
        return Processed(self.around(views), media.size, (columns * tile, lines * tile))

    def _film(self, video: Video, limits: Limits) -> Processed:
        """Take frames from the middles of equal parts of a video, each as one tile."""
        from pyengine.media.image import known_options                                  # Pillow takes 20 ms to import

        known_options(video.options, "num_frames")
        total, c = len(video), self.config
        whole = "num_frames" in video.options or isinstance(video.frames, tuple)
        numbers = middles(total, whole_option(video, "num_frames", total) if whole else min(FRAMES, total))
        if self.positions(len(numbers)) > limits.n_ctx:
            raise ContextOverflowError(f"a video of {len(numbers)} frames takes {self.positions(len(numbers))} positions, but the context holds "
                                       f"{limits.n_ctx}; load with a larger n_ctx, or give a smaller num_frames")
        frames = squeezed(video, numbers, ((c.tile, c.tile),), c.resample)
        views = [self._view(lambda i=i: frames()[i]) for i in range(len(numbers))]
        parts = (part for i, view in enumerate(views) for part in (f"{chr(10) * (i > 0)}Frame{i + 1}: ", *self.around([view])))
        return Processed(tuple(parts), video.size, (c.tile, c.tile))

    def _view(self, pixels: Callable[[], np.ndarray]) -> View:
        """Make one run of the encoder over a tile [tile, tile, 3]."""
        rows = np.arange(self.rows, dtype=np.int32)[None]
        return View(lambda: {"patches": self._patches(pixels())}, {}, rows, self.rows)

    def _patches(self, pixels: np.ndarray) -> np.ndarray:
        """Cut patches: pixels uint8 [tile, tile, 3] -> F32 [n, 3 * p * p], group by group."""
        x = cut_patches(pixels, self.config.side, self.config.patch)[self.order]
        return by_table(self.levels, x).reshape(len(x), -1)
