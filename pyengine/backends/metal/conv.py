"""Launches of csrc/metal/conv.metal: windows gathered for the products of linear, or convolved where they lie."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pyengine.backends.metal.launch import ceil_div, Launch, launches, scratch, spread, Step, View
from pyengine.backends.metal.products import few_rows, group_bytes, multiply, prepare, Room, Rows, ROWS_FEW, ROWS_MOST, rows_of, Set

GATHER_BYTES = 32 << 20                 # of windows that are gathered at a time


def _geometry(s: Step) -> dict[str, Any]:
    """Return the fields of window_args that all launches of a step share."""
    p, (_, height, width, c), (_, rows, columns, o) = s.params, s.need("x").shape, s.outputs[0].shape
    (kh, kw), (sy, sx), (dy, dx) = ((n[0], n[-1]) for n in (p.kernel, p.stride, p.dilation))
    left = p.padding[2] if len(p.padding) == 4 else p.padding[-1]
    w = s.need("weight")
    each = group_bytes(w.dtype, w.shape[1]) if w.dtype.is_packed else w.strides[0]
    return dict(height=height, width=width, c=c, rows=rows, columns=columns, o=o, kh=kh, kw=kw, sy=sy, sx=sx, top=p.padding[0], left=left,
                dy=dy, dx=dx, cg=c // p.groups, og=o // p.groups, k=w.shape[1], group_bytes=each)


def _is_product(s: Step) -> bool:
    """Say whether linear's kernels multiply: rows of the weight that are a group's lie by themselves."""
    groups, o = s.params.groups, s.outputs[0].shape[3]
    return groups == 1 or o // groups % 16 == 0 or s.need("weight").dtype.block > 1


def _places(s: Step) -> tuple[int, View | None, Rows, int]:
    """Return how many windows are gathered at a time, their place, that of rows as products take them, and the bytes of both."""
    (n, rows, columns, _), w, room = s.outputs[0].shape, s.need("weight"), Room(s.scratch)
    k = w.shape[1]
    together = min(n * rows * columns, max(128, GATHER_BYTES // (4 * k) // 128 * 128))
    windows = room.take(4 * together * k)
    return together, windows, rows_of(room, together, k, [w], -together % ROWS_MOST), room.used


@scratch
def conv2d(s: Step) -> int:
    """Count the windows that are gathered at a time, twice."""
    return _places(s)[3] if _is_product(s) and s.outputs[0].size else 0


def _multiplied(s: Step, args: dict[str, Any], group: int, row0: int, count: int) -> list[Launch]:
    """Return the launches for `count` windows of a group."""
    x, w, bias, out, (o, og, k) = s.need("x"), s.need("weight"), s.one("bias"), s.outputs[0], (args[n] for n in ("o", "og", "k"))
    _, windows, rows, _ = _places(s)
    assert windows is not None
    grid, threads = spread(count * k)
    gather = Launch("gather_windows", {**args, "group": group, "row0": row0, "count": count}, {"x": x, "to": windows}, grid, threads)
    rows, first = replace(rows, count=count), group * og
    part = replace(w.at((first // 16 if w.dtype.is_packed else first) * args["group_bytes"]), shape=(og, k))
    result = replace(out.at(4 * (row0 * o + first)), shape=(count, og), strides=(4 * o, 4))
    tile = few_rows(count) if count <= ROWS_FEW else 16 if count <= 16 else ROWS_MOST
    flat = replace(windows, dtype=x.dtype, shape=(count, k), strides=(4 * k, 4))
    return [gather, prepare(rows, flat, None, 0.0, count + -count % (ROWS_FEW if count <= ROWS_FEW else ROWS_MOST)),
            multiply(rows, [Set(part, result, bias and bias.at(4 * first))], 0, 0.0, tile, ceil_div(count, tile))]


@launches
def conv2d(s: Step) -> list[Launch]:  # noqa: F811
    """Launch a product for each group and part of the windows, or one thread an output where groups are small."""
    x, w, out, args = s.need("x"), s.need("weight"), s.outputs[0], _geometry(s)
    if out.size == 0:
        return []
    grid, threads = spread(out.size)
    if not _is_product(s):
        constants = {"FORMAT": w.dtype.unpacked.id, "PACKED": w.dtype.is_packed, "KIND": s.params.activation}
        return [Launch("convolve_places", {**args, "group": 0, "row0": 0, "count": out.size},
                       {"x": x, "weight": w, "bias": s.one("bias"), "out": out}, grid, threads, constants=constants)]
    n, together, found = out.size // args["o"], _places(s)[0], []
    for group in range(s.params.groups):
        for row0 in range(0, n, together):
            found += _multiplied(s, args, group, row0, min(together, n - row0))
    if s.params.activation:                                  # its numbers are those of `unary`
        grid, threads = spread(out.size, 4)
        found.append(Launch("apply_activation", {"n": out.size}, {"x": out, "out": out}, grid, threads,
                            constants={"KIND": s.params.activation}))
    return found
