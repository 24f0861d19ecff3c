"""Qwen3 text decoders (0.6B to 32B).

Paper arXiv:2505.09388. Follows transformers `modeling_qwen3.py`: llama's block without biases; queries and keys of a head are normed
before they are rotated (NEOX order). `qwen3moe` has the same with a mixture in the place of the feed-forward.
Axes: m rows of the batch, D hidden, H/K query/KV heads, E head size, F feed-forward width.
"""

from __future__ import annotations

from typing import Any

from pyengine.cache.policy import Full, Policy
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models import encoders
from pyengine.models.architecture import Architecture, Encoder, EncoderFiles
from pyengine.models.llama import FeedForward
from pyengine.nn.batch import Batch
from pyengine.nn.cache import LayerCache
from pyengine.nn.decoder import common, DecoderConfig
from pyengine.nn.layers import Embedding, Linear, RMSNorm
from pyengine.nn.rope import Rope, rope


class Block:
    """Pre-norm grouped-query attention and feed-forward, each added to its input."""

    def __init__(self, w: Weights, c: DecoderConfig, feed_forward: Any):
        self.c = c
        self.attn_norm = RMSNorm(w["attn_norm"], c.d_model, c.eps)
        self.q = Linear(w["attn_q"], c.d_model, c.n_heads * c.head_dim)
        self.k = Linear(w["attn_k"], c.d_model, c.n_kv_heads * c.head_dim)
        self.v = Linear(w["attn_v"], c.d_model, c.n_kv_heads * c.head_dim)
        self.q_norm, self.k_norm = (RMSNorm(w[name], c.head_dim, c.eps) for name in ("attn_q_norm", "attn_k_norm"))
        self.out = Linear(w["attn_output"], c.n_heads * c.head_dim, c.d_model)
        self.ffn_norm = RMSNorm(w["ffn_norm"], c.d_model, c.eps)
        self.feed_forward = feed_forward(w, c)

    def __call__(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> Tensor:     # [m, D]
        x = x + self.attend(self.attn_norm(x), rope, angles, cache)
        return x + self.feed_forward(self.ffn_norm(x))                             # [m, D]

    def attend(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> Tensor:
        """Apply attention: x [m, D] -> [m, D]"""
        c = self.c
        q = self.q_norm(self.q(x).reshape(-1, c.n_heads, c.head_dim))             # [m, H, E]
        k = self.k_norm(self.k(x).reshape(-1, c.n_kv_heads, c.head_dim))           # [m, K, E]
        v = self.v(x).reshape(-1, c.n_kv_heads, c.head_dim)                        # [m, K, E]
        return self.out(cache.attend(rope(q, angles), rope(k, angles), v, scale=c.head_dim**-0.5))


class Model(Architecture):
    """A qwen3 decoder. `forward` builds the graph of one step; nothing about a request is kept here."""

    feed_forward: Any = FeedForward

    def __init__(self, h: Hparams, w: Weights):
        c = self.config = self.read(h, w)
        self.embed = Embedding(w["token_embd"], c.vocab_size, c.d_model)
        self.blocks = [self.block(w["blk", i], i) for i in range(c.n_layers)]
        self.norm = RMSNorm(w["output_norm"], c.d_model, c.eps)
        self.head = Linear(w.first("output", "token_embd"), c.d_model, c.vocab_size)    # tied if absent
        self.rope = rope(h, w, c.head_dim, interleaved=False)

    @staticmethod
    def read(h: Hparams, w: Weights) -> DecoderConfig:
        """Read the keys "qwen3.*"."""
        h.refuse(attention__sliding_window="a sliding window", expert_count="a mixture of experts")
        return DecoderConfig(**common(h, w))

    def block(self, w: Weights, i: int) -> Any:
        """Bind layer i."""
        return Block(w, self.config, self.feed_forward)

    @classmethod
    def encoders(cls, files: EncoderFiles) -> dict[str, Encoder]:
        """Bind the encoder that the file's projector names."""
        return encoders.beside(files)

    def policies(self) -> list[Policy]:
        """Return what each layer's attention needs."""
        return [Full()] * self.config.n_layers

    def forward(self, batch: Batch, caches: list[LayerCache]) -> Tensor:
        """Return last hidden states [m, D]."""
        x = self.embed(batch.ids, batch.media)                                     # [m, D]
        rope, angles = self.rotation(batch)
        for block, cache in zip(self.blocks, caches):
            x = block(batch.noted(x), rope, angles, cache)
        return self.norm(x)

    def rotation(self, batch: Batch) -> tuple[Rope, Tensor]:
        """Return the rotation, and its angles of each row, [m, E]."""
        rope = self.rope.at(batch.n_ctx)
        return rope, rope.table(batch.positions)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [l, vocab] of hidden states [l, D]."""
        return self.head(x)
