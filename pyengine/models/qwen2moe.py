"""Qwen2 with experts (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): 60 or 64 experts of which a row uses some, and one that all rows share.

Paper arXiv:2407.10671. Follows transformers `modeling_qwen2_moe.py`: qwen2's attention; gates are a softmax over all experts, not normalised
(llama.cpp has no key for it); the shared expert is weighted by a sigmoid of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
    d_shared: int            # width of the expert that all rows share


class Mixture:
    """Experts that a router picks for each row, and one for all rows that a sigmoid weighs. normed: gates add up to 1."""

    normed: ClassVar[bool] = False

    def __init__(self, w: Weights, c: Config):
        self.n_used = c.n_used
        self.router = Linear(w["ffn_gate_inp"], c.d_model, c.n_experts)
        self.experts = Experts(w, c.n_experts, c.d_model, c.d_ff)
        self.shared, self.weight = FeedForward(w, c, "_shexp", c.d_shared), Linear(w["ffn_gate_inp_shexp"], c.d_model, 1)

    def __call__(self, x: Tensor) -> Tensor:                                       # [m, D]
        mixed = self.experts(x, *ops.top_experts(self.router(x), n_used=self.n_used, gate="softmax", normed=self.normed))
        return mixed + self.shared(x) * ops.sigmoid(self.weight(x))


class Model(qwen2.Model):
    """A qwen2moe decoder."""

    feed_forward = Mixture

    @staticmethod
    def read(h: Hparams, w: Weights) -> Config:
        """Read the keys "qwen2moe.*"."""
        h.refuse(attention__sliding_window="a sliding window", leading_dense_block_count="a layer without experts")
        numbers = common(h, w, d_ff="expert_feed_forward_length")
        return Config(**numbers, windows=(0,) * numbers["n_layers"], n_experts=h.size("expert_count"), n_used=used_experts(h),
                      d_shared=h.size("expert_shared_feed_forward_length"))
