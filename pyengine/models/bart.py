"""BART: an encoder that reads a text in both directions, and a decoder whose layers attend to it across; norms behind each part.

Paper arXiv:1910.13461. Follows transformers `modeling_bart.py`. Positions are embeddings, the first two rows of whose table stand for
nothing; embeddings are normed. llama.cpp has no such model: tensors are named as its T5's are.
Axes: m rows, c rows of the encoder, D hidden, H heads, E head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyengine import ops
from pyengine.dtype import dtype as dtype_of
from pyengine.errors import InvalidModelError, RequestError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models import encoders
from pyengine.models.architecture import Encoder as ImageEncoder
from pyengine.models.architecture import EncoderDecoder, EncoderFiles, SourceEncoder
from pyengine.nn.attention import Attention
from pyengine.nn.batch import Batch, Source
from pyengine.nn.decoder import DecoderConfig, first_tokens, vocab_size
from pyengine.nn.encoder import EncoderFeedForward, known_activation
from pyengine.nn.layers import constant, Embedding, LayerNorm

OFFSET = 2                           # BartLearnedPositionalEmbedding.offset


@dataclass(frozen=True)
class Config(DecoderConfig):
    """Numbers of both halves; those of `DecoderConfig` are the decoder's."""

    n_encoder_layers: int
    n_encoder_heads: int
    d_encoder_ff: int
    act: str                         # of ops.unary
    scale: float                     # of embeddings

    @classmethod
    def read(cls, h: Hparams, w: Weights) -> Config:
        """Read the keys below the architecture's name. Raises: InvalidModelError."""
        n_layers, d_model = h.size("block_count"), h.size("embedding_length")
        n_heads, d_ff = h.size("attention.head_count"), h.size("feed_forward_length")
        decoder_heads = h.size("decoder_attention_head_count", n_heads)
        if d_model % n_heads or d_model % decoder_heads:
            raise InvalidModelError(f"{h.key('attention.head_count')}: {n_heads} and {decoder_heads} heads do not divide a width of {d_model}")
        return cls(
            n_layers=h.size("decoder_block_count", n_layers),
            d_model=d_model,
            d_ff=h.size("decoder_feed_forward_length", d_ff),
            n_heads=decoder_heads,
            n_kv_heads=decoder_heads,
            head_dim=d_model // decoder_heads,
            vocab_size=vocab_size(w),
            n_ctx_train=h.size("context_length"),
            eps=h.number("attention.layer_norm_epsilon", above=0.0),
            n_encoder_layers=n_layers,
            n_encoder_heads=n_heads,
            d_encoder_ff=d_ff,
            act=known_activation(h, "hidden_act", "gelu"),
            scale=h.number("embedding_scale", 1.0),
        )


class Embedded:
    """Embeddings of tokens, which both halves share, with those of positions, normed."""

    def __init__(self, w: Weights, own: Weights, c: Config):
        self.n_ctx = c.n_ctx_train
        self.tokens = Embedding(w["token_embd"], c.vocab_size, c.d_model, c.scale)
        places = own["position_embd"].tensor("weight", (c.n_ctx_train + OFFSET, c.d_model))
        self.places = constant(places.rows(OFFSET, c.n_ctx_train))
        self.norm = LayerNorm(own["token_embd_norm"], c.d_model, c.eps)

    def __call__(self, ids: Tensor, positions: Tensor, n_ctx: int, media: Tensor | None = None) -> Tensor:         # [m] -> [m, D]
        if n_ctx > self.n_ctx:
            raise RequestError(f"n_ctx is {n_ctx}, but the model has embeddings of {self.n_ctx} positions")
        return self.norm(self.tokens(ids, media) + ops.rows(self.places, positions))


class EncoderLayer:
    """Attention and a feed-forward, each added to its input and normed."""

    def __init__(self, w: Weights, c: Config):
        self.attention = Attention(w, c.d_model, c.n_encoder_heads, c.d_model // c.n_encoder_heads, (c.d_model // c.n_encoder_heads) ** -0.5)
        self.feed_forward = EncoderFeedForward(w, c.d_model, c.d_encoder_ff, c.act)
        self.attn_norm, self.ffn_norm = (LayerNorm(w[name], c.d_model, c.eps) for name in ("attn_norm", "ffn_norm"))

    def __call__(self, x: Tensor, source: Source) -> Tensor:                       # [m, D]
        x = self.attn_norm(x + self.attention.among(x, source))
        return self.ffn_norm(x + self.feed_forward(x))                             # [m, D]


class DecoderLayer:
    """Attention to what came before, attention across and a feed-forward, each added to its input and normed."""

    def __init__(self, w: Weights, c: Config):
        self.attention, self.cross = (Attention(w, c.d_model, c.n_heads, c.head_dim, c.head_dim**-0.5, name) for name in ("attn", "cross_attn"))
        self.feed_forward = EncoderFeedForward(w, c.d_model, c.d_ff, c.act)
        self.attn_norm, self.cross_norm, self.ffn_norm = (
            LayerNorm(w[name], c.d_model, c.eps) for name in ("attn_norm", "cross_attn_norm", "ffn_norm"))

    def __call__(self, x: Tensor, states: Tensor, own: Any, across: Any) -> Tensor:            # [m, D], [c, D]
        x = self.attn_norm(x + self.attention.before(x, own))
        x = self.cross_norm(x + self.cross.across(x, states, across))
        return self.ffn_norm(x + self.feed_forward(x))                             # [m, D]


class Encoder(SourceEncoder):
    """The half that prompts go to."""

    def __init__(self, h: Hparams, w: Weights, c: Config):
        self.start, self.forced = first_tokens(h)
        self.embed = Embedded(w, w["enc"], c)
        self.layers = [EncoderLayer(w["enc", "blk", i], c) for i in range(c.n_encoder_layers)]

    def forward(self, source: Source) -> Tensor:
        """Return last hidden states [m, D]. Raises: RequestError for sources longer than the positions of the file."""
        x = self.embed(source.ids, source.positions, source.n_ctx, source.media)   # [m, D]
        for layer in self.layers:
            x = layer(x, source)
        return x


class Model(EncoderDecoder):
    """A BART. `forward` builds the graph of a decoder's step; nothing about a request is kept here."""

    absolute = True

    def __init__(self, h: Hparams, w: Weights):
        c = self.config = Config.read(h, w)
        self.source = Encoder(h, w, c)
        self.embed = Embedded(w, w["dec"], c)
        self.layers = [DecoderLayer(w["dec", "blk", i], c) for i in range(c.n_layers)]
        tied = w["output"].shape("weight") is None
        self.head = constant(w["token_embd" if tied else "output"].tensor("weight", (c.vocab_size, c.d_model)))
        bias = w["output"].optional("bias", (c.vocab_size,))
        self.head_bias = constant(bias, dtype_of("F32")) if bias else None

    @classmethod
    def encoders(cls, files: EncoderFiles) -> dict[str, ImageEncoder]:
        """Bind the encoder of pictures, whose rows go to the encoder of prompts."""
        return encoders.beside(files)

    def forward(self, batch: Batch, caches: list[Any]) -> Tensor:
        """Return last hidden states [m, D]. Raises: RequestError for contexts that are larger than the positions of the file."""
        x = self.embed(batch.ids, batch.positions.reshape(-1), batch.n_ctx)        # [m, D]
        for layer, own, across in zip(self.layers, caches[::2], caches[1::2]):
            x = layer(x, batch.across.states, own, across)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [l, vocab] of hidden states [l, D]."""
        return ops.linear(x, [self.head], None if self.head_bias is None else [self.head_bias])[0]
