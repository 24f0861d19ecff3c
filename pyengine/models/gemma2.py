"""Gemma 2 text decoders (2B, 9B, 27B): sliding and global layers in turn, soft caps on scores and logits, norms before and after.

Paper arXiv:2408.00118. Follows transformers `modeling_gemma2.py`. Norm weights in GGUF files already hold 1 + w.
differs: nothing. llama.cpp hard-codes the pattern of layers (the first of each two slides) and the scale of scores (of the 27B, which has 46
layers, 1 / sqrt(D / H)); files that carry them as keys are believed, others get those constants.
Axes: m rows of the batch, D hidden, H/K query/KV heads, E head size, F feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyengine import ops
from pyengine.cache.policy import Full, Policy, Sliding
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models.architecture import Architecture
from pyengine.nn.batch import Batch
from pyengine.nn.cache import LayerCache
from pyengine.nn.decoder import common, DecoderConfig, per_layer
from pyengine.nn.layers import Embedding, Linear, RMSNorm
from pyengine.nn.rope import Rope, rope

HEAD_DIM, LARGEST = 256, 46          # transformers Gemma2Config.head_dim; layers of the 27B


@dataclass(frozen=True)
class Config(DecoderConfig):
    """Numbers of one checkpoint, from its metadata."""

    window: int
    sliding: tuple[bool, ...]        # per layer
    attn_scale: float
    attn_softcap: float              # 0: none
    final_softcap: float

    @classmethod
    def read(cls, h: Hparams, w: Weights) -> Config:
        """Read the keys "gemma2.*"."""
        numbers = common(h, w, head_dim=HEAD_DIM)
        n, d, heads = numbers["n_layers"], numbers["d_model"], numbers["n_heads"]
        return cls(
            **numbers,
            window=h.window(),
            sliding=per_layer(h, "attention.sliding_window_pattern", tuple(i % 2 == 0 for i in range(n))),
            attn_scale=h.number("attention.scale", (d // heads if n == LARGEST else numbers["head_dim"]) ** -0.5),
            attn_softcap=h.number("attn_logit_softcapping", 50.0),
            final_softcap=h.number("final_logit_softcapping", 30.0),
        )


class Block:
    """Attention and gated feed-forward; each has a norm before and after, and is added to its input."""

    def __init__(self, w: Weights, c: Config):
        self.c = c
        self.attn_norm, self.attn_post = RMSNorm(w["attn_norm"], c.d_model, c.eps), RMSNorm(w["post_attention_norm"], c.d_model, c.eps)
        self.q = Linear(w["attn_q"], c.d_model, c.n_heads * c.head_dim)
        self.k = Linear(w["attn_k"], c.d_model, c.n_kv_heads * c.head_dim)
        self.v = Linear(w["attn_v"], c.d_model, c.n_kv_heads * c.head_dim)
        self.out = Linear(w["attn_output"], c.n_heads * c.head_dim, c.d_model)
        self.ffn_norm, self.ffn_post = RMSNorm(w["ffn_norm"], c.d_model, c.eps), RMSNorm(w["post_ffw_norm"], c.d_model, c.eps)
        self.gate = Linear(w["ffn_gate"], c.d_model, c.d_ff)
        self.up = Linear(w["ffn_up"], c.d_model, c.d_ff)
        self.down = Linear(w["ffn_down"], c.d_ff, c.d_model)

    def __call__(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> Tensor:     # [m, D]
        x = x + self.attn_post(self.attend(self.attn_norm(x), rope, angles, cache))
        h = self.ffn_norm(x)
        return x + self.ffn_post(self.down(ops.gelu_tanh(self.gate(h)) * self.up(h)))     # [m, D]

    def attend(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> Tensor:
        """Apply attention: x [m, D] -> [m, D]"""
        c = self.c
        q = self.q(x).reshape(-1, c.n_heads, c.head_dim)                          # [m, H, E]
        k = self.k(x).reshape(-1, c.n_kv_heads, c.head_dim)                        # [m, K, E]
        v = self.v(x).reshape(-1, c.n_kv_heads, c.head_dim)                        # [m, K, E]
        return self.out(cache.attend(rope(q, angles), rope(k, angles), v, scale=c.attn_scale, softcap=c.attn_softcap))


class Model(Architecture):
    """A gemma2 decoder. `forward` builds the graph of one step; nothing about a request is kept here."""

    def __init__(self, h: Hparams, w: Weights):
        c = self.config = Config.read(h, w)
        self.embed = Embedding(w["token_embd"], c.vocab_size, c.d_model, scale=c.d_model**0.5)
        self.blocks = [Block(w["blk", i], c) for i in range(c.n_layers)]
        self.norm = RMSNorm(w["output_norm"], c.d_model, c.eps)
        self.head = Linear(w.first("output", "token_embd"), c.d_model, c.vocab_size)    # tied if absent
        self.rope = rope(h, w, c.head_dim, interleaved=False)

    def policies(self) -> list[Policy]:
        """Return what each layer's attention needs."""
        return [Sliding(self.config.window) if slides and self.config.window else Full() for slides in self.config.sliding]

    def forward(self, batch: Batch, caches: list[LayerCache]) -> Tensor:
        """Return last hidden states [m, D]."""
        x = self.embed(batch.ids)                                                  # [m, D]
        rope = self.rope.at(batch.n_ctx)
        angles = rope.table(batch.positions)                                       # [m, E]
        for block, cache in zip(self.blocks, caches):
            x = block(x, rope, angles, cache)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [l, vocab] of hidden states [l, D]."""
        y, cap = self.head(x), self.config.final_softcap
        return ops.softcap(y, cap=cap) if cap else y
