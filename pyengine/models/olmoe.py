"""OLMoE (1B-7B): 64 experts, of which a row uses 8, with gates that are not normalised; q/k norms over all heads at once.

Paper arXiv:2409.02060. Follows transformers `modeling_olmoe.py`: norms before attention and mixture, attention as in olmo2.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyengine import ops
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models import olmo2
from pyengine.nn.cache import LayerCache
from pyengine.nn.decoder import common, DecoderConfig, used_experts
from pyengine.nn.layers import Experts, Linear, RMSNorm
from pyengine.nn.rope import Rope


@dataclass(frozen=True)
class Config(DecoderConfig):
    """Numbers of one checkpoint, from its metadata; `d_ff` is an expert's."""

    n_experts: int
    n_used: int              # experts of a row


class Block:
    """Pre-norm attention and mixture, each added to its input."""

    def __init__(self, w: Weights, c: Config):
        self.n_used = c.n_used
        self.attn_norm, self.ffn_norm = RMSNorm(w["attn_norm"], c.d_model, c.eps), RMSNorm(w["ffn_norm"], c.d_model, c.eps)
        self.attention = olmo2.Attention(w, c)
        self.router = Linear(w["ffn_gate_inp"], c.d_model, c.n_experts)
        self.experts = Experts(w, c.n_experts, c.d_model, c.d_ff)

    def __call__(self, x: Tensor, rope: Rope, angles: Tensor, cache: LayerCache) -> Tensor:     # [m, D]
        x = x + self.attention(self.attn_norm(x), rope, angles, cache)
        h = self.ffn_norm(x)
        return x + self.experts(h, *ops.top_experts(self.router(h), n_used=self.n_used, gate="softmax"))    # [m, D]


class Model(olmo2.Model):
    """An olmoe decoder."""

    block = Block

    @staticmethod
    def read(h: Hparams, w: Weights) -> Config:
        """Read the keys "olmoe.*"."""
        h.refuse(attention__sliding_window="a sliding window", attention__clamp_kqv="a limit of queries, keys and values",
                 expert_shared_count="an expert for all rows")
        return Config(**common(h, w), n_experts=h.size("expert_count"), n_used=used_experts(h))
