"""Persimmon-8B, and the decoder of Fuyu: layer norms with biases, norms of each head's queries and keys, squared ReLU, half of a head rotated.

No paper; follows transformers `modeling_persimmon.py`, `modeling_fuyu.py`. The encoder of Fuyu stands in `encoders/fuyu.py`.
differs: q, k and v are matrices of their own in the file; the authors' one holds them in turns, a head's three after each other.
Axes: m rows of the batch, D hidden, H heads, E head size, F feed-forward width.
"""

from __future__ import annotations

from pyengine import ops
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models import phi3
from pyengine.nn.cache import LayerCache
from pyengine.nn.decoder import common, DecoderConfig
from pyengine.nn.layers import Embedding, LayerNorm, Linear
from pyengine.nn.rope import Rope, rope


class Block:
    """Pre-norm attention and feed-forward, each added to its input."""

    def __init__(self, w: Weights, c: DecoderConfig):
        self.c = c
        q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        self.attn_norm, self.ffn_norm = LayerNorm(w["attn_norm"], c.d_model, c.eps), LayerNorm(w["ffn_norm"], c.d_model, c.eps)
        self.q, self.k, self.v = (Linear(w[name], c.d_model, n) for name, n in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)))
        normed = "attn_q_norm" in w or "attn_k_norm" in w
        self.q_norm, self.k_norm = (LayerNorm(w[name], c.head_dim, c.eps) if normed else None for name in ("attn_q_norm", "attn_k_norm"))
        self.out = Linear(w["attn_output"], q, c.d_model)
        self.up, self.down = Linear(w["ffn_up"], c.d_model, c.d_ff), Linear(w["ffn_down"], c.d_ff, c.d_model)

    def __call__(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> Tensor:     # [m, D]
        x = x + self.attend(self.attn_norm(x), rope, angles, cache)
        return x + self.down(ops.unary(self.up(self.ffn_norm(x)), kind="relu2"))                # [m, D]

    def attend(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> Tensor:
        """Apply attention: x [m, D] -> [m, D]"""
        c = self.c
        q = self.q(x).reshape(-1, c.n_heads, c.head_dim)                           # [m, H, E]
        k, v = (part(x).reshape(-1, c.n_kv_heads, c.head_dim) for part in (self.k, self.v))     # [m, H, E] each
        if self.q_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.out(cache.attend(rope(q, angles), rope(k, angles), v, scale=c.head_dim**-0.5))


class Model(phi3.Model):
    """A persimmon decoder. `forward` builds the graph of one step; nothing about a request is kept here."""

    def __init__(self, h: Hparams, w: Weights):
        h.refuse(expert_count="a mixture of experts", attention__sliding_window="a sliding window")
        c = self.config = phi3.Config(**common(h, w, eps="attention.layer_norm_epsilon"), window=0)
        self.embed = Embedding(w["token_embd"], c.vocab_size, c.d_model)
        self.blocks = [Block(w["blk", i], c) for i in range(c.n_layers)]
        self.norm = LayerNorm(w["output_norm"], c.d_model, c.eps)
        self.head = Linear(w.first("output", "token_embd"), c.d_model, c.vocab_size)    # tied if absent
        self.rope = rope(h, w, c.head_dim, interleaved=False)
