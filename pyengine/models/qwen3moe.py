"""Qwen3 with experts (Qwen3-30B-A3B, Qwen3-Coder ...).

Paper arXiv:2505.09388. Follows transformers `modeling_qwen3_moe.py`: qwen3's attention, and in every layer a mixture whose gates add up
to 1. llama.cpp normalises the gates of every file of this architecture; there is no key for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.models import qwen3
from pyengine.models.llama import Mixture
from pyengine.nn.decoder import common, DecoderConfig, used_experts


@dataclass(frozen=True)
class Config(DecoderConfig):
    """Numbers of one checkpoint, from its metadata; `d_ff` is an expert's."""

    n_experts: int
    n_used: int              # experts of a row


class Model(qwen3.Model):
    """A qwen3moe decoder."""

    feed_forward = Mixture

    @staticmethod
    def read(h: Hparams, w: Weights) -> Config:
        """Read the keys "qwen3moe.*"."""
        h.refuse(attention__sliding_window="a sliding window", expert_shared_count="an expert for all rows",
                 leading_dense_block_count="a layer without experts")
        return Config(**common(h, w, d_ff="expert_feed_forward_length"), n_experts=h.size("expert_count"), n_used=used_experts(h))
