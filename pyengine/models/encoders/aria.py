"""Aria: SigLIP over the patches of a picture's own shape, then a fixed number of queries that attend to them, and a feed-forward.

Paper arXiv:2410.05993. Follows transformers 5.23: `modeling_aria.py`, `modeling_idefics3.py` (the encoder), `image_processing_pil_aria.py`,
`processing_aria.py`.

    picture -> longer side 980 pixels (or 490), enlarged too, the shorter one 336 at least -> padded to whole patches -> encoder
    -> 256 queries (128 of a small one), keys and values each by two products -> feed-forward
    prompt: <fim_prefix> rows <fim_suffix>

transformers pads to a square and masks patches without a pixel of the picture; here they are left out. With `split_image` a picture is
fitted into the best of some resolutions, black around it, and cut into squares, each treated like a picture; their rows follow each other.
Rows are taken behind a layer, before the encoder's last norm. Axes: n patches, t queries, V hidden, H heads; D hidden of the decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from pyengine import ops
from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Dim, Tensor
from pyengine.media.views import Limits, Processed, View
from pyengine.models.architecture import Encoder, EncoderFiles
from pyengine.models.encoders.llava import best_grid, fitted
from pyengine.nn.encoder import (
    buckets, by_table, common, cut_patches, EncoderAttention, EncoderBlock, EncoderConfig, levels, only_pictures, special_token)
from pyengine.nn.layers import constant, LayerNorm, Linear, PatchEmbedding

if TYPE_CHECKING:
    from pyengine.media.image import Image
    from pyengine.media.video import Video

HALF, BICUBIC = (0.5, 0.5, 0.5), 3   # transformers AriaImageProcessorPil: mean and deviation, Pillow's number of the filter
EPS, PROJECTOR_EPS = 1e-6, 1e-5
MARKERS = (("image_start", "<fim_prefix>"), ("image", "<|img|>"), ("image_end", "<fim_suffix>"))


@dataclass(frozen=True)
class VisionConfig(EncoderConfig):
    """Numbers of one encoder, its projector and its image processor, from the metadata."""

    side: int                        # lines of the position embedding
    queries: dict[int, int]          # queries of a square by its side in pixels
    longest: int                     # side of a square, unless it is said otherwise
    shortest: int                    # pixels of a picture's shorter side, at least
    grids: tuple[tuple[int, int], ...]       # resolutions (height, width) of pictures that are split
    splitting: bool                  # into squares, unless it is said otherwise

    @classmethod
    def read(cls, h: Hparams, v: Hparams, w: Weights) -> VisionConfig:
        """Read the keys "clip.*". Raises: InvalidModelError, UnsupportedModelError."""
        patch = v.size("vision.patch_size")
        counts, sides = (v.get(f"vision.{name}", np.zeros(0, int), np.ndarray).tolist() for name in ("projector.patch_to_query", "image_grid_pinpoints"))
        longest, shortest = v.size("vision.preproc_image_size"), v.size("vision.preproc_min_size")
        if min(counts, default=0) < 1:
            raise InvalidModelError(f"{v.key('vision.projector.patch_to_query')} is {counts}: numbers of patches and queries are needed")
        queries = {round(n**0.5) * patch: count for n, count in zip(counts[::2], counts[1::2])}
        if longest not in queries or longest < shortest or len(sides) % 2 or min(sides, default=1) < 1:
            raise InvalidModelError(f"{v.key('vision')}: squares of {longest} pixels, shorter sides from {shortest}, queries by the number of patches "
                                    f"{counts}, resolutions {sides}: they do not fit together")
        return cls(
            **common(h, v, w, gelu="gelu_pytorch_tanh", eps=EPS, colours=(HALF, HALF), resample=BICUBIC),
            side=v.size("vision.image_size") // patch, queries=queries, longest=longest, shortest=shortest,
            grids=tuple(zip(sides[::2], sides[1::2])), splitting=v.get("vision.image_splitting", False, bool))


class Projector:
    """Queries that attend to an encoder's rows, and a feed-forward."""

    def __init__(self, mm: Weights, c: VisionConfig):
        width = c.width
        self.query = constant(mm["query"].tensor("weight", (max(c.queries.values()), width)))
        self.query_norm, self.row_norm, self.norm = (LayerNorm(mm[name], width, PROJECTOR_EPS) for name in ("ln_q", "ln_kv", "ln_post"))
        self.q, self.k, self.v, self.out = (Linear(mm[name], width, width) for name in ("q", "k", "v", "out"))
        self.attention = EncoderAttention(mm, width, c.n_heads)
        self.up, self.down = Linear(mm["ffn_up"], width, c.d_out), Linear(mm["ffn_down"], c.d_out, c.d_out)

    def __call__(self, x: Tensor, chosen: Tensor, lo: Tensor, hi: Tensor) -> Tensor:         # [n, V], I32 [t] x3 -> [t, D]
        x, queries = self.row_norm(x), self.query_norm(ops.rows(self.query, chosen))         # [n, V], [t, V]
        y = self.out(self.attention(self.q(queries), lo, hi, across=(self.k(x), self.v(x))))
        return self.down(ops.gelu_tanh(self.up(self.norm(y))))                               # [t, D]


