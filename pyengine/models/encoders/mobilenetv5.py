"""Gemma 3n's encoder of pictures: MobileNet-V5, convolutions and attention of many queries to few keys, at one size of picture.

Follows timm's `MobileNetV5Encoder`, `UniversalInvertedResidual`, `MultiQueryAttention2d` (mobilenetv5_300m_enc), transformers
`modeling_gemma3n.py`, `processing_gemma3n.py`; names as in llama.cpp's `conversion/gemma.py`. Layers are told by the tensors that they have.

    stem        3 x 3, stride 2
    stages      the first layer of each halves both sides; each layer but those is added to its input
      edge      k x k -> norm, GELU -> 1 x 1 -> norm
      inverted  (k x k by channel -> norm) -> 1 x 1 -> norm, GELU -> (k x k by channel -> norm, GELU) -> 1 x 1 -> norm, times a number a channel
      attention norm -> heads of queries to one head of keys and values, which a convolution by channel may thin out -> times a number a channel
    fusion      the last stage's pixels repeated to the size of the one before, both side by side -> 1 x 1 -> norm, GELU -> 1 x 1 -> norm
                -> means of squares, as many as soft tokens -> norm
    decoder     times sqrt(V) -> norm -> product -> norm without weights; and one row more: the token that ends a picture, which has an
                embedding among the encoder's tensors

Sides that a stride does not divide are padded as TensorFlow does: less before than behind. differs from llama.cpp: the end of a picture is
embedded as transformers does, pictures are resized by Pillow. Axes: h x w pixels, C channels, V width of the encoder, D hidden of the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from pyengine import ops
from pyengine.errors import InvalidModelError
from pyengine.files.weights import Weights
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Tensor
from pyengine.media.views import Limits, Processed, View
from pyengine.models.architecture import Encoder, EncoderFiles
from pyengine.nn.convolution import Conv2d, pointwise
from pyengine.nn.encoder import levels, mean_and_std, only_pictures, PIXELS, resample_filter, special_token
from pyengine.nn.layers import constant, RMSNorm

if TYPE_CHECKING:
    from pyengine.media.image import Image
    from pyengine.media.video import Video

EPS = 1e-6                           # of timm's RmsNorm2d
NO_MEAN, NO_STD, BILINEAR = (0.0,) * 3, (1.0,) * 3, 2          # the processor does not normalize; Pillow's number
TOKENS = 256                         # soft tokens of a picture


def widths(w: Weights) -> tuple[int, int, int]:
    """Return a convolution's (channels it makes, channels of a group, side of its window). Raises: InvalidModelError."""
    shape = w.shape("weight")
    if shape is None or len(shape) not in (2, 4) or len(shape) == 4 and shape[2] != shape[3] or 0 in shape:
        raise InvalidModelError(f"{w.place}: weight has shape {shape}; [out, in, k, k] is needed")
    return shape[0], shape[1], shape[2] if len(shape) == 4 else 1


