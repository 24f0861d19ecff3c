"""Llama 2, 3.x and everything of their shape (SmolLM, Mistral 7B, TinyLlama, Vicuna ...), also with experts (Mixtral).

Papers arXiv:2307.09288, arXiv:2407.21783, arXiv:2401.04088. Follows transformers `modeling_llama.py`, `modeling_mixtral.py`. GGUF
files hold q and k with their rows permuted, so that the rotation is the interleaved one (pairs 2i, 2i + 1). Encoders that may
stand beside this decoder: `encoders`.
Axes: m rows of the batch, D hidden, H/K query/KV heads, E head size, F feed-forward width.
"""

from __future__ import annotations

from pyengine import ops
from pyengine.nn.batch import Batch
from pyengine.files.hparams import Hparams
from pyengine.cache.policy import Full, Policy, Sliding
from pyengine.nn.cache import LayerCache
from pyengine.models import encoders
from pyengine.models.architecture import Architecture, Encoder, EncoderFiles
from pyengine.nn.decoder import common, DecoderConfig, used_experts
from pyengine.nn.layers import Embedding, Experts, Linear, RMSNorm
from pyengine.nn.rope import Rope, rope
from pyengine.graph.tensor import Tensor
from pyengine.files.weights import Weights
from pyengine.records import dataclass


@dataclass(frozen=True)
class Config(DecoderConfig):
    """Numbers of one checkpoint, from its metadata."""

    window: int              # 0: full attention
    n_experts: int           # 0: one feed-forward for all
    n_used: int              # experts of a row

    @classmethod
    def read(cls, h: Hparams, w: Weights) -> Config:
        """Read the keys "llama.*"."""
        h.refuse(expert_shared_count="an expert for all rows", leading_dense_block_count="a layer without experts")
        n_experts = h.get("expert_count", 0, int)
        return cls(
            **common(h, w),
            window=h.window(),
            n_experts=n_experts and h.size("expert_count"),
            n_used=n_experts and used_experts(h),
        )


class FeedForward:
    """down(silu(gate x) * up x). kind: what its tensors' names end with, where there are several in a layer; d_ff: its width then."""

    def __init__(self, w: Weights, c: DecoderConfig, kind: str = "", d_ff: int | None = None):
        width = d_ff or c.d_ff
        self.gate = Linear(w[f"ffn_gate{kind}"], c.d_model, width)
        self.up = Linear(w[f"ffn_up{kind}"], c.d_model, width)
        self.down = Linear(w[f"ffn_down{kind}"], width, c.d_model)

    def __call__(self, x: Tensor) -> Tensor:                                       # [m, D]
        return self.down(ops.silu(self.gate(x)) * self.up(x))


class Mixture:
    """Such feed-forwards, of which a router picks some for each row; their gates add up to 1."""

    def __init__(self, w: Weights, c: Config):
        self.n_used = c.n_used
        self.router = Linear(w["ffn_gate_inp"], c.d_model, c.n_experts)
        self.experts = Experts(w, c.n_experts, c.d_model, c.d_ff)

    def __call__(self, x: Tensor) -> Tensor:                                       # [m, D]
        return self.experts(x, *ops.top_experts(self.router(x), n_used=self.n_used, gate="softmax", normed=True))


class Block:
    """Pre-norm grouped-query attention and feed-forward (or mixture), each added to its input."""

    def __init__(self, w: Weights, c: Config):
        self.c = c
        self.attn_norm = RMSNorm(w["attn_norm"], c.d_model, c.eps)
        self.q = Linear(w["attn_q"], c.d_model, c.n_heads * c.head_dim)
        self.k = Linear(w["attn_k"], c.d_model, c.n_kv_heads * c.head_dim)
        self.v = Linear(w["attn_v"], c.d_model, c.n_kv_heads * c.head_dim)
        self.out = Linear(w["attn_output"], c.n_heads * c.head_dim, c.d_model)
        self.ffn_norm = RMSNorm(w["ffn_norm"], c.d_model, c.eps)
        self.ffn = (Mixture if c.n_experts else FeedForward)(w, c)

    def __call__(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache, factors: Tensor | None = None) -> Tensor:     # [m, D]
        x = x + self.attend(self.attn_norm(x), rope, angles, cache, factors)
        return x + self.ffn(self.ffn_norm(x))                                      # [m, D]

    def attend(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache, factors: Tensor | None) -> Tensor:
        """Apply attention: x [m, D] -> [m, D]. factors: of queries, [m, 1, 1]."""
        c = self.c
        q = self.q(x).reshape(-1, c.n_heads, c.head_dim)                          # [m, H, E]
        k = self.k(x).reshape(-1, c.n_kv_heads, c.head_dim)                        # [m, K, E]
        v = self.v(x).reshape(-1, c.n_kv_heads, c.head_dim)                        # [m, K, E]
        q, k = rope(q, angles), rope(k, angles)
        return self.out(cache.attend(q if factors is None else q * factors, k, v, scale=c.head_dim**-0.5))


class Model(Architecture):
    """A llama decoder. `forward` builds the graph of one step; nothing about a request is kept here."""

    def __init__(self, h: Hparams, w: Weights):
        c = self.config = Config.read(h, w)
        self.embed = Embedding(w["token_embd"], c.vocab_size, c.d_model)
        self.blocks = [Block(w["blk", i], c) for i in range(c.n_layers)]
        self.norm = RMSNorm(w["output_norm"], c.d_model, c.eps)
        self.head = Linear(w.first("output", "token_embd"), c.d_model, c.vocab_size)    # tied if absent
        self.rope = rope(h, w, c.head_dim, interleaved=True)

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
        angles, factors = rope.table(batch.positions), self.factors(batch)         # [m, E]
        for block, cache in zip(self.blocks, caches):
            x = block(batch.noted(x), rope, angles, cache, factors)
        return self.norm(x)

    def factors(self, batch: Batch) -> Tensor | None:
        """Return what queries are multiplied with, [m, 1, 1]; None: nothing."""
        return None

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [l, vocab] of hidden states [l, D]."""
        return self.head(x)
