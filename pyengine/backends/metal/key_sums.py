"""Launches of csrc/metal/key_sums.metal: queries made ready as for attention, then tiles of keys."""

from __future__ import annotations

import math

from pyengine.backends.metal.attention import check_channels, FORMATS, is_blocks, WIDTH_MOST
from pyengine.backends.metal.launch import ceil_div, Launch, launches, NoKernel, scratch, Step
from pyengine.backends.metal.products import Room
from pyengine.errors import GraphError

THREADS, TOGETHER, CHANNELS = 128, 16, 6         # of csrc/metal/key_sums.metal
KEYS = ((64, 64), (128, 32), (256, 16), (512, 8))          # (widest head, keys of a threadgroup)


def _stride(s: Step) -> int:
    """Return the floats of a query as `attention_queries` leaves it."""
    e = s.need("q").shape[2]
    return ceil_div(e, 8) * 8 + (ceil_div(1 + e // 32, 8) * 8 if is_blocks(s.need("k").dtype) else 0)


@scratch
def key_sums(s: Step) -> int:
    """Count the queries."""
    (m, heads, _), room = s.need("q").shape, Room(None)
    room.take(4 * m * heads * _stride(s))
    return room.used


@launches
def key_sums(s: Step) -> list[Launch]:  # noqa: F811
    """Launch two kernels, the second for all places of every sequence and head. Raises: GraphError, NoKernel."""
    sums, q, k, cells, seq = s.need("sums"), s.need("q"), s.need("k"), s.need("cells"), s.one("seq")
    (m, heads, e), groups, (_, n_keys, channels) = q.shape, k.shape[0], sums.shape
    if groups == 0 or heads % groups:
        raise GraphError(f"{s.name}: {heads} heads share {groups}")
    if k.dtype.by_channel:
        check_channels(s, k)
    if channels > CHANNELS or e > WIDTH_MOST or k.dtype.name not in FORMATS and not k.dtype.by_channel or e % k.dtype.block:
        raise NoKernel(f"{s.name}: {channels} channels, and heads of {e} elements of {k.dtype.name}; at most {CHANNELS} channels and "
                       f"{WIDTH_MOST} elements of {', '.join(FORMATS)} in whole blocks are possible")
    if k.dtype.block > 1 and k.strides[2] != k.dtype.nbytes:
        raise NoKernel(f"{s.name}: the blocks of 'k' do not lie side by side")
    if m == 0 or heads == 0 or cells.shape[1] == 0:
        return []
    group, keys, run = heads // groups, next(n for widest, n in KEYS if e <= widest), e & -e
    queries, pitch, kinds = Room(s.scratch).take(4 * m * heads * _stride(s)), ceil_div(e, 4) * 4 + 4, tuple(s.params.kinds)
    shared = {"m": m, "heads": heads, "group": group, "e": e, "ep": ceil_div(e, 8) * 8, "eq": _stride(s), "queries": m * group}
    unused = ("f", "l", "n_cells", "sequences", "cells_stride", "chunks", "reach", "v_run", "v_shrink", "k_head", "k_cell", "k_step", "v_head",
              "v_cell", "v_step")
    ready = {**dict.fromkeys(unused, 0), **shared, "slots": group, "k_run": run, "k_shrink": 1 / math.sqrt(max(1, run)),
             **dict(scale=s.params.scale, softcap=0.0), **dict(zip(("q_row", "q_head", "q_step"), q.strides))}
    args = {**shared, "l": cells.shape[1], "n_cells": k.shape[1], "sequences": cells.shape[0], "cells_stride": cells.strides[0] // 4,
            "channels": channels, "n_keys": n_keys, "pitch": pitch, "kinds": kinds + (0,) * (CHANNELS - channels),
            **dict(softcap=s.params.softcap), **dict(zip(("k_head", "k_cell", "k_step"), k.strides))}
    buffers = {"queries": queries, "seq": seq, **{name: s.need(name) for name in ("sums", "k", "lo", "hi", "cells", "stats", "weights")}}
    floats = 4 * THREADS + keys + 2 * TOGETHER * (keys + 1) + 3 + keys * pitch
    return [
        Launch("attention_queries", ready, {"q": q, "queries": queries}, (m * group, groups, 1), (32, 1, 1), 8 * WIDTH_MOST,
               {"K_FORMAT": k.dtype.id}),
        Launch("key_sums_tiles", args, buffers, (ceil_div(cells.shape[1], keys), groups, cells.shape[0]), (THREADS, 1, 1), 4 * floats,
               {"K_FORMAT": k.dtype.id, "KEYS": keys, "SEQUENCED": seq is not None, "CAPPED": s.params.softcap != 0.0})]
