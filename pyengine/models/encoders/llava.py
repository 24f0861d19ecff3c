"""LLaVA's encoders: CLIP or SigLIP, rows of one layer or of several joined, two products with a GELU between; pictures in one square
(LLaVA 1.5) or in tiles of the best of some resolutions, and once more whole (LLaVA-NeXT, Granite Vision, LLaVA-OneVision).

Papers arXiv:2310.03744 (LLaVA 1.5), arXiv:2502.09927 (Granite Vision), arXiv:2408.03326 (LLaVA-OneVision); LLaVA-NeXT has a report only.
Follows transformers 5.23: `modeling_llava.py`, `modeling_llava_next.py`, `modeling_llava_onevision.py`, `image_processing_pil_llava*.py`.

    one square    1.5: padded to a square with the mean colour, or its middle cut out -> a row for each patch
    tiles         whole picture squeezed into a square: its rows; then the lines of all tiles together without what is padding, and after
                  each line one row more, `image_newline`
    OneVision     as tiles, but where their rows are more than 1.21 times those of 9 tiles (the number of "anyres_max_9"), they are resized
                  to as many; a picture that is not the only one of a prompt is one padded square and one row more, `image_newline`
    its videos    each frame squeezed into a square, its rows resized to half the lines and columns; behind the last `image_newline`

A tile is a run of the encoder; each run gives image_newline as its last row, which the ends of lines take. llama.cpp's files hold the
layers up to the last one that is needed, keys "clip.vision.feature_layer" where there are several or it is said, and "mlp" as the
projector. differs from transformers 5: its LLaVA-NeXT has a head of its own and leaves out Granite's scale of logits, which
GraniteForCausalLM, transformers 4 and llama.cpp have. differs from llama.cpp: padding is black in tiles, pictures are resized by Pillow's bicubic
filter, both as transformers does.
Axes: n patches of a tile, V hidden, F rows joined, H heads; D hidden of the decoder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from pyengine import ops
from pyengine.dtype import dtype
from pyengine.errors import ContextOverflowError, InvalidModelError, UnsupportedModelError
from pyengine.files.hparams import Hparams
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Tensor
from pyengine.media.views import Blend, Limits, Piece, Processed, View
from pyengine.models.architecture import Encoder, EncoderFiles
from pyengine.models.encoders.clip import Tower, TowerConfig
from pyengine.nn.encoder import bilinear, known_activation, only_pictures, special_token
from pyengine.nn.layers import constant, Linear

if TYPE_CHECKING:
    from pyengine.media.image import Image
    from pyengine.media.video import Video

MARKER, VIDEO_MARKER = "<image>", "<video>"
ASPECT = re.compile("pad|crop|anyres|anyres_max_([1-9][0-9]{0,5})")
LARGER = 1.1                         # of sides, from where on rows are resized: `pack_image_features`


@dataclass(frozen=True)
class VisionConfig:
    """Numbers of the projector and the image processor, from the metadata."""

    d_out: int                       # of the decoder
    projector_act: str
    grids: tuple[tuple[int, int], ...]       # resolutions (height, width) in tiles; none: one square
    crop: bool                       # the middle of a picture is one square, else it is padded
    most_tiles: int                  # that a picture has the rows of; 0: any

    @classmethod
    def read(cls, h: Hparams, v: Hparams) -> VisionConfig:
        """Read the keys "clip.*". Raises: InvalidModelError, UnsupportedModelError."""
        aspect = v.get("vision.image_aspect_ratio", "pad", str)
        known = ASPECT.fullmatch(aspect)
        if known is None:
            raise UnsupportedModelError(f"{v.key('vision.image_aspect_ratio')} is {aspect!r}; pad, crop, anyres and anyres_max_9 are supported")
        c = cls(d_out=h.size("embedding_length"), projector_act=known_activation(v, "vision.projector.hidden_act", "gelu"),
                grids=_grids(v, v.size("vision.image_size")), crop=aspect == "crop", most_tiles=int(known[1] or 0))
        if c.most_tiles and not c.grids:
            raise InvalidModelError(f"{v.key('vision.image_aspect_ratio')} is {aspect!r}, but there are no vision.image_grid_pinpoints")
        return c


def _grids(v: Hparams, tile: int) -> tuple[tuple[int, int], ...]:
    """Read the resolutions of tiles: pairs (height, width) in pixels, in one list."""
    found = v.get("vision.image_grid_pinpoints", None, np.ndarray)
    sides = [] if found is None else [int(n) for n in found]
    if len(sides) % 2 or any(n < tile or n % tile for n in sides):
        raise InvalidModelError(f"{v.key('vision.image_grid_pinpoints')} is {sides}: pairs of multiples of {tile} are needed")
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


class Lines:
    """The lines of rows of all tiles of a picture together, without what is padding, and how many of them it gets."""

    def __init__(self, width: int, height: int, side: int, grid: tuple[int, int], most_tiles: int):
        """Lay a picture of that size out on a grid (lines, columns) of tiles, which have side x side rows."""
        self.side, (self.tile_lines, self.tile_columns) = side, grid
        self.across, self.down = unpadded(width, height, self.tile_columns * side, self.tile_lines * side)
        self.height, self.width = self.tile_lines * side - 2 * self.down, self.tile_columns * side - 2 * self.across
        ratio = math.sqrt(self.height * self.width / (most_tiles * side**2)) if most_tiles else 0.0
        self.resized = (int(self.height // ratio), int(self.width // ratio)) if ratio > LARGER else None

    def __len__(self) -> int:
        """Return the rows, with the one more behind each line."""
        lines, columns = self.resized or (self.height, self.width)
        return lines * (columns + 1)

    def pieces(self, tiles: list[View], end: Piece) -> list[Piece | Blend]:
        """Return the rows, line by line, each with its end. tiles: in reading order."""
        parts: list[Piece | Blend] = []
        for line in range(self.down, self.tile_lines * self.side - self.down):
            row, inner = divmod(line, self.side)
            for column in range(self.tile_columns):
                start = max(self.across - column * self.side, 0)
                stop = min(self.tile_columns * self.side - self.across - column * self.side, self.side)
                if start < stop:
                    parts.append(Piece(tiles[row * self.tile_columns + column], inner * self.side + start, inner * self.side + stop))
            parts.append(end)
        return parts

    def blends(self, tiles: list[View], rows: int, end: Piece) -> list[Piece | Blend]:
        """Return the same where rows are resized, bilinearly. rows: of a tile's run."""
        parts: list[Piece | Blend] = []
        indices, weights = bilinear((self.height, self.width), self.resized)                     # [h, w, 4]
        y, x = np.divmod(indices, self.width)
        (row, y), (column, x) = np.divmod(y + self.down, self.side), np.divmod(x + self.across, self.side)
        for r, c, inner, weight in zip(row, column, y * self.side + x, weights):                 # a line each, of one or two lines of tiles
            first, last = int(r.min()), int(r.max()) + 1
            parts.append(Blend(tuple(tiles[first * self.tile_columns : last * self.tile_columns]),
                               ((r - first) * self.tile_columns + c) * rows + inner, weight))
            parts.append(end)
        return parts


