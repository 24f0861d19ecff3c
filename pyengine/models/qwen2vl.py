"""Qwen2-VL and Qwen2.5-VL whole: decoder, vision encoder, patch merger, image and video processor, special tokens.

Papers arXiv:2409.12191 and arXiv:2502.13923. Follows transformers 5.23: `modeling_qwen2_vl.py`, `modeling_qwen2_5_vl.py`,
`image_processing_pil_qwen2_vl.py`, `video_processing_qwen2_vl.py`. The decoder is qwen2's with positions on three axes (M-RoPE).

    picture -> resized so that both sides are multiples of patch * merge -> patches in groups of merge x merge, windows in a row
    -> encoder -> each group joined to one row of the decoder

The encoder's rows are put into window order on the host, once, so that a window is an interval of rows: attention takes two
numbers a row, and windows of partial size at the edges need no padding. Nothing attends across time steps of a video, so
a long video is encoded in several runs.

transformers and the authors' own code (modeling of the first release; qwen-vl-utils) disagree; we do as transformers does:
- text after a video starts at the video's start + max(height, width) in merged patches; the authors let it start after the
  greatest position of the three axes, which is later when a video lasts longer than it is wide (pictures: no difference);
- a list of frames without a rate has 24 frames a second; the authors assume 2;
- each frame of a video may have up to video_max_pixels; the authors also limit the sum over frames.
Frames of videos are resized by Pillow as pictures are (and as the authors do with lists of frames). transformers has only a
torchvision processor for videos, which rounds differently: by 1/255 here and there, by more in noise.
Files of a video are sampled as the authors do, 2 frames a second (transformers samples only if it is asked to).
Axes: m rows of the batch, D hidden; in the encoder n patches, t merged rows, V hidden, H heads, E head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pyengine import ops
from pyengine.media.views import Limits, Processed, View
from pyengine.nn.batch import Batch
from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError, UnsupportedModelError
from pyengine.graph.graph import Graph
from pyengine.files.hparams import Hparams
from pyengine.media.image import Image, known_options, resize
from pyengine.media.video import Video
from pyengine.nn.cache import LayerCache
from pyengine.models import qwen2
from pyengine.models.architecture import Encoder, EncoderFiles
from pyengine.nn.encoder import (
    activation, by_table, EncoderAttention, EncoderFeedForward, head_count, levels, mean_and_std, n_layers, projector_type, resample_filter,
    special_token)
from pyengine.nn.layers import LayerNorm, Linear, mlp_width, PatchEmbedding, RMSNorm
from pyengine.graph.tensor import Dim, Tensor
from pyengine.files.weights import Weights

# Constants for files without the key; of Qwen/Qwen2-VL-7B-Instruct and Qwen/Qwen2.5-VL-7B-Instruct:
MIN_PIXELS, MAX_PIXELS = 56 * 56, 28 * 28 * 16384              # preprocessor_config.json; transformers reads it for videos too
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TOKENS_PER_SECOND = 2.0                                        # config.json of Qwen2.5-VL
VIDEO_FPS = 2.0                                                # qwen-vl-utils, FPS
MIN_FRAMES, MAX_FRAMES = 4, 768                                # transformers Qwen2VLVideoProcessor
LIST_FPS = 24.0                                                # transformers VideoMetadata.sampled_fps
BICUBIC = 3                                                    # Pillow's number
MAX_ASPECT = 200                                               # transformers smart_resize

SPECIAL = (("image_start", "<|vision_start|>"), ("image_end", "<|vision_end|>"), ("image", "<|image_pad|>"),
           ("video", "<|video_pad|>"))
SLICES = ("patch_embd.weight", "patch_embd.weight.1")                           # of the patch convolution, one a frame
PROJECTORS = {"qwen2vl_merger": False, "qwen2.5vl_merger": True}                # name -> is it Qwen2.5-VL's


# ---- vision encoder -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VisionConfig:
    """Numbers of one encoder and its processor, from the metadata."""

    qwen25: bool                     # RMS norms and a gated MLP; otherwise layer norms and a plain one
    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    d_out: int                       # of the decoder
    eps: float
    rope_base: float
    act: str                         # of ops.unary
    full: tuple[bool, ...]           # per layer: attention over the whole time step, not over windows
    window: int                      # side of a window in merged patches
    patch: int                       # side in pixels
    depth: int                       # frames that a patch spans
    merge: int                       # side of a group in patches
    mean: np.ndarray
    std: np.ndarray
    resample: int
    pixels: tuple[int, int]          # least and most of a picture
    video_pixels: tuple[int, int]    # of a frame
    video_fps: float                 # frames that are sampled of a second
    sample_lists: bool               # of lists of frames with a rate too, not only of files
    video_frames: tuple[int, int]    # least and most that are sampled
    time_scale: float | None         # positions on the time axis per second; None: one a time step (Qwen2-VL)

    @classmethod
    def read(cls, h: Hparams, v: Hparams, w: Weights) -> VisionConfig:
        """Read the keys "clip.*". Raises: InvalidModelError, UnsupportedModelError."""
        projector = projector_type(v)
        if projector not in PROJECTORS:
            raise UnsupportedModelError(f"{v.key('projector_type')} is {projector!r}; {', '.join(PROJECTORS)} are supported")
        qwen25 = PROJECTORS[projector]
        full = _full_layers(v, n_layers(v, w), qwen25)
        act, d_model = activation(v, "gelu_pytorch_tanh"), v.size("vision.embedding_length")
        n_heads = head_count(v, d_model)
        patch, merge = v.size("vision.patch_size", 14), v.size("vision.spatial_merge_size", 2)
        window = v.size("vision.window_size", 112) // merge // patch if not all(full) else 1
        if not window:
            raise InvalidModelError(f"{v.key('vision.window_size')} is smaller than {merge} patches of {patch} pixels")
        low, high = v.size("vision.image_min_pixels", MIN_PIXELS), v.size("vision.image_max_pixels", MAX_PIXELS)
        mean, std = mean_and_std(v, MEAN, STD)
        return cls(
            qwen25=qwen25,
            n_layers=len(full),
            d_model=d_model,
            d_ff=mlp_width(w["v", "blk", 0], d_model),
            n_heads=n_heads,
            d_out=h.size("embedding_length"),
            eps=v.number("vision.attention.layer_norm_epsilon", 1e-6, above=0.0),
            rope_base=v.number("vision.rope.freq_base", 10_000.0, above=0.0),
            act=act,
            full=full,
            window=window,
            patch=patch,
            depth=v.size("vision.temporal_patch_size", 2),
            merge=merge,
            mean=mean,
            std=std,
            resample=resample_filter(v, BICUBIC),
            pixels=(low, high),
            video_pixels=(v.size("vision.video_min_pixels", low), v.size("vision.video_max_pixels", high)),
            video_fps=v.number("vision.video_fps", VIDEO_FPS, above=0.0),
            sample_lists=v.get("vision.video_sample_frames", False, bool),
            video_frames=(v.size("vision.video_min_frames", MIN_FRAMES), v.size("vision.video_max_frames", MAX_FRAMES)),
            time_scale=v.number("vision.tokens_per_second", TOKENS_PER_SECOND, above=0.0) if qwen25 else None,
        )


def integers(h: Hparams, name: str) -> list[int]:
    """Read an array of whole numbers. Raises: InvalidModelError for a missing key and for other values."""
    value = h.need(name, np.ndarray)
    if value.dtype.kind not in "iu" or np.any(value < 0):
        raise InvalidModelError(f"{h.key(name)}: must hold whole numbers from 0 on")
    return [int(i) for i in value]


def _full_layers(v: Hparams, n: int, qwen25: bool) -> tuple[bool, ...]:
    """Read which layers have full attention: a list of their numbers, or every n-th one; in Qwen2-VL all."""
    if not qwen25:
        return (True,) * n
    if "vision.wa_layer_indexes" in v:
        numbers = integers(v, "vision.wa_layer_indexes")
        return tuple(i in numbers for i in range(n))
    period = v.size("vision.n_wa_pattern")
    return tuple((i + 1) % period == 0 for i in range(n))


@dataclass(frozen=True)
class Geometry:
    """What a layer must know of the encoder's rows: angles F32 [n, E], and the interval of rows that each one sees, I32 [n]."""

    angles: Tensor
    lo: Tensor
    hi: Tensor


