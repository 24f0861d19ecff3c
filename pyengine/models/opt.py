"""OPT (125M to 66B) and models of its shape (Galactica): positions are embeddings that are added, layer norms before or behind what they
belong to, one feed-forward matrix up and down.

Paper arXiv:2205.01068. Follows transformers 5.23 `modeling_opt.py`. The 350M model's norms stand behind attention and feed-forward, and its
tokens are narrower than its layers: a product makes them wider, another one makes hidden states narrow again. llama.cpp does not have
this architecture; names and keys are as it calls the same things elsewhere, and ours are "pre_norm", "embedding_length_token" and the two
products. differs: the first two rows of the checkpoint's table of positions, which padding takes, are not in the file; `hidden` of a model
with narrower tokens is as wide as its layers, as transformers' is before its last product.
Axes: m rows of the batch, D hidden, W of a token, H heads, E head size, F feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyengine import ops
from pyengine.errors import UnsupportedModelError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models import encoders, gpt2
from pyengine.models.architecture import Encoder, EncoderFiles
from pyengine.nn.batch import Batch
from pyengine.nn.cache import LayerCache
from pyengine.nn.decoder import common, DecoderConfig
from pyengine.nn.encoder import known_activation
from pyengine.nn.layers import Embedding, LayerNorm, Linear


@dataclass(frozen=True)
class Config(DecoderConfig):
    """Numbers of an OPT model, from the metadata."""

    d_token: int                     # numbers of a token's embedding
    pre_norm: bool                   # norms stand before attention and feed-forward, else behind
    act: str                         # of ops.unary

    @classmethod
    def read(cls, h: Hparams, w: Weights) -> Config:
        """Read the keys below the architecture's name. Raises: InvalidModelError, UnsupportedModelError."""
        own = common(h, w, eps="attention.layer_norm_epsilon")
        return cls(**own, d_token=h.size("embedding_length_token", own["d_model"]), pre_norm=h.need("pre_norm", bool),
                   act=known_activation(h, "hidden_activation", "relu"))


class Block:
    """Attention and feed-forward, each added to its input, with a norm before both or behind both."""

    def __init__(self, w: Weights, c: Config):
        self.c = c
        self.attn_norm, self.ffn_norm = LayerNorm(w["attn_norm"], c.d_model, c.eps), LayerNorm(w["ffn_norm"], c.d_model, c.eps)
        self.q, self.k, self.v, self.out = (Linear(w[f"attn_{n}"], c.d_model, c.d_model) for n in ("q", "k", "v", "output"))
        self.up, self.down = Linear(w["ffn_up"], c.d_model, c.d_ff), Linear(w["ffn_down"], c.d_ff, c.d_model)

    def __call__(self, x: Tensor, cache: LayerCache) -> Tensor:                    # [m, D]
        if self.c.pre_norm:
            x = x + self.attend(self.attn_norm(x), cache)
            return x + self.feed_forward(self.ffn_norm(x))
        x = self.attn_norm(x + self.attend(x, cache))
        return self.ffn_norm(x + self.feed_forward(x))

    def attend(self, x: Tensor, cache: LayerCache) -> Tensor:
        """Apply attention: x [m, D] -> [m, D]"""
        q, k, v = (part(x).reshape(-1, self.c.n_heads, self.c.head_dim) for part in (self.q, self.k, self.v))      # [m, H, E] each
        return self.out(cache.attend(q, k, v, scale=self.c.head_dim**-0.5))

    def feed_forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward: x [m, D] -> [m, D]"""
        return self.down(ops.unary(self.up(x), kind=self.c.act))


class Model(gpt2.Model):
    """An opt decoder. `forward` builds the graph of one step; nothing about a request is kept here."""

    def __init__(self, h: Hparams, w: Weights):
        c = self.config = Config.read(h, w)
        self.embed = Embedding(w["token_embd"], c.vocab_size, c.d_token)
        self.places = Embedding(w["position_embd"], c.n_ctx_train, c.d_model)
        wider = c.d_token != c.d_model
        self.into = Linear(w["token_embd_proj"], c.d_token, c.d_model) if wider else None
        self.blocks = [Block(w["blk", i], c) for i in range(c.n_layers)]
        self.norm = LayerNorm(w["output_norm"], c.d_model, c.eps) if c.pre_norm else None
        self.back = Linear(w["output_proj"], c.d_model, c.d_token) if wider else None
        self.head = Linear(w.first("output", "token_embd"), c.d_token, c.vocab_size)    # tied if absent

    @classmethod
    def encoders(cls, files: EncoderFiles) -> dict[str, Encoder]:
        """Bind the encoder beside the text. Raises: UnsupportedModelError where rows of pictures would not be as wide as tokens."""
        if files.text.size("embedding_length_token", files.text.size("embedding_length")) != files.text.size("embedding_length"):
            raise UnsupportedModelError(f"{files.text.key('embedding_length_token')}: a text model whose tokens are narrower than its layers has no encoder here")
        return encoders.beside(files)

    def forward(self, batch: Batch, caches: list[LayerCache]) -> Tensor:
        """Return last hidden states [m, D]. Raises: RequestError for contexts that are larger than the positions of the file."""
        x = self.embed(batch.ids, batch.media)                                     # [m, W]
        x = self.placed(x if self.into is None else self.into(x), batch)           # [m, D]
        for block, cache in zip(self.blocks, caches):
            x = block(x, cache)
        return x if self.norm is None else self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [l, vocab] of hidden states [l, D]."""
        return self.head(x if self.back is None else self.back(x))
