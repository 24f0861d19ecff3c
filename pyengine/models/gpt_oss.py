"""gpt-oss (20B, 120B): experts in MXFP4 with biases and a clamped gate, sinks, sliding and global layers in turn.

Model card arXiv:2508.10925. Follows transformers `modeling_gpt_oss.py`: rotation in NEOX order, yarn whose ramp is not rounded to whole
frequencies (`truncate` is false in its config); gates are a softmax over the chosen experts' scores.
differs: nothing. llama.cpp rounds the ramp; it hard-codes the pattern of layers (the first of each two slides) and the gate's numbers.
Axes: m rows of the batch, u experts of a row, D hidden, H/K query/KV heads, E head size, F an expert's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pyengine import ops
from pyengine.cache.policy import Full, Policy, Sliding
from pyengine.dtype import dtype
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models.architecture import Architecture
from pyengine.nn.batch import Batch
from pyengine.nn.cache import LayerCache
from pyengine.nn.decoder import common, DecoderConfig, per_layer, used_experts
from pyengine.nn.layers import constant, Embedding, Linear, RMSNorm
from pyengine.nn.rope import Rope, rope

ALPHA, LIMIT = 1.702, 7.0            # transformers GptOssConfig.swiglu_alpha, swiglu_limit


@dataclass(frozen=True)
class Config(DecoderConfig):
    """Numbers of one checkpoint, from its metadata; `d_ff` is an expert's."""

    window: int
    sliding: tuple[bool, ...]        # per layer
    n_experts: int
    n_used: int                      # experts of a row

    @classmethod
    def read(cls, h: Hparams, w: Weights) -> Config:
        """Read the keys "gpt-oss.*"."""
        h.refuse(expert_shared_count="an expert for all rows", leading_dense_block_count="a layer without experts")
        numbers = common(h, w, d_ff="expert_feed_forward_length")
        pattern = per_layer(h, "attention.sliding_window_pattern", tuple(i % 2 == 0 for i in range(numbers["n_layers"])))
        return cls(**numbers, window=h.window(), sliding=pattern, n_experts=h.size("expert_count"), n_used=used_experts(h))


class Mixture:
    """Experts down((up x + 1) * g), g = gate x * sigmoid(1.702 gate x), both clamped to 7; each product has a bias for each expert."""

    def __init__(self, w: Weights, c: Config):
        n, d, f, f32 = c.n_experts, c.d_model, c.d_ff, dtype("F32")
        self.n_used = c.n_used
        self.router = Linear(w["ffn_gate_inp"], d, n)
        shapes = {"gate": (f, d), "up": (f, d), "down": (d, f)}
        self.weight = {name: constant(w[f"ffn_{name}_exps"].tensor("weight", (n, *shape))) for name, shape in shapes.items()}
        self.bias = {name: constant(w[f"ffn_{name}_exps"].tensor("bias", (n, shape[0])), f32) for name, shape in shapes.items()}

    def product(self, name: str, x: Tensor, chosen: Tensor) -> Tensor:
        """Multiply by the chosen experts' matrices and add their biases: [m or m u, in] -> [m u, out]"""
        return ops.expert_linear(x, [self.weight[name]], chosen) + ops.rows(self.bias[name], chosen.reshape(-1))

    def __call__(self, x: Tensor) -> Tensor:                                       # [m, D]
        chosen, gates = ops.top_experts(self.router(x), n_used=self.n_used, gate="softmax", normed=True)
        limit = np.array([LIMIT], np.float32)
        gate = ops.binary(self.product("gate", x, chosen), limit, kind="min")      # [m u, F]
        up = ops.binary(ops.binary(self.product("up", x, chosen), limit, kind="min"), -limit, kind="max")
        h = ops.scale(up, factor=1.0, offset=1.0) * (gate * ops.sigmoid(ops.scale(gate, factor=ALPHA)))
        return ops.sum_experts(self.product("down", h, chosen), gates, n_used=self.n_used)


class Block:
    """Pre-norm grouped-query attention with sinks and mixture, each added to its input."""

    def __init__(self, w: Weights, c: Config):
        self.c = c
        self.attn_norm, self.ffn_norm = RMSNorm(w["attn_norm"], c.d_model, c.eps), RMSNorm(w["post_attention_norm"], c.d_model, c.eps)
        self.q = Linear(w["attn_q"], c.d_model, c.n_heads * c.head_dim)
        self.k = Linear(w["attn_k"], c.d_model, c.n_kv_heads * c.head_dim)
        self.v = Linear(w["attn_v"], c.d_model, c.n_kv_heads * c.head_dim)
        self.sinks = constant(w["attn_sinks"].tensor("weight", (c.n_heads,)), dtype("F32"))
        self.out = Linear(w["attn_output"], c.n_heads * c.head_dim, c.d_model)
        self.mixture = Mixture(w, c)

    def __call__(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> Tensor:     # [m, D]
        x = x + self.attend(self.attn_norm(x), rope, angles, cache)
        return x + self.mixture(self.ffn_norm(x))                                  # [m, D]

    def attend(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> Tensor:
        """Apply attention: x [m, D] -> [m, D]"""
        c = self.c
        q = self.q(x).reshape(-1, c.n_heads, c.head_dim)                          # [m, H, E]
        k = self.k(x).reshape(-1, c.n_kv_heads, c.head_dim)                        # [m, K, E]
        v = self.v(x).reshape(-1, c.n_kv_heads, c.head_dim)                        # [m, K, E]
        return self.out(cache.attend(rope(q, angles), rope(k, angles), v, scale=c.head_dim**-0.5, sinks=self.sinks))


class Model(Architecture):
    """A gpt-oss decoder. `forward` builds the graph of one step; nothing about a request is kept here."""

    def __init__(self, h: Hparams, w: Weights):
        c = self.config = Config.read(h, w)
        self.embed = Embedding(w["token_embd"], c.vocab_size, c.d_model)
        self.blocks = [Block(w["blk", i], c) for i in range(c.n_layers)]
        self.norm = RMSNorm(w["output_norm"], c.d_model, c.eps)
        self.head = Linear(w.first("output", "token_embd"), c.d_model, c.vocab_size)    # tied if absent
        self.rope = rope(h, w, c.head_dim, interleaved=False, whole_ramp=False)

    def policies(self) -> list[Policy]:
        """Return what each layer's attention needs."""
        return [Sliding(self.config.window) if slides and self.config.window else Full() for slides in self.config.sliding]

    def forward(self, batch: Batch, caches: list[LayerCache]) -> Tensor:
        """Return last hidden states [m, D]."""
        x = self.embed(batch.ids)                                                  # [m, D]
        rope = self.rope.at(batch.n_ctx)
        angles = rope.table(batch.positions)                                       # [m, E]
        for block, cache in zip(self.blocks, caches):
            x = block(batch.noted(x), rope, angles, cache)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [l, vocab] of hidden states [l, D]."""
        return self.head(x)
