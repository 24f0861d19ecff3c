"""Qwen3-VL with experts (30B-A3B, 235B-A22B): qwen3vl with qwen3moe's mixture in every layer.

Follows transformers `modeling_qwen3_vl_moe.py`.
"""

from __future__ import annotations

from pyengine.models import qwen3moe, qwen3vl
from pyengine.models.llama import Mixture


class Model(qwen3vl.Model):
    """A qwen3vlmoe decoder."""

    feed_forward = Mixture
    read = staticmethod(qwen3moe.Model.read)
