"""Launches of csrc/metal/groups.metal."""

from __future__ import annotations

import math
from typing import Any

from pyengine.backends.metal.attention import check_channels
from pyengine.backends.metal.launch import ceil_div, Launch, launches, NoKernel, Step, View
from pyengine.backends.metal.rope import CELL_FORMATS

PLAIN = ("F32", "F16", "BF16")
SIMDGROUPS, CHANNELS_ROOM = 4, 32 * 33   # of csrc/metal/groups.metal: of a threadgroup; floats of 32 channels of a group
MERGED, MOST_PARTS = 8, 4                # heads of a threadgroup that are merged, and parts


def _check(s: Step, name: str, view: View, formats: tuple[str, ...]) -> None:
    if view.dtype.name not in formats or view.strides[2] != view.dtype.nbytes:
        raise NoKernel(f"{s.name}: '{name}' has dtype {view.dtype}; possible are {', '.join(formats)}, elements side by side")


@launches
def cache_groups(s: Step) -> list[Launch]:
    """Launch one threadgroup a group of cells and head. Raises: NoKernel."""
    k, v, k_full, v_full, source, target = (s.need(name) for name in ("k", "v", "k_full", "v_full", "source", "target"))
    if k.dtype.by_channel:
        check_channels(s, k)
    else:
        _check(s, "k", k, CELL_FORMATS)
    for name, view, formats in (("v", v, CELL_FORMATS), ("k_full", k_full, PLAIN), ("v_full", v_full, PLAIN)):
        _check(s, name, view, formats)
    if source.shape[0] == 0 or k.shape[0] == 0:
        return []
    room = max(2 * ceil_div(max(k.shape[2], v.shape[2]), 32) * 32, CHANNELS_ROOM)
    if 4 * room * SIMDGROUPS > 32768:
        raise NoKernel(f"{s.name}: heads of {max(k.shape[2], v.shape[2])} elements do not fit into threadgroup memory")
    args: dict[str, Any] = {"k_width": k.shape[2], "v_width": v.shape[2], "cells": k.shape[1], "full": k_full.shape[1], "room": room}
    for name, view in (("k", k), ("v", v)):
        run = view.shape[2] & -view.shape[2]
        args |= {f"{name}_run": run, f"{name}_shrink": 1 / math.sqrt(max(1, run))}
    for name, view in (("k", k), ("v", v), ("kf", k_full), ("vf", v_full)):
        args |= {f"{name}_head": view.strides[0], f"{name}_cell": view.strides[1]}
    constants = {"K_FORMAT": k.dtype.id, "V_FORMAT": v.dtype.id, "K_FULL": k_full.dtype.id, "V_FULL": v_full.dtype.id}
    buffers = {"k": k, "v": v, "k_full": k_full, "v_full": v_full, "source": source, "target": target}
    return [Launch("write_groups", args, buffers, (source.shape[0], k.shape[0], 1), (32 * SIMDGROUPS, 1, 1), 4 * room * SIMDGROUPS, constants)]


@launches
def merge_attention(s: Step) -> list[Launch]:
    """Launch one simdgroup a head of a row. Raises: NoKernel."""
    parts, stats, out = s.inputs["parts"], s.inputs["stats"], s.outputs[0]
    if len(parts) != len(stats) or len(parts) > MOST_PARTS:
        raise NoKernel(f"{s.name}: {len(parts)} results and {len(stats)} stats; {MOST_PARTS} of each at most")
    heads = out.shape[0] * stats[0].shape[1]
    if heads == 0 or out.shape[1] == 0:
        return []
    buffers: dict[str, View | None] = {"out": out, "together": s.outputs[1] if len(s.outputs) > 1 else None}
    for i, (part, stat) in enumerate(zip(parts, stats)):
        buffers |= {f"x{i}": part, f"s{i}": stat}
    together = min(MERGED, heads)
    return [Launch("merge_heads", {"heads": heads, "width": out.shape[1] // stats[0].shape[1], "parts": len(parts)}, buffers,
                   (ceil_div(heads, together), 1, 1), (32 * together, 1, 1))]
