"""CLIP's and SigLIP's encoders over one square of pixels, which several models have beside their text, with projectors of their own.

Papers arXiv:2103.00020 (CLIP), arXiv:2303.15343 (SigLIP). Follows transformers 5.23: `modeling_clip.py`, `modeling_siglip.py`. CLIP has a
class token in front, whose row is left out, and a norm before its layers. Files hold the layers up to the last one that is needed; keys
"clip.vision.feature_layer" say which layers' inputs are taken where there are several or it is said. Files of llama.cpp's first converters
may have SigLIP's pooling head, which is left out, and switch GELU on for CLIP's "gelu" only: without it SigLIP's is the tanh one.
differs from llama.cpp, which then computes CLIP's quick GELU, and without "feature_layer" leaves the file's last layer out.
Axes: n patches of a square, V hidden, F rows joined, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pyengine import ops
from pyengine.dtype import dtype
from pyengine.errors import InvalidModelError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import DerivedRef, Weights
from pyengine.graph.tensor import Tensor
from pyengine.nn.encoder import (
    activation, by_table, cut_patches, EncoderBlock, head_count, levels, mean_and_std, n_layers, resample_filter)
from pyengine.nn.grids import cubics, resized, smooth_cubics
from pyengine.nn.layers import constant, LayerNorm, mlp_width, PatchEmbedding

# Constants for files without the key: transformers CLIPImageProcessor, CLIPVisionConfig
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3                          # Pillow's number
EPS = 1e-5


@dataclass(frozen=True)
class TowerConfig:
    """Numbers of one encoder and of what its image processor does with colours, from the metadata."""

    n_layers: int
    width: int
    d_ff: int
    n_heads: int
    eps: float
    act: str                         # of ops.unary
    features: tuple[int, ...]        # layers whose inputs are joined; n_layers: what the last one gives
    tile: int                        # side of a square in pixels
    patch: int
    mean: np.ndarray
    std: np.ndarray
    resample: int

    @property
    def side(self) -> int:
        """Patches along a side; pixels behind the last whole one are not seen."""
        return self.tile // self.patch

    @classmethod
    def read(cls, v: Hparams, w: Weights) -> TowerConfig:
        """Read the keys "clip.*". Raises: InvalidModelError, UnsupportedModelError."""
        width, count = v.size("vision.embedding_length"), n_layers(v, w)
        mean, std = mean_and_std(v, MEAN, STD)
        neither = "quick_gelu" if w["v"].shape("class_embd") else "gelu_pytorch_tanh"
        return cls(
            n_layers=count, width=width, d_ff=mlp_width(w["v", "blk", 0], width), n_heads=head_count(v, width, step=1),
            eps=v.number("vision.attention.layer_norm_epsilon", EPS, above=0.0), act=activation(v, "gelu", neither), features=feature_layers(v, count),
            tile=v.size("vision.image_size"), patch=v.size("vision.patch_size"), mean=mean, std=std, resample=resample_filter(v, BICUBIC))


def feature_layers(v: Hparams, count: int) -> tuple[int, ...]:
    """Read which layers' inputs are taken; without the key, what the last layer of the file gives."""
    found = v.get("vision.feature_layer", None, np.ndarray)
    if found is None:
        return (count,)
    layers = tuple(int(i) for i in found)
    if not layers or not all(0 <= i <= count for i in layers):
        raise InvalidModelError(f"{v.key('vision.feature_layer')} is {list(layers)}, but the file has {count} layers")
    return layers