class Vision(Encoder):
    """Encoder, projector and processor. Nothing about a picture is kept here."""

    def __init__(self, files: EncoderFiles):
        h, v, w, token = files
        self.tower = Tower(w["v"], TowerConfig.read(v, w))
        c = self.config = VisionConfig.read(h, v)
        self.counts = bool(c.most_tiles)
        try:
            self.markers = {"image": (special_token(v, "image", token, MARKER),)}
            if c.most_tiles:
                self.markers["video"] = (special_token(v, "video", token, VIDEO_MARKER),)
        except InvalidModelError:                                                       # Vicuna's vocabulary has no token for pictures
            self.markers = {"image": ()}
        self.first = Linear(w["mm", 0], self.tower.width, c.d_out)
        self.second = Linear(w["mm", 2], c.d_out, c.d_out)
        newline = w["model"].optional("image_newline", (c.d_out,))
        self.newline = constant(newline._replace(shape=(1, c.d_out)), dtype("F32")) if newline else None
        if c.grids and self.newline is None:
            raise InvalidModelError("tensor 'model.image_newline' is missing, which pictures in tiles need")
        self.side, self.tile = self.tower.config.side, self.tower.config.tile

    @property
    def tile_rows(self) -> int:
        """Rows of one run: its patches, and the end of a line where there are tiles."""
        return self.side**2 + (self.newline is not None)

    def most_rows(self, n_ctx: int) -> int:
        """Return the rows of one run."""
        return self.tile_rows

    def lines(self, width: int, height: int) -> Lines:
        """Lay the tiles of a picture out."""
        grid = best_grid(width, height, self.config.grids, self.tile)
        return Lines(width, height, self.side, grid, self.config.most_tiles)

    def n_rows(self, width: int, height: int) -> int:
        """Return the soft tokens of a picture of this size, those of all tiles that are not padding, with ends of lines."""
        return self.side**2 + (len(self.lines(width, height)) if self.config.grids else 0)

    def declare(self, g: Graph, rows: int) -> Tensor:
        """Declare the rows [tile_rows, D] of "patches" [n, 3 * p * p]."""
        x = self.tower(g.input("patches", (self.side**2, 3 * self.tower.config.patch**2)))       # [n, F]
        y = self.second(ops.unary(self.first(x), kind=self.config.projector_act))                # [n, D]
        return y if self.newline is None else ops.concat([y, self.newline], axis=0)

    # -- processor ------------------------------------------------------------------------------------------------------------

    def process(self, media: Image | Video, limits: Limits) -> Processed:
        """Turn a picture into runs over squares, and lay out their rows.

        Raises: RequestError for options, and for videos but in OneVision; ContextOverflowError if its rows exceed the context.
        """
        from pyengine.media.image import known_options                                  # Pillow takes 20 ms to import
        from pyengine.media.video import Video

        if self.config.most_tiles and isinstance(media, Video):
            known_options(media.options)
            return self._film(media, limits)
        only_pictures(media)
        if self.config.grids and not (self.counts and limits.pictures > 1):
            return self._tiles(media, limits)
        view = self._view(lambda: self._square(media.pixels))
        return Processed((Piece(view, 0, self.side**2 + self.counts),), media.size, (self.tile, self.tile))

    def _tiles(self, media: Image, limits: Limits) -> Processed:
        """Process a picture as the whole and tiles."""
        from pyengine.media.image import resize                                         # Pillow takes 20 ms to import

        tile, n, (width, height) = self.tile, self.side**2, media.size
        lines = self.lines(width, height)
        self._fit(n + len(lines), f"a picture of {width} x {height} pixels", "make the picture smaller", limits)
        whole = self._view(lambda: resize(media.pixels, tile, tile, self.tower.config.resample))
        canvas = cache(lambda: self._canvas(media.pixels, lines.tile_lines, lines.tile_columns))
        tiles = [self._view(lambda y=y, x=x: canvas()[y : y + tile, x : x + tile])
                 for y in range(0, lines.tile_lines * tile, tile) for x in range(0, lines.tile_columns * tile, tile)]
        end = Piece(whole, n, n + 1)
        rows = lines.blends(tiles, self.tile_rows, end) if lines.resized else lines.pieces(tiles, end)
        size = fitted(width, height, lines.tile_columns * tile, lines.tile_lines * tile)
        return Processed((Piece(whole, 0, n), *rows), media.size, size)

    def _film(self, video: Video, limits: Limits) -> Processed:
        """Process all frames of a video, each as a square whose rows are resized to half as many lines and columns."""
        from pyengine.media.image import resize                                         # Pillow takes 20 ms to import

        n, half, tile = self.side**2, -(-self.side // 2), self.tile
        self._fit(len(video) * half**2 + 1, f"a video of {len(video)} frames", "give fewer frames", limits)
        frames = cache(lambda: [resize(f.pixels, tile, tile, self.tower.config.resample) for f in video.read(range(len(video)))])
        views = [self._view(lambda i=i: frames()[i]) for i in range(len(video))]
        indices, weights = (a.reshape(-1, 4) for a in bilinear((self.side, self.side), (half, half)))
        parts: list[Blend | Piece] = [Blend((view,), indices, weights) for view in views]
        return Processed((*parts, Piece(views[0], n, n + 1)), video.size, (tile, tile))

    def _fit(self, taken: int, what: str, way: str, limits: Limits) -> None:
        """Raise ContextOverflowError where so many rows are more than the context holds."""
        if taken > limits.n_ctx:
            raise ContextOverflowError(f"{what} takes {taken} positions, but the context holds {limits.n_ctx}; load with a larger n_ctx, or {way}")

    def _view(self, pixels: Callable[[], np.ndarray]) -> View:
        """Make one run of the encoder over a square [tile, tile, 3]."""
        rows = np.arange(self.tile_rows, dtype=np.int32)[None]
        return View(lambda: {"patches": self.tower.patches(pixels())}, {}, rows, self.tile_rows)

    def _square(self, pixels: np.ndarray) -> np.ndarray:
        """Make a picture one square: padded with the mean colour, or its middle."""
        from pyengine.media.image import resize                                         # Pillow takes 20 ms to import

        if not self.config.crop:
            return self.tower.padded(pixels)
        tile, (height, width) = self.tile, pixels.shape[:2]
        w, h = (tile, tile * height // width) if width <= height else (tile * width // height, tile)
        top, left = (h - tile) // 2, (w - tile) // 2
        return resize(pixels, h, w, self.tower.config.resample)[top : top + tile, left : left + tile]

    def _canvas(self, pixels: np.ndarray, lines: int, columns: int) -> np.ndarray:
        """Fit a picture into a canvas of tiles, black around it."""
        from pyengine.media.image import resize                                         # Pillow takes 20 ms to import

        canvas = np.zeros((lines * self.tile, columns * self.tile, 3), np.uint8)
        w, h = fitted(pixels.shape[1], pixels.shape[0], columns * self.tile, lines * self.tile)
        top, left = (lines * self.tile - h) // 2, (columns * self.tile - w) // 2
        canvas[top : top + h, left : left + w] = resize(pixels, h, w, self.tower.config.resample)
        return canvas
