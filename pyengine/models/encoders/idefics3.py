"""Idefics3 and SmolVLM: SigLIP over squares, groups of rows joined by a pixel shuffle, one product; pictures in tiles, and once more whole.

Papers arXiv:2408.12637, arXiv:2504.05299. Follows transformers 5.23: `modeling_smolvlm.py`, `image_processing_pil_smolvlm.py`,
`video_processing_smolvlm.py`, `processing_smolvlm.py` (`idefics3` has the same, without videos).

    picture -> longest side as the processor says, enlarged too -> sides up to multiples of a tile -> tiles, and all of it in one more
    prompt: for each tile <fake_token_around_image><row_1_col_1> its rows, a blank line, <fake_token_around_image><global-img> the rows of
    the whole, <fake_token_around_image>
    video: a sentence on how many frames of how long; for each its time, Frame from 00:01:, and what a picture without tiles becomes; a blank line

A tile is a run of the encoder. Its patches are computed group by group, so that the shuffle is a reshape; position embeddings are put into
the same order when they are loaded, through the buckets of `SmolVLMVisionEmbeddings` in float32. llama.cpp's files say the longest side
(`preproc_image_size`) and the shuffle (`projector.scale_factor`). A list of frames without a rate has 24 a second.
differs: frames are resized by Pillow, as pictures are; transformers has only a torchvision processor for videos.
Axes: n patches of a tile, t rows, V hidden; D hidden of the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
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
    buckets, by_table, common, cut_patches, EncoderBlock, EncoderConfig, grouped, levels, special_token, squeezed, token_or_text, whole_option)
from pyengine.nn.layers import constant, LayerNorm, Linear, PatchEmbedding

if TYPE_CHECKING:
    from pyengine.media.image import Image
    from pyengine.media.video import Video

# Constants for files without the key: transformers SmolVLMImageProcessorPil, SmolVLMVisionConfig
HALF, LANCZOS = (0.5, 0.5, 0.5), 1   # mean and deviation, Pillow's number of the filter
EPS, LARGEST = 1e-6, 4096            # pixels of a side, after all
FRAMES, FPS, SKIPPED = 64, 1.0, 1    # SmolVLM2: frames of a video at most, of a second, and seconds left out at both ends of a long one
LIST_FPS, MAX_RATE = 24.0, 1e9       # processing_smolvlm.py: of frames without a rate
AROUND, WHOLE, MARKER = "<fake_token_around_image>", "<global-img>", "<image>"


@dataclass(frozen=True)
class VisionConfig(EncoderConfig):
    """Numbers of one encoder, its projector and its image processor, from the metadata."""

    tile: int                        # side in pixels
    group: int                       # side of a group in patches
    longest_edge: int                # pixels of the longer side
    splitting: bool                  # into tiles, unless it is said otherwise
    video_edge: int                  # pixels of the longer side of a frame, before it becomes a tile
    frames: int                      # of a video at most
    fps: float                       # frames taken of a second
    sample_lists: bool               # of lists of frames with a rate too, not only of files

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
            splitting=v.get("vision.image_splitting", True, bool), video_edge=v.size("vision.video_preproc_image_size", tile),
            frames=v.size("vision.video_max_frames", FRAMES), fps=v.number("vision.video_fps", FPS, above=0.0),
            sample_lists=v.get("vision.video_sample_frames", False, bool))
        if made.side % made.group or not made.side:
            raise InvalidModelError(f"{v.key('vision')}: {made.side} patches along a side are no groups of {made.group}")
        return made


def fitted(width: int, height: int, longest: int) -> tuple[int, int]:
    """Compute (width, height) with a longer side of `longest` pixels and an even shorter one.

    Source: `get_resize_output_image_size` in transformers' `image_processing_pil_smolvlm.py`.
    """
    ratio = width / height
    w, h = (longest, int(longest / ratio)) if width >= height else (int(longest * ratio), longest)
    w, h = (w, h + h % 2) if width >= height else (w + w % 2, h)
    return max(w, 1), max(h, 1)


ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen").split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()


def in_words(n: int) -> str:
    """Return a number below a million in words, as the package num2words does: one thousand, two hundred and thirty-four."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    size, name = (100, "hundred") if n < 1000 else (1000, "thousand")
    rest = n % size
    joint = " and " if rest < 100 else ", "
    return f"{in_words(n // size)} {name}" + (joint + in_words(rest) if rest else "")


