"""Qwen2 and Qwen2.5 text decoders.

Paper arXiv:2407.10671. Follows transformers `modeling_qwen2.py`: llama's block with biases on q, k and v, rotation in NEOX
order, and optionally a sliding window in some layers.
Axes: m rows of the batch, D hidden, H/K query/KV heads, E head size, F feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pyengine.nn.batch import Batch
from pyengine.files.hparams import Hparams
from pyengine.cache.policy import Full, Policy, Sliding
from pyengine.nn.cache import LayerCache
from pyengine.models import encoders
from pyengine.models.architecture import Architecture, Encoder, EncoderFiles
from pyengine.models.llama import FeedForward
from pyengine.nn.decoder import common, DecoderConfig, embedded, per_layer
from pyengine.nn.layers import constant, Embedding, Linear, RMSNorm
from pyengine.nn.rope import Rope, rope
from pyengine.graph.tensor import Tensor
from pyengine.files.weights import DerivedRef, WeightRef, Weights


@dataclass(frozen=True)
class Config(DecoderConfig):
    """Numbers of one checkpoint, from its metadata."""

    windows: tuple[int, ...]     # per layer; 0: full attention

    @classmethod
    def read(cls, h: Hparams, w: Weights) -> Config:
        """Read the keys "qwen2.*"."""
        h.refuse(expert_count="a mixture of experts")
        numbers, window = common(h, w), h.window()
        sliding = per_layer(h, "attention.sliding_window_pattern", (window > 0,) * numbers["n_layers"])
        return cls(**numbers, windows=tuple(window if slides else 0 for slides in sliding))


def common_key(bias: WeightRef | None, c: Config, rope: Rope) -> Tensor | None:
    """Return the key bias [K * E] where rotation nearly leaves it in place [K, E]: in pairs that turn by less than 2 radians in the
    training context.

    There, in the last pairs, biases reach 200 while keys without them are near 1. Up to 2 radians the difference to the bias at
    position 0 is less than the bias, on average over the context (2 - 2 cos). Pairs are (i, i + n_rot / 2).
    """
    if bias is None:
        return None
    shape = c.n_kv_heads, c.head_dim
    still = np.ones(c.head_dim, np.float32)
    still[: 2 * len(rope.inv_freq)] = np.tile(rope.inv_freq * c.n_ctx_train < 2, 2) * rope.scale
    return constant(DerivedRef(bias.name, shape, (bias,), lambda b: b.reshape(shape) * still))


class Block:
    """Pre-norm grouped-query attention and gated feed-forward, each added to its input."""

    def __init__(self, w: Weights, c: Config, feed_forward: Any):
        self.c = c
        self.attn_norm = RMSNorm(w["attn_norm"], c.d_model, c.eps)
        self.q = Linear(w["attn_q"], c.d_model, c.n_heads * c.head_dim)
        self.k = Linear(w["attn_k"], c.d_model, c.n_kv_heads * c.head_dim)
        self.k_bias = w["attn_k"].optional("bias", (c.n_kv_heads * c.head_dim,))
        self.v = Linear(w["attn_v"], c.d_model, c.n_kv_heads * c.head_dim)
        self.out = Linear(w["attn_output"], c.n_heads * c.head_dim, c.d_model)
        self.ffn_norm = RMSNorm(w["ffn_norm"], c.d_model, c.eps)
        self.feed_forward = feed_forward(w, c)

    def __call__(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> Tensor:     # [m, D]
        x = x + self.attend(self.attn_norm(x), rope, angles, cache)
        return x + self.feed_forward(self.ffn_norm(x))                             # [m, D]

    def attend(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> Tensor:
        """Apply attention: x [m, D] -> [m, D]"""
        c = self.c
        q = self.q(x).reshape(-1, c.n_heads, c.head_dim)                          # [m, H, E]
        k = self.k(x).reshape(-1, c.n_kv_heads, c.head_dim)                        # [m, K, E]
        v = self.v(x).reshape(-1, c.n_kv_heads, c.head_dim)                        # [m, K, E]
        return self.out(cache.attend(rope(q, angles), rope(k, angles), v, scale=c.head_dim**-0.5,
                                     k_common=common_key(self.k_bias, c, rope)))


class Model(Architecture):
    """A qwen2 decoder. `forward` builds the graph of one step; nothing about a request is kept here."""

    feed_forward: Any = FeedForward

    def __init__(self, h: Hparams, w: Weights):
        c = self.config = self.read(h, w)
        self._n_ids = embedded(w, c.vocab_size)
        self.embed = Embedding(w["token_embd"], self._n_ids, c.d_model)
        self.rope = rope(h, w, c.head_dim, interleaved=False)
        self.blocks = [Block(w["blk", i], c, self.feed_forward) for i in range(c.n_layers)]
        self.norm = RMSNorm(w["output_norm"], c.d_model, c.eps)
        self.head = Linear(w.first("output", "token_embd"), c.d_model, c.vocab_size)    # tied if absent

    @staticmethod
    def read(h: Hparams, w: Weights) -> Config:
        """Read the keys "qwen2.*"."""
        return Config.read(h, w)

    @classmethod
    def encoders(cls, files: EncoderFiles) -> dict[str, Encoder]:
        """Bind the encoder that the file's projector names."""
        return encoders.beside(files)

    @property
    def n_ids(self) -> int:
        """Rows of the embedding, which may have tokens that the output head does not."""
        return self._n_ids

    def policies(self) -> list[Policy]:
        """Return what each layer's attention needs."""
        return [Sliding(window) if window else Full() for window in self.config.windows]

    def forward(self, batch: Batch, caches: list[LayerCache]) -> Tensor:
        """Return last hidden states [m, D]."""
        x = self.embed(batch.ids, batch.media)                                     # [m, D]
        rope = self.rope.at(batch.n_ctx)
        angles = rope.table(batch.positions)                                       # [m, E]
        for block, cache in zip(self.blocks, caches):
            x = block(batch.noted(x), rope, angles, cache)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [l, vocab] of hidden states [l, D]."""
        return self.head(x)
