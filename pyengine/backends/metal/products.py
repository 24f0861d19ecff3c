"""What the launches of `linear` and `expert_linear` share: rows of x made ready, and a product with up to four matrices of one format.

csrc/metal/linear.h says what the kernels' arguments mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pyengine.backends.metal.launch import ceil_div, elements, Launch, View
from pyengine.backends.metal.norm import SIMDGROUP_WIDTH
from pyengine.dtype import DType, PACKED_FORMS

SIMDGROUPS, GROUP, TILE_COLUMNS, PREPARE_BLOCKS = 4, 16, 64, 64          # of csrc/metal/linear.h and linear.metal
ROWS_FEW = 8                            # rows that take the kernels for few rows
ROWS_MOST = 32                          # of a tile: rows of x are padded to whole tiles
SHARED = {                              # bytes of threadgroup memory, drawn in linear.metal and linear_floats.metal
    "linear_few": 4 * SIMDGROUPS * 2 * ROWS_FEW * 2 * GROUP,
    "linear_tiles": 4 * (64 + 4 * TILE_COLUMNS + 3 * ROWS_MOST + 32 * 72 // 2 + ROWS_MOST * 40 // 2),
    "linear_floats_few": 4 * (64 + SIMDGROUPS * 32 * 24 + SIMDGROUPS * 2 * ROWS_FEW * GROUP),
    "linear_floats_tiles": 4 * (64 + 32 * 72 + ROWS_MOST * 36),
}


FEW, TILED = ("linear_few", "linear_floats_few"), ("linear_tiles", "linear_floats_tiles")       # with codes, with floats


def is_float(dtype: DType) -> bool:
    """Say whether products with weights of this format take float32 rows of x; else they take codes of 8 bits."""
    return dtype.block == 1 or not dtype.is_packed


def group_bytes(dtype: DType, k: int) -> int:
    """Return the bytes of 16 packed rows, as csrc/cpu/pack.c counts them."""
    form, blocks = PACKED_FORMS[dtype.unpacked.name], k // dtype.block
    return -(-(ceil_div(blocks, form.unit) * form.unit * form.head + blocks * form.body) // 64) * 64


class Room:
    """Working memory, handed out piece by piece; without a view it only counts."""

    def __init__(self, scratch: View | None):
        self.scratch, self.used = scratch, 0

    def take(self, nbytes: int) -> View | None:
        """Return the next bytes, from a multiple of 64."""
        at = self.used
        self.used += -(-nbytes // 64) * 64
        return None if self.scratch is None else replace(self.scratch.at(at), nbytes=nbytes)


@dataclass(frozen=True)
class Rows:
    """Rows of x as products take them, padded with rows of zeros: codes with their scales and sums, or floats, or both.

    order  experts: the pair that each row belongs to, else None
    tiles  experts: the table of tiles
    """

    count: int
    k: int
    h_stride: int
    codes: View | None
    scales: View | None
    sums: View | None
    h: View | None
    order: View | None = None
    tiles: View | None = None


def rows_of(room: Room, count: int, k: int, weights: Sequence[View], padding: int) -> Rows:
    """Take room for rows of x as these weights want them, for `count` rows and `padding` more."""
    quantized, floats = not all(is_float(w.dtype) for w in weights), any(is_float(w.dtype) for w in weights)
    n, stride = count + padding, ceil_div(k, 32) * 32
    codes, scales, sums = (room.take(n * size) if quantized else None for size in (2 * k, k // 32 * 4, k // 16 * 4))
    return Rows(count, k, stride, codes, scales, sums, room.take(4 * n * stride) if floats else None)


def prepare(rows: Rows, x: View, norm: View | None, eps: float, padded: int, each: int = 1) -> Launch:
    """Return the launch that fills rows 0 .. padded - 1. each: experts' rows that share a row of x."""
    args = dict(k=rows.k, rows=rows.count, x_stride=elements(x)[0], h_stride=rows.h_stride, each=each, eps=eps,
                team=32 if rows.k <= SIMDGROUP_WIDTH else 256)
    buffers = {"x": x, "norm": norm, "codes": rows.codes, "scales": rows.scales, "sums": rows.sums, "h": rows.h, "order": rows.order}
    constants = {"NORMED": norm is not None, "QUANTIZED": rows.codes is not None, "FLOATS": rows.h is not None,
                 "EXPERTS": rows.order is not None}
    return Launch("prepare_rows", args, buffers, (ceil_div(ceil_div(rows.k, 32), PREPARE_BLOCKS), padded, 1), (256, 1, 1), 1024, constants)


@dataclass(frozen=True)
class Set:
    """One result and what it is made of; `second` is the other matrix of a glu, `given` that matrix's product where it is known."""

    w: View
    out: View
    bias: View | None = None
    second: View | None = None
    second_bias: View | None = None
    residual: View | None = None
    given: View | None = None


def few_rows(rows: int) -> int:
    """Return for how many rows the kernel for few rows is compiled: 1, 2, 4 or 8."""
    return next(n for n in (1, 2, 4, 8) if rows <= n)


def multiply(rows: Rows, sets: Sequence[Set], glu: int, cap: float, tile_rows: int, tiles: int) -> Launch:
    """Return the product of rows with up to four matrices of one format.

    tile_rows  rows of x that a threadgroup multiplies: up to 8, or 16 or 32; tiles: how many times
    """
    w, few = sets[0].w, tile_rows <= ROWS_FEW
    n, k, dtype = [s.w.shape[-2] for s in sets], rows.k, w.dtype
    groups = 2 if few and tile_rows >= 4 and not is_float(dtype) else 1      # which share what is loaded of x
    width = GROUP * groups if few else TILE_COLUMNS
    ends = [sum(ceil_div(i, width) for i in n[: j + 1]) for j in range(len(n))]
    each = group_bytes(dtype, k) if dtype.is_packed else w.strides[-2]
    floats = is_float(dtype)
    side = sets[0].residual or sets[0].given
    args: Mapping[str, Any] = dict(
        rows=rows.count, k=k, sets=len(sets), x_stride=rows.h_stride if floats else k, n=n, ends=ends,
        out_stride=[elements(s.out)[0] for s in sets], residual_stride=elements(side)[0] if side else 0, softcap=cap,
        group_bytes=each, expert_bytes=ceil_div(n[0], GROUP) * each if dtype.is_packed else w.strides[0])
    buffers: dict[str, View | None] = {"residual": side, "order": rows.order, "tiles": rows.tiles}
    if floats:
        buffers |= {"h": rows.h}
    else:
        buffers |= {"codes": rows.codes, "scales": rows.scales, "sums": rows.sums}
    for i, s in enumerate(sets):
        buffers |= {f"w{i}": s.w, f"bias{i}": s.bias, f"out{i}": s.out}
    if sets[0].second:
        buffers |= {"w1": sets[0].second, "bias1": sets[0].second_bias}
    constants = {"FORMAT": dtype.unpacked.id, "ROWS": tile_rows, "GLU": glu, "BIASED": sets[0].bias is not None,
                 "ADDED": sets[0].residual is not None, "GIVEN": sets[0].given is not None, "EXPERTS": rows.order is not None,
                 "PACKED": dtype.is_packed}
    if not floats:
        constants["GROUPS"] = groups
    kernel = (FEW if few else TILED)[floats]
    return Launch(kernel, args, buffers, (ends[-1], tiles, 1), (128, 1, 1), SHARED[kernel], constants)
