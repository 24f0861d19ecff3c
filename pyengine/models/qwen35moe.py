"""Qwen3.5 with experts (35B-A3B, 122B-A10B, 397B-A17B): qwen35 with qwen3next's mixture in every layer.

Follows transformers 5.23 `modeling_qwen3_5_moe.py`.
"""

from __future__ import annotations

from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.models import qwen3next, qwen35


class Model(qwen35.Model):
    """A qwen35moe decoder."""

    feed_forward = qwen3next.Mixture

    @staticmethod
    def read(h: Hparams, w: Weights) -> qwen3next.Config:
        """Read the keys "qwen35moe.*"."""
        h.refuse(attention__sliding_window="a sliding window", n_deepstack_layers="features for first layers")
        return qwen3next.Config(**qwen3next.delta_net(h, w, d_ff="expert_feed_forward_length"), **qwen3next.experts(h))
