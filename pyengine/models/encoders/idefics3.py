"""Idefics3 and SmolVLM: SigLIP over squares, groups of rows joined by a pixel shuffle, one product; pictures in tiles, and once more whole.

Papers arXiv:2408.12637, arXiv:2504.05299. Follows transformers 5.23: `modeling_smolvlm.py`, `image_processing_pil_smolvlm.py`,
`processing_smolvlm.py` (`idefics3` has the same).

    picture -> longest side as the processor says, enlarged too -> sides up to multiples of a tile -> tiles, and all of it in one more
    prompt: for each tile <fake_token_around_image><row_1_col_1> its rows, a blank line, <fake_token_around_image><global-img> the rows of
    the whole, <fake_token_around_image>

A tile is a run of the encoder. Its patches are computed group by group, so that the shuffle is a reshape; position embeddings are put into
the same order when they are loaded, through the buckets of `SmolVLMVisionEmbeddings` in float32. llama.cpp's files say the longest side
(`preproc_image_size`) and the shuffle (`projector.scale_factor`). Videos are not taken; their frames are, as pictures.
Axes: n patches of a tile, t rows, V hidden; D hidden of the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import DerivedRef, Weights
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Tensor
from pyengine.media.views import Limits, Processed, View
from pyengine.models.architecture import Encoder, EncoderFiles
from pyengine.nn.encoder import (
    buckets, by_table, common, cut_patches, EncoderBlock, EncoderConfig, grouped, levels, only_pictures, special_token)
from pyengine.nn.layers import constant, LayerNorm, Linear, PatchEmbedding

if TYPE_CHECKING:
    from pyengine.media.image import Image
    from pyengine.media.video import Video

# Constants for files without the key: transformers SmolVLMImageProcessorPil, SmolVLMVisionConfig
HALF, LANCZOS = (0.5, 0.5, 0.5), 1   # mean and deviation, Pillow's number of the filter
EPS, LARGEST = 1e-6, 4096            # pixels of a side, after all
AROUND, WHOLE, MARKER = "<fake_token_around_image>", "<global-img>", "<image>"


@dataclass(frozen=True)
class VisionConfig(EncoderConfig):
    """Numbers of one encoder, its projector and its image processor, from the metadata."""

    tile: int                        # side in pixels
    group: int                       # side of a group in patches
    longest_edge: int                # pixels of the longer side
    splitting: bool                  # into tiles, unless it is said otherwise

    @property
    def side(self) -> int:
        """Patches along a side of a tile."""
        return self.tile // self.patch

    @classmethod
    def read(cls, h: Hparams, v: Hparams, w: Weights) -> VisionConfig:
        """Read the keys "clip.*". Raises: InvalidModelError, UnsupportedModelError."""
        tile = v.size("vision.image_size")
        made = cls(
            **common(h, v, w, gelu="gelu_pytorch_tanh", eps=EPS, colours=(HALF, HALF), resample=LANCZOS), tile=tile,
            group=v.size("vision.projector.scale_factor", 2), longest_edge=v.size("vision.preproc_image_size", 4 * tile),
            splitting=v.get("vision.image_splitting", True, bool))
        if made.side % made.group or not made.side:
            raise InvalidModelError(f"{v.arch}.vision: {made.side} patches along a side are no groups of {made.group}")
        return made


class Vision(Encoder):
    """Encoder, projector, processor and special tokens. Nothing about a picture is kept here."""

    def __init__(self, files: EncoderFiles):
        h, v, w, self.token = files
        c = self.config = VisionConfig.read(h, v, w)
        self.markers = {"image": (special_token(v, "image", self.token, MARKER),)}
        self.around, self.whole = self.token(AROUND), self._named(WHOLE)
        self.rows = (c.side // c.group) ** 2
        self.order = grouped(c.side, c.group)
        self.levels = levels(c.mean, c.std)                                             # [3, 256]
        v_, places = w["v"], buckets(c.side, c.side)
        own = (places[:, None] * c.side + places).reshape(-1)[self.order]
        self.patch = PatchEmbedding(v_["patch_embd"], c.width, 3, c.patch)
        position = v_["position_embd"].tensor("weight", (c.side**2, c.width))
        self.position = constant(DerivedRef(position.name, position.shape, (position,), lambda a: a[own]))
        self.blocks = [EncoderBlock(v_["blk", i], c) for i in range(c.n_layers)]
        self.norm = LayerNorm(v_["post_ln"], c.width, c.eps)
        self.projector = Linear(w["mm", "model", "fc"], c.width * c.group**2, c.d_out)

    def _named(self, text: str) -> int | str:
        """Return a token by its text, or the text where the vocabulary has none."""
        try:
            return self.token(text)
        except InvalidModelError:
            return text

    def most_rows(self, n_ctx: int) -> int:
        """Return the rows of one run."""
        return self.rows

    def n_rows(self, width: int, height: int) -> int:
        """Return the soft tokens of a picture of this size, all tiles and the whole together."""
        if not self.config.splitting:
            return self.rows
        across, down = self.sizes(width, height)[1]
        tiles = down // self.config.tile * (across // self.config.tile)
        return self.rows * (tiles + (tiles > 1))

    def declare(self, g: Graph, rows: int) -> Tensor:
        """Declare the rows [t, D] of "patches" [n, 3 * p * p]."""
        c, n = self.config, self.config.side**2
        lo, hi = np.zeros(n, np.int32), np.full(n, n, np.int32)
        x = self.patch(g.input("patches", (n, 3 * c.patch**2))) + self.position         # [n, V]
        for block in self.blocks:
            x = block(x, lo, hi)
        return self.projector(self.norm(x).reshape(self.rows, c.width * c.group**2))    # [t, D]

    # -- processor ------------------------------------------------------------------------------------------------------------

    def sizes(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Compute (width, height) of a picture after each of its two resizes: to the longest side, and up to whole tiles.

        Sources: `get_resize_output_image_size`, `resize_for_vision_encoder` in transformers' `image_processing_pil_smolvlm.py`.
        """
        longest, tile, ratio = self.config.longest_edge, self.config.tile, width / height
        w, h = (longest, int(longest / ratio)) if width >= height else (int(longest * ratio), longest)
        w, h = (w, h + h % 2) if width >= height else (w + w % 2, h)
        w, h = max(w, 1), max(h, 1)
        ratio = w / h
        if max(w, h) > LARGEST:
            w, h = (LARGEST, max(int(LARGEST / ratio), 1)) if w >= h else (max(int(LARGEST * ratio), 1), LARGEST)
        ratio = w / h
        if w >= h:
            across = math.ceil(w / tile) * tile
            down = math.ceil(int(across / ratio) / tile) * tile
        else:
            down = math.ceil(h / tile) * tile
            across = math.ceil(int(down * ratio) / tile) * tile
        return (w, h), (across, down)

    def process(self, media: Image | Video, limits: Limits) -> Processed:
        """Turn a picture into tiles and the whole, with tokens around them.

        Option: image_splitting (bool). Raises: RequestError for videos and other options; ContextOverflowError if its rows exceed the context.
        """
        from pyengine.media.image import resize                                         # Pillow takes 20 ms to import

        only_pictures(media, "image_splitting")
        c, tile = self.config, self.config.tile
        wanted = media.options.get("image_splitting", c.splitting)
        if not isinstance(wanted, bool):
            raise RequestError(f"image_splitting={wanted!r}: must be True or False")
        first, (w, h) = self.sizes(*media.size)
        lines, columns = (h // tile, w // tile) if wanted else (1, 1)
        n = lines * columns + (lines * columns > 1)
        if n * self.rows > limits.n_ctx:
            raise ContextOverflowError(f"a picture of {media.size[0]} x {media.size[1]} pixels takes {n} tiles of {self.rows} positions, but the context "
                                       f"holds {limits.n_ctx}; load with a larger n_ctx, or give image_splitting=False")

        def resized(width: int, height: int) -> np.ndarray:
            once = resize(media.pixels, first[1], first[0], c.resample)
            return resize(once, height, width, c.resample)

        if n == 1:
            whole = self._view(lambda: resized(tile, tile))
            return Processed((self.around, self.whole, whole, self.around), media.size, (tile, tile))
        canvas = cache(lambda: resized(w, h))
        parts: list[str | int | View] = []
        for line in range(lines):
            for column in range(columns):
                y, x = line * tile, column * tile
                view = self._view(lambda y=y, x=x: canvas()[y : y + tile, x : x + tile])
                parts += [self.around, self._named(f"<row_{line + 1}_col_{column + 1}>"), view]
            parts.append("\n" if line + 1 < lines else "\n\n")
        whole = self._view(lambda: resize(canvas(), tile, tile, c.resample))
        return Processed((*parts, self.around, self.whole, whole, self.around), media.size, (w, h))

    def _view(self, pixels: Callable[[], np.ndarray]) -> View:
        """Make one run of the encoder over a tile [tile, tile, 3]."""
        rows = np.arange(self.rows, dtype=np.int32)[None]
        return View(lambda: {"patches": self._patches(pixels())}, {}, rows, self.rows)

    def _patches(self, pixels: np.ndarray) -> np.ndarray:
        """Cut patches: pixels uint8 [tile, tile, 3] -> F32 [n, 3 * p * p], group by group."""
        x = cut_patches(pixels, self.config.side, self.config.patch)[self.order]
        return by_table(self.levels, x).reshape(len(x), -1)
