"""Granite text decoders (3.x dense, 2B and 8B): llama's block with four multipliers.

Follows transformers `modeling_granite.py`; multipliers as in arXiv:2408.13359 (Power scheduler, section 3.1). GGUF files hold q and k with
their rows permuted, so that the rotation is the interleaved one. Soft tokens of pictures are multiplied like embeddings of tokens.
Axes: m rows of the batch, D hidden, H/K query/KV heads, E head size, F feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyengine import ops
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


@dataclass(frozen=True)
class Config(DecoderConfig):
    """Numbers of one checkpoint, from its metadata."""

    embedding_scale: float   # of embeddings
    residual_scale: float    # of what attention and feed-forward add
    attn_scale: float        # of scores
    logit_scale: float       # logits are divided by it


def multipliers(h: Hparams, head_dim: int) -> dict[str, float]:
    """Read the four multipliers; 0 is none, as in llama.cpp."""
    return {"embedding_scale": h.number("embedding_scale", 1.0) or 1.0, "residual_scale": h.number("residual_scale", 1.0) or 1.0,
            "attn_scale": h.number("attention.scale", 0.0) or head_dim**-0.5, "logit_scale": h.number("logit_scale") or 1.0}


class Block:
    """Pre-norm grouped-query attention and feed-forward (or mixture), each scaled and added to its input."""

    def __init__(self, w: Weights, c: Config, feed_forward: Any):
        self.c = c
        self.attn_norm = RMSNorm(w["attn_norm"], c.d_model, c.eps)
        self.q = Linear(w["attn_q"], c.d_model, c.n_heads * c.head_dim)
        self.k = Linear(w["attn_k"], c.d_model, c.n_kv_heads * c.head_dim)
        self.v = Linear(w["attn_v"], c.d_model, c.n_kv_heads * c.head_dim)
        self.out = Linear(w["attn_output"], c.n_heads * c.head_dim, c.d_model)
        self.ffn_norm = RMSNorm(w["ffn_norm"], c.d_model, c.eps)
        self.feed_forward = feed_forward(w, c)

    def __call__(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> Tensor:     # [m, D]
        x = x + ops.scale(self.attend(self.attn_norm(x), rope, angles, cache), factor=self.c.residual_scale)
        return x + ops.scale(self.feed_forward(self.ffn_norm(x)), factor=self.c.residual_scale)     # [m, D]

    def attend(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> Tensor:
        """Apply attention: x [m, D] -> [m, D]"""
        c = self.c
        q = self.q(x).reshape(-1, c.n_heads, c.head_dim)                          # [m, H, E]
        k = self.k(x).reshape(-1, c.n_kv_heads, c.head_dim)                        # [m, K, E]
        v = self.v(x).reshape(-1, c.n_kv_heads, c.head_dim)                        # [m, K, E]
        return self.out(cache.attend(rope(q, angles), rope(k, angles), v, scale=c.attn_scale))


class Model(Architecture):
    """A granite decoder. `forward` builds the graph of one step; nothing about a request is kept here."""

    feed_forward: Any = FeedForward

    def __init__(self, h: Hparams, w: Weights):
        c = self.config = self.read(h, w)
        self.embed = Embedding(w["token_embd"], c.vocab_size, c.d_model)
        self.blocks = [Block(w["blk", i], c, self.feed_forward) for i in range(c.n_layers)]
        self.norm = RMSNorm(w["output_norm"], c.d_model, c.eps)
        self.head = Linear(w.first("output", "token_embd"), c.d_model, c.vocab_size)    # tied if absent
        self.rope = rope(h, w, c.head_dim, interleaved=True)

    @staticmethod
    def read(h: Hparams, w: Weights) -> Config:
        """Read the keys "granite.*"."""
        h.refuse(attention__sliding_window="a sliding window", expert_count="a mixture of experts")
        numbers = common(h, w)
        return Config(**numbers, **multipliers(h, numbers["head_dim"]))

    @classmethod
    def encoders(cls, files: EncoderFiles) -> dict[str, Encoder]:
        """Bind the encoder that the file's projector names."""
        return encoders.beside(files)

    def policies(self) -> list[Policy]:
        """Return what each layer's attention needs."""
        return [Full()] * self.config.n_layers

    def forward(self, batch: Batch, caches: list[LayerCache]) -> Tensor:
        """Return last hidden states [m, D]."""
        x = ops.scale(self.embed(batch.ids, batch.media), factor=self.config.embedding_scale)      # [m, D]
        rope = self.rope.at(batch.n_ctx)
        angles = rope.table(batch.positions)                                       # [m, E]
        for block, cache in zip(self.blocks, caches):
            x = block(x, rope, angles, cache)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [l, vocab] of hidden states [l, D]."""
        return ops.scale(self.head(x), factor=1 / self.config.logit_scale)