class Vision(Encoder):
    """Encoder, projector, processor and special tokens. Nothing about a picture is kept here."""

    def __init__(self, files: EncoderFiles):
        h, v, w, token = files
        c = self.config = VisionConfig.read(h, v, w)
        self.start, soft, self.end = (special_token(v, name, token, text) for name, text in MARKERS)
        self.markers = {"image": (self.start, soft, self.end)}
        self.levels = levels(c.mean, c.std)                                             # [3, 256]
        v_ = w["v"]
        self.patch = PatchEmbedding(v_["patch_embd"], c.width, 3, c.patch)
        self.position = constant(v_["position_embd"].tensor("weight", (c.side**2, c.width)))
        self.blocks = [EncoderBlock(v_["blk", i], c) for i in range(c.n_layers)]
        self.projector = Projector(w["mm"], c)

    def most_rows(self, n_ctx: int) -> int:
        """Return the rows of one run."""
        return max(self.config.queries.values())

    def n_rows(self, width: int, height: int) -> int:
        """Return the soft tokens of a picture of this size."""
        c = self.config
        return len(self.squares(width, height, c.longest, c.splitting)) * c.queries[c.longest]

    def declare(self, g: Graph, rows: int) -> Tensor:
        """Declare the rows [t, D] of "patches" [n, 3 * p * p] at places of the position embedding."""
        c = self.config
        n, t = Dim("n", (max(c.queries) // c.patch) ** 2), Dim("t", rows)
        lo, hi = (g.input(name, (n,), "I32") for name in ("lo", "hi"))
        x = self.patch(g.input("patches", (n, 3 * c.patch**2)))                         # [n, V]
        x = x + ops.rows(self.position, g.input("places", (n,), "I32"))
        for block in self.blocks:
            x = block(x, lo, hi)
        return self.projector(x, *(g.input(name, (t,), "I32") for name in ("queries", "first", "last")))      # [t, D]

    # -- processor ------------------------------------------------------------------------------------------------------------

    def squares(self, width: int, height: int, longest: int, split: bool) -> list[tuple[slice, slice]]:
        """List the parts (lines, columns) of a picture's canvas, each of which is treated like a picture."""
        if not split:
            return [(slice(0, height), slice(0, width))]
        h, w = best_grid(width, height, self.config.grids, 1)
        return [(slice(y, min(y + longest, h)), slice(x, min(x + longest, w))) for y in range(0, h, longest) for x in range(0, w, longest)]

    def process(self, media: Image | Video, limits: Limits) -> Processed:
        """Turn a picture into runs, with tokens around their rows.

        Options: max_image_size, one of the sides for which there are queries; split_image (bool).
        Raises: RequestError for videos and other options; ContextOverflowError if its rows exceed the context.
        """
        only_pictures(media, "max_image_size", "split_image")
        c, (width, height) = self.config, media.size
        longest, split = media.options.get("max_image_size", c.longest), media.options.get("split_image", c.splitting)
        if type(longest) is not int or longest not in c.queries:
            raise RequestError(f"max_image_size={longest!r}: must be one of {', '.join(map(str, sorted(c.queries)))}")
        if not isinstance(split, bool) or split and not c.grids:
            raise RequestError(f"split_image={split!r}: must be {'True or False' if c.grids else 'False, as the file has no resolutions to split into'}")
        squares = self.squares(width, height, longest, split)
        taken = len(squares) * c.queries[longest] + 2
        if taken > limits.n_ctx:
            raise ContextOverflowError(f"a picture of {width} x {height} pixels takes {taken} positions, but the context holds {limits.n_ctx}; "
                                       "load with a larger n_ctx, or give split_image=False or a smaller max_image_size")
        if c.queries[longest] > limits.rows:
            raise RequestError(f"max_image_size={longest} takes {c.queries[longest]} soft tokens a run, but this model was planned for {limits.rows}; "
                               f"load with images=({longest}, {longest})")
        canvas = cache(lambda: self._padded(media.pixels) if split else media.pixels)
        views = [self._view(lambda y=y, x=x: canvas()[y, x], x.stop - x.start, y.stop - y.start, longest) for y, x in squares]
        y, x = squares[0]
        return Processed((self.start, *views, self.end), media.size, self.sizes(x.stop - x.start, y.stop - y.start, longest))

    def sizes(self, width: int, height: int, longest: int) -> tuple[int, int]:
        """Compute (width, height) of a picture after its resize."""
        scale, least = longest / max(width, height), self.config.shortest
        return (longest, max(int(height * scale), least)) if width >= height else (max(int(width * scale), least), longest)

    def _padded(self, pixels: np.ndarray) -> np.ndarray:
        """Fit a picture into the best resolution, black around it."""
        from pyengine.media.image import resize                                         # Pillow takes 20 ms to import

        height, width = pixels.shape[:2]
        rows, columns = best_grid(width, height, self.config.grids, 1)
        w, h = fitted(width, height, columns, rows)
        canvas = np.zeros((rows, columns, 3), np.uint8)
        top, left = (rows - h) // 2, (columns - w) // 2
        canvas[top : top + h, left : left + w] = resize(pixels, h, w, self.config.resample)
        return canvas

    def _view(self, pixels: Callable[[], np.ndarray], width: int, height: int, longest: int) -> View:
        """Make one run over pixels [height, width, 3]."""
        p, t = self.config.patch, self.config.queries[longest]
        w, h = self.sizes(width, height, longest)
        lines, columns = -(-h // p), -(-w // p)
        return View(lambda: self._inputs(pixels(), h, w, t), {"n": lines * columns, "t": t}, np.arange(t, dtype=np.int32)[None], t, (1, lines, columns))

    def _inputs(self, pixels: np.ndarray, h: int, w: int, t: int) -> dict[str, np.ndarray]:
        """Resize a picture to w x h pixels, black up to whole patches, cut it, and say where its patches lie and what sees them."""
        from pyengine.media.image import resize                                         # Pillow takes 20 ms to import

        c, p = self.config, self.config.patch
        lines, columns = -(-h // p), -(-w // p)
        canvas = np.zeros((lines * p, columns * p, 3), np.uint8)
        canvas[:h, :w] = resize(pixels, h, w, c.resample)
        places = (buckets(lines, c.side)[:, None] * c.side + buckets(columns, c.side)).reshape(-1).astype(np.int32)
        n, zero = lines * columns, np.zeros(lines * columns + t, np.int32)
        return {"patches": by_table(self.levels, cut_patches(canvas, (lines, columns), p)).reshape(n, -1), "places": places, "lo": zero[:n],
                "hi": zero[:n] + np.int32(n), "queries": np.arange(t, dtype=np.int32), "first": zero[:t], "last": zero[:t] + np.int32(n)}
