"""Launches of `expert_linear`: csrc/metal/experts.metal sorts pairs by expert, then the products of linear.metal or linear_floats.metal."""

from __future__ import annotations

import math
from dataclasses import replace

from pyengine.backends.metal.launch import Launch, launches, NoKernel, scratch, Step, View
from pyengine.backends.metal.products import few_rows, multiply, prepare, Room, Rows, ROWS_MOST, rows_of, Set

EXPERTS_MOST = 4000                     # whose counts fit threadgroup memory


def _tile(m: int, used: int, experts: int) -> tuple[int, int]:
    """Return (rows of a tile, most tiles): an expert takes at most m rows, and of many pairs about their share.

    A little more than the share, so that most experts are one tile and little is multiplied for nothing. Results do not depend on it.
    """
    share = m * used / experts
    rows = few_rows(min(m, 1 + math.ceil(share))) if share <= 4 else 16 if share <= 16 else ROWS_MOST
    return rows, min(experts, m * used) + m * used // rows


def _places(s: Step) -> tuple[Rows, View | None, int]:
    (m, used), w = s.need("chosen").shape, s.inputs["w"]
    experts, n, k = w[0].shape
    room = Room(s.scratch)
    rows = rows_of(room, m * used, k, w, ROWS_MOST)
    order, tiles = room.take(4 * m * used), room.take(12 * (min(experts, m * used) + m * used))
    between = room.take(4 * m * used * n) if s.params.glu and w[0].dtype != w[1].dtype else None
    return replace(rows, order=order, tiles=tiles), between, room.used


@scratch
def expert_linear(s: Step) -> int:
    """Count the prepared rows, their order, and the table of tiles."""
    return _places(s)[2]


@launches
def expert_linear(s: Step) -> list[Launch]:  # noqa: F811
    """Launch as many tiles as there may be; those that no expert needs return at once."""
    x, w, chosen, out, glu = s.need("x"), s.inputs["w"], s.need("chosen"), s.outputs[0], s.params.glu
    (m, used), (experts, n, k) = chosen.shape, w[0].shape
    pairs = m * used
    if pairs == 0 or k == 0 or n == 0:
        return []
    if experts > EXPERTS_MOST:
        raise NoKernel(f"expert_linear: {experts} experts; at most {EXPERTS_MOST}")
    rows, between, _ = _places(s)
    tile, most = _tile(m, used, experts)
    sort = Launch("sort_experts", dict(pairs=pairs, experts=experts, rows=tile, tiles=most),
                  {"chosen": chosen, "order": rows.order, "tiles": rows.tiles}, (1, 1, 1), (256, 1, 1), 8 * (experts + 1))
    first = [sort, prepare(rows, x, None, 0.0, pairs + ROWS_MOST, used if x.shape[0] == m and used > 1 else 1)]
    if between is not None:
        second = replace(between, dtype=x.dtype, shape=(pairs, n), strides=(4 * n, 4))
        return [*first, multiply(rows, [Set(w[1], second)], 0, 0.0, tile, most),
                multiply(rows, [Set(w[0], out, given=second)], glu, 0.0, tile, most)]
    return [*first, multiply(rows, [Set(w[0], out, second=w[1] if glu else None)], glu, 0.0, tile, most)]
