"""What devices find while they compute, in words: a kernel there notes a number and its limit, and the op's declaration says the rest."""

from __future__ import annotations

from pyengine.ops import REGISTRY


def said(op: str, value: int, limit: int) -> str:
    """Say what an op found: "rows: id 7 of 5"."""
    return f"{op}: {REGISTRY[op].fault.format(value, limit)}"
