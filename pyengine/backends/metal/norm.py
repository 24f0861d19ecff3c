"""Launches of csrc/metal/norm.metal."""

from __future__ import annotations

import math
from typing import Any

from pyengine.backends.metal.launch import ceil_div, Launch, launches, Step, View
from pyengine.errors import GraphError

SIMDGROUP_WIDTH = 1024                   # rows up to here belong to a simdgroup
THREADS = 256                            # wider ones to so many threads
PARTS_BYTES = 2 * THREADS * 4            # of sums of a team of several simdgroups, two turns


def rows_launch(kernel: str, x: View, args: dict[str, Any], buffers: dict[str, View | None], **constants: int) -> list[Launch]:
    """Return the launch of a kernel whose teams own a row of x each."""
    rows, width = math.prod(x.shape[:-1]), x.shape[-1]
    if rows == 0:
        return []
    team = 32 if width <= SIMDGROUP_WIDTH else THREADS
    together = min(4, rows) if team == 32 else 1
    return [Launch(kernel, dict(rows=rows, width=width, team=team, **args), buffers, (ceil_div(rows, together), 1, 1),
                   (team * together, 1, 1), PARTS_BYTES, constants)]


def _norm(s: Step, add: View | None, add_step: int, centred: bool) -> list[Launch]:
    x = s.need("x")
    if x.shape[-1] == 0:
        return []
    buffers = {"x": x, "weight": s.one("weight"), "add": add, "out": s.outputs[0]}
    return rows_launch("norm_rows", x, {"eps": s.params.eps, "add_step": add_step}, buffers, CENTRED=centred)


@launches
def rms_norm(s: Step) -> list[Launch]:
    """Launch a team a row; the residual is added in the same pass."""
    return _norm(s, s.one("residual"), s.need("x").shape[-1], False)


@launches
def layer_norm(s: Step) -> list[Launch]:
    """Launch a team a row."""
    return _norm(s, s.one("bias"), 0, True)


@launches
def l2_norm(s: Step) -> list[Launch]:
    """Launch a team a row."""
    x = s.need("x")
    if x.shape[-1] == 0:
        return []
    return rows_launch("scale_to_length", x, {"eps": s.params.eps}, {"x": x, "out": s.outputs[0]})


@launches
def group_norm(s: Step) -> list[Launch]:
    """Launch a threadgroup for each group of a picture."""
    x, groups = s.need("x"), s.params.groups
    if x.size == 0:
        return []
    n, d = x.shape[0], x.shape[-1]
    args = dict(count=x.size // n // groups, each=d // groups, d=d, picture=x.size // n, eps=s.params.eps)
    buffers = {"x": x, "weight": s.one("weight"), "bias": s.one("bias"), "out": s.outputs[0]}
    return [Launch("norm_groups", args, buffers, (n, groups, 1), (THREADS, 1, 1), PARTS_BYTES)]


@launches
def softmax(s: Step) -> list[Launch]:
    """Launch a team a row."""
    x = s.need("x")
    if x.shape[-1] == 0:
        return []
    return rows_launch("softmax_rows", x, dict(scale=s.params.scale), {"x": x, "out": s.outputs[0]})


@launches
def reduce(s: Step) -> list[Launch]:
    """Launch a team a row. Raises: GraphError for the largest of none."""
    x = s.need("x")
    if x.shape[-1] == 0 and x.shape[0] and s.params.kind > 1:
        raise GraphError("reduce: max and min need at least one element")
    return rows_launch("reduce_rows", x, {}, {"x": x, "out": s.outputs[0]}, REDUCTION=s.params.kind)
