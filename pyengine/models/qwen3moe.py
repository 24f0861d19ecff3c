"""Qwen3 with experts (Qwen3-30B-A3B, Qwen3-Coder ...).

Paper arXiv:2505.09388. Follows transformers `modeling_qwen3_moe.py`: queries and keys of a head are normed before they are rotated
(NEOX order), no biases, and in every layer a mixture whose gates add up to 1. llama.cpp normalises the gates of every file of this
architecture; there is no key for it.
Axes: m rows of the batch, D hidden, H/K query/KV heads, E head size.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyengine import ops
from pyengine.nn.batch import Batch
from pyengine.files.hparams import Hparams
from pyengine.cache.policy import Full, Policy
from pyengine.nn.cache import LayerCache
from pyengine.models.architecture import Architecture
from pyengine.nn.decoder import common, DecoderConfig
from pyengine.nn.layers import Embedding, Experts, Linear, RMSNorm
from pyengine.nn.rope import Rope, rope
from pyengine.graph.tensor import Tensor
from pyengine.files.weights import Weights


@dataclass(frozen=True)
class Config(DecoderConfig):
    """Numbers of one checkpoint, from its metadata; `d_ff` is an expert's."""

    n_experts: int
    n_used: int              # experts of a row

    @classmethod
    def read(cls, h: Hparams, w: Weights) -> Config:
        """Read the keys "qwen3moe.*"."""
        h.refuse(attention__sliding_window="a sliding window", expert_shared_count="an expert for all rows",
                 leading_dense_block_count="a layer without experts")
        return cls(**common(h, w, d_ff="expert_feed_forward_length"), n_experts=h.size("expert_count"), n_used=h.size("expert_used_count"))


class Block:
    """Pre-norm grouped-query attention and mixture, each added to its input."""

    def __init__(self, w: Weights, c: Config):
        self.c = c
        self.attn_norm = RMSNorm(w["attn_norm"], c.d_model, c.eps)
        self.q = Linear(w["attn_q"], c.d_model, c.n_heads * c.head_dim)
        self.k = Linear(w["attn_k"], c.d_model, c.n_kv_heads * c.head_dim)
        self.v = Linear(w["attn_v"], c.d_model, c.n_kv_heads * c.head_dim)
        self.q_norm, self.k_norm = (RMSNorm(w[name], c.head_dim, c.eps) for name in ("attn_q_norm", "attn_k_norm"))
        self.out = Linear(w["attn_output"], c.n_heads * c.head_dim, c.d_model)
        self.ffn_norm = RMSNorm(w["ffn_norm"], c.d_model, c.eps)
        self.router = Linear(w["ffn_gate_inp"], c.d_model, c.n_experts)
        self.experts = Experts(w, c.n_experts, c.d_model, c.d_ff)

    def __call__(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> Tensor:     # [m, D]
        x = x + self.attend(self.attn_norm(x), rope, angles, cache)
        h = self.ffn_norm(x)
        chosen, gates = ops.top_experts(self.router(h), n_used=self.c.n_used, gate="softmax", normed=True)
        return x + self.experts(h, chosen, gates)                                  # [m, D]

    def attend(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> Tensor:
        """x [m, D] -> [m, D]"""
        c = self.c
        q = self.q_norm(self.q(x).reshape(-1, c.n_heads, c.head_dim))             # [m, H, E]
        k = self.k_norm(self.k(x).reshape(-1, c.n_kv_heads, c.head_dim))           # [m, K, E]
        v = self.v(x).reshape(-1, c.n_kv_heads, c.head_dim)                        # [m, K, E]
        return self.out(cache.attend(rope(q, angles), rope(k, angles), v, scale=c.head_dim**-0.5))


class Model(Architecture):
    """A qwen3moe decoder. `forward` builds the graph of one step; nothing about a request is kept here."""

    def __init__(self, h: Hparams, w: Weights):
        c = self.config = Config.read(h, w)
        self.embed = Embedding(w["token_embd"], c.vocab_size, c.d_model)
        self.blocks = [Block(w["blk", i], c) for i in range(c.n_layers)]
        self.norm = RMSNorm(w["output_norm"], c.d_model, c.eps)
        self.head = Linear(w.first("output", "token_embd"), c.d_model, c.vocab_size)    # tied if absent
        self.rope = rope(h, w, c.head_dim, interleaved=False)

    def policies(self) -> list[Policy]:
        """Return what each layer's attention needs."""
        return [Full()] * self.config.n_layers

    def forward(self, batch: Batch, caches: list[LayerCache]) -> Tensor:
        """Return hidden states [m, D]."""
        x = self.embed(batch.ids)                                                  # [m, D]
        rope = self.rope.at(batch.n_ctx)
        angles = rope.table(batch.positions)                                       # [m, E]
        for block, cache in zip(self.blocks, caches):
            x = block(x, rope, angles, cache)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [l, vocab] of hidden states [l, D]."""
        return self.head(self.norm(x))
