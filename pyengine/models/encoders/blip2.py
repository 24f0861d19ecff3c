"""BLIP-2's encoder: a vision transformer over one square, and a Q-Former, whose queries attend to its rows and become the soft tokens.

Paper arXiv:2301.12597. Follows transformers 5.23: `modeling_blip_2.py`, `processing_blip_2.py`, `image_processing_pil_blip.py`.

    picture -> resized to a square -> class token and patches, 39 layers, a norm over all rows
    32 queries -> norm -> 12 layers: attention among the queries; in every other one attention to the picture's rows; feed-forward;
                  each added to its input, and a norm behind the sum -> a product into the text model's width

The soft tokens stand before all of a text, BOS included. llama.cpp does not have this model; names are those that it has for other
Q-Formers, behind "mm.", and keys "clip.vision.qformer.*" are ours.
Axes: n patches of a square, V hidden, q queries, Q hidden of the Q-Former, H heads, D hidden of the text model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TYPE_CHECKING

import numpy as np

from pyengine.dtype import dtype
from pyengine.errors import InvalidModelError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Tensor
from pyengine.media.views import Limits, Processed, View
from pyengine.models.architecture import Encoder, EncoderFiles
from pyengine.models.encoders.clip import Tower, TowerConfig
from pyengine.nn.encoder import EncoderAttention, EncoderFeedForward, head_count, known_activation, only_pictures, special_token
from pyengine.nn.layers import constant, LayerNorm, Linear

if TYPE_CHECKING:
    from pyengine.media.image import Image
    from pyengine.media.video import Video


@dataclass(frozen=True)
class QFormerConfig:
    """Numbers of the Q-Former, from the metadata."""

    n_layers: int
    n_queries: int
    width: int
    d_ff: int
    n_heads: int
    eps: float
    act: str                         # of ops.unary
    every: int                       # which layers attend to the picture: the first, and each of that many behind it

    @classmethod
    def read(cls, v: Hparams, w: Weights) -> QFormerConfig:
        """Read the keys "clip.vision.qformer.*". Raises: InvalidModelError, UnsupportedModelError."""
        at = "vision.qformer"
        n_layers, width = v.size(f"{at}.block_count"), v.size(f"{at}.embedding_length")
        if ("mm", "proj_blk", n_layers - 1) not in w:
            raise InvalidModelError(f"{v.arch}.{at}.block_count is {n_layers}, but no tensor is named mm.proj_blk.{n_layers - 1}")
        return cls(n_layers, v.size(f"{at}.query_count"), width, v.size(f"{at}.feed_forward_length"), head_count(v, width, f"{at}.attention.head_count"),
                   v.number(f"{at}.attention.layer_norm_epsilon"), known_activation(v, f"{at}.hidden_act", "gelu"),
                   v.size(f"{at}.cross_attention_frequency"))


class QFormerAttention(EncoderAttention):
    """Attention of queries to rows of any width; its result is added to the queries, with a norm behind the sum."""

    def __init__(self, w: Weights, name: str, c: QFormerConfig, width: int):
        q, *kv = (Linear(w[f"{name}_{part}"], n, c.width) for part, n in (("q", c.width), ("k", width), ("v", width)))
        self.hold(q, *kv, Linear(w[f"{name}_out"], c.width, c.width), n_heads=c.n_heads)
        self.norm = LayerNorm(w[f"{name}_norm"], c.width, c.eps)

    def attend(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Let queries x [q, Q] attend to all rows: the sum's norm [q, Q], and what the attention was [H, q, rows]."""
        n, n_rows = (int(t.shape[0]) for t in (x, rows))
        q, k, v = self.heads(x, across=(rows, rows))
        y = self.read(q, k, v, np.zeros(n, np.int32), np.full(n, n_rows, np.int32))
        return self.norm(x + y), self.shares(q, k)


class QFormerLayer:
    """Attention among the queries, to the picture's rows in some layers, and a feed-forward."""

    def __init__(self, w: Weights, c: QFormerConfig, width: int | None):
        """Bind the weights. width: of the picture's rows; None for a layer that does not see them."""
        self.among = QFormerAttention(w, "self_attn", c, c.width)
        self.across = None if width is None else QFormerAttention(w, "cross_attn", c, width)
        self.feed_forward, self.norm = EncoderFeedForward(w, c.width, c.d_ff, c.act), LayerNorm(w["ffn_norm"], c.width, c.eps)

    def __call__(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:          # [q, Q], [n + 1, V] -> [q, Q], [H, q, n + 1]
        x, seen = self.among.attend(x, x)[0], None
        if self.across is not None:
            x, seen = self.across.attend(x, rows)
        return self.norm(x + self.feed_forward(x)), seen


class Vision(Encoder):
    """Encoder, Q-Former, projection and processor. Nothing about a picture is kept here."""

    leads: ClassVar[bool] = True

    def __init__(self, files: EncoderFiles):
        h, v, w, token = files
        self.tower = Tower(w["v"], TowerConfig.read(v, w), post_norm=True, whole=True)
        c = self.config = QFormerConfig.read(v, w)
        own = w["mm"]
        self.queries = constant(own.tensor("proj_query", (c.n_queries, c.width)), dtype("F32"))
        self.norm = LayerNorm(own["proj_norm"], c.width, c.eps)
        self.layers = [QFormerLayer(own["proj_blk", i], c, None if i % c.every else self.tower.width) for i in range(c.n_layers)]
        self.projection = Linear(own["proj_linear"], c.width, h.size("embedding_length"))
        self.maps = tuple(f"qformer.{i}" for i in range(0, c.n_layers, c.every))
        try:
            self.markers = {"image": (special_token(v, "image", token, "<image>"),)}
        except InvalidModelError:                                                       # the vocabularies of first checkpoints have no such token
            self.markers = {"image": ()}

    def most_rows(self, n_ctx: int) -> int:
        """Return the rows of a picture, one for each query."""
        return self.config.n_queries

    def n_rows(self, width: int, height: int) -> int:
        """Return the rows of a picture: as many for each size."""
        return self.config.n_queries

    def declare(self, g: Graph, rows: int) -> Tensor:
        """Declare the rows [q, D] of "patches" [n, 3 * p * p]."""
        return self.declare_maps(g, rows)[0]

    def declare_maps(self, g: Graph, rows: int) -> list[Tensor]:
        """Declare them and what the queries attended to in each layer that sees the picture, [H, q, n + 1]: the class token comes first."""
        c = self.tower.config
        picture = self.tower(g.input("patches", (c.side**2, 3 * c.patch**2)))           # [n + 1, V]
        x, maps = self.norm(self.queries), []
        for layer in self.layers:
            x, seen = layer(x, picture)
            maps += [] if seen is None else [seen]
        return [self.projection(x), *maps]

    def process(self, media: Image | Video, limits: Limits) -> Processed:
        """Turn a picture into one run over a square. Raises: RequestError for videos and options."""
        only_pictures(media)
        rows, tile = self.config.n_queries, self.tower.config.tile
        view = View(lambda: {"patches": self._patches(media.pixels)}, {}, np.arange(rows, dtype=np.int32)[None], rows)
        return Processed((view,), media.size, (tile, tile))

    def _patches(self, pixels: np.ndarray) -> np.ndarray:
        from pyengine.media.image import resize                                         # Pillow takes 20 ms to import

        c = self.tower.config
        return self.tower.patches(resize(pixels, c.tile, c.tile, c.resample))
