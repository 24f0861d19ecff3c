"""Caches whose keys are quantized by channel: what goes into their groups of cells, and attention to several stores put together.

A few channels of keys are much larger than the rest, and the same ones for all tokens: a scale for each channel of a group of tokens follows
them, where one for neighbouring channels of a token does not (KIVI, Liu et al. 2024, arXiv:2402.02750). A group is quantized when it is
whole; its tokens are in full elsewhere until then.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyengine.dtype import BY_CHANNEL, GROUP
from pyengine.errors import ShapeError
from pyengine.graph.op import Cache, F32, I32, op, Same


def _infer_groups(args: tuple[Any, ...], params: dict[str, Any]) -> list[Any]:
    shapes, (k, v, k_full, v_full) = cache_groups._infer(args), args[:4]
    if any(t.shape[1] % GROUP for t in (k, v, k_full, v_full)):
        raise ShapeError(f"cache_groups: caches of {k.shape[1]} and {k_full.shape[1]} cells: they must be whole groups of {GROUP}")
    if any(t.dtype.block > 1 for t in (k_full, v_full)):
        raise ShapeError(f"cache_groups: tokens are in full in {k_full.dtype} and {v_full.dtype}: plain numbers are needed")
    return shapes


@op(infer=_infer_groups, fault="a group begins at cell {} of {}")
def cache_groups(
    k: Cache["g s e"],
    v: Cache["g s f"],
    k_full: Cache["g r e"],
    v_full: Cache["g r f"],
    source: I32["z"],
    target: I32["z"],
) -> tuple[Same["k"], Same["v"]]:
    """Write groups of 32 keys and values, cells source[i] .. source[i] + 31 of `full`, into cells target[i] .. + 31 of k and v, in place.

    Both begin at multiples of 32; a negative target is skipped. k in a format by channel holds a block for each channel of a group; other
    block formats hold `rope.mixed` elements. Q2_1's scales are searched for the least sum of squared differences (csrc/cpu/cells.h).
    """
    for a, b in zip(source, target):
        if b >= 0:
            k[:, b : b + GROUP], v[:, b : b + GROUP] = k_full[:, a : a + GROUP], v_full[:, a : a + GROUP]
    return k, v


cache_groups.case(k=(2, 96, 64), v=(2, 96, 32), k_full=(2, 160, 64), v_full=(2, 160, 32), source=(3,), target=(3,))
cache_groups.case(k=(1, 64, 96), v=(1, 64, 96), k_full=(1, 32, 96), v_full=(1, 32, 96), source=(1,), target=(1,))
cache_groups.case(k=(1, 64, 32), v=(1, 64, 32), k_full=(1, 32, 32), v_full=(1, 32, 32), source=(0,), target=(0,))


def _infer_merge(args: tuple[Any, ...], params: dict[str, Any]) -> list[Any]:
    parts, stats = args
    if len(parts) != len(stats):
        raise ShapeError(f"merge_attention: {len(parts)} results and {len(stats)} stats: each result has its own")
    (m, d), (n, h, two) = parts[0].shape, stats[0].shape
    if m != n or two != 2 or d % h or any(t.shape != parts[0].shape for t in parts) or any(t.shape != stats[0].shape for t in stats):
        raise ShapeError(f"merge_attention: results {[t.shape for t in parts]} and stats {[t.shape for t in stats]} are not of the same queries")
    return [(t.shape, t.dtype) for t in (parts[0], stats[0])[: 1 + params["together"]]]


@op(infer=_infer_merge, rowwise=True)
def merge_attention(parts: list[F32["m d"]], stats: list[F32["m h 2"]], *, together: bool = False) -> tuple[F32["m d"], F32["m h 2"] | None]:
    """Put together what `attention` gave for the same queries and several sets of keys, as if it had seen all of them in one softmax.

    stats: its second results, of each query and head the largest logit and the sum of exp(logit - it); a sum of 0 is of no keys.
    together: a second result gives the same of all sets together, zeros where there are no keys (`key_sums` reads them).
    """
    (m, d), h = parts[0].shape, stats[0].shape[1]
    top = np.max([np.where(s[..., 1] > 0, s[..., 0], -np.inf) for s in stats], axis=0)                                # [m, h]
    shift = np.where(np.isfinite(top), top, 0)
    weights = [np.where(s[..., 1] > 0, s[..., 1] * np.exp(np.minimum(s[..., 0] - shift, 0)), 0) for s in stats]
    total = np.sum(weights, axis=0)
    summed = np.sum([w[..., None] * p.reshape(m, h, d // h) for w, p in zip(weights, parts)], axis=0)                 # [m, h, d / h]
    out = np.divide(summed, total[..., None], out=np.zeros_like(summed), where=total[..., None] > 0).reshape(m, d).astype(parts[0].dtype)
    return (out, np.stack([shift, total], -1).astype(stats[0].dtype)) if together else out


merge_attention.case(parts=[(5, 96), (5, 96)], stats=[(5, 2, 2), (5, 2, 2)])
merge_attention.case(parts=[(70, 64), (70, 64), (70, 64)], stats=[(70, 4, 2), (70, 4, 2), (70, 4, 2)])
merge_attention.case(parts=[(0, 64)], stats=[(0, 4, 2)])
merge_attention.case(parts=[(9, 64), (9, 64), (9, 64)], stats=[(9, 4, 2), (9, 4, 2), (9, 4, 2)], together=True)
