"""Launches of csrc/metal/attention.metal: queries made ready, chunks of keys, results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyengine.backends.metal.launch import ceil_div, Launch, launches, NoKernel, scratch, Step, View
from pyengine.backends.metal.products import Room
from pyengine.dtype import DType, GROUP

TILE_QUERIES, CHUNK_KEYS, SLICE, WIDTH_MOST = 8, 256, 64, 512       # of csrc/metal/attention.metal
WIDTH_NARROW = 256                      # values up to here leave registers for many queries of a threadgroup
QUERIES = 4 * TILE_QUERIES              # of a threadgroup where there are many rows
ROWS_SPLIT = 16                         # at most so many rows are split over their chunks of keys: they read the keys one by one
SPLIT_BYTES = 64 << 20                  # and as many of them as leave results of chunks of this size
SHARED_BYTES = 4 * (64 + 11 * QUERIES + 64 + 4 + QUERIES * 68 + 32 * 68)
RAW_BYTES = 32 * 276                    # and for blocks, whose cells are copied first
FORMATS = {"F32": 4, "F16": 2, "BF16": 2, "Q8_0": 0, "Q4_0": 0, "Q4_1": 0, "Q2_1": 0}            # bytes of a plain number


@dataclass(frozen=True)
class _Job:
    """Sizes of a step. slots: queries of a row; queries: of a key/value head, in whole threadgroups; chunks: of one row, at most."""

    m: int
    heads: int
    e: int
    f: int
    groups: int
    chunks: int
    split: int
    blocks: bool                        # of keys

    @property
    def group(self) -> int:
        """Heads that share a key/value head."""
        return self.heads // self.groups

    @property
    def stride(self) -> int:
        """Floats of a query as it is made ready: over keys in blocks codes, then their scale and sums."""
        return ceil_div(self.e, 8) * 8 + (ceil_div(1 + self.e // 32, 8) * 8 if self.blocks else 0)

    def sizes(self, rows: int) -> tuple[bool, int, int]:
        """Return (split over chunks, slots, queries) for so many rows."""
        split = rows <= self.split
        slots = ceil_div(self.group, TILE_QUERIES) * TILE_QUERIES if split else self.group
        return split, slots, ceil_div(rows * slots, QUERIES) * QUERIES


def _job(s: Step) -> _Job:
    q, k, v, cells = s.need("q"), s.need("k"), s.need("v"), s.one("cells")
    (m, heads, e), groups, f = q.shape, k.shape[0], v.shape[2]
    if groups == 0 or heads % groups:
        raise NoKernel(f"attention: {heads} heads share {groups}")
    keys = cells.shape[1] if cells else min(k.shape[1], v.shape[1])
    chunks = keys // CHUNK_KEYS + 2
    return _Job(m, heads, e, f, groups, chunks, min(ROWS_SPLIT, SPLIT_BYTES // (4 * heads * chunks * max(1, f))),
                is_blocks(k.dtype))


def _places(job: _Job, room: Room, rows: int, stats: bool) -> tuple[View | None, View | None, View | None, View | None, int]:
    """Return places of queries, of results of chunks, of tops and sums, and of largest logits, and the bytes of all."""
    split, _, queries = job.sizes(rows)
    parts = rows * job.heads * (job.chunks if split else 1)
    prepared, partials = room.take(4 * job.groups * queries * job.stride), room.take(4 * parts * job.f if split else 0)
    return prepared, partials, room.take(8 * parts), room.take(4 * parts if stats else 0), room.used


@scratch
def attention(s: Step) -> int:
    """Count for as many rows as there may be, and for few of them, whose chunks have results of their own."""
    job = _job(s)
    return max(_places(job, Room(None), rows, s.params.stats)[-1] for rows in {job.m, min(job.m, job.split)})


def is_blocks(k: DType) -> bool:
    """Say whether keys are in blocks of one cell, for which queries are rounded; those by channel are not."""
    return k.block > 1 and not k.by_channel


def check_channels(s: Step, k: View) -> None:
    """Look at keys by channel: whole groups of cells that lie side by side. Raises: NoKernel."""
    n, (_, cells, e) = k.dtype.nbytes, k.shape
    if e % k.dtype.block or cells % GROUP or k.strides[1:] != (e // k.dtype.block * n, n) or e > WIDTH_MOST:
        raise NoKernel(f"{s.name}: 'k' has {cells} cells of {e} elements by channel; at most {WIDTH_MOST} elements, in whole groups of "
                       f"{GROUP} cells that lie side by side, are possible")


def _cache(s: Step, name: str) -> tuple[View, bool]:
    """Return keys or values, and whether four elements side by side are aligned, or cells of blocks whole words. Raises: NoKernel."""
    view = s.need(name)
    if name == "k" and view.dtype.by_channel:
        check_channels(s, view)
        return view, not any(n % 4 for n in (view.offset, view.strides[0]))
    if view.dtype.name not in FORMATS or view.shape[2] > WIDTH_MOST or view.shape[2] % view.dtype.block:
        raise NoKernel(f"attention: '{name}' has {view.shape[2]} elements of {view.dtype.name}; at most {WIDTH_MOST} of "
                       f"{', '.join(FORMATS)} in whole blocks are possible")
    size = FORMATS[view.dtype.name]
    if not size and view.strides[2] != view.dtype.nbytes:
        raise NoKernel(f"attention: the blocks of '{name}' do not lie side by side")
    width = view.dtype.size(view.shape[2])
    whole = view.strides[2] == view.dtype.nbytes and not any(n % (4 * size or 4) for n in (view.offset, *view.strides[:2], width))
    return view, whole


def _args(s: Step, job: _Job, slots: int, queries: int) -> dict[str, Any]:
    p, q, k, v, cells = s.params, s.need("q"), s.need("k"), s.need("v"), s.one("cells")
    run = {name: n & -n for name, n in (("k", job.e), ("v", job.f))}
    args: dict[str, Any] = {
        "m": job.m, "heads": job.heads, "group": job.group, "slots": slots, "e": job.e, "ep": ceil_div(job.e, 8) * 8, "eq": job.stride, "f": job.f,
        "queries": queries, "l": cells.shape[1] if cells else 0, "n_cells": min(k.shape[1], v.shape[1]),
        "sequences": cells.shape[0] if cells else 1, "cells_stride": cells.strides[0] // 4 if cells else 0, "chunks": job.chunks}
    args |= dict(scale=p.scale, softcap=p.softcap, reach=s.need("bias").shape[1] // 2 if s.inputs["bias"] else 0)
    for name, n in run.items():
        args |= {f"{name}_run": n, f"{name}_shrink": 1 / math.sqrt(n)}
    args |= dict(zip(("q_row", "q_head", "q_step"), q.strides))
    args |= dict(zip(("k_head", "k_cell", "k_step"), k.strides)) | dict(zip(("v_head", "v_cell", "v_step"), v.strides))
    return args


@launches
def attention(s: Step) -> list[Launch]:  # noqa: F811
    """Launch three kernels. Few rows are split over their chunks of keys; the results do not depend on it."""
    job, cap = _job(s), s.params.softcap
    if job.m == 0 or job.heads == 0 or job.f == 0:
        return []
    if s.params.products and (s.inputs["cells"] or s.inputs["seq"] or s.inputs["sinks"] or s.inputs["bias"] or cap
                                 or s.need("k").dtype.block > 1 or s.need("v").dtype.block > 1):
        raise NoKernel("attention: products of int8 take neither cells nor blocks nor sinks nor a bias nor a soft cap")
    (k, k_whole), (v, v_whole), out = _cache(s, "k"), _cache(s, "v"), s.outputs[0]
    split, slots, queries = job.sizes(job.m)
    told = bool(s.params.stats)
    prepared, partials, tops, mosts, _ = _places(job, Room(s.scratch), job.m, told)
    cells, seq, sinks, bias = s.one("cells"), s.one("seq"), s.one("sinks"), s.one("bias")
    if seq is not None and cells is None:
        seq = None                                           # without a table there is one sequence
    args = _args(s, job, slots, queries)
    tiles = 1 if split or job.f > WIDTH_NARROW else QUERIES // TILE_QUERIES
    constants: Mapping[str, int | bool] = {
        "K_FORMAT": k.dtype.id, "V_FORMAT": v.dtype.id, "K_WHOLE": k_whole, "V_WHOLE": v_whole, "TILES": tiles,
        "SLICES": ceil_div(job.f, SLICE), "PAGED": cells is not None, "SEQUENCED": seq is not None, "CAPPED": cap != 0.0,
        "SPLIT": split, "SUNK": sinks is not None, "BIASED": bias is not None, "TOLD": told}
    rows = {"lo": s.need("lo"), "hi": s.need("hi"), "seq": seq, "partials": partials if split else None, "tops": tops, "out": out,
            "mosts": mosts if told else None}
    grid = (ceil_div(job.m * slots, TILE_QUERIES * tiles), job.groups, job.chunks if split else 1)
    return [
        Launch("attention_queries", args, {"q": s.need("q"), "queries": prepared}, (queries, job.groups, 1), (32, 1, 1), 8 * WIDTH_MOST,
               constants),
        Launch("attention_chunks", args, {"queries": prepared, "k": k, "v": v, "cells": cells, "bias": bias, "numbers": s.one("at"), **rows}, grid, (128, 1, 1),
               SHARED_BYTES + (RAW_BYTES if k.dtype.block > 1 or v.dtype.block > 1 else 0), constants),
        Launch("attention_finish", args, {"sinks": sinks, "stats": s.outputs[1] if told else None, **rows}, (job.heads, job.m, 1), (32, 1, 1), 8 * WIDTH_MOST, constants)]
