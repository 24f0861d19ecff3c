"""Gemma 3, text decoder: five sliding-window layers, then one global, and so on.

Paper arXiv:2503.19786. Follows transformers `modeling_gemma3.py`. Norm weights in GGUF files already hold 1 + w.
differs: nothing. llama.cpp hard-codes the layer pattern (every 6th global), the local rope base (10,000) and the query scale;
files that carry them as keys are believed, others get those constants.
Axes: m rows of the batch, D hidden, H/K query/KV heads, E head size, F feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pyengine import ops
from pyengine.batch import Batch
from pyengine.errors import InvalidModelError
from pyengine.hparams import Hparams
from pyengine.kvcache import Full, LayerCache, Policy, Sliding
from pyengine.nn import Embedding, Linear, RMSNorm, Rope, rope
from pyengine.tensor import Tensor
from pyengine.weights import Weights

GLOBAL_EVERY = 6                     # transformers Gemma3TextConfig.sliding_window_pattern
LOCAL_ROPE_BASE = 10_000.0           # transformers Gemma3TextConfig.rope_local_base_freq


@dataclass(frozen=True)
class Config:
    """Numbers of one checkpoint, from its metadata."""

    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    n_ctx_train: int
    eps: float
    window: int
    sliding: tuple[bool, ...]        # per layer
    attn_scale: float
    attn_softcap: float              # 0: none
    final_softcap: float

    @classmethod
    def read(cls, h: Hparams) -> Config:
        """Read the keys "gemma3.*"."""
        d_model, n_heads, n_layers = h.size("embedding_length"), h.size("attention.head_count"), h.size("block_count")
        head_dim = h.size("attention.key_length", 256)
        # query_pre_attn_scalar is d_model / n_heads in the 27B checkpoint and head_dim in all others (their config.json).
        scalar = d_model / n_heads if h.meta.get("general.size_label", "") == "27B" else head_dim
        return cls(
            n_layers=n_layers,
            d_model=d_model,
            d_ff=h.size("feed_forward_length"),
            n_heads=n_heads,
            n_kv_heads=h.size("attention.head_count_kv", n_heads),
            head_dim=head_dim,
            vocab_size=h.vocab_size(),
            n_ctx_train=h.size("context_length"),
            eps=h.number("attention.layer_norm_rms_epsilon"),
            window=h.size("attention.sliding_window"),
            sliding=_pattern(h, n_layers),
            attn_scale=h.number("attention.scale", scalar**-0.5),
            attn_softcap=h.number("attn_logit_softcapping", 0.0),
            final_softcap=h.number("final_logit_softcapping", 0.0),
        )


def _pattern(h: Hparams, n_layers: int) -> tuple[bool, ...]:
    """Which layers slide: a list of booleans, or a period whose last layer is global."""
    value = h.get("attention.sliding_window_pattern", GLOBAL_EVERY, int, np.ndarray)
    if isinstance(value, int):
        return tuple((i + 1) % value != 0 if value else True for i in range(n_layers))
    if len(value) != n_layers:
        raise InvalidModelError(f"gemma3.attention.sliding_window_pattern has {len(value)} entries for {n_layers} layers")
    return tuple(bool(v) for v in value)


class Block:
    """Attention and gated feed-forward; each has a norm before and after, and is added to its input."""

    def __init__(self, w: Weights, c: Config):
        self.c = c
        self.attn_norm = RMSNorm(w["attn_norm"], c.d_model, c.eps)
        self.q = Linear(w["attn_q"], c.d_model, c.n_heads * c.head_dim)
        self.k = Linear(w["attn_k"], c.d_model, c.n_kv_heads * c.head_dim)
        self.v = Linear(w["attn_v"], c.d_model, c.n_kv_heads * c.head_dim)
        self.q_norm = RMSNorm(w["attn_q_norm"], c.head_dim, c.eps)
        self.k_norm = RMSNorm(w["attn_k_norm"], c.head_dim, c.eps)
        self.out = Linear(w["attn_output"], c.n_heads * c.head_dim, c.d_model)
        self.attn_post = RMSNorm(w["post_attention_norm"], c.d_model, c.eps)
        self.ffn_norm = RMSNorm(w["ffn_norm"], c.d_model, c.eps)
        self.gate = Linear(w["ffn_gate"], c.d_model, c.d_ff)
        self.up = Linear(w["ffn_up"], c.d_model, c.d_ff)
        self.down = Linear(w["ffn_down"], c.d_ff, c.d_model)
        self.ffn_post = RMSNorm(w["post_ffw_norm"], c.d_model, c.eps)

    def __call__(self, x: Tensor, batch: Batch, rope: Rope, angles: Tensor, cache: LayerCache, last: bool) -> Tensor:
        xw, angles_w = (batch.select(x), batch.select(angles)) if last else (x, angles)   # [w, D], [w, E]
        y = self.attend(self.attn_norm(x), self.attn_norm(xw), rope, angles, angles_w, cache, last)
        x = xw + self.attn_post(y)
        h = self.ffn_norm(x)
        return x + self.ffn_post(self.down(ops.gelu_tanh(self.gate(h)) * self.up(h)))     # [m or w, D]

    def attend(self, x: Tensor, xw: Tensor, rope: Rope, angles: Tensor, angles_w: Tensor, cache: LayerCache, last: bool) -> Tensor:
        """x [m, D] gives keys and values, xw [m or w, D] the queries."""
        c = self.c
        q = self.q_norm(self.q(xw).reshape(-1, c.n_heads, c.head_dim))             # [m or w, H, E]
        k = self.k_norm(self.k(x).reshape(-1, c.n_kv_heads, c.head_dim))           # [m, K, E]
        v = self.v(x).reshape(-1, c.n_kv_heads, c.head_dim)                        # [m, K, E]
        y = cache.attend(rope(q, angles_w), rope(k, angles), v, scale=c.attn_scale, softcap=c.attn_softcap, wanted=last)
        return self.out(y)


class Model:
    """A gemma3 decoder. `forward` builds the graph of one step; nothing about a request is kept here."""

    def __init__(self, h: Hparams, w: Weights, n_ctx: int | None = None):
        c = self.config = Config.read(h)
        self.embed = Embedding(w["token_embd"], c.vocab_size, c.d_model, scale=c.d_model**0.5)
        self.blocks = [Block(w["blk", i], c) for i in range(c.n_layers)]
        self.norm = RMSNorm(w["output_norm"], c.d_model, c.eps)
        self.head = Linear(w.first("output", "token_embd"), c.d_model, c.vocab_size)    # tied if absent
        self.rope = rope(h, w, c.head_dim, interleaved=False, n_ctx=n_ctx or c.n_ctx_train)
        local = h.number("rope.freq_base_swa", LOCAL_ROPE_BASE)
        self.rope_local = Rope((1 / local ** (np.arange(0, c.head_dim, 2, dtype=np.float32) / c.head_dim)).astype(np.float32), 1.0, False)

    def cache_policies(self) -> list[Policy]:
        """What each layer's attention needs."""
        return [Sliding(self.config.window) if slides else Full() for slides in self.config.sliding]

    def forward(self, batch: Batch, caches: list[LayerCache]) -> tuple[Tensor, Tensor]:
        """Return logits [l, vocab] and hidden states of the wanted rows [w, D]."""
        c = self.config
        x = self.embed(batch.ids)                                                  # [m, D]
        ropes = {slides: (r, r.table(batch.positions)) for slides, r in ((True, self.rope_local), (False, self.rope))}
        for i, block in enumerate(self.blocks):
            x = block(x, batch, *ropes[c.sliding[i]], caches[i], last=i == c.n_layers - 1)
        logits = self.head(self.norm(batch.select_head(x)))
        return ops.softcap(logits, cap=c.final_softcap) if c.final_softcap else logits, x
