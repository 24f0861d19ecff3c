"""GLM-4 text decoders (GLM-4-0414 9B and 32B, GLM-Z1): norms before and after, half of each head rotated, biases on q, k and v.

Paper arXiv:2406.12793. Follows transformers `modeling_glm4.py`; pairs of the rotation lie side by side. Gate and up are one matrix.
Axes: m rows of the batch, D hidden, H/K query/KV heads, E head size, F feed-forward width.
"""

from __future__ import annotations

from pyengine.cache.policy import Full, Policy
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models.architecture import Architecture
from pyengine.models.phi3 import FeedForward
from pyengine.nn.batch import Batch
from pyengine.nn.cache import LayerCache
from pyengine.nn.decoder import common, DecoderConfig
from pyengine.nn.layers import Embedding, Linear, RMSNorm
from pyengine.nn.rope import Rope, rope


class Block:
    """Attention and gated feed-forward; each has a norm before and after, and is added to its input."""

    def __init__(self, w: Weights, c: DecoderConfig):
        self.c = c
        self.attn_norm, self.attn_post = RMSNorm(w["attn_norm"], c.d_model, c.eps), RMSNorm(w["post_attention_norm"], c.d_model, c.eps)
        self.q = Linear(w["attn_q"], c.d_model, c.n_heads * c.head_dim)
        self.k = Linear(w["attn_k"], c.d_model, c.n_kv_heads * c.head_dim)
        self.v = Linear(w["attn_v"], c.d_model, c.n_kv_heads * c.head_dim)
        self.out = Linear(w["attn_output"], c.n_heads * c.head_dim, c.d_model)
        self.ffn_norm, self.ffn_post = RMSNorm(w["ffn_norm"], c.d_model, c.eps), RMSNorm(w["post_ffw_norm"], c.d_model, c.eps)
        self.feed_forward = FeedForward(w, c)

    def __call__(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> Tensor:     # [m, D]
        x = x + self.attn_post(self.attend(self.attn_norm(x), rope, angles, cache))
        return x + self.ffn_post(self.feed_forward(self.ffn_norm(x)))              # [m, D]

    def attend(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> Tensor:
        """Apply attention: x [m, D] -> [m, D]"""
        c = self.c
        q = self.q(x).reshape(-1, c.n_heads, c.head_dim)                          # [m, H, E]
        k = self.k(x).reshape(-1, c.n_kv_heads, c.head_dim)                        # [m, K, E]
        v = self.v(x).reshape(-1, c.n_kv_heads, c.head_dim)                        # [m, K, E]
        return self.out(cache.attend(rope(q, angles), rope(k, angles), v, scale=c.head_dim**-0.5))


class Model(Architecture):
    """A glm4 decoder. `forward` builds the graph of one step; nothing about a request is kept here."""

    def __init__(self, h: Hparams, w: Weights):
        h.refuse(attention__sliding_window="a sliding window", expert_count="a mixture of experts", nextn_predict_layers="a layer for drafts")
        c = self.config = DecoderConfig(**common(h, w))
        self.embed = Embedding(w["token_embd"], c.vocab_size, c.d_model)
        self.blocks = [Block(w["blk", i], c) for i in range(c.n_layers)]
        self.norm = RMSNorm(w["output_norm"], c.d_model, c.eps)
        self.head = Linear(w.first("output", "token_embd"), c.d_model, c.vocab_size)    # tied if absent
        self.rope = rope(h, w, c.head_dim, interleaved=True)

    def policies(self) -> list[Policy]:
        """Return what each layer's attention needs."""
        return [Full()] * self.config.n_layers

    def forward(self, batch: Batch, caches: list[LayerCache]) -> Tensor:
        """Return last hidden states [m, D]."""
        x = self.embed(batch.ids)                                                  # [m, D]
        rope = self.rope.at(batch.n_ctx)
        angles = rope.table(batch.positions)                                       # [m, n_rot]
        for block, cache in zip(self.blocks, caches):
            x = block(x, rope, angles, cache)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [l, vocab] of hidden states [l, D]."""
        return self.head(x)
