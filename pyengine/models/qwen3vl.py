"""Qwen3-VL whole: decoder, vision encoder with features for the decoder's first layers, image processor, special tokens.

Paper arXiv:2511.21631; DeepStack arXiv:2406.04334. Follows transformers 5.23: `modeling_qwen3_vl.py`, `processing_qwen3_vl.py`,
`image_processing_pil_qwen2_vl.py`, `video_processing_qwen3_vl.py`. The decoder is qwen3's with positions on three axes that take turns over a head's pairs.

    picture -> resized so that both sides are multiples of patch * merge -> patches in groups of merge x merge -> encoder
    -> each group joined to one row of the decoder; groups of some layers' rows too, which are added behind the decoder's first layers

A row of a picture so has 1 + n parts of D numbers: what stands for the token, and what layers 0 .. n - 1 get. Position embeddings are a
square grid that is interpolated to each picture's (bilinear, corners aligned).
differs: pairs that no axis has turn (the last ones, where the sections leave any) turn with time, as in transformers; llama.cpp gives them
a fourth position, which is always 0 for pictures.

A video is pairs of frames, each a run of the encoder as a picture is, and in the prompt the time of each, in seconds, before it:
`<0.5 seconds>` start, rows, end. Positions go on from one pair to the next as behind pictures. As in transformers a list of frames without a
rate has 24 a second. differs: frames are resized by Pillow, as pictures are; transformers has only a torchvision processor for videos. A
single frame is a pair of the same; transformers refuses it.
Axes: m rows of the batch, D hidden; in the encoder n patches, t merged rows, V hidden, H heads, E head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pyengine import ops
from pyengine.dtype import dtype
from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError, UnsupportedModelError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Dim, Tensor
from pyengine.media.image import Image, known_options, resize
from pyengine.media.video import Video
from pyengine.media.views import Limits, Processed, View
from pyengine.models import qwen3
from pyengine.models.architecture import Encoder, EncoderFiles
from pyengine.models.qwen2vl import integers, LIST_FPS, most_rows, smart_resize
from pyengine.nn.batch import Batch
from pyengine.nn.cache import LayerCache
from pyengine.nn.decoder import common, DecoderConfig
from pyengine.nn.encoder import (
    activation, by_table, EncoderAttention, EncoderFeedForward, head_count, levels, mean_and_std, n_layers, projector_type,
    resample_filter, special_token)
from pyengine.nn.layers import constant, LayerNorm, Linear, mlp_width, PatchEmbedding
from pyengine.nn.rope import Rope

# Constants for files without the key; of Qwen/Qwen3-VL-4B-Instruct:
MIN_PIXELS, MAX_PIXELS = 65_536, 16_777_216
VIDEO_PIXELS, VIDEO_FRAMES, VIDEO_FPS = (4096, 25_165_824), (4, 768), 2.0      # of all frames together; sampled of a file, and of a second
HALF, BICUBIC = (0.5, 0.5, 0.5), 3                             # mean and deviation, Pillow's number of the filter
EPS, ROPE_BASE = 1e-6, 10_000.0                                # of the encoder
SPECIAL = (("image_start", "<|vision_start|>"), ("image_end", "<|vision_end|>"), ("image", "<|image_pad|>"), ("video", "<|video_pad|>"))
SLICES = ("patch_embd.weight", "patch_embd.weight.1")                           # of the patch convolution, one a frame


# ---- vision encoder -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VisionConfig:
    """Numbers of one encoder and its processor, from the metadata."""

    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    d_out: int                       # of the decoder
    eps: float
    act: str                         # of ops.unary
    rope_base: float
    deep: tuple[int, ...]            # layers whose rows the decoder's first layers get
    side: int                        # of the grid of position embeddings
    patch: int                       # side in pixels
    merge: int                       # side of a group in patches
    mean: np.ndarray
    std: np.ndarray
    resample: int
    pixels: tuple[int, int]          # least and most of a picture
    video_pixels: tuple[int, int]    # of all frames of a video together
    video_frames: tuple[int, int]    # least and most that are sampled
    video_fps: float                 # frames that are sampled of a second
    sample_lists: bool               # of lists of frames with a rate too, not only of files

    @classmethod
    def read(cls, h: Hparams, v: Hparams, w: Weights) -> VisionConfig:
        """Read the keys "clip.*". Raises: InvalidModelError, UnsupportedModelError."""
        if projector_type(v) != "qwen3vl_merger":
            raise UnsupportedModelError(f"{v.key('projector_type')} is {projector_type(v)!r}; qwen3vl_merger is supported")
        count, d_model = n_layers(v, w), v.size("vision.embedding_length")
        marked = v.get("vision.is_deepstack_layers", np.zeros(count, bool), np.ndarray)
        if len(marked) != count:
            raise InvalidModelError(f"{v.key('vision.is_deepstack_layers')} has {len(marked)} entries for {count} layers")
        places = w["v", "position_embd"].shape("weight") or (0,)
        side = round(places[0] ** 0.5)
        if side * side != places[0]:
            raise InvalidModelError(f"v.position_embd.weight has {places[0]} rows, which are no square")
        mean, std = mean_and_std(v, HALF, HALF)
        return cls(
            n_layers=count, d_model=d_model, d_ff=mlp_width(w["v", "blk", 0], d_model), n_heads=head_count(v, d_model),
            d_out=h.size("embedding_length"), eps=v.number("vision.attention.layer_norm_epsilon", EPS, above=0.0), act=activation(v, "gelu_pytorch_tanh"),
            rope_base=v.number("vision.rope.freq_base", ROPE_BASE, above=0.0), deep=tuple(np.flatnonzero(marked).tolist()), side=side,
            patch=v.size("vision.patch_size"), merge=v.size("vision.spatial_merge_size", 2), mean=mean, std=std,
            resample=resample_filter(v, BICUBIC), pixels=(v.size("vision.image_min_pixels", MIN_PIXELS), v.size("vision.image_max_pixels", MAX_PIXELS)),
            video_pixels=(v.size("vision.video_min_pixels", VIDEO_PIXELS[0]), v.size("vision.video_max_pixels", VIDEO_PIXELS[1])),
            video_frames=(v.size("vision.video_min_frames", VIDEO_FRAMES[0]), v.size("vision.video_max_frames", VIDEO_FRAMES[1])),
            video_fps=v.number("vision.video_fps", VIDEO_FPS, above=0.0), sample_lists=v.get("vision.video_sample_frames", False, bool))


class Merger:
    """Groups of rows joined, and two products with a GELU between."""

    def __init__(self, first: Weights, second: Weights, c: VisionConfig):
        self.wide = c.d_model * c.merge**2
        self.first, self.second = Linear(first, self.wide, self.wide), Linear(second, self.wide, c.d_out)

    def __call__(self, x: Tensor) -> Tensor:                                               # [t, V * merge^2] -> [t, D]
        return self.second(ops.gelu(self.first(x)))


class VisionBlock:
    """Attention of all patches of a picture and a feed-forward, each behind a layer norm and added to its input."""

    def __init__(self, w: Weights, c: VisionConfig):
        self.ln1, self.ln2 = LayerNorm(w["ln1"], c.d_model, c.eps), LayerNorm(w["ln2"], c.d_model, c.eps)
        self.attention = EncoderAttention(w, c.d_model, c.n_heads)
        self.feed_forward = EncoderFeedForward(w, c.d_model, c.d_ff, c.act)

    def __call__(self, x: Tensor, angles: Tensor, lo: Tensor, hi: Tensor) -> Tensor:       # [n, V]
        x = x + self.attention(self.ln1(x), lo, hi, lambda t: ops.rope(t, angles))
        return x + self.feed_forward(self.ln2(x))


class Vision(Encoder):
    """Encoder, mergers, processor and special tokens. Nothing about a picture is kept here."""

    def __init__(self, files: EncoderFiles):
        h, v, w, token = files
        c = self.config = VisionConfig.read(h, v, w)
        self.start, self.end, *soft = (special_token(v, name, token, text) for name, text in SPECIAL)
        self.markers = {kind: (self.start, one, self.end) for kind, one in zip(("image", "video"), soft)}
        self.levels = levels(c.mean, c.std)                                    # [3, 256]
        half = c.d_model // c.n_heads // 2
        inv_freq = 1.0 / c.rope_base ** (np.arange(0, half, 2, dtype=np.float32) / half)
        self.inv_freq = np.concatenate([inv_freq, inv_freq]).astype(np.float32)                      # height, then width: [E / 2]
        self.axes = np.repeat(np.arange(2, dtype=np.int32), len(inv_freq))
        self.embed = PatchEmbedding(w["v"], c.d_model, 3, c.patch, SLICES)
        bias = w["v", "patch_embd"].optional("bias", (c.d_model,))
        self.embed.bias = constant(bias, dtype("F32")) if bias else None
        self.places = constant(w["v", "position_embd"].tensor("weight", (c.side**2, c.d_model)), dtype("F32"))
        self.blocks = [VisionBlock(w["v", "blk", i], c) for i in range(c.n_layers)]
        self.norm, self.merger = LayerNorm(w["v", "post_ln"], c.d_model, c.eps), Merger(w["mm", 0], w["mm", 2], c)
        deep = {i: w["v", "deepstack", i] for i in c.deep}
        self.deep = {i: (LayerNorm(own["norm"], c.d_model * c.merge**2, c.eps), Merger(own["fc1"], own["fc2"], c)) for i, own in deep.items()}

    def most_rows(self, n_ctx: int) -> int:
        """Return the rows of the largest picture that the processor makes, which the context must hold."""
        c = self.config
        return min(n_ctx, most_rows(*c.pixels, c.patch * c.merge))

    def declare(self, g: Graph, rows: int) -> Tensor:
        """Declare the inputs and return rows for the decoder, F32 [t, D * (1 + layers that get their own)]."""
        c = self.config
        n, wide = Dim("t", rows) * c.merge**2, c.d_model * c.merge**2
        x = self.embed(g.input("patches", (n, 3 * len(SLICES) * c.patch**2)))                      # [n, V]
        for tap in range(4):
            x = x + ops.rows(self.places, g.input(f"tap{tap}", (n,), "I32")) * g.input(f"weight{tap}", (n, 1))
        angles = ops.rope_table(g.input("positions", (2, n), "I32"), self.inv_freq, self.axes)     # [n, E]
        lo, hi = (g.input(name, (n,), "I32") for name in ("lo", "hi"))
        parts: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            x = block(x, angles, lo, hi)
            if i in self.deep:
                norm, merger = self.deep[i]
                parts.append(merger(norm(x.reshape(-1, wide))))
        y = self.merger(self.norm(x).reshape(-1, wide))                                            # [t, D]
        return ops.concat([y, *parts], axis=1) if parts else y

    # -- processor ------------------------------------------------------------------------------------------------------------

    def n_rows(self, width: int, height: int) -> int:
        """Return the soft tokens of a picture of this size."""
        factor = self.config.patch * self.config.merge
        h, w = smart_resize(height, width, factor, *self.config.pixels)
        return h // factor * (w // factor)

    def process(self, media: Image | Video, limits: Limits) -> Processed:
        """Turn a picture or a video into the encoder's inputs. A file is sampled; a list of frames only if the processor does so.

        Options: min_pixels and max_pixels, of a picture, or of all frames together; sample_fps, frames to take of a second of a video.
        Raises: ContextOverflowError if its rows exceed the context, RequestError.
        """
        moving = isinstance(media, Video)
        known_options(media.options, "min_pixels", "max_pixels", *(["sample_fps"] if moving else []))
        c, (width, height) = self.config, media.size
        low, high = c.video_pixels if moving else c.pixels
        low, high = media.options.get("min_pixels", low), media.options.get("max_pixels", high)
        factor, numbers = c.patch * c.merge, self._frames(media) if moving else []
        h, w = video_resize(len(numbers), height, width, factor, low, high) if moving else smart_resize(height, width, factor, low, high)
        pairs = [numbers[i : i + 2] for i in range(0, len(numbers), 2)]
        lines, columns = h // factor, w // factor
        rows, runs, what = lines * columns, len(pairs) or 1, "video" if moving else "picture"
        if rows * runs > limits.n_ctx:
            raise ContextOverflowError(f"a {what} of {width} x {height} pixels takes {rows * runs} positions, but the context holds {limits.n_ctx}; load "
                                       f"with a larger n_ctx, or give a smaller max_pixels{' or sample_fps' if moving else ''}")
        if rows > limits.rows:
            raise RequestError(f"a {what} of {width} x {height} pixels takes {rows} soft tokens a run, but this model was planned for pictures of up to "
                               f"{limits.rows}, {limits.rows * factor**2} pixels; give a smaller max_pixels, or load with images=({width}, {height})")
        y, x = np.divmod(np.arange(rows), columns)                             # of each merged row
        places = np.stack([np.zeros(rows), y, x]).astype(np.int32)

        def view(chosen: list[int]) -> View:
            return View(lambda: self._inputs(media, chosen, h, w), {"t": rows}, places, max(lines, columns), (1, lines, columns))

        if not moving:
            return Processed((self.start, view([]), self.end), (width, height), (w, h))
        fps = np.float64(media.fps or LIST_FPS)
        seconds = [(pair[0] / fps + pair[-1] / fps) / 2 for pair in pairs]
        parts = (part for pair, at in zip(pairs, seconds) for part in (f"<{at:.1f} seconds>", self.start, view(pair), self.end))
        return Processed(tuple(parts), (width, height), (w, h))

    def _frames(self, video: Video) -> list[int]:
        """Choose the numbers of the frames to take. Source: `sample_frames` in transformers' `video_processing_qwen3_vl.py`."""
        c, total, fps = self.config, len(video), video.fps or LIST_FPS
        whole = isinstance(video.frames, tuple) and not (c.sample_lists and video.fps)
        wanted = video.options.get("sample_fps", None if whole else c.video_fps)
        if wanted is None:
            return list(range(total))
        if isinstance(wanted, bool) or not isinstance(wanted, (int, float)) or not wanted > 0:
            raise RequestError(f"sample_fps={wanted!r}: must be a number above 0")
        n = min(max(int(total / fps * wanted), c.video_frames[0]), c.video_frames[1], total)
        return np.linspace(0, total - 1, n).round().astype(int).tolist()

    def _inputs(self, media: Image | Video, numbers: list[int], h: int, w: int) -> dict[str, np.ndarray]:
        """Resize a picture, or frames of these numbers, and cut them into patches, those of a merged row one after another.

        A patch has two frames: the same where there is one.
        """
        c, m, p = self.config, self.config.merge, self.config.patch
        lines, columns = h // p // m, w // p // m
        n = lines * columns * m * m
        frames = [resize(f.pixels, h, w, c.resample) for f in (media.read(numbers) if isinstance(media, Video) else [media])]
        cut = [f.reshape(lines, m, p, columns, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5).reshape(n, 3, p * p) for f in frames]
        both = [by_table(self.levels, f) for f in cut]
        patches = np.stack([both[0], both[-1]], axis=2).reshape(n, -1)                             # [n, 3, frames, p * p]
        line, column = np.divmod(np.arange(lines * columns), columns)
        inner = np.stack(np.divmod(np.arange(m * m), m))                       # [2, m * m]
        positions = (np.stack([line, column])[..., None] * m + inner[:, None]).reshape(2, n).astype(np.int32)
        lo, hi = np.zeros(n, np.int32), np.full(n, n, np.int32)
        return {"patches": patches, "positions": positions, "lo": lo, "hi": hi, **self._taps(positions, lines * m, columns * m)}

    def _taps(self, positions: np.ndarray, height: int, width: int) -> dict[str, np.ndarray]:
        """Return the four embeddings that each patch's place lies between, and their weights, in float32.

        Source: `get_vision_interpolation_indices_and_weights` in transformers' `vision_utils.py`.
        """
        side, found = self.config.side, []
        for index, size in zip(positions, (height, width)):
            at = index.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
            low = np.floor(at)
            taps = np.clip(np.stack([low, low + 1]).astype(np.int64), 0, side - 1)
            found.append((taps, np.maximum(1 - np.abs(at - low - np.arange(2, dtype=np.float32)[:, None]), 0).astype(np.float32)))
        (rows, down), (columns, across) = found
        made: dict[str, np.ndarray] = {}
        for tap, (i, j) in enumerate(np.ndindex(2, 2)):
            made[f"tap{tap}"] = (rows[i] * side + columns[j]).astype(np.int32)
            made[f"weight{tap}"] = (down[i] * across[j])[:, None]
        return made


