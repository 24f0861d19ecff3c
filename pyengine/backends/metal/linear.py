"""Launches of csrc/metal/linear.metal and linear_floats.metal for `linear`: rows of x made ready, then a product for each format."""

from __future__ import annotations

from dataclasses import replace

from pyengine.backends.metal.launch import ceil_div, Launch, launches, scratch, Step, View
from pyengine.backends.metal.products import few_rows, multiply, prepare, Room, Rows, ROWS_FEW, ROWS_MOST, rows_of, Set


def _places(s: Step) -> tuple[Rows, View | None, int]:
    """Return rows of x, a place for the second product of a glu with two formats, and the bytes of both."""
    (m, k), w = s.need("x").shape, s.inputs["w"]
    room = Room(s.scratch)
    rows = rows_of(room, m, k, w, -m % ROWS_MOST)
    mixed = s.params.glu and w[0].dtype != w[1].dtype
    return rows, room.take(4 * m * w[1].shape[0]) if mixed else None, room.used


@scratch
def linear(s: Step) -> int:
    """Count the prepared rows."""
    return _places(s)[2]


def _product(rows: Rows, sets: list[Set], glu: int, cap: float) -> list[Launch]:
    """Return the launches for sets of any formats: one for each format, in order."""
    m = rows.count
    tile = few_rows(m) if m <= ROWS_FEW else 16 if m <= 16 else ROWS_MOST
    formats = list(dict.fromkeys(s.w.dtype for s in sets))
    return [multiply(rows, [s for s in sets if s.w.dtype == f], glu, cap, tile, ceil_div(m, tile)) for f in formats]


@launches
def linear(s: Step) -> list[Launch]:  # noqa: F811
    """Launch the kernels for few rows or for many, whose sums are the same."""
    p, x, w, bias, norm = s.params, s.need("x"), s.inputs["w"], s.inputs["bias"], s.one("norm")
    (m, k), glu, cap = x.shape, p.glu, p.softcap
    if m == 0 or k == 0:
        return []
    rows, between, _ = _places(s)
    out = [prepare(rows, x, norm, p.norm_eps, m + -m % (ROWS_FEW if m <= ROWS_FEW else ROWS_MOST))]
    biases = bias or [None] * len(w)
    if not glu:
        sets = [Set(a, y, b, residual=s.one("residual")) for a, y, b in zip(w, s.outputs, biases) if a.shape[0]]
        return out + _product(rows, sets, 0, cap) if sets else []
    n = w[0].shape[0]
    if n == 0:
        return []
    if between is None:
        return out + _product(rows, [Set(w[0], s.outputs[0], biases[0], w[1], biases[1])], glu, cap)
    second = replace(between, dtype=x.dtype, shape=(m, n), strides=(4 * n, 4))
    out += _product(rows, [Set(w[1], second, biases[1])], 0, 0.0)
    return out + _product(rows, [Set(w[0], s.outputs[0], biases[0], given=second)], glu, cap)
