"""Florence-2's encoder: DaViT, four stages that see the picture through windows and through channels, and a projector whose first row is
the mean of all others.

Papers arXiv:2311.06242, arXiv:2204.03645 (DaViT). Follows transformers 5.23: `modeling_florence2.py`, `processing_florence2.py`.

    picture -> resized to a square -> each stage: a convolution that shrinks the grid, with a norm before or behind it; then blocks
    block   -> over windows, then over channels: a depthwise convolution is added to its input, attention behind a norm is added,
               a second depthwise convolution and a feed-forward behind a norm likewise
    rows    -> embeddings of line and column, and of time (a picture is its first frame) -> [mean, rows] -> a product, a norm

Windows at the right and lower edge are filled up with zeros behind the norm, which are seen as rows are. Channels attend to channels of their
group: scores are products over all places, scaled by their number ** -0.5. The rows stand before the prompt, BOS included, in BART's encoder.
A prompt that is a task, as "<OD>", is read as its sentence. llama.cpp does not have this model: names and keys are ours.
Axes: n places of a grid, C channels, H heads, G groups, c channels of a group, D hidden of the text model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TYPE_CHECKING

import numpy as np

from pyengine import ops
from pyengine.errors import InvalidModelError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import DerivedRef, Weights
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Tensor
from pyengine.media.views import Limits, Processed, View
from pyengine.models.architecture import Encoder, EncoderFiles, Task
from pyengine.nn.convolution import Conv2d, DepthwiseConv
from pyengine.nn.encoder import (
    EncoderAttention, EncoderFeedForward, image_marker, known_activation, levels, mean_and_std, only_pictures, resample_filter, whole_numbers)
from pyengine.nn.layers import constant, LayerNorm, Linear, mlp_width

if TYPE_CHECKING:
    from pyengine.media.image import Image
    from pyengine.media.video import Video

# Constants for files without the key: the authors' preprocessor_config.json
MEAN, STD, BICUBIC = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 3
EPS = 1e-5                           # torch's default

# `Florence2Processor`: what each task asks, and how its answer names places (`chat/regions`)
TASKS = {
    "<OCR>": Task("What is the text in the image?"),
    "<OCR_WITH_REGION>": Task("What is the text in the image, with regions?", "quads"),
    "<CAPTION>": Task("What does the image describe?"),
    "<DETAILED_CAPTION>": Task("Describe in detail what is shown in the image."),
    "<MORE_DETAILED_CAPTION>": Task("Describe with a paragraph what is shown in the image."),
    "<OD>": Task("Locate the objects with category name in the image.", "boxes"),
    "<DENSE_REGION_CAPTION>": Task("Locate the objects in the image, with their descriptions.", "boxes"),
    "<REGION_PROPOSAL>": Task("Locate the region proposals in the image.", "bare boxes"),
    "<CAPTION_TO_PHRASE_GROUNDING>": Task("Locate the phrases in the caption: {input}", "phrases"),
    "<REFERRING_EXPRESSION_SEGMENTATION>": Task("Locate {input} in the image with mask", "bare polygons"),
    "<REGION_TO_SEGMENTATION>": Task("What is the polygon mask of region {input}", "bare polygons"),
    "<OPEN_VOCABULARY_DETECTION>": Task("Locate {input} in the image.", "boxes or polygons"),
    "<REGION_TO_CATEGORY>": Task("What is the region {input}?"),
    "<REGION_TO_DESCRIPTION>": Task("What does the region {input} describe?"),
    "<REGION_TO_OCR>": Task("What text is in the region {input}?"),
}


@dataclass(frozen=True)
class Stage:
    """Numbers of one stage, from the metadata."""

    n_blocks: int
    n_in: int
    width: int
    kernel: int
    stride: int
    padding: int
    norm_first: bool                 # the norm stands before the convolution
    n_heads: int
    n_groups: int
    side: int                        # of its grid
    window: int
    act: str                         # of ops.unary

    @classmethod
    def read(cls, v: Hparams, tile: int) -> list[Stage]:
        """Read the keys "clip.vision.stage.*", which have a number for each. Raises: InvalidModelError, UnsupportedModelError."""
        names = ("block_count", "embedding_length", "kernel_size", "stride", "padding", "norm_first", "head_count", "group_count")
        lists = [whole_numbers(v, f"vision.stage.{name}", ()) for name in names]
        if not lists[0] or len({len(numbers) for numbers in lists}) != 1:
            raise InvalidModelError(f"{v.key('vision.stage')}.*: lists of {[len(numbers) for numbers in lists]} numbers, one for each stage is needed")
        window, act, n_in, side, stages = v.size("vision.window_size"), known_activation(v, "vision.hidden_act", "gelu"), 3, tile, []
        for n_blocks, width, kernel, stride, padding, first, n_heads, n_groups in zip(*lists):
            side = (side + 2 * padding - kernel) // max(stride, 1) + 1
            if min(width, kernel, stride, n_heads, n_groups, side) < 1 or width % n_heads or width // n_heads % 4 or width % n_groups:
                raise InvalidModelError(f"{v.key('vision.stage')}.*: {width} channels in {n_heads} heads, whose elements must be a multiple of 4, and "
                                        f"{n_groups} groups; windows of {kernel} with steps of {stride} over {side} places are not possible")
            stages.append(cls(n_blocks, n_in, width, kernel, stride, padding, bool(first), n_heads, n_groups, side, window, act))
            n_in = width
        return stages


class Windows:
    """A grid of side x side places cut into squares, the places of each side by side; those beyond the grid are zeros.

    order  I32 [n']: the place of each row, -1 beyond the grid; back: the row of each place; lo, hi: the rows of each row's window
    """

    def __init__(self, side: int, window: int):
        across, area = -(-side // window), window * window
        grid = np.full((across * window, across * window), -1, np.int32)
        grid[:side, :side] = np.arange(side * side).reshape(side, side)
        self.order = np.ascontiguousarray(grid.reshape(across, window, across, window).transpose(0, 2, 1, 3)).reshape(-1)
        self.back = np.empty(side * side, np.int32)
        inside = np.flatnonzero(self.order >= 0)
        self.back[self.order[inside]] = inside
        self.lo = (np.arange(len(self.order)) // area * area).astype(np.int32)
        self.hi = self.lo + np.int32(area)


class WindowAttention:
    """Attention within windows."""

    def __init__(self, w: Weights, s: Stage):
        self.attention, self.windows, self.beyond = EncoderAttention(w, s.width, s.n_heads), Windows(s.side, s.window), np.zeros((1, s.width), np.float32)

    def __call__(self, x: Tensor) -> Tensor:                                       # [n, C] -> [n, C]
        cut = self.windows
        y = self.attention(ops.rows(x, cut.order, self.beyond), cut.lo, cut.hi)    # [n', C]
        return ops.rows(y, cut.back)                                               # [n, C]


class ChannelAttention:
    """Attention of channels to those of their group: a channel is the row of its values at all places."""

    def __init__(self, w: Weights, s: Stage):
        self.q, self.k, self.v = Linear.several(w["attn_qkv"], s.width, (s.width,) * 3)
        self.out, self.n_groups, self.scale = Linear(w["attn_out"], s.width, s.width), s.n_groups, float(s.side**2) ** -0.5

    def __call__(self, x: Tensor) -> Tensor:                                       # [n, C] -> [n, C]
        q, k, v = (f(x).reshape(int(x.shape[0]), self.n_groups, -1) for f in (self.q, self.k, self.v))         # [n, G, c]
        q, k = (ops.transpose(t, axes=(1, 2, 0)) for t in (q, k))                                              # [G, c, n]
        shares = ops.softmax(ops.matmul(q, k), scale=self.scale)                                               # [G, c, c]
        y = ops.matmul(ops.transpose(v, axes=(1, 0, 2)), shares)                                               # [G, n, c]
        return self.out(ops.contiguous(ops.transpose(y, axes=(1, 0, 2))).reshape(*x.shape))                    # [n, C]


class Half:
    """Half of a block: a depthwise convolution, attention, another convolution and a feed-forward, each added to its input."""

    def __init__(self, w: Weights, s: Stage, attention: type[WindowAttention] | type[ChannelAttention]):
        self.conv1, self.conv2 = DepthwiseConv(w["conv1"], s.width, 3), DepthwiseConv(w["conv2"], s.width, 3)
        self.norm1, self.norm2 = LayerNorm(w["ln1"], s.width, EPS), LayerNorm(w["ln2"], s.width, EPS)
        self.attention = attention(w, s)
        self.feed_forward, self.grid = EncoderFeedForward(w, s.width, mlp_width(w, s.width), s.act), (s.side, s.side, s.width)

    def __call__(self, x: Tensor) -> Tensor:                                       # [n, C]
        x = x + self._near(self.conv1, x)
        x = x + self.attention(self.norm1(x))
        x = x + self._near(self.conv2, x)
        return x + self.feed_forward(self.norm2(x))

    def _near(self, conv: DepthwiseConv, x: Tensor) -> Tensor:
        return conv(x.reshape(*self.grid)).reshape(*x.shape)


class Shrink:
    """What a stage begins with: a convolution [h, w, C_in] -> [n, C] and its norm."""

    def __init__(self, w: Weights, s: Stage):
        self.conv = Conv2d(w["patch_embd"], s.n_in, s.width, (s.kernel, s.kernel), (s.stride,), (s.padding,))
        self.norm, self.stage = LayerNorm(w["norm"], s.n_in if s.norm_first else s.width, EPS), s

    def __call__(self, x: Tensor, side: int) -> Tensor:                            # [side * side, C_in] -> [n, C]
        s = self.stage
        x = self.norm(x) if s.norm_first else x
        x = self.conv(x.reshape(1, side, side, s.n_in)).reshape(s.side**2, s.width)
        return x if s.norm_first else self.norm(x)


class Vision(Encoder):
    """DaViT, projector and processor. Nothing about a picture is kept here."""

    leads: ClassVar[bool] = True
    several: ClassVar[bool] = False
    tasks: ClassVar[Mapping[str, Task]] = TASKS

    def __init__(self, files: EncoderFiles):
        h, v, w, token = files
        self.tile = v.size("vision.image_size")
        mean, std = mean_and_std(v, MEAN, STD)
        self.levels, self.resample = levels(mean, std), resample_filter(v, BICUBIC)
        stages, own = Stage.read(v, self.tile), w["v"]
        self.shrinks = [Shrink(own["stage", i], s) for i, s in enumerate(stages)]
        self.blocks = [[(Half(b["spatial"], s, WindowAttention), Half(b["channel"], s, ChannelAttention))
                        for b in (own["stage", i, "blk", j] for j in range(s.n_blocks))] for i, s in enumerate(stages)]
        self.side, width, d = stages[-1].side, stages[-1].width, h.size("embedding_length")
        self.places = self._places(w["mm"], v.size("vision.position_count"), width)
        self.projection, self.norm = Linear(w["mm", "proj"], width, d), LayerNorm(w["mm", "proj_norm"], d, EPS)
        self.ignored = tuple(str(label) for label in v.get("vision.ignored_phrases", (), list))
        self.markers = {"image": image_marker(v, token)}

    def _places(self, w: Weights, most: int, width: int) -> Tensor:
        """Bind the embeddings of all places [n, C]: of column and line side by side, and cosines of time 0 (0, 1, 0, 1 ...)."""
        if self.side > most:
            raise InvalidModelError(f"the grid has {self.side} x {self.side} places, and the file embeddings of {most} lines and columns")
        lines, columns = (w[name].tensor("weight", (most, n)) for name, n in (("line_embd", width // 2), ("column_embd", width - width // 2)))

        def made(columns: np.ndarray, lines: np.ndarray) -> np.ndarray:
            y, x = np.divmod(np.arange(self.side**2), self.side)
            return np.concatenate([columns[x], lines[y]], axis=1) + np.arange(width, dtype=np.float32) % 2

        return constant(DerivedRef(columns.name, (self.side**2, width), (columns, lines), made))

    def most_rows(self, n_ctx: int) -> int:
        """Return the rows of a picture: one for each place of the last grid, and their mean."""
        return self.side**2 + 1

    def n_rows(self, width: int, height: int) -> int:
        """Return the rows of a picture: as many for each size."""
        return self.side**2 + 1

    def declare(self, g: Graph, rows: int) -> Tensor:
        """Declare the rows [n + 1, D] of "pixels" [tile, tile, 3]."""
        return self.project(self.states(g)[-1])

    def states(self, g: Graph) -> list[Tensor]:
        """Declare what each stage begins with and what each block gives, [n, C] of its stage."""
        x, side, states = g.input("pixels", (self.tile, self.tile, 3)).reshape(self.tile**2, 3), self.tile, []
        for shrink, blocks in zip(self.shrinks, self.blocks):
            x, side = shrink(x, side), shrink.stage.side                           # [n, C]
            states.append(x)
            for spatial, channel in blocks:
                x = channel(spatial(x))
                states.append(x)
        return states

    def project(self, x: Tensor) -> Tensor:                                        # [n, C] -> [n + 1, D]
        """Declare the mean of all places and the places, in the text model's width."""
        x = x + self.places
        mean = ops.mean_rows(x, np.zeros(1, np.int32), np.full(1, self.side**2, np.int32))         # [1, C]
        return self.norm(self.projection(ops.concat([mean, x], axis=0)))           # [n + 1, D]

    def process(self, media: Image | Video, limits: Limits) -> Processed:
        """Turn a picture into one run over a square. Raises: RequestError for videos and options."""
        only_pictures(media)
        rows = self.side**2 + 1
        view = View(lambda: {"pixels": self._pixels(media.pixels)}, {}, np.arange(rows, dtype=np.int32)[None], rows)
        return Processed((view,), media.size, (self.tile, self.tile))

    def _pixels(self, pixels: np.ndarray) -> np.ndarray:
        from pyengine.media.image import resize                                    # Pillow takes 20 ms to import

        return self.levels[np.arange(3), resize(pixels, self.tile, self.tile, self.resample)]      # [tile, tile, 3]