def window(w: Weights, n_in: int, side: int, stride: int, by_channel: bool) -> tuple[Conv2d, int, int]:
    """Bind a convolution over a square; returns it, its channels and the side of what it makes."""
    n_out, _, k = widths(w)
    after = -(-side // stride)
    missing = max(0, (after - 1) * stride + k - side)
    ends = (missing // 2, missing - missing // 2)
    return Conv2d(w, n_in, n_out, (k, k), (stride,), (*ends, *ends), n_in if by_channel else 1), n_out, after


def each_pixel(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply what takes rows to each pixel: [1, h, w, C_in] -> [1, h, w, C]."""
    y = f(x.reshape(-1, x.shape[3]))
    return y.reshape(*x.shape[:3], y.shape[1])


class Edge:
    """A convolution, and a product for each pixel."""

    def __init__(self, w: Weights, n_in: int, side: int, stride: int):
        self.expand, middle, self.side = window(w["conv_exp"], n_in, side, stride, by_channel=False)
        self.width = widths(w["conv_pwl"])[0]
        self.leave = pointwise(w["conv_pwl"], middle, self.width)
        self.norm, self.leave_norm = RMSNorm(w["bn1"], middle, EPS), RMSNorm(w["bn2"], self.width, EPS)
        self.added = stride == 1 and n_in == self.width

    def __call__(self, x: Tensor) -> Tensor:                                       # [1, h, w, C]
        y = self.leave_norm(each_pixel(self.leave, ops.gelu_tanh(self.norm(self.expand(x)))))
        return x + y if self.added else y


class Inverted:
    """Products for each pixel, and convolutions by channel before and between them. alone: not added, and without numbers a channel."""

    def __init__(self, w: Weights, n_in: int, side: int, stride: int, alone: bool = False):
        between = "dw_mid" in w
        self.start = self.middle = None
        if "dw_start" in w:
            self.start, _, side = window(w["dw_start", "conv"], n_in, side, 1 if between else stride, by_channel=True)
            self.start_norm = RMSNorm(w["dw_start", "bn"], n_in, EPS)
        wide, self.width = widths(w["pw_exp", "conv"])[0], widths(w["pw_proj", "conv"])[0]
        self.enter, self.enter_norm = pointwise(w["pw_exp", "conv"], n_in, wide), RMSNorm(w["pw_exp", "bn"], wide, EPS)
        if between:
            self.middle, _, side = window(w["dw_mid", "conv"], wide, side, stride, by_channel=True)
            self.middle_norm = RMSNorm(w["dw_mid", "bn"], wide, EPS)
        self.leave, self.leave_norm = pointwise(w["pw_proj", "conv"], wide, self.width), RMSNorm(w["pw_proj", "bn"], self.width, EPS)
        self.scale = None if alone else constant(w["layer_scale"].tensor("gamma", (self.width,)))
        self.side, self.added = side, stride == 1 and n_in == self.width and not alone

    def __call__(self, x: Tensor) -> Tensor:                                       # [1, h, w, C]
        y = self.start_norm(self.start(x)) if self.start else x
        y = ops.gelu_tanh(self.enter_norm(each_pixel(self.enter, y)))
        y = ops.gelu_tanh(self.middle_norm(self.middle(y))) if self.middle else y
        y = self.leave_norm(each_pixel(self.leave, y))
        y = y if self.scale is None else y * self.scale
        return x + y if self.added else y


class Attention:
    """Heads of queries, one of keys and values, of all pixels or of those that a convolution with a stride leaves."""

    THINNED = 2                      # stride of that convolution

    def __init__(self, w: Weights, n_in: int, side: int, stride: int):
        a, self.side, self.norm = w["attn"], side, RMSNorm(w["norm"], n_in, EPS)
        self.head_dim, (wide, _, _) = widths(a["key", "proj"])[0], widths(a["query", "proj"])
        self.width = widths(a["output", "proj"])[0]
        if stride != 1 or wide % self.head_dim:
            raise InvalidModelError(f"{w.place}: attention with a stride of {stride}, and queries of {wide} for keys of {self.head_dim}")
        self.query, self.out = pointwise(a["query", "proj"], n_in, wide), pointwise(a["output", "proj"], wide, self.width)
        self.seen = []                                                             # of keys, of values: what thins them out, and the product
        for name in ("key", "value"):
            thin = None
            if "down_conv" in a[name]:
                conv, _, self.seen_side = window(a[name, "down_conv"], n_in, side, self.THINNED, by_channel=True)
                thin = conv, RMSNorm(a[name, "norm"], n_in, EPS)
            self.seen.append((thin, pointwise(a[name, "proj"], n_in, self.head_dim)))
        self.scale, self.added = constant(w["layer_scale"].tensor("gamma", (self.width,))), n_in == self.width

    def __call__(self, x: Tensor) -> Tensor:                                       # [1, h, w, C]
        y, seen = self.norm(x), []
        q = self.query(y.reshape(-1, y.shape[3])).reshape(self.side**2, -1, self.head_dim)         # [n, H, E]
        for thin, product in self.seen:
            t = thin[1](thin[0](y)) if thin else y
            seen.append(product(t.reshape(-1, t.shape[3])).reshape(1, -1, self.head_dim))          # [1, m, E]
        n, m = self.side**2, int(seen[0].shape[1])
        y = ops.attention(q, *seen, np.zeros(n, np.int32), np.full(n, m, np.int32), scale=self.head_dim**-0.5, products="float")
        y = self.out(y).reshape(*x.shape[:3], self.width) * self.scale
        return x + y if self.added else y


def layer(w: Weights, n_in: int, side: int, stride: int) -> Edge | Inverted | Attention:
    """Bind a layer of the kind that its tensors say."""
    kind = Edge if "conv_exp" in w else Attention if "attn" in w else Inverted
    return kind(w, n_in, side, stride)


class Tower:
    """Stem and stages over a square of `side` pixels, and the fusion of the last two to `tokens` x `tokens` pixels."""

    def __init__(self, w: Weights, side: int, tokens: int):
        stem, self.tokens = w["conv_stem"], tokens
        self.stem, width, side = window(stem["conv"], 3, side, 2, by_channel=False)
        self.stem_norm = RMSNorm(stem["bn"], width, EPS)
        self.stages, ends = [], []
        while ("blk", len(self.stages), 0) in w:
            stage = w["blk", len(self.stages)]
            self.stages.append(made := [])
            while len(made) in stage:
                made.append(found := layer(stage[len(made)], width, side, 1 if made else 2))
                width, side = found.width, found.side
            ends.append((width, side))
        if len(ends) < 2 or ends[-2][1] < tokens:
            raise InvalidModelError(f"{w.place}: stages end in (channels, side) {ends}; two are needed, the one before the last of {tokens} pixels or more")
        self.side = ends[-2][1]
        self.fusion = Inverted(w["msfa", "ffn"], ends[-2][0] + ends[-1][0], self.side, 1, alone=True)
        self.width, self.norm = self.fusion.width, RMSNorm(w["msfa", "norm"], self.fusion.width, EPS)

    def __call__(self, x: Tensor) -> Tensor:                                       # [1, side, side, 3] -> [tokens^2, V]
        x, ends = ops.gelu_tanh(self.stem_norm(self.stem(x))), []
        for stage in self.stages:
            for block in stage:
                x = block(x)
            ends.append(x)
        square, each = (self.tokens, self.tokens), self.side // self.tokens
        x = self.fusion(ops.concat([ends[-2], ops.resize2d(ends[-1], kind="nearest", size=(self.side, self.side))], axis=3))
        if self.side % self.tokens:
            x = ops.resize2d(x, kind="bilinear", size=square)
        elif each > 1:
            x = ops.avg_pool2d(x, kernel=(each, each))
        return self.norm(x).reshape(-1, self.width)


class Vision(Encoder):
    """Encoder, projection, processor. Nothing about a picture is kept here."""

    def __init__(self, files: EncoderFiles):
        h, v, w, token = files
        self.side, tokens = v.size("vision.image_size", most=PIXELS), v.size("vision.tokens_per_image", TOKENS)
        if math.isqrt(tokens) ** 2 != tokens:
            raise InvalidModelError(f"{v.key('vision.tokens_per_image')} is {tokens}: not a square")
        self.tokens, self.eps, self.resample = tokens, v.number("vision.attention.layer_norm_epsilon", EPS, above=0.0), resample_filter(v, BILINEAR)
        self.start = special_token(v, "image_start", token, "<start_of_image>")
        self.markers = {"image": (special_token(v, "image", token, "<image_soft_token>"),)}
        self.levels = levels(*mean_and_std(v, NO_MEAN, NO_STD))                         # [3, 256]
        for sound in (w["a"], w["mm", "a"]):
            sound.leave_out()                                                           # of models that hear, which this one does not
        self.tower, mm = Tower(w["v"], self.side, math.isqrt(tokens)), w["mm"]
        width, table = self.tower.width, mm["embedding"].shape("weight")
        self.end = v.get("vision.image_end_row", 0, int)
        if table is None or len(table) != 2 or not 0 <= self.end < table[0]:
            raise InvalidModelError(f"{v.key('vision')}: mm.embedding.weight has shape {table}, and row {self.end} is the end of a picture")
        self.table = constant(mm["embedding"].tensor("weight", (table[0], width)))
        self.soft, self.hard = RMSNorm(mm["soft_emb_norm"], width, self.eps), RMSNorm(mm["hard_emb_norm"], width, self.eps)
        self.project = pointwise(mm["input_projection"], width, h.size("embedding_length"))

    def most_rows(self, n_ctx: int) -> int:
        """Return the rows of a picture: soft tokens, and its end."""
        return self.tokens + 1

    def n_rows(self, width: int, height: int) -> int:
        """Return the rows of a picture: as many for each size."""
        return self.tokens + 1

    def declare(self, g: Graph, rows: int) -> Tensor:
        """Declare the rows [tokens + 1, D] of "pixels" [side, side, 3]."""
        x = self.tower(g.input("pixels", (1, self.side, self.side, 3)))                 # [tokens, V]
        end = ops.rows(self.table, np.full(1, self.end, np.int32))                      # [1, V]
        x = ops.concat([self.soft(ops.scale(x, factor=self.tower.width**0.5)), self.hard(end)], axis=0)
        return ops.rms_norm(self.project(x), eps=self.eps)

    def process(self, media: Image | Video, limits: Limits) -> Processed:
        """Resize to the encoder's square, whatever the aspect ratio. Raises: RequestError for videos and options."""
        only_pictures(media)
        rows = self.tokens + 1
        view = View(lambda: {"pixels": self.pixels(media.pixels)}, {}, np.arange(rows, dtype=np.int32)[None], rows)
        return Processed(("\n\n", self.start, view, "\n\n"), media.size, (self.side, self.side))

    def pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Resize pixels uint8 [h, w, 3] to F32 [side, side, 3]."""
        from pyengine.media.image import resize                                         # Pillow takes 20 ms to import

        x = resize(pixels, self.side, self.side, self.resample)
        return np.stack([table[x[..., i]] for i, table in enumerate(self.levels)], axis=-1)

