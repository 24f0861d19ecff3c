"""BLIP-2's and InstructBLIP's encoder: a vision transformer over one square, and a Q-Former, whose queries attend to its rows and become the
soft tokens.

Papers arXiv:2301.12597, arXiv:2305.06500. Follows transformers 5.23: `modeling_blip_2.py`, `modeling_instructblip.py`, `processing_blip_2.py`,
`image_processing_pil_blip.py`.

    picture -> resized to a square -> class token and patches, 39 layers, a norm over all rows
    32 queries -> norm -> 12 layers: attention among the queries; in every other one attention to the picture's rows; feed-forward;
                  each added to its input, and a norm behind the sum -> a product into the text model's width
    InstructBLIP: the prompt's text, in BERT's vocabulary, stands behind the queries, which attend to it too; it has feed-forwards of its own

The soft tokens stand before all of a text, BOS included; beside Flan-T5 both go to its encoder. llama.cpp does not have this model; names are those that it has for other
Q-Formers, behind "mm.", and keys "clip.vision.qformer.*" are ours.
Axes: n patches of a square, V hidden, q queries, r rows of queries and text, Q hidden of the Q-Former, H heads, D hidden of the text model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TYPE_CHECKING

import numpy as np

from pyengine import ops
from pyengine.dtype import dtype
from pyengine.errors import InvalidModelError, RequestError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Dim, Tensor
from pyengine.media.views import Limits, Processed, View
from pyengine.models.architecture import Encoder, EncoderFiles
from pyengine.models.encoders.clip import Tower, TowerConfig
from pyengine.nn.encoder import EncoderAttention, head_count, image_marker, known_activation, only_pictures, projector_type
from pyengine.nn.layers import constant, Embedding, LayerNorm, Linear

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
            raise InvalidModelError(f"{v.key(f'{at}.block_count')} is {n_layers}, but no tensor is named mm.proj_blk.{n_layers - 1}")
        return cls(n_layers, v.size(f"{at}.query_count"), width, v.size(f"{at}.feed_forward_length"), head_count(v, width, f"{at}.attention.head_count"),
                   v.number(f"{at}.attention.layer_norm_epsilon", above=0.0), known_activation(v, f"{at}.hidden_act", "gelu"),
                   v.size(f"{at}.cross_attention_frequency"))


class Rows(NamedTuple):
    """What the rows of a run attend to: the picture's rows, and each other. Of a Q-Former that reads text, those of the queries come first.

    lo, hi     I32 [r]: the interval of rows that each sees
    own, back  I32 [q]: the queries' rows, and [r]: the number of a row among them, or -1 - its own number; None without text
    """

    picture: Tensor
    lo: Tensor | np.ndarray
    hi: Tensor | np.ndarray
    own: np.ndarray | None = None
    back: Tensor | None = None


class QFormerAttention(EncoderAttention):
    """Attention of rows to rows of any width; its result is added to them, with a norm behind the sum."""

    def __init__(self, w: Weights, name: str, c: QFormerConfig, width: int):
        q, *kv = (Linear(w[f"{name}_{part}"], n, c.width) for part, n in (("q", c.width), ("k", width), ("v", width)))
        self.hold(q, *kv, Linear(w[f"{name}_out"], c.width, c.width), n_heads=c.n_heads)
        self.norm = LayerNorm(w[f"{name}_norm"], c.width, c.eps)

    def within(self, x: Tensor, rows: Rows) -> Tensor:                                    # [r, Q] -> [r, Q]
        """Let the rows attend to each other."""
        return self.norm(x + self(x, rows.lo, rows.hi))

    def across(self, x: Tensor, picture: Tensor) -> tuple[Tensor, Tensor]:
        """Let queries x [q, Q] attend to all rows of the picture: the sum's norm [q, Q], and what the attention was [H, q, n + 1]."""
        n, n_rows = (int(t.shape[0]) for t in (x, picture))
        q, k, v = self.heads(x, across=(picture, picture))
        y = self.read(q, k, v, np.zeros(n, np.int32), np.full(n, n_rows, np.int32))
        return self.norm(x + y), self.shares(q, k)


class Behind:
    """A feed-forward that is added to its input, with a norm behind the sum."""

    def __init__(self, w: Weights, name: str, c: QFormerConfig):
        self.up, self.down = Linear(w[f"{name}_up"], c.width, c.d_ff), Linear(w[f"{name}_down"], c.d_ff, c.width)
        self.norm, self.act = LayerNorm(w[f"{name}_norm"], c.width, c.eps), c.act

    def __call__(self, x: Tensor) -> Tensor:                                              # [m, Q] -> [m, Q]
        return self.norm(x + self.down(ops.unary(self.up(x), kind=self.act)))


