"""Launches of csrc/metal/rope.metal."""

from __future__ import annotations

import math
from typing import Any

from pyengine.backends.metal.launch import ceil_div, Launch, launches, NoKernel, spread, Step, View
from pyengine.errors import GraphError, RequestError

CELL_FORMATS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q2_1")
SIMDGROUPS = 4                           # of a threadgroup that appends heads


@launches
def rope_table(s: Step) -> list[Launch]:
    """Launch one thread an angle. Raises: GraphError for positions without rows."""
    positions, frequencies, axis = s.singles()
    (axes, rows), n = positions.shape, frequencies.size
    if axes < 1:
        raise GraphError(f"{s.name}: positions has no rows")
    if rows == 0 or n == 0:
        return []
    threads = min(256, ceil_div(n, 32) * 32)
    return [Launch("angles", dict(rows=rows, axes=axes, n=n, scale=s.params.scale),
                   dict(positions=positions, frequencies=frequencies, axis=axis, out=s.outputs[0]),
                   (ceil_div(n, threads), rows, 1), (threads, 1, 1))]


@launches
def temperature(s: Step) -> list[Launch]:
    """Launch one thread a row. Raises: RequestError for a floor below 1."""
    (positions,), floor = s.singles(), s.params.floor
    if floor < 1:
        raise RequestError(f"{s.name}: a floor of {floor}")
    if positions.shape[0] < 1:
        raise GraphError(f"{s.name}: positions has no rows")
    if positions.shape[1] == 0:
        return []
    grid, threads = spread(positions.shape[1])
    return [Launch("sharpness", dict(rows=positions.shape[1], floor=floor, scale=s.params.scale, offset=s.params.offset),
                   dict(positions=positions, out=s.outputs[0]), grid, threads)]


def _pairs(s: Step, width: int) -> int:
    """Return half of the table's width. Raises: GraphError where it does not fit the heads."""
    t = s.need("table").shape[1]
    if t > width or t % 2:
        raise GraphError(f"{s.name}: a table of {t} for heads of {width}")
    return t // 2


@launches
def rope(s: Step) -> list[Launch]:
    """Launch one thread a pair."""
    x = s.need("x")
    (rows, heads, width), pairs = x.shape, _pairs(s, x.shape[2])
    if x.size == 0:
        return []
    grid, threads = spread(heads * (width - pairs))
    return [Launch("rotate_pairs", dict(rows=rows, heads=heads, width=width, pairs=pairs),
                   {"x": x, "table": s.need("table"), "out": s.outputs[0]}, (grid[0], rows, 1), threads,
                   constants={"INTERLEAVED": s.params.interleaved})]


def _cache(s: Step, name: str, cache: View) -> dict[str, Any]:
    """Return how one cache lies: head and cell apart, run and shrink of its mixing. Raises: NoKernel, GraphError."""
    if cache.dtype.name not in CELL_FORMATS:
        raise NoKernel(f"{s.name}: '{name}' has dtype {cache.dtype}; possible are {', '.join(CELL_FORMATS)}")
    if cache.strides[2] != cache.dtype.nbytes:
        raise NoKernel(f"{s.name}: the elements of '{name}' do not lie side by side")
    run = cache.shape[2] & -cache.shape[2]
    return {"head": cache.strides[0], "cell": cache.strides[1], "run": run, "shrink": 1 / math.sqrt(run) if run else 1.0}


def _append(s: Step, k: View, k_cache: View, v_cache: View | None, q_heads: int, pairs: int, buffers: dict[str, Any]) -> list[Launch]:
    (rows, kv_heads, width), cells = k.shape, k_cache.shape[1]
    ks = _cache(s, "cache" if v_cache is None else "k_cache", k_cache)
    vs = _cache(s, "v_cache", v_cache) if v_cache is not None else dict.fromkeys(ks, 0)
    v_width = v_cache.shape[2] if v_cache is not None else 0
    heads = q_heads + kv_heads * (1 if v_cache is None else 2)
    if rows == 0 or heads == 0:
        return []
    room = 2 * ceil_div(max(width, v_width), 32) * 32
    together = min(SIMDGROUPS, heads, 32768 // (4 * room))
    if together == 0:
        raise NoKernel(f"{s.name}: heads of {max(width, v_width)} elements do not fit into threadgroup memory")
    args = dict(rows=rows, q_heads=q_heads, kv_heads=kv_heads, width=width, v_width=v_width, pairs=pairs, cells=cells, room=room,
                eps=getattr(s.params, "eps", 0.0))
    args |= {f"{side}_{name}": value for side, own in (("k", ks), ("v", vs)) for name, value in own.items()}
    constants = {"INTERLEAVED": getattr(s.params, "interleaved", False), "K_FORMAT": k_cache.dtype.id,
                 "V_FORMAT": v_cache.dtype.id if v_cache is not None else 0}
    bound = {"k": k, "cells": s.need("cells"), "k_cache": k_cache, "v_cache": v_cache, **buffers}
    return [Launch("append_heads", args, bound, (ceil_div(heads, together), rows, 1), (32 * together, 1, 1), 4 * room * together, constants)]


@launches
def cache_append(s: Step) -> list[Launch]:
    """Launch one simdgroup a head."""
    return _append(s, s.need("x"), s.need("cache"), None, 0, 0, {"offset": s.one("offset")})


@launches
def rope_append(s: Step) -> list[Launch]:
    """Launch one simdgroup a head of q, k or v."""
    q, k_cache, v_cache = s.need("q"), s.need("k_cache"), s.need("v_cache")
    buffers = {"q": q, "v": s.need("v"), "table": s.need("table"), "q_norm": s.one("q_norm"), "k_norm": s.one("k_norm"),
               "offset": s.one("k_offset"), "q_out": s.outputs[0]}
    return _append(s, s.need("k"), k_cache, v_cache, q.shape[1], _pairs(s, q.shape[2]), buffers)