class Vision(Encoder):
    """Encoder, projector, processor and special tokens. Nothing about a picture is kept here."""

    def __init__(self, files: EncoderFiles):
        h, v, w, self.token = files
        c = self.config = VisionConfig.read(h, v, w)
        self.markers = {"image": (special_token(v, "image", self.token, MARKER),), "video": ()}
        self.around, self.whole = self.token(AROUND), token_or_text(self.token, WHOLE)
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
        tile, (w, h) = self.config.tile, fitted(width, height, self.config.longest_edge)
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
        """Turn a picture into tiles and the whole, with tokens around them, or frames of a video into one tile each.

        Options: image_splitting (bool), of a picture; num_frames and sample_fps, of a video, at most and of a second; without them a list of frames
        is taken whole. Raises: RequestError for other options; ContextOverflowError if its rows exceed the context.
        """
        from pyengine.media.image import known_options, resize                          # Pillow takes 20 ms to import
        from pyengine.media.video import Video

        if isinstance(media, Video):
            return self._film(media, limits)
        known_options(media.options, "image_splitting")
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
                parts += [self.around, token_or_text(self.token, f"<row_{line + 1}_col_{column + 1}>"), view]
            parts.append("\n" if line + 1 < lines else "\n\n")
        whole = self._view(lambda: resize(canvas(), tile, tile, c.resample))
        return Processed((*parts, self.around, self.whole, whole, self.around), media.size, (w, h))

    def _film(self, video: Video, limits: Limits) -> Processed:
        """Make of frames of a video a tile each, behind their times."""
        from pyengine.media.image import known_options                                  # Pillow takes 20 ms to import

        known_options(video.options, "num_frames", "sample_fps")
        c, numbers, fps = self.config, self._frames(video), video.fps or LIST_FPS
        if len(numbers) * self.rows > limits.n_ctx:
            raise ContextOverflowError(f"a video of {len(numbers)} frames takes {len(numbers) * self.rows} positions, but the context holds "
                                       f"{limits.n_ctx}; load with a larger n_ctx, or give a smaller num_frames")
        w, h = fitted(*video.size, min(c.video_edge, LARGEST))
        frames, listed = squeezed(video, numbers, ((h, w), (c.tile, c.tile)), c.resample), isinstance(video.frames, tuple)
        length = timedelta(seconds=int(numbers[-1] / fps if listed else len(video) / fps))
        parts: list[str | int | View] = [f"You are provided the following series of {in_words(len(numbers))} frames from a {length} [H:MM:SS] video.\n"]
        for i, number in enumerate(numbers):
            seconds = number / fps
            time = f"\nFrame from {int(seconds // 60):02d}:{int(seconds % 60):02d}:"
            parts += [time, self.around, self.whole, self._view(lambda i=i: frames()[i]), self.around]
        return Processed((*parts, "\n\n"), video.size, (c.tile, c.tile))

    def _frames(self, video: Video) -> list[int]:
        """Choose the numbers of the frames to take. Source: `sample_frames` in transformers' `video_processing_smolvlm.py`."""
        c, total = self.config, len(video)
        if isinstance(video.frames, tuple) and not video.options and not (c.sample_lists and video.fps):
            return list(range(total))
        rate, n = video.options.get("sample_fps", c.fps), whole_option(video, "num_frames", 1 << 20) if "num_frames" in video.options else c.frames
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < MAX_RATE:
            raise RequestError(f"sample_fps={rate!r}: must be a number above 0")
        fps = video.fps or LIST_FPS
        first, last, seconds = 0, total - 1, total / fps
        if seconds - 2 * SKIPPED > n * rate:
            first, last = int(SKIPPED * fps), min(int(total - SKIPPED * fps), total - 1)
            first, last = (first, last) if first < last else (0, total - 1)
        return np.unique(np.linspace(first, last, max(min(round(rate * seconds), n), 1), dtype=int)).tolist()

    def _view(self, pixels: Callable[[], np.ndarray]) -> View:
        """Make one run of the encoder over a tile [tile, tile, 3]."""
        rows = np.arange(self.rows, dtype=np.int32)[None]
        return View(lambda: {"patches": self._patches(pixels())}, {}, rows, self.rows)

    def _patches(self, pixels: np.ndarray) -> np.ndarray:
        """Cut patches: pixels uint8 [tile, tile, 3] -> F32 [n, 3 * p * p], group by group."""
        x = cut_patches(pixels, self.config.side, self.config.patch)[self.order]
        return by_table(self.levels, x).reshape(len(x), -1)
