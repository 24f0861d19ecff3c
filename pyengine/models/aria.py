"""Aria: a decoder with experts, of which a row uses some, and one feed-forward that all rows share.

Paper arXiv:2410.05993. Follows transformers `modeling_aria.py`: llama's attention, rotated in NEOX order; gates are a softmax over the chosen
experts; the shared feed-forward is as wide as several experts and not weighted. Its encoder stands in `encoders/aria.py`.
llama.cpp has no such architecture; keys and names are those that it has for others.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyengine import ops
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models import qwen2
from pyengine.models.llama import FeedForward
from pyengine.nn.decoder import common, used_experts
from pyengine.nn.layers import Experts, Linear


@dataclass(frozen=True)
class Config(qwen2.Config):
    """Numbers of one checkpoint, from its metadata; `d_ff` is an expert's."""

    n_experts: int
    n_used: int              # experts of a row
    n_shared: int            # experts that together are as wide as the shared feed-forward


class Mixture:
    """Experts that a router picks for each row, and a feed-forward for all rows."""

    def __init__(self, w: Weights, c: Config):
        self.n_used = c.n_used
        self.router = Linear(w["ffn_gate_inp"], c.d_model, c.n_experts)
        self.experts = Experts(w, c.n_experts, c.d_model, c.d_ff)
        self.shared = FeedForward(w, c, "_shexp", c.d_ff * c.n_shared)

    def __call__(self, x: Tensor) -> Tensor:                                       # [m, D]
        return self.experts(x, *ops.top_experts(self.router(x), n_used=self.n_used, gate="softmax", normed=True)) + self.shared(x)


class Model(qwen2.Model):
    """An aria decoder."""

    feed_forward = Mixture

    @staticmethod
    def read(h: Hparams, w: Weights) -> Config:
        """Read the keys "aria.*"."""
        h.refuse(attention__sliding_window="a sliding window", leading_dense_block_count="a layer without experts")
        numbers = common(h, w, d_ff="expert_feed_forward_length")
        return Config(**numbers, windows=(0,) * numbers["n_layers"], n_experts=h.size("expert_count"), n_used=used_experts(h),
                      n_shared=h.size("expert_shared_count"))
