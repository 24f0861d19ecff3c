"""Phi-3, Phi-3.5 and Phi-4 text decoders (mini to 14B): llama's block with q, k and v in one matrix, gate and up in another.

Papers arXiv:2404.14219, arXiv:2412.08905, arXiv:2503.01743. Follows transformers `modeling_phi3.py`: rotation in NEOX order, of a part of
each head in Phi-4-mini; longrope; in some a sliding window.
differs: llama.cpp ignores the window of these files; here it counts, as in transformers.
Axes: m rows of the batch, D hidden, H/K query/KV heads, E head size, F feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyengine import ops
from pyengine.cache.policy import Full, Policy, Sliding
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models import encoders
from pyengine.models.architecture import Architecture, Encoder, EncoderFiles
from pyengine.nn.batch import Batch
from pyengine.nn.cache import LayerCache
from pyengine.nn.decoder import common, DecoderConfig
from pyengine.nn.layers import Embedding, Linear, RMSNorm
from pyengine.nn.rope import Rope, rope


@dataclass(frozen=True)
class Config(DecoderConfig):
    """Numbers of one checkpoint, from its metadata."""

    window: int              # 0: full attention


class FeedForward:
    """down(silu(gate x) * up x), gate and up in one matrix of the file."""

    def __init__(self, w: Weights, c: DecoderConfig):
        self.gate, self.up = Linear.several(w["ffn_up"], c.d_model, (c.d_ff, c.d_ff))
        self.down = Linear(w["ffn_down"], c.d_ff, c.d_model)

    def __call__(self, x: Tensor) -> Tensor:                                       # [m, D]
        return self.down(ops.silu(self.gate(x)) * self.up(x))


class Block:
    """Pre-norm grouped-query attention and feed-forward, each added to its input."""

    def __init__(self, w: Weights, c: Config):
        self.c = c
        q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        self.attn_norm, self.ffn_norm = RMSNorm(w["attn_norm"], c.d_model, c.eps), RMSNorm(w["ffn_norm"], c.d_model, c.eps)
        self.q, self.k, self.v = Linear.several(w["attn_qkv"], c.d_model, (q, kv, kv))
        self.out = Linear(w["attn_output"], q, c.d_model)
        self.feed_forward = FeedForward(w, c)

    def __call__(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> Tensor:     # [m, D]
        x = x + self.attend(self.attn_norm(x), rope, angles, cache)
        return x + self.feed_forward(self.ffn_norm(x))                             # [m, D]

    def attend(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> Tensor:
        """Apply attention: x [m, D] -> [m, D]"""
        c = self.c
        q = self.q(x).reshape(-1, c.n_heads, c.head_dim)                          # [m, H, E]
        k = self.k(x).reshape(-1, c.n_kv_heads, c.head_dim)                        # [m, K, E]
        v = self.v(x).reshape(-1, c.n_kv_heads, c.head_dim)                        # [m, K, E]
        return self.out(cache.attend(rope(q, angles), rope(k, angles), v, scale=c.head_dim**-0.5))


class Model(Architecture):
    """A phi3 decoder. `forward` builds the graph of one step; nothing about a request is kept here."""

    def __init__(self, h: Hparams, w: Weights):
        h.refuse(expert_count="a mixture of experts")
        c = self.config = Config(**common(h, w), window=h.window())
        self.embed = Embedding(w["token_embd"], c.vocab_size, c.d_model)
        self.blocks = [Block(w["blk", i], c) for i in range(c.n_layers)]
        self.norm = RMSNorm(w["output_norm"], c.d_model, c.eps)
        self.head = Linear(w.first("output", "token_embd"), c.d_model, c.vocab_size)    # tied if absent
        self.rope = rope(h, w, c.head_dim, interleaved=False)

    @classmethod
    def encoders(cls, files: EncoderFiles) -> dict[str, Encoder]:
        """Bind the encoder that the file's projector names."""
        return encoders.beside(files)

    def policies(self) -> list[Policy]:
        """Return what each layer's attention needs."""
        c = self.config
        return [Sliding(c.window) if c.window else Full()] * c.n_layers

    def forward(self, batch: Batch, caches: list[LayerCache]) -> Tensor:
        """Return last hidden states [m, D]."""
        x = self.embed(batch.ids, batch.media)                                     # [m, D]
        rope = self.rope.at(batch.n_ctx)
        angles = rope.table(batch.positions)                                       # [m, n_rot]
        for block, cache in zip(self.blocks, caches):
            x = block(x, rope, angles, cache)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [l, vocab] of hidden states [l, D]."""
        return self.head(x)
