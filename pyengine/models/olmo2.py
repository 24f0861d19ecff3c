"""OLMo 2 text decoders (1B to 32B): norms behind attention and feed-forward instead of before them, and q/k norms over all heads at once.

Paper arXiv:2501.00656. Follows transformers `modeling_olmo2.py`. Axes: m rows of the batch, D hidden, H/K query/KV heads, E head size.
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
from pyengine.nn.decoder import common, DecoderConfig, embedded
from pyengine.nn.layers import Embedding, Linear, RMSNorm
from pyengine.nn.rope import Rope, rope


class Attention:
    """Grouped-query attention; queries and keys are normed over their whole width before they are rotated (NEOX order)."""

    def __init__(self, w: Weights, c: Any):
        self.c = c
        q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        self.q, self.k, self.v = Linear(w["attn_q"], c.d_model, q), Linear(w["attn_k"], c.d_model, kv), Linear(w["attn_v"], c.d_model, kv)
        self.q_norm, self.k_norm = RMSNorm(w["attn_q_norm"], q, c.eps), RMSNorm(w["attn_k_norm"], kv, c.eps)
        self.out = Linear(w["attn_output"], q, c.d_model)

    def __call__(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> Tensor:     # [m, D]
        c = self.c
        q = self.q_norm(self.q(x)).reshape(-1, c.n_heads, c.head_dim)              # [m, H, E]
        k = self.k_norm(self.k(x)).reshape(-1, c.n_kv_heads, c.head_dim)           # [m, K, E]
        v = self.v(x).reshape(-1, c.n_kv_heads, c.head_dim)                        # [m, K, E]
        return self.out(cache.attend(rope(q, angles), rope(k, angles), v, scale=c.head_dim**-0.5))


class Block:
    """Attention and feed-forward, each normed and added to its input."""

    def __init__(self, w: Weights, c: DecoderConfig):
        self.attention, self.feed_forward = Attention(w, c), FeedForward(w, c)
        self.attn_post = RMSNorm(w["post_attention_norm"], c.d_model, c.eps)
        self.ffn_post = RMSNorm(w["post_ffw_norm"], c.d_model, c.eps)

    def __call__(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> Tensor:     # [m, D]
        x = x + self.attn_post(self.attention(x, rope, angles, cache))
        return x + self.ffn_post(self.feed_forward(x))                             # [m, D]


class Model(Architecture):
    """An olmo2 decoder. `forward` builds the graph of one step; nothing about a request is kept here."""

    block: Any = Block

    def __init__(self, h: Hparams, w: Weights):
        c = self.config = self.read(h, w)
        self._n_ids = embedded(w, c.vocab_size)
        self.embed = Embedding(w["token_embd"], self._n_ids, c.d_model)
        self.blocks = [self.block(w["blk", i], c) for i in range(c.n_layers)]
        self.norm = RMSNorm(w["output_norm"], c.d_model, c.eps)
        self.head = Linear(w.first("output", "token_embd"), c.d_model, c.vocab_size)    # tied if absent
        self.rope = rope(h, w, c.head_dim, interleaved=False)

    @staticmethod
    def read(h: Hparams, w: Weights) -> DecoderConfig:
        """Read the keys "olmo2.*"."""
        h.refuse(attention__sliding_window="a sliding window", attention__clamp_kqv="a limit of queries, keys and values")
        return DecoderConfig(**common(h, w))

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
        return [Full()] * self.config.n_layers

    def forward(self, batch: Batch, caches: list[LayerCache]) -> Tensor:
        """Return last hidden states [m, D]."""
        x = self.embed(batch.ids, batch.media)                                                  # [m, D]
        rope = self.rope.at(batch.n_ctx)
        angles = rope.table(batch.positions)                                       # [m, E]
        for block, cache in zip(self.blocks, caches):
            x = block(x, rope, angles, cache)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [l, vocab] of hidden states [l, D]."""
        return self.head(x)
