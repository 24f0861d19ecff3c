"""Rotary position embedding, in two steps: one table of angles a step of the model, then a rotation in every layer.

    NEOX  (interleaved=False), d = 8: [a b c d | a' b' c' d']     pairs (a, a'), (b, b') ...
    NORM  (interleaved=True),  d = 8: [a a' b b' c c' d d']
"""

from __future__ import annotations

import numpy as np

from pyengine.graph.op import Cache, F32, I32, op, Same


@op(fault="axis {} of {} rows of positions")
def rope_table(
    positions: I32["a m"], inv_freq: F32["f"], axis: I32["f"] | None = None, *, scale: float = 1.0
) -> F32["m 2*f"]:
    """Cosines, then sines, of position x inverse frequency, times `scale`. Su et al. 2021, arXiv:2104.09864.

    `axis` names, for each frequency, the row of `positions` that it turns with (M-RoPE: time, height, width; 2-D RoPE);
    without it, row 0. Angles are taken in float32, as transformers does. `scale` is yarn's attention factor.
    """
    p = positions[np.zeros(len(inv_freq), np.int32) if axis is None else axis].T      # [m, f]
    angle = p.astype(np.float32) * inv_freq.astype(np.float32)
    return (np.concatenate([np.cos(angle.astype(np.float64)), np.sin(angle.astype(np.float64))], axis=-1) * scale).astype(inv_freq.dtype)


rope_table.case(positions=(1, 9), inv_freq=(32,))
rope_table.case(positions=(3, 5), inv_freq=(20,), axis=(20,), scale=1.25)
rope_table.case(positions=(1, 0), inv_freq=(8,))


@op()
def temperature(positions: I32["a m"], *, floor: int, scale: float, offset: int = 1) -> F32["m"]:
    """How much sharper attention becomes with distance: 1 + scale * log(1 + (position + offset) // floor).

    Queries are multiplied by it. Row 0 of `positions` counts; a sum below 0 counts as 0.
    Nakanishi 2025, arXiv:2501.19399, in the steps of Llama 4. Raises: RequestError at run time for a floor below 1.
    """
    steps = np.maximum(positions[0].astype(np.int64) + offset, 0) // floor
    return (1 + scale * np.log1p(steps.astype(np.float64))).astype(np.float32)


temperature.case(positions=(1, 9), floor=4, scale=0.1)
temperature.case(positions=(3, 700), floor=8192, scale=0.1)
temperature.case(positions=(1, 50), floor=3, scale=0.7, offset=0)
temperature.case(positions=(1, 0), floor=1, scale=1.0)


def rotate(x: np.ndarray, table: np.ndarray, interleaved: bool) -> np.ndarray:
    """Apply the rotation of `rope` to arrays [m, h, e]."""
    f = table.shape[-1] // 2
    cos, sin = table[:, None, :f], table[:, None, f:]
    a, b = (x[..., 0 : 2 * f : 2], x[..., 1 : 2 * f : 2]) if interleaved else (x[..., :f], x[..., f : 2 * f])
    y = x.copy()
    u, v = a * cos - b * sin, b * cos + a * sin
    if interleaved:
        y[..., 0 : 2 * f : 2], y[..., 1 : 2 * f : 2] = u, v
    else:
        y[..., :f], y[..., f : 2 * f] = u, v
    return y


@op(inplace="x", rowwise=True)
def rope(x: F32["m h e"], table: F32["m t"], *, interleaved: bool = False) -> F32["m h e"]:
    """Rotate the first t elements of each head by the angles of its row's `table`; the rest (partial rotary) stays."""
    return rotate(x, table, interleaved)


rope.case(x=(5, 3, 64), table=(5, 64))
rope.case(x=(5, 3, 64), table=(5, 64), interleaved=True)
rope.case(x=(2, 1, 80), table=(2, 40))
rope.case(x=(0, 2, 16), table=(0, 16))


def mixed(x: np.ndarray) -> np.ndarray:
    """Compute H x over the last axis (a multiple of 32), in the dtype of x: what block formats of a cache hold instead of x.

    H: for each run of s elements, the largest power of two that divides the axis, Sylvester's Hadamard matrix over sqrt(s). It is
    orthogonal and its own inverse, and spreads a channel that is larger than the rest over all scales (arXiv:2404.00456). Sums
    are in the kernels' order.
    """
    n = x.shape[-1]
    s, lanes = n & -n, range(16)
    sign = np.array([[1 - 2 * ((i & j).bit_count() % 2) for i in lanes] for j in lanes], x.dtype)
    runs = x.reshape(*x.shape[:-1], -1, 16)
    y = np.zeros_like(runs)
    for j in lanes:
        y = y + runs[..., j : j + 1] * sign[j]
    h = 16
    while h < s:
        pairs = y.reshape(*x.shape[:-1], -1, 2, h)
        y = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=-2)
        h *= 2
    return y.reshape(x.shape) * x.dtype.type(1 / np.sqrt(s))


@op(fault="a row goes to cell {} of {}")
def cache_append(cache: Cache["g s e"], x: F32["m g e"], cells: I32["m"], offset: F32["g e"] | None = None) -> Same["cache"]:
    """Write row i of every head, less `offset`, into cell cells[i] of the cache, which is changed in place.

    A negative cell is skipped. Block formats hold `mixed` elements, rounded as ggml's quantizers do.
    Raises: RequestError at run time for a cell outside the cache.
    """
    keep = cells >= 0
    cache[:, cells[keep]] = np.swapaxes(x[keep] if offset is None else x[keep] - offset, 0, 1)
    return cache


cache_append.case(cache=(2, 20, 64), x=(5, 2, 64), cells=(5,), offset=(2, 64))


def _head_norm(x: np.ndarray, weight: np.ndarray | None, eps: float) -> np.ndarray:
    return x if weight is None else x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps)) * weight


@op(inplace="q", fault="a row goes to cell {} of {}")
def rope_append(
    q: F32["m h e"],
    k: F32["m g e"],
    v: F32["m g f"],
    table: F32["m t"],
    k_cache: Cache["g s e"],
    v_cache: Cache["g s f"],
    cells: I32["m"],
    q_norm: F32["e"] | None = None,
    k_norm: F32["e"] | None = None,
    k_offset: F32["g e"] | None = None,
    *,
    interleaved: bool = False,
    eps: float = 0.0,
) -> tuple[F32["m h e"], Same["k_cache"], Same["v_cache"]]:
    """What stands between the q/k/v product and attention, in one pass: q/k-norm, rotation, cache write.

    q' = rope(rms_norm(q, q_norm)), k' = rope(rms_norm(k, k_norm)); k' - k_offset and v go to `cells` of the caches.
    """
    q = rotate(_head_norm(q, q_norm, eps), table, interleaved)
    k = rotate(_head_norm(k, k_norm, eps), table, interleaved)
    return q, cache_append.fn(k_cache, k, cells, k_offset), cache_append.fn(v_cache, v, cells)


rope_append.case(q=(5, 4, 64), k=(5, 2, 64), v=(5, 2, 64), table=(5, 64), k_cache=(2, 9, 64), v_cache=(2, 9, 64), cells=(5,))
rope_append.case(
    q=(3, 4, 64), k=(3, 1, 64), v=(3, 1, 32), table=(3, 64), k_cache=(1, 9, 64), v_cache=(1, 9, 32), cells=(3,),
    q_norm=(64,), k_norm=(64,), k_offset=(1, 64), interleaved=True, eps=1e-6,
)