class QFormerLayer:
    """Attention among the rows, of the queries to the picture in some layers, and feed-forwards: one of queries, one of text."""

    def __init__(self, w: Weights, c: QFormerConfig, width: int | None, reads: bool):
        """Bind the weights. width: of the picture's rows; None for a layer that does not see them. reads: text is among the rows behind it."""
        self.among = QFormerAttention(w, "self_attn", c, c.width)
        self.cross = None if width is None else QFormerAttention(w, "cross_attn", c, width)
        self.feed_forward, self.of_text = Behind(w, "ffn", c), Behind(w, "ffn_text", c) if reads else None

    def __call__(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:            # [r, Q] -> [r, Q] or the queries' [q, Q], [H, q, n + 1]
        x, seen = self.among.within(x, rows), None
        own = x if rows.own is None else ops.rows(x, rows.own)                            # [q, Q]
        if self.cross is not None:
            own, seen = self.cross.across(own, rows.picture)
        own = self.feed_forward(own)
        return own if self.of_text is None else ops.rows(own, rows.back, self.of_text(x)), seen


class Words:
    """Embeddings of a text's words and of their positions, which stand behind the queries."""

    def __init__(self, w: Weights, c: QFormerConfig):
        n_ids, self.most = (n[0] if (n := w[name].shape("weight")) else 0 for name in ("token_embd", "position_embd"))
        self.embed, self.places = Embedding(w["token_embd"], n_ids, c.width), Embedding(w["position_embd"], self.most, c.width)
        self.none = np.zeros((1, c.width), np.float32)

    def __call__(self, words: Tensor, places: Tensor, queries: Tensor) -> Tensor:         # [r], [r], [q, Q] -> [r, Q]
        """Return the embeddings of rows; id -1-j is query j, which has place -1."""
        return self.embed(words, queries) + self.places(places, self.none)


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
        self.words = Words(own, c) if projector_type(v) == "instructblip" else None
        self.vocabulary = f"{v.arch}.vision.qformer" if self.words else ""
        self.layers = [QFormerLayer(own["proj_blk", i], c, None if i % c.every else self.tower.width, bool(self.words) and i < c.n_layers - 1)
                       for i in range(c.n_layers)]
        self.projection = Linear(own["proj_linear"], c.width, h.size("embedding_length"))
        self.maps = tuple(f"qformer.{i}" for i in range(0, c.n_layers, c.every))
        self.markers = {"image": image_marker(v, token)}

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
        _, states, maps = self.states(g)
        return [self.projection(states[-1]), *maps]

    def states(self, g: Graph) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Declare the picture's rows [n + 1, V], the Q-Former's before its first layer and behind each, [r, Q] and at last [q, Q], and maps."""
        c, n = self.tower.config, self.config.n_queries
        picture = self.tower(g.input("patches", (c.side**2, 3 * c.patch**2)))           # [n + 1, V]
        if self.words is None:
            x, rows = self.queries, Rows(picture, np.zeros(n, np.int32), np.full(n, n, np.int32))
        else:
            names, r = ("words", "places", "lo", "hi", "back"), Dim("r", n + self.words.most)
            words, places, lo, hi, back = (g.input(name, (r,), "I32") for name in names)
            x, rows = self.words(words, places, self.queries), Rows(picture, lo, hi, np.arange(n, dtype=np.int32), back)
        states, maps = [self.norm(x)], []
        for layer in self.layers:
            x, seen = layer(states[-1], rows)
            states.append(x)
            maps += [] if seen is None else [seen]
        return picture, states, maps

    def process(self, media: Image | Video, limits: Limits) -> Processed:
        """Turn a picture into one run over a square, with the prompt's text where the Q-Former reads it.

        Raises: RequestError for videos and options, and for a text that is longer than its positions.
        """
        only_pictures(media)
        rows, tile = self.config.n_queries, self.tower.config.tile
        if self.words is not None and len(limits.words) > self.words.most:
            raise RequestError(f"the model reads a text of {len(limits.words)} words of its own for a picture, and has positions for {self.words.most}; "
                               "make the text shorter")
        view = View(lambda: {"patches": self._patches(media.pixels), **self._text(limits.words)}, {} if self.words is None else {
            "r": rows + len(limits.words)}, np.arange(rows, dtype=np.int32)[None], rows)
        return Processed((view,), media.size, (tile, tile))

    def _patches(self, pixels: np.ndarray) -> np.ndarray:
        from pyengine.media.image import resize                                         # Pillow takes 20 ms to import

        c = self.tower.config
        return self.tower.patches(resize(pixels, c.tile, c.tile, c.resample))

    def _text(self, words: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return the inputs of queries and the words behind them, I32 [r] each."""
        if self.words is None:
            return {}
        n, t = self.config.n_queries, len(words)
        queries, own = np.arange(n), np.arange(t)
        made = {"words": [*(-1 - queries), *words], "places": [-1] * n + own.tolist(), "lo": [0] * (n + t), "hi": [n + t] * (n + t),
                "back": [*queries, *(-1 - n - own)]}
        return {name: np.array(numbers, np.int32) for name, numbers in made.items()}
