"""Molmo: CLIP over crops that overlap, two layers joined, each 2 x 2 patches pooled by attention, and a gated feed-forward.

Paper arXiv:2409.17146. Follows the authors' `modeling_molmo.py`, `image_preprocessing_molmo.py` (allenai/Molmo-7B-D-0924); transformers has no such
model.

    picture -> the whole, and crops of a grid whose windows lie side by side: a crop is its window and a margin on each side
    prompt: <im_start> lines of the whole <im_end> <im_start> lines of all windows and of the outer margins <im_end>, <im_col> ends each line

A crop is a run of the encoder. Patches lie group by group, so that a group's keys are an interval. What is added to a patch says whether it is
padding, in part or as a whole. A row is added to the embedding of <im_patch>, which the file has as "mm.token_embd". Pictures are resized as
floats, with torch's antialiased bilinear filter.
As in the authors' code, padding is told to the run before the one that it belongs to: the whole gets that of the first crop, and all patches of
the last crop count as padding in part.
differs: a picture that is so long that nothing of its short side would be left keeps one pixel of it.
Axes: n patches of a crop, t groups, V hidden, F rows joined; D hidden of the decoder.
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
from pyengine.media.views import Limits, Piece, Processed, View
from pyengine.models.architecture import Encoder, EncoderFiles
from pyengine.models.encoders.clip import MEAN, STD
from pyengine.nn.encoder import (
    common, cut_patches, EncoderBlock, EncoderConfig, grouped, n_layers, only_pictures, PIXELS, special_token, TILES,
    whole_numbers, whole_option)
from pyengine.nn.layers import constant, LayerNorm, Linear, mlp_width, PatchEmbedding

if TYPE_CHECKING:
    from pyengine.media.image import Image
    from pyengine.media.video import Video

BILINEAR = 2                         # Pillow's number
EPS = 1e-5                           # image_norm_eps
CROPS, MARGINS, GROUP = 12, (4, 4), 2      # preprocessor_config.json of Molmo-7B-D-0924; image_pooling_h, image_pooling_w
TOKENS = {"image": "<|image|>", "image_start": "<im_start>", "image_end": "<im_end>", "image_row": "<im_col>"}


@dataclass(frozen=True)
class VisionConfig(EncoderConfig):
    """Numbers of one encoder, its projector and its image processor, from the metadata."""

    features: tuple[int, ...]        # layers whose inputs are joined; n_layers: what the last one gives
    side: int                        # of a crop in patches
    group: int                       # side of what is pooled, in patches
    margins: tuple[int, ...]         # patches of a crop before and behind its window
    crops: int                       # at most, beside the whole

    @property
    def window(self) -> int:
        """Patches along a crop that no margin has."""
        return self.side - sum(self.margins)

    @classmethod
    def read(cls, h: Hparams, v: Hparams, w: Weights) -> VisionConfig:
        """Read the keys "clip.*". Raises: InvalidModelError, UnsupportedModelError."""
        count, patch = n_layers(v, w), v.size("vision.patch_size")
        margins = whole_numbers(v, "vision.preproc_overlap_margins", MARGINS)
        made = cls(
            **common(h, v, w, gelu="gelu", eps=EPS, colours=(MEAN, STD), resample=BILINEAR),
            features=whole_numbers(v, "vision.feature_layer", (count,)), side=v.size("vision.image_size", most=PIXELS) // patch,
            group=v.size("vision.projector.scale_factor", GROUP), margins=margins, crops=v.size("vision.preproc_max_tiles", CROPS, most=TILES))
        if not made.features or max(made.features) > count:
            raise InvalidModelError(f"{v.key('vision.feature_layer')} is {list(made.features)}, but the file has {count} layers")
        if len(margins) != 2 or any(n % made.group for n in (made.side, *margins)) or made.window < 1:
            raise InvalidModelError(f"{v.key('vision')}: {made.side} patches with margins of {list(margins)} are no windows of groups of {made.group}")
        return made


def grid(width: int, height: int, window: int, margin: int, most: int) -> tuple[int, int]:
    """Choose (lines, columns) of windows: those that enlarge the picture least, or, where all make it smaller, the least.

    window, margin: pixels. Source: `select_tiling` in `image_preprocessing_molmo.py`, in float32; of equals the fewest, then the fewest lines.
    """
    grids = sorted(((y, x) for y in range(1, most + 1) for x in range(1, most // y + 1)), key=lambda g: (g[0] * g[1], g[0]))
    with np.errstate(divide="ignore"):                                                  # a picture that is all margin
        scales = (np.array(grids, np.float32) * np.float32(window) / np.array([height - margin, width - margin], np.float32)).min(axis=1)
    at = scales.argmax() if (scales < 1).all() else np.where(scales < 1, np.inf, scales).argmin()
    return grids[at]


def fitted(width: int, height: int, w: int, h: int) -> tuple[int, int]:
    """Compute (width, height) of a picture in a canvas of w x h pixels, in float32: `resize_and_pad`."""
    scale = min(np.float32(w) / np.float32(width), np.float32(h) / np.float32(height))
    return max(1, int(np.float32(width) * scale)), max(1, int(np.float32(height) * scale))


class Vision(Encoder):
    """Encoder, projector, processor and special tokens. Nothing about a picture is kept here."""

    points = True

    def __init__(self, files: EncoderFiles):
        h, v, w, token = files
        c = self.config = VisionConfig.read(h, v, w)
        marker, self.start, self.end, self.row = (special_token(v, name, token, text) for name, text in TOKENS.items())
        self.markers = {"image": (marker,)}
        self.side = c.side // c.group                                                   # groups along a crop
        self.order = grouped(c.side, c.group)
        v_, mm, f32, n, wide = w["v"], w["mm"], dtype("F32"), c.side**2, c.width * len(c.features)
        self.own = constant(v_.tensor("class_embd", (c.width,)), f32)
        self.patch = PatchEmbedding(v_["patch_embd"], c.width, 3, c.patch)
        position, rows = v_["position_embd"].tensor("weight", (n + 1, c.width)), np.concatenate([[0], 1 + self.order])
        self.position = constant(DerivedRef(position.name, position.shape, (position,), lambda a: a[rows]))
        self.pre = LayerNorm(v_["pre_ln"], c.width, c.eps)
        self.blocks = [EncoderBlock(v_["blk", i], c) for i in range(c.n_layers)]
        padding = mm.tensor("pad_embd", (2, wide))
        self.padding = constant(DerivedRef(padding.name, (3, wide), (padding,), lambda a: np.pad(a, ((1, 0), (0, 0)))))       # none, all, in part
        self.q, self.k, self.v = (Linear(mm[f"attn_{name}"], wide, c.width) for name in "qkv")
        self.out = Linear(mm["attn_out"], c.width, c.width)
        units = mlp_width(mm, c.width, ("ffn_gate", "ffn_up"))
        self.gate, self.up, self.down = Linear(mm["ffn_gate"], c.width, units), Linear(mm["ffn_up"], c.width, units), Linear(mm["ffn_down"], units, c.d_out)
        self.token = constant(mm.tensor("token_embd", (c.d_out,)), f32)

    def most_rows(self, n_ctx: int) -> int:
        """Return the rows of one run."""
        return self.side**2

    def n_rows(self, width: int, height: int) -> int:
        """Return the soft tokens of a picture of this size, of the whole and of its windows."""
        down, across = self._lines(*self._grid(width, height, self.config.crops))
        return self.side**2 + down * across

    def declare(self, g: Graph, rows: int) -> Tensor:
        """Declare the rows [t, D] of "patches" [n, 3 * p * p] and "padding" I32 [n]: 0 for none, 1 for a patch of nothing else, 2 for one in part."""
        c, n, t, m = self.config, self.config.side**2, self.side**2, self.config.group**2
        x = ops.concat([self.own.reshape(1, c.width), self.patch(g.input("patches", (n, 3 * c.patch**2)))], axis=0)    # [n + 1, V]
        given, lo, hi = [self.pre(x + self.position)], np.zeros(n + 1, np.int32), np.full(n + 1, n + 1, np.int32)
        for block in self.blocks:
            given.append(block(given[-1], lo, hi))
        x = ops.concat([given[i] for i in c.features], axis=1)                          # [n + 1, F]
        x = ops.contiguous(ops.slice(x, axis=0, start=1, stop=n + 1)) + ops.rows(self.padding, g.input("padding", (n,), "I32"))     # [n, F]
        mean = ops.reduce(ops.contiguous(ops.transpose(x.reshape(t, m, -1), axes=(0, 2, 1))), kind="mean")             # [t, F]
        q, k, v = (y.reshape(-1, c.n_heads, c.width // c.n_heads) for y in (self.q(mean), self.k(x), self.v(x)))       # [t | n, H, E]
        k, v = (ops.transpose(y, axes=(1, 0, 2)) for y in (k, v))                       # [H, n, E], views
        first = np.arange(0, n, m, dtype=np.int32)
        x = self.out(ops.attention(q, k, v, first, first + np.int32(m), scale=(c.width // c.n_heads) ** -0.5))         # [t, V]
        return self.down(ops.silu(self.gate(x)) * self.up(x)) + self.token              # [t, D]

    # -- processor ------------------------------------------------------------------------------------------------------------

    def _grid(self, width: int, height: int, most: int) -> tuple[int, int]:
        c = self.config
        return grid(width, height, c.window * c.patch, sum(c.margins) * c.patch, most)

    def _lines(self, lines: int, columns: int) -> tuple[int, int]:
        """Compute (rows down, rows across) of all windows and the outer margins."""
        c = self.config
        return (lines * c.window + sum(c.margins)) // c.group, (columns * c.window + sum(c.margins)) // c.group

    def process(self, media: Image | Video, limits: Limits) -> Processed:
        """Turn a picture into the whole and crops, and lay out their rows.

        Option: max_crops. Raises: RequestError for videos and other options; ContextOverflowError if its rows exceed the context.
        """
        only_pictures(media, "max_crops")
        c, (width, height) = self.config, media.size
        lines, columns = self._grid(width, height, whole_option(media, "max_crops", c.crops))
        down, across = self._lines(lines, columns)
        taken = self.side * (self.side + 1) + down * (across + 1) + 4
        if taken > limits.n_ctx:
            raise ContextOverflowError(f"a picture of {width} x {height} pixels takes {taken} positions, but the context holds {limits.n_ctx}; "
                                       "load with a larger n_ctx, or give a smaller max_crops")
        step, size = c.window * c.patch, c.side * c.patch
        w, h = ((n * c.window + sum(c.margins)) * c.patch for n in (columns, lines))
        canvas, inside = cache(lambda: self._padded(media.pixels, w, h)), self._inside(width, height, w, h)
        crops = [np.s_[y * step : y * step + size, x * step : x * step + size] for y in range(lines) for x in range(columns)]
        padding = [self._padding(inside[crop]) for crop in crops] + [np.full(c.side**2, 2, np.int32)]
        whole = self._view(lambda: self._padded(media.pixels, size, size), padding[0])
        views = [self._view(lambda crop=crop: canvas()[crop], told) for crop, told in zip(crops, padding[1:])]
        parts: list[int | Piece] = [self.start]
        for line in range(self.side):
            parts += [Piece(whole, line * self.side, (line + 1) * self.side), self.row]
        parts += [self.end, self.start]
        for y in range(lines):
            for line in range(*self._taken(y, lines)):
                for x in range(columns):
                    start, stop = self._taken(x, columns)
                    parts.append(Piece(views[y * columns + x], line * self.side + start, line * self.side + stop))
                parts.append(self.row)
        return Processed((*parts, self.end), media.size, fitted(width, height, w, h))

    def _taken(self, number: int, of: int) -> tuple[int, int]:
        """Return which groups of a crop stand in the prompt, on one axis: those of its window, and of margins at the picture's edge."""
        c = self.config
        start = 0 if number == 0 else c.margins[0] // c.group
        return start, self.side if number == of - 1 else self.side - c.margins[1] // c.group

    def _inside(self, width: int, height: int, w: int, h: int) -> np.ndarray:
        """Mark which pixels of a canvas show the picture: bool [h, w]."""
        w_, h_ = fitted(width, height, w, h)
        inside = np.zeros((h, w), bool)
        inside[(h - h_) // 2 :, (w - w_) // 2 :][:h_, :w_] = True
        return inside

    def _padded(self, pixels: np.ndarray, w: int, h: int) -> np.ndarray:
        """Fit a picture into a canvas, black around it, and normalize: uint8 [.., .., 3] -> float32 [h, w, 3]."""
        from pyengine.media.image import resize_floats                                  # Pillow takes 20 ms to import

        c, (w_, h_) = self.config, fitted(pixels.shape[1], pixels.shape[0], w, h)
        canvas = np.zeros((h, w, 3), np.float32)
        resized = resize_floats(pixels.astype(np.float32) / np.float32(255), h_, w_, c.resample)
        canvas[(h - h_) // 2 :, (w - w_) // 2 :][:h_, :w_] = np.clip(resized, 0, 1)
        return (canvas - c.mean) / c.std

    def _padding(self, inside: np.ndarray) -> np.ndarray:
        """Tell how much of each patch is padding: bool [size, size] -> int32 [n], group by group."""
        c = self.config
        shown = inside.reshape(c.side, c.patch, c.side, c.patch).sum(axis=(1, 3)).reshape(-1)[self.order]
        return np.where(shown == 0, 1, np.where(shown < c.patch**2, 2, 0)).astype(np.int32)

    def _view(self, pixels: Callable[[], np.ndarray], padding: np.ndarray) -> View:
        """Make one run of the encoder over a crop [size, size, 3]."""
        c, n = self.config, self.side**2

        def inputs() -> dict[str, np.ndarray]:
            patches = cut_patches(pixels(), c.side, c.patch)[self.order]                # [n, 3, p * p]
            return {"patches": np.ascontiguousarray(patches.reshape(len(patches), -1)), "padding": padding}

        return View(inputs, {}, np.arange(n, dtype=np.int32)[None], n)