class VisionBlock:
    """Attention within intervals of rows and an MLP, each after a norm and added to its input."""

    def __init__(self, w: Weights, c: VisionConfig):
        norm = RMSNorm if c.qwen25 else LayerNorm
        self.ln1, self.ln2 = norm(w["ln1"], c.d_model, c.eps), norm(w["ln2"], c.d_model, c.eps)
        self.attention = EncoderAttention(w, c.d_model, c.n_heads)
        self.feed_forward = EncoderFeedForward(w, c.d_model, c.d_ff, c.act, gated=c.qwen25)

    def __call__(self, x: Tensor, geometry: Geometry) -> Tensor:                           # [n, V]
        x = x + self.attention(self.ln1(x), geometry.lo, geometry.hi, lambda t: ops.rope(t, geometry.angles))
        return x + self.feed_forward(self.ln2(x))


class Vision(Encoder):
    """Encoder, merger, processor and special tokens. Nothing about a picture is kept here."""

    atomic_rows = 0                                                            # rows of pictures are causal and may be cut

    def __init__(self, files: EncoderFiles):
        h, v, w, token = files
        c = self.config = VisionConfig.read(h, v, w)
        self.start, self.end, self.soft, self.soft_video = (special_token(v, name, token, text) for name, text in SPECIAL)
        self.markers = {kind: (self.start, soft, self.end) for kind, soft in (("image", self.soft), ("video", self.soft_video))}
        self.levels = levels(c.mean, c.std)                                    # [3, 256]
        half = c.d_model // c.n_heads // 2
        inv_freq = 1.0 / c.rope_base ** (np.arange(0, half, 2, dtype=np.float32) / half)
        self.inv_freq = np.concatenate([inv_freq, inv_freq]).astype(np.float32)                      # height, then width: [E / 2]
        self.axes = np.repeat(np.arange(2, dtype=np.int32), len(inv_freq))
        if c.depth != len(SLICES):
            raise UnsupportedModelError(f"{v.key('vision.temporal_patch_size')} is {c.depth}; files hold {len(SLICES)} slices")
        self.embed = PatchEmbedding(w["v"], c.d_model, 3, c.patch, SLICES)
        self.blocks = [VisionBlock(w["v", "blk", i], c) for i in range(c.n_layers)]
        d_group = c.d_model * c.merge**2
        self.norm = (RMSNorm if c.qwen25 else LayerNorm)(w["v", "post_ln"], c.d_model, c.eps)
        self.first, self.second = Linear(w["mm", 0], d_group, d_group), Linear(w["mm", 2], d_group, c.d_out)

    def most_rows(self, n_ctx: int) -> int:
        """Return the rows of the largest picture or time step that the processor makes, which the context must hold."""
        c = self.config
        return min(n_ctx, max(most_rows(*limits, c.patch * c.merge) for limits in (c.pixels, c.video_pixels)))

    def declare(self, g: Graph, rows: int) -> Tensor:
        """Declare the inputs and return rows for the decoder, F32 [t, D]."""
        c = self.config
        t = Dim("t", rows)
        n = t * c.merge**2
        x = self.embed(g.input("patches", (n, 3 * c.depth * c.patch**2)))                          # [n, V]
        angles = ops.rope_table(g.input("positions", (2, n), "I32"), self.inv_freq, self.axes)     # [n, E]
        geometry = {full: Geometry(angles, *(g.input(f"{'step' if full else 'window'}.{end}", (n,), "I32") for end in ("lo", "hi")))
                for full in sorted(set(c.full))}
        for block, full in zip(self.blocks, c.full):
            x = block(x, geometry[full])
        x = self.norm(x).reshape(-1, c.d_model * c.merge**2)                                       # [t, V * merge^2]
        x = self.second(ops.gelu(self.first(x)))                                                   # [t, D], in window order
        return x if all(c.full) else ops.rows(x, g.input("order", (t,), "I32"))

    # -- processor ------------------------------------------------------------------------------------------------------------

    def sample(self, total: int, fps: float, wanted: float) -> np.ndarray:
        """Choose the numbers of the frames that give about `wanted` a second of `total` frames at `fps`; all if they are too few.

        Source: `sample_frames` in transformers' `video_processing_qwen2_vl.py`, which takes their numbers in float32.
        """
        if not wanted > 0:
            raise RequestError(f"sample_fps={wanted!r}: must be a number above 0")
        c = self.config
        least, most = c.video_frames
        n = min(max(total / fps * wanted, least), min(most, total) // c.depth * c.depth)
        n = math.floor(n / c.depth) * c.depth
        return np.arange(0, total, total / n).astype(np.float32).astype(np.int64) if n else np.arange(total)

    def n_rows(self, width: int, height: int) -> int:
        """Return the soft tokens of a picture of this size."""
        factor = self.config.patch * self.config.merge
        h, w = smart_resize(height, width, factor, *self.config.pixels)
        return h // factor * (w // factor)

    def process(self, media: Image | Video, limits: Limits) -> Processed:
        """Turn a picture or a video into the encoder's inputs. A file is sampled; a list of frames only if the processor does so.

        Options: min_pixels and max_pixels, of a picture or of each frame; sample_fps, frames to take of a second of a video.
        Raises: ContextOverflowError if its rows exceed the context, RequestError, ImageError.
        """
        c = self.config
        moving = isinstance(media, Video)
        known_options(media.options, "min_pixels", "max_pixels", *(["sample_fps"] if moving else []))
        low, high = c.video_pixels if moving else c.pixels
        low, high = media.options.get("min_pixels", low), media.options.get("max_pixels", high)
        numbers, interval = self._frames(media) if moving else (np.arange(1), np.float32(1))
        factor = c.patch * c.merge
        width, height = media.size
        h, w = smart_resize(height, width, factor, low, high)
        steps, rows = -(-len(numbers) // c.depth), h // factor * (w // factor)
        if steps * rows > limits.n_ctx:
            raise ContextOverflowError(f"a {'video' if moving else 'picture'} of {width} x {height} pixels takes {steps * rows} "
                                       f"positions, but the context holds {limits.n_ctx}; load with a larger n_ctx, "
                                       "or give a smaller max_pixels")
        if rows > limits.rows:
            larger = f", or load with images=({width}, {height})" if self.n_rows(width, height) > limits.rows else ""
            raise RequestError(f"a picture of {width} x {height} pixels takes {rows} soft tokens, but this model was planned for pictures of up "
                               f"to {limits.rows}, {limits.rows * factor**2} pixels; give a smaller max_pixels{larger}")
        run = limits.rows // rows                                            # time steps of one run of the encoder
        views = [self._view(media, numbers[first * c.depth : (first + run) * c.depth], (h, w), first, interval, first + run >= steps)
                 for first in range(0, steps, run)]
        return Processed((self.start, *views, self.end), (width, height), (w, h))

    def _frames(self, video: Video) -> tuple[np.ndarray, np.float32]:
        """Choose the numbers of the frames to take, and say how many positions of the time axis lie between two time steps."""
        c, total = self.config, len(video)
        fps = video.fps or LIST_FPS
        whole = isinstance(video.frames, tuple) and not (c.sample_lists and video.fps)
        wanted = video.options.get("sample_fps", None if whole else c.video_fps)
        numbers = np.arange(total) if wanted is None else self.sample(total, fps, wanted)
        seconds = np.float32(c.depth / (len(numbers) / total * fps))           # of a time step
        return numbers, np.float32(1) if c.time_scale is None else np.float32(c.time_scale) * seconds

    def _view(self, media: Image | Video, numbers: np.ndarray, size: tuple[int, int], first: int, interval: np.float32, last: bool) -> View:
        """Make a run of the encoder over frames of these numbers, resized to `size` (height, width), from time step `first` on."""
        c = self.config
        steps, (height, width) = -(-len(numbers) // c.depth), (s // c.patch // c.merge for s in size)       # in merged rows
        rows = height * width
        time = (np.arange(first, first + steps, dtype=np.float32) * interval).astype(np.int32)
        y, x = np.divmod(np.arange(rows), width)                               # of each merged row
        places = np.stack([np.repeat(time, rows), np.tile(y, steps), np.tile(x, steps)]).astype(np.int32)
        return View(lambda: self._inputs(media, numbers, size), {"t": steps * rows}, places, max(height, width) if last else 0,
                    (steps, height, width))

    def _inputs(self, media: Image | Video, numbers: np.ndarray, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """Read frames, resize them, cut them into patches; the last frame is repeated to fill its time step."""
        c = self.config
        read = media.read(numbers) if isinstance(media, Video) else [media]
        frames = np.stack([resize(f.pixels, *size, c.resample) for f in read])
        frames = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % c.depth, axis=0)])
        steps, group = len(frames) // c.depth, c.merge**2
        height, width = (s // c.patch // c.merge for s in size)
        rows = height * width
        y, x = np.divmod(np.arange(rows), width)                               # of each merged row
        order, counts = np.arange(rows), np.array([rows])
        if not all(c.full):
            window = y // c.window * -(-width // c.window) + x // c.window
            order, counts = np.argsort(window, kind="stable"), np.bincount(window)
        inner = np.stack(np.divmod(np.arange(group), c.merge))                 # [2, merge^2]
        positions = np.stack([y, x])[:, order, None] * c.merge + inner[:, None]
        inputs = {"patches": self._patches(frames, order), "positions": np.tile(positions.reshape(2, -1), steps).astype(np.int32)}
        if any(c.full):
            inputs["step.lo"], inputs["step.hi"] = _intervals(np.full(steps, rows * group))
        if not all(c.full):
            inputs["window.lo"], inputs["window.hi"] = _intervals(np.tile(counts * group, steps))
            inputs["order"] = (np.arange(steps)[:, None] * rows + np.argsort(order)).reshape(-1).astype(np.int32)
        return inputs

    def _patches(self, frames: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Cut frames uint8 [steps * depth, h, w, 3] -> F32 [steps * patches, 3 * depth * patch^2], each step's rows in `order`."""
        c = self.config
        steps, height, width = len(frames) // c.depth, frames.shape[1] // c.patch // c.merge, frames.shape[2] // c.patch // c.merge
        a = frames.reshape(steps, c.depth, height, c.merge, c.patch, width, c.merge, c.patch, 3)
        a = a.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)                             # step, rows, columns, inner, channel, frame, y, x
        a = a.reshape(steps, height * width, c.merge**2, 3, -1)[:, order]
        return by_table(self.levels, a).reshape(-1, 3 * c.depth * c.patch**2)


def _intervals(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and one past the last row of the run of rows that each row lies in."""
    ends = np.cumsum(counts)
    return np.repeat(ends - counts, counts).astype(np.int32), np.repeat(ends, counts).astype(np.int32)


def smart_resize(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Compute the size to which a picture is resized: multiples of `factor`, from `least` to `most` pixels, nearly the same shape.

    Sides are rounded half to even. Source: `smart_resize` in transformers' `image_processing_pil_qwen2_vl.py`.
    Raises: RequestError for a picture that is more than 200 times as long as wide, and for impossible limits.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise RequestError(f"a picture of {width} x {height} pixels: one side may be at most {MAX_ASPECT} times the other")
    if not all(type(n) is int and 0 < n for n in (least, most)):
        raise RequestError(f"min_pixels={least}, max_pixels={most}: must be whole numbers above 0")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > most:
        beta = math.sqrt(height * width / most)
        h, w = (max(factor, math.floor(s / beta / factor) * factor) for s in (height, width))
    elif h * w < least:
        beta = math.sqrt(least / (height * width))
        h, w = (math.ceil(s * beta / factor) * factor for s in (height, width))
    return h, w


def most_rows(least: int, most: int, factor: int) -> int:
    """Count the most squares of factor x factor pixels that `smart_resize` can give with these limits.

    Its limits are exceeded by narrow pictures, whose short side is rounded up to `factor`, and by small ones, both of whose
    sides are rounded up. A picture of `area` pixels is at most sqrt(200 * area) long.
    """
    long, short = math.sqrt(MAX_ASPECT * least) / factor, math.sqrt(least / MAX_ASPECT) / factor
    return max(most // factor**2, math.ceil(math.sqrt(MAX_ASPECT * most) / factor), math.ceil((long + 1) * (short + 1)))


# ---- decoder ----------------------------------------------------------------------------------------------------------------


class Model(qwen2.Model):
    """qwen2's decoder with positions on three axes."""

    position_axes = 3                # time, height, width

    def __init__(self, h: Hparams, w: Weights):
        super().__init__(h, w)
        name = "rope.dimension_sections"
        sections, pairs = integers(h, name), len(self.rope.rope.inv_freq)
        if len(sections) not in (3, 4) or any(sections[3:]) or sum(sections) != pairs:
            raise InvalidModelError(f"{h.key(name)} is {sections}: three numbers that add up to {pairs} are needed")
        self.axes = np.repeat(np.arange(3, dtype=np.int32), sections[:3])      # of each frequency

    @classmethod
    def encoders(cls, files: EncoderFiles) -> dict[str, Encoder]:
        """Bind the encoder, where the files hold it."""
        return {"image": Vision(files)}

    def forward(self, batch: Batch, caches: list[LayerCache]) -> Tensor:
        """Return last hidden states [m, D]."""
        x = self.embed(batch.ids, batch.media)                                 # [m, D]
        rope = self.rope.at(batch.n_ctx)
        angles = ops.rope_table(batch.positions, rope.inv_freq, self.axes, scale=rope.scale)               # [m, E]
        for block, cache in zip(self.blocks, caches):
            x = block(x, rope, angles, cache)
        return self.norm(x)
