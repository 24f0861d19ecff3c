"""T5, T5 1.1, Flan-T5, mT5 and UMT5: an encoder-decoder whose only word on positions is a bias of scores by distance.

Papers arXiv:1910.10683, arXiv:2210.11416. Follows transformers `modeling_t5.py`. Norms are RMS norms in front of each part, scores are not
scaled, and a bias for each head, in buckets of distances that grow, is added to them: one table for all layers of a half (the first layer's), or
one for each (UMT5). The head of the first T5 is the embedding, and hidden states are multiplied by d_model ** -0.5 in front of it.
differs: T5 1.1's head is its own where the file has one, as in the authors' checkpoints; transformers 5 ties it always.
Names are those of llama.cpp's files, which know neither the farthest distance (128) nor that factor (it is there where no head is).
Axes: m rows, c rows of the encoder, D hidden, H heads, E head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyengine import ops
from pyengine.errors import InvalidModelError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models import encoders
from pyengine.models.architecture import Encoder as ImageEncoder
from pyengine.models.architecture import EncoderDecoder, EncoderFiles, SourceEncoder
from pyengine.nn.attention import Attention
from pyengine.nn.batch import Batch, Source
from pyengine.nn.decoder import DecoderConfig, first_tokens, vocab_size
from pyengine.nn.encoder import EncoderFeedForward
from pyengine.nn.layers import Embedding, Linear, RMSNorm
from pyengine.nn.relative_bias import RelativeBias
from pyengine.nn.texts import Texts

MAX_DISTANCE = 128                   # T5Config.relative_attention_max_distance, for files without the key
START = 0                            # the token that fills up, T5Config.pad_token_id


@dataclass(frozen=True)
class Config(DecoderConfig):
    """Numbers of both halves; `n_layers` is the decoder's."""

    n_encoder_layers: int
    n_buckets: int
    max_distance: int
    head_scale: float                # of hidden states in front of the head

    @classmethod
    def read(cls, h: Hparams, w: Weights) -> Config:
        """Read the keys below the architecture's name. Raises: InvalidModelError."""
        n_layers, d_model, n_heads = h.size("block_count"), h.size("embedding_length"), h.size("attention.head_count")
        buckets, farthest = h.size("attention.relative_buckets_count"), h.size("attention.relative_max_distance", MAX_DISTANCE)
        if buckets < 4 or buckets % 2 or farthest <= buckets // 2 or farthest > 1 << 20:
            raise InvalidModelError(f"{h.key('attention.relative_buckets_count')} is {buckets}: no such buckets reach a distance of {farthest}")
        tied = w["output"].shape("weight") is None
        return cls(
            n_layers=h.size("decoder_block_count", n_layers),
            d_model=d_model,
            d_ff=h.size("feed_forward_length"),
            n_heads=n_heads,
            n_kv_heads=n_heads,
            head_dim=h.size("attention.key_length", d_model // n_heads),
            vocab_size=vocab_size(w),
            n_ctx_train=h.size("context_length"),
            eps=h.number("attention.layer_norm_rms_epsilon", above=0.0),
            n_encoder_layers=n_layers,
            n_buckets=buckets,
            max_distance=farthest,
            head_scale=h.number("logit_scale", d_model**-0.5 if tied else 1.0),
        )


def biases(w: Weights, n_layers: int, c: Config, both: bool) -> list[Tensor]:
    """Bind the biases [H, 2 max_distance + 1] of a half's layers: their own, or the first one's."""
    found: list[Tensor] = []
    for i in range(n_layers):
        if i and ("blk", i, "attn_rel_b") not in w:
            found.append(found[0])
            continue
        found.append(RelativeBias(w["blk", i, "attn_rel_b"], c.n_heads, c.n_buckets, c.max_distance, both).bias)
    return found


class Layer:
    """A layer of either half: attention, in the decoder attention across, and a feed-forward, each behind a norm and added to its input."""

    def __init__(self, w: Weights, c: Config, crosses: bool):
        names = ("attn", "cross_attn") if crosses else ("attn",)
        self.attentions = [Attention(w, c.d_model, c.n_heads, c.head_dim, 1.0, name) for name in names]
        self.norms = [RMSNorm(w[f"{name}_norm"], c.d_model, c.eps) for name in (*names, "ffn")]
        gated = "ffn_gate" in w                                                    # gelu_new where it is, relu else
        self.feed_forward = EncoderFeedForward(w, c.d_model, c.d_ff, "gelu_tanh" if gated else "relu", gated)
        if crosses:
            w["cross_attn_rel_b"].leave_out()                                      # of some files; nobody reads it

    def encode(self, x: Tensor, source: Source | Texts, bias: Tensor) -> Tensor:   # [m, D]
        """Apply it to rows of sources."""
        x = x + self.attentions[0].among(self.norms[0](x), source, bias)
        return x + self.feed_forward(self.norms[1](x))                             # [m, D]

    def decode(self, x: Tensor, states: Tensor, bias: Tensor, own: Any, across: Any) -> Tensor:        # [m, D], [c, D]
        """Apply it to a step's rows."""
        x = x + self.attentions[0].before(self.norms[0](x), own, bias)
        x = x + self.attentions[1].across(self.norms[1](x), states, across)
        return x + self.feed_forward(self.norms[2](x))                             # [m, D]


class Encoder(SourceEncoder):
    """The half that prompts go to."""

    def __init__(self, h: Hparams, w: Weights, c: Config, embed: Embedding):
        self.embed, own = embed, w["enc"]
        self.start, self.forced = first_tokens(h, START)
        self.layers = [Layer(own["blk", i], c, False) for i in range(c.n_encoder_layers)]
        self.biases = biases(own, c.n_encoder_layers, c, True)
        self.norm = RMSNorm(own["output_norm"], c.d_model, c.eps)

    def forward(self, source: Source) -> Tensor:
        """Return last hidden states [m, D]."""
        x = self.embed(source.ids, source.media)                                   # [m, D]
        for layer, bias in zip(self.layers, self.biases):
            x = layer.encode(x, source, bias)
        return self.norm(x)


class Model(EncoderDecoder):
    """A T5. `forward` builds the graph of a decoder's step; nothing about a request is kept here."""

    def __init__(self, h: Hparams, w: Weights):
        c = self.config = Config.read(h, w)
        self.embed = Embedding(w["token_embd"], c.vocab_size, c.d_model)
        self.source = Encoder(h, w, c, self.embed)
        self.layers = [Layer(w["dec", "blk", i], c, True) for i in range(c.n_layers)]
        self.biases = biases(w["dec"], c.n_layers, c, False)
        self.norm = RMSNorm(w["dec", "output_norm"], c.d_model, c.eps)
        self.head = Linear(w.first("output", "token_embd"), c.d_model, c.vocab_size)

    @classmethod
    def encoders(cls, files: EncoderFiles) -> dict[str, ImageEncoder]:
        """Bind the encoder of pictures, whose rows go to the encoder of prompts."""
        return encoders.beside(files)

    def forward(self, batch: Batch, caches: list[Any]) -> Tensor:
        """Return last hidden states [m, D]."""
        x = self.embed(batch.ids)                                                  # [m, D]
        for layer, bias, own, across in zip(self.layers, self.biases, caches[::2], caches[1::2]):
            x = layer.decode(x, batch.across.states, bias, own, across)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [l, vocab] of hidden states [l, D]."""
        return self.head(x if self.config.head_scale == 1 else ops.scale(x, factor=self.config.head_scale))