def video_resize(n: int, height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Compute the size of a video's n frames: as `smart_resize`, with limits of the pixels of all frames together.

    Source: `smart_resize` in transformers' `video_processing_qwen3_vl.py`. Raises: RequestError.
    """
    n = max(n, 2)
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    smart_resize(height, width, factor, least, most)                           # refuses what no size fits
    h, w, t = round(height / factor) * factor, round(width / factor) * factor, round(n / 2) * 2
    if t * h * w > most:
        beta = math.sqrt(n * height * width / most)
        h, w = (max(factor, math.floor(s / beta / factor) * factor) for s in (height, width))
    elif t * h * w < least:
        beta = math.sqrt(least / (n * height * width))
        h, w = (math.ceil(s * beta / factor) * factor for s in (height, width))
    return h, w


# ---- decoder ----------------------------------------------------------------------------------------------------------------


class Model(qwen3.Model):
    """qwen3's decoder with positions on three axes, and features of pictures behind its first layers."""

    position_axes = 3                # time, height, width

    def __init__(self, h: Hparams, w: Weights):
        super().__init__(h, w)
        self.n_deep = h.get("n_deepstack_layers", 0, int)
        name, pairs = "rope.dimension_sections", len(self.rope.rope.inv_freq)
        sections = integers(h, name)
        if len(sections) not in (3, 4) or sum(sections) > pairs or not 0 <= self.n_deep <= self.config.n_layers:
            raise InvalidModelError(f"{h.key(name)} is {sections} for {pairs} pairs, and {self.n_deep} layers get features")
        self.axes = np.zeros(pairs, np.int32)                                  # of each frequency: time, height, width in turns
        for axis in (1, 2):
            self.axes[axis : 3 * sections[axis] : 3] = axis

    @staticmethod
    def read(h: Hparams, w: Weights) -> DecoderConfig:
        """Read the keys "qwen3vl.*"."""
        h.refuse(attention__sliding_window="a sliding window", expert_count="a mixture of experts")
        return DecoderConfig(**common(h, w))

    @property
    def media_width(self) -> int:
        """Numbers of a picture's row: the token's, and those of each layer that gets some."""
        return self.config.d_model * (1 + self.n_deep)

    @classmethod
    def encoders(cls, files: EncoderFiles) -> dict[str, Encoder]:
        """Bind the encoder, where the files hold it."""
        return {"image": Vision(files)}

    def forward(self, batch: Batch, caches: list[LayerCache]) -> Tensor:
        """Return last hidden states [m, D]."""
        d = self.config.d_model
        parts = [] if batch.media is None else [
            ops.contiguous(ops.slice(batch.media, axis=1, start=i * d, stop=(i + 1) * d)) for i in range(1 + self.n_deep)]     # [e, D] each
        x = self.embed(batch.ids, parts[0] if parts else None)                 # [m, D]
        rope, angles = self.rotation(batch)
        nothing = np.zeros((1, d), np.float32)
        for i, (block, cache) in enumerate(zip(self.blocks, caches)):
            x = block(x, rope, angles, cache)
            if i + 1 < len(parts):
                x = x + ops.rows(nothing, batch.places, parts[i + 1])          # rows of text get nothing
        return self.norm(x)

    def rotation(self, batch: Batch) -> tuple[Rope, Tensor]:
        """Return the rotation, and its angles of each row, [m, E]."""
        rope = self.rope.at(batch.n_ctx)
        return rope, ops.rope_table(batch.positions, rope.inv_freq, self.axes, scale=rope.scale)
