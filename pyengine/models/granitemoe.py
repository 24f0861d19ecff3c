"""Granite with experts (3.x 1B-A400M, 3B-A800M; with an expert that all rows share: `GraniteMoeShared`).

Follows transformers `modeling_granitemoe.py`, `modeling_granitemoeshared.py`: granite with a mixture in every layer, whose gates are a
softmax over the chosen experts' scores (the softmax over all, divided by what the chosen ones have of it, is the same).
"""

from __future__ import annotations

from dataclasses import dataclass

from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.models import granite, llama
from pyengine.nn.decoder import common, used_experts


@dataclass(frozen=True)
class Config(granite.Config):
    """Numbers of one checkpoint, from its metadata; `d_ff` is an expert's."""

    n_experts: int
    n_used: int              # experts of a row
    d_shared: int            # width of the expert that all rows share; 0: there is none


class Mixture(llama.Mixture):
    """llama's mixture; where there is one, the expert that all rows share is added."""

    def __init__(self, w: Weights, c: Config):
        super().__init__(w, c)
        self.shared = llama.FeedForward(w, c, "_shexp", c.d_shared) if c.d_shared else None

    def __call__(self, x: Tensor) -> Tensor:                                       # [m, D]
        y = super().__call__(x)
        return y if self.shared is None else y + self.shared(x)


class Model(granite.Model):
    """A granitemoe decoder."""

    feed_forward = Mixture

    @staticmethod
    def read(h: Hparams, w: Weights) -> Config:
        """Read the keys "granitemoe.*"."""
        h.refuse(attention__sliding_window="a sliding window", leading_dense_block_count="a layer without experts")
        numbers = common(h, w)
        return Config(**numbers, **granite.multipliers(h, numbers["head_dim"]), n_experts=h.size("expert_count"),
                      n_used=used_experts(h), d_shared=h.get("expert_shared_feed_forward_length", 0, int))