class Tower:
    """The encoder over one square.

    post_norm  the last layer is followed by a norm; without, one in the file is behind what is taken
    whole      the class token's row, the first, is taken too, and those of registers behind it, which have no positions
    any_grid   positions of another square than the picture's are resized (bicubic; beside registers smoothed where the grid shrinks)
    front      rows before those of patches
    """

    def __init__(self, w: Weights, c: TowerConfig, post_norm: bool = False, whole: bool = False, any_grid: bool = False):
        self.config, self.whole = c, whole
        self.levels = levels(c.mean, c.std)                                             # [3, 256]
        f32, n = dtype("F32"), c.side**2
        own = w.optional("class_embd", (c.width,))
        self.own = constant(own, f32) if own else None
        shape = w.shape("register_embd")
        self.registers = constant(w.tensor("register_embd", (math.prod(shape) // c.width, c.width)), f32) if shape and own else None
        self.front = (own is not None) + (int(self.registers.shape[0]) if self.registers is not None else 0)
        self.patch = PatchEmbedding(w["patch_embd"], c.width, 3, c.patch)
        self.position = self._positions(w["position_embd"], n + (own is not None), any_grid)
        self.pre = LayerNorm(w["pre_ln"], c.width, c.eps) if "pre_ln" in w else None
        self.blocks = [EncoderBlock(w["blk", i], c) for i in range(c.n_layers)]
        self.post = LayerNorm(w["post_ln"], c.width, c.eps) if post_norm else None
        for part in ("weight", "bias"):
            w["post_ln"].optional(part, (c.width,))
        w["head"].leave_out()

    def _positions(self, w: Weights, n: int, any_grid: bool) -> Tensor:
        """Bind the embeddings of n rows' positions, those of patches resized where the file has another number."""
        f32, one, rows = dtype("F32"), int(self.own is not None), math.prod(w.shape("weight") or (0,)) // self.config.width
        side = math.isqrt(max(0, rows - one))
        if not any_grid or rows == n or rows != side**2 + one:
            return constant(w.tensor("weight", (n, self.config.width)), f32)
        ref, weights = w.tensor("weight", (rows, self.config.width)), (cubics if self.registers is None else smooth_cubics)(side, self.config.side)
        return constant(DerivedRef(ref.name, (n, self.config.width), (ref,), lambda a: np.concatenate([a[:one], resized(a[one:], weights, weights)])))

    @property
    def width(self) -> int:
        """Numbers of a row: those of all layers that are taken."""
        return self.config.width * len(self.config.features)

    def __call__(self, patches: Tensor) -> Tensor:                                      # [n, 3 * p * p] -> [n, F], whole [n + front, F]
        c, n = self.config, self.config.side**2
        x = self.patch(patches)                                                         # [n, V]
        if self.own is not None:
            x = ops.concat([self.own.reshape(1, c.width), x], axis=0)                   # [n + 1, V]
            n += 1
        x = x + self.position
        if self.registers is not None:
            x = ops.concat([ops.slice(x, axis=0, start=0, stop=1), self.registers, ops.slice(x, axis=0, start=1, stop=n)], axis=0)         # [n + front, V]
            n += self.front - 1
        x = self.pre(x) if self.pre else x
        lo, hi = np.zeros(n, np.int32), np.full(n, n, np.int32)
        given = [x]
        for block in self.blocks:
            given.append(block(given[-1], lo, hi))
        taken = [given[i] for i in c.features]
        x = taken[0] if len(taken) == 1 else ops.concat(taken, axis=1)                  # [n, F]
        x = self.post(x) if self.post else x
        return x if self.own is None or self.whole else ops.contiguous(ops.slice(x, axis=0, start=self.front, stop=n))

    def patches(self, pixels: np.ndarray) -> np.ndarray:
        """Cut patches: pixels uint8 [tile, tile, 3] -> F32 [n, 3 * p * p]."""
        c = self.config
        seen = c.side * c.patch
        x = cut_patches(np.ascontiguousarray(pixels[:seen, :seen]), c.side, c.patch)
        return by_table(self.levels, x).reshape(len(x), -1)

    def on_square(self, pixels: np.ndarray) -> np.ndarray:
        """Pad a picture with the mean colour to a square [side, side, 3]."""
        height, width = pixels.shape[:2]
        side = max(width, height)
        square = np.empty((side, side, 3), np.uint8)
        square[:] = (self.config.mean.astype(np.float64) * 255).astype(np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = pixels
        return square

    def padded(self, pixels: np.ndarray) -> np.ndarray:
        """Make a picture one square: padded, then resized to [tile, tile, 3]."""
        from pyengine.media.image import resize                                         # Pillow takes 20 ms to import

        c = self.config
        return resize(self.on_square(pixels), c.tile, c.tile, c.resample)
