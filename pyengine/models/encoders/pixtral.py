"""Pixtral's vision encoder, Mistral 3's patch merger and projector, the image processor and the tokens around a picture's rows.

Paper arXiv:2410.07073 (Pixtral 12B). Follows transformers 5.23: `modeling_pixtral.py`, `image_processing_pil_pixtral.py`,
`processing_pixtral.py`, and `Mistral3MultiModalProjector` of `modeling_mistral3.py`.

    picture -> shrunk to the longest edge, sides rounded up to multiples of patch * merge -> patches, merge x merge in a row
    -> encoder -> norm, each group joined to one row (Mistral 3; Pixtral 12B has no groups) -> two products with a GELU between
    prompt: a line of rows, [IMG_BREAK], a line of rows ... the last line, [IMG_END]

A picture is a run of its own, so that nothing attends from one picture to another. Positions are those of the patch in its picture:
pairs of a head turn with its line, then with its column. Rows of a picture attend causally in the decoder, and may be cut.

llama.cpp's files have q and k with their rows permuted, so that pairs are neighbours (2i, 2i + 1); `v.token_embd.img_break` there
is a row of the text's embedding, which the decoder looks up itself. What they do not say is the authors': bicubic, the longest edge
equal to image_size. differs from llama.cpp: the projector's norm has the text's epsilon, and a picture is not shrunk to 1024 rows.
Axes: n patches, t merged rows, V hidden, H heads, E head size; D hidden of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pyengine import ops
from pyengine.media.views import Limits, Piece, Processed, View
from pyengine.errors import ContextOverflowError, RequestError
from pyengine.graph.graph import Graph
from pyengine.models.architecture import Encoder, EncoderFiles
from pyengine.files.hparams import Hparams
from pyengine.nn.encoder import (
    by_table, common, EncoderAttention, EncoderConfig, EncoderFeedForward, known_activation, levels, only_pictures,
    special_token, whole_option)
from pyengine.nn.layers import Linear, PatchEmbedding, RMSNorm
from pyengine.nn.rope import Rope
from pyengine.graph.tensor import Dim, Tensor
from pyengine.files.weights import Weights

if TYPE_CHECKING:
    from pyengine.media.image import Image
    from pyengine.media.video import Video

# Constants for files without the key: transformers PixtralImageProcessorPil, PixtralVisionConfig, modeling_pixtral.py
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3                          # Pillow's number
EPS, ROPE_BASE = 1e-5, 10_000.0
SPECIAL = (("image", "[IMG]"), ("image_break", "[IMG_BREAK]"), ("image_end", "[IMG_END]"))


@dataclass(frozen=True)
class VisionConfig(EncoderConfig):
    """Numbers of one encoder, its projector and its image processor, from the metadata."""

    projector_eps: float
    rope_base: float
    interleaved: bool                # pairs of q and k that turn together are neighbours
    projector_act: str
    merge: int                       # side of a group in patches
    longest_edge: int                # pixels of the longer side, at most

    @classmethod
    def read(cls, h: Hparams, v: Hparams, w: Weights) -> VisionConfig:
        """Read the keys "clip.*". Raises: InvalidModelError, UnsupportedModelError."""
        return cls(
            **common(h, v, w, gelu="gelu", eps=EPS, colours=(MEAN, STD), resample=BICUBIC),
            projector_eps=h.number("attention.layer_norm_rms_epsilon", above=0.0),
            rope_base=v.number("vision.rope.freq_base", ROPE_BASE, above=0.0),
            interleaved=v.get("vision.rope.interleaved", True, bool),
            projector_act=known_activation(v, "vision.projector.hidden_act", "gelu"),
            merge=v.size("vision.spatial_merge_size", 1),
            longest_edge=v.size("vision.longest_edge", v.size("vision.image_size")),
        )


class VisionBlock:
    """Attention of all patches to each other and a gated feed-forward, each after a norm and added to its input."""

    def __init__(self, w: Weights, c: VisionConfig):
        self.attn_norm, self.ffn_norm = (RMSNorm(w[n], c.width, c.eps) for n in ("ln1", "ln2"))
        self.attention = EncoderAttention(w, c.width, c.n_heads)
        self.feed_forward = EncoderFeedForward(w, c.width, c.d_ff, c.act, gated=True)

    def __call__(self, x: Tensor, rope: Rope, angles: Tensor, lo: Tensor, hi: Tensor) -> Tensor:     # [n, V]
        x = x + self.attention(self.attn_norm(x), lo, hi, lambda t: rope(t, angles))
        return x + self.feed_forward(self.ffn_norm(x))


class Vision(Encoder):
    """Encoder, merger, projector, processor and special tokens. Nothing about a picture is kept here."""

    def __init__(self, files: EncoderFiles):
        h, v, w, token = files
        c = self.config = VisionConfig.read(h, v, w)
        self.soft, self.line_end, self.end = (special_token(v, name, token, text) for name, text in SPECIAL)
        self.markers = {"image": (self.soft,)}
        self.levels = levels(c.mean, c.std)                                    # [3, 256]
        head_dim = c.width // c.n_heads
        inv_freq = 1.0 / c.rope_base ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
        halves = inv_freq[0::2], inv_freq[1::2]                                # that turn with the line, and with the column
        self.rope = Rope(np.concatenate(halves).astype(np.float32), 1.0, c.interleaved)                  # [E / 2]
        self.axes = np.repeat(np.arange(2, dtype=np.int32), [len(half) for half in halves])
        v_, mm = w["v"], w["mm"]
        self.patch = PatchEmbedding(v_["patch_embd"], c.width, 3, c.patch)
        self.norm = RMSNorm(v_["pre_ln"], c.width, c.eps)
        self.blocks = [VisionBlock(v_["blk", i], c) for i in range(c.n_layers)]
        self.merger = None
        if c.merge > 1 or "patch_merger" in mm:
            self.projector_norm = RMSNorm(mm["input_norm"], c.width, c.projector_eps)
            self.merger = Linear(mm["patch_merger"], c.width * c.merge**2, c.width)
        self.first, self.second = Linear(mm[1], c.width, c.d_out), Linear(mm[2], c.d_out, c.d_out)
        v_["token_embd"].optional("img_break", (c.d_out,))                     # the text's own embedding of that token is taken

    def most_rows(self, n_ctx: int) -> int:
        """Return the rows of the largest picture, which the context must hold."""
        return min(n_ctx, self._lines(self.config.longest_edge) ** 2)

    def declare(self, g: Graph, rows: int) -> Tensor:
        """Declare the inputs and return rows for the decoder, F32 [t, D]."""
        c, group = self.config, self.config.merge**2
        n = Dim("t", rows) * group
        lo, hi = (g.input(name, (n,), "I32") for name in ("lo", "hi"))
        x = self.norm(self.patch(g.input("patches", (n, 3 * c.patch**2))))                           # [n, V]
        angles = ops.rope_table(g.input("positions", (2, n), "I32"), self.rope.inv_freq, self.axes)  # [n, E]
        for block in self.blocks:
            x = block(x, self.rope, angles, lo, hi)
        if self.merger:                                                        # its columns: feature, then place in the group
            x = ops.transpose(self.projector_norm(x).reshape(-1, group, c.width), axes=(0, 2, 1))
            x = self.merger(ops.contiguous(x).reshape(-1, c.width * group))                          # [t, V]
        return self.second(ops.unary(self.first(x), kind=c.projector_act))                           # [t, D]

    # -- processor ------------------------------------------------------------------------------------------------------------

    def _lines(self, pixels: int) -> int:
        """Count the merged rows along a side of this many pixels."""
        return -(-pixels // (self.config.patch * self.config.merge))

    def grid(self, width: int, height: int, longest_edge: int) -> tuple[int, int]:
        """Compute (lines, columns) of the merged rows of a picture.

        Sides are rounded down where the picture is shrunk, then up to whole rows. Source: `get_resize_output_image_size` in
        transformers' `image_processing_pil_pixtral.py`. Raises: RequestError for a picture of which less than a pixel remains.
        """
        ratio = max(height / longest_edge, width / longest_edge)
        w, h = (int(s / ratio) if ratio > 1 else s for s in (width, height))
        if not w or not h:
            raise RequestError(f"a picture of {width} x {height} pixels: shrunk to {longest_edge} pixels, less than one remains of "
                               "its shorter side; cut it")
        return self._lines(h), self._lines(w)

    def n_rows(self, width: int, height: int) -> int:
        """Return the soft tokens of a picture of this size."""
        lines, columns = self.grid(width, height, self.config.longest_edge)
        return lines * columns

    def process(self, media: Image | Video, limits: Limits) -> Processed:
        """Turn a picture into the encoder's inputs and the tokens around its lines.

        Option: longest_edge, pixels of the longer side at most, up to the processor's own limit.
        Raises: ContextOverflowError if its rows exceed the context, RequestError; both also for videos and other options.
        """
        only_pictures(media, "longest_edge")
        c = self.config
        longest = whole_option(media, "longest_edge", c.longest_edge)
        width, height = media.size
        lines, columns = self.grid(width, height, longest)
        rows, side = lines * columns, c.patch * c.merge
        if rows + lines > limits.n_ctx:
            raise ContextOverflowError(f"a picture of {width} x {height} pixels takes {rows + lines} positions, but the context "
                                       f"holds {limits.n_ctx}; load with a larger n_ctx, or give a smaller longest_edge")
        if rows > limits.rows:
            raise RequestError(f"a picture of {width} x {height} pixels takes {rows} soft tokens, but this model was planned for "
                               f"pictures of up to {limits.rows}; give a smaller longest_edge, or load with "
                               f"images=({width}, {height})")
        places = np.arange(rows, dtype=np.int32)[None]
        view = View(lambda: self._inputs(media, lines, columns), {"t": rows}, places, rows, (1, lines, columns))
        parts: list[int | Piece] = []
        for line in range(lines):
            parts += [Piece(view, line * columns, (line + 1) * columns), self.line_end]
        return Processed((*parts[:-1], self.end), (width, height), (columns * side, lines * side))

    def _inputs(self, image: Image, lines: int, columns: int) -> dict[str, np.ndarray]:
        """Resize a picture to lines x columns merged rows, and cut it into patches, those of a merged row one after another."""
        from pyengine.media.image import resize                               # Pillow takes 20 ms to import

        c, m, p = self.config, self.config.merge, self.config.patch
        n = lines * columns * m * m
        pixels = resize(image.pixels, lines * m * p, columns * m * p, c.resample)
        pixels = pixels.reshape(lines, m, p, columns, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5).reshape(n, 3, p * p)
        patches = by_table(self.levels, pixels)
        line, column = np.divmod(np.arange(lines * columns), columns)
        inner = np.stack(np.divmod(np.arange(m * m), m))                       # [2, m * m]
        positions = (np.stack([line, column])[..., None] * m + inner[:, None]).reshape(2, n).astype(np.int32)
        lo, hi = np.zeros(n, np.int32), np.full(n, n, np.int32)
        return {"patches": patches.reshape(n, -1), "positions": positions, "lo": lo, "hi": hi}
