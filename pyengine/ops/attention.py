"""Attention: one op, its variants are arguments. The mask is an interval of key numbers for each query, never a matrix.

And sums over queries of what attention gives a key: what decides which keys a cache can forget.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from pyengine.errors import ShapeError
from pyengine.graph.op import Cache, F32, I32, op, Same
from pyengine.graph.tensor import axis_max

TILE_KEYS = 64


def attend_int8(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attend with a scaled query q [h, e] to keys k [h, n, e] and values v [h, n, f] of its interval, in products of bytes: [h, f].

    Keys lose what they have in common, which softmax does not see, and queries and keys get a scale each (SageAttention,
    arXiv:2410.02367). In tiles of 64 keys: probabilities are rounded to 1/255 of the largest; values, less what they have in common,
    get a scale for each element. In common is the mean of up to 64 keys that are spread evenly.
    """
    def codes(x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
        scale = np.abs(x).max(axis, keepdims=True) / 127
        return np.rint(np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)), scale

    n = k.shape[1]
    spread = np.arange(min(n, TILE_KEYS)) * max(n, TILE_KEYS) // TILE_KEYS
    common = v[:, spread].mean(1)
    qc, q_scale = codes(q, 1)
    kc, k_scale = codes(k - k[:, spread].mean(1, keepdims=True), 2)
    s = np.einsum("he,hke->hk", qc, kc) * q_scale * k_scale[..., 0]
    top, total, out = s.max(1, keepdims=True), 0.0, np.zeros_like(common)
    for first in range(0, n, TILE_KEYS):
        part = np.s_[:, first : first + TILE_KEYS]
        peak = s[part].max(1, keepdims=True)
        p = np.rint(255 * np.exp(s[part] - peak))
        vc, v_scale = codes(v[part] - common[:, None], 1)
        total = total + p.sum(1, keepdims=True) * np.exp(peak - top)
        out = out + np.einsum("hk,hkf->hf", p, vc) * v_scale[:, 0] * np.exp(peak - top)
    return common + out / total


def distance_columns(distance: np.ndarray, n: int) -> np.ndarray:
    """Return the columns of a bias with n of them for distances from query to key; the middle one is 0."""
    return n // 2 + np.clip(distance, -(n // 2), n // 2)


def _weigh(s: np.ndarray, sinks: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return exp(s - top), top and total of logits s [h, keys]; sinks [h] are among those whose largest is top and whose sum is total."""
    top = s.max(axis=-1, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, sinks[:, None])
    p = np.exp(s - top)
    total = p.sum(axis=-1, keepdims=True)
    return p, top, total if sinks is None else total + np.exp(sinks[:, None] - top)


def _products(q: Any, k: Any, v: Any, *others: Any, **params: Any) -> int:
    """Count the operations of scores and of sums of values, for as many keys as there are cells."""
    return 2 * axis_max(q.shape[0]) * axis_max(q.shape[1]) * axis_max(k.shape[1]) * (axis_max(q.shape[2]) + axis_max(v.shape[2]))


def _infer(args: tuple[Any, ...], params: dict[str, Any]) -> list[Any]:
    shapes = attention._infer(args)
    bias, at = args[8:10]
    if bias is not None and (not isinstance(bias.shape[1], int) or bias.shape[1] % 2 == 0):
        raise ShapeError(f"attention: 'bias' has {bias.shape[1]} distances; it must be an odd number of them, the middle one 0")
    if bias is None and at is not None:
        raise ShapeError("attention: 'at' is for a bias, and there is none")
    if params["stats"] and params["products"] == "int8":
        raise ShapeError("attention: products of int8 give no stats; leave one of them out")
    return shapes if params["stats"] else shapes[:1]


@op(
    infer=_infer,
    strided=("q", "k", "v"),
    rowwise=True,
    fault="a row reads key, cell or sequence {} of {}",
    flops=_products,
)
def attention(
    q: F32["m h e"],
    k: Cache["g s e"],
    v: Cache["g s f"],
    lo: I32["m"],
    hi: I32["m"],
    cells: I32["b l"] | None = None,
    seq: I32["m"] | None = None,
    sinks: F32["h"] | None = None,
    bias: F32["h r"] | None = None,
    at: I32["m"] | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    products: Literal["float", "int8"] = "float",
    stats: bool = False,
) -> tuple[F32["m h*f"], F32["m h 2"] | None]:
    """softmax(scale * q k^T) v over the keys lo[i] <= j < hi[i] of each query i; h heads share g key/value heads.

    Key j of sequence n lies in cell cells[n, j % l] (without `cells`: in cell j); query i belongs to sequence seq[i]
    (default 0). Every mask of the engine is such an interval: causal [0, i], sliding [i - window + 1, i], chunked,
    bidirectional spans (hi reaches the span's end), cross (all keys), windows of an encoder. An empty interval gives zeros.
    softcap: logits = softcap * tanh(logits / softcap). sinks: one more logit per head that takes probability and gives
    nothing (gpt-oss). bias: added to the scores by the distance from the query to the key, j - at[i], in -R .. R for r = 2 R + 1 columns;
    what is farther counts as R (T5's buckets end so). at: the number that query i has among the keys, by default hi[i] - 1. Vaswani et al. 2017, arXiv:1706.03762; grouped heads: arXiv:2305.13245.
    Caches in block formats hold `rope.mixed` keys and values, which this takes into account; with keys in blocks, kernels round
    mixed queries to 8 bits, one scale a head.

    products="int8": see `attend_int8`; about as exact as products with blocks of 8 bits, fast where rows share intervals.
    Keys and values of plain numbers, without cells, sinks, bias and soft cap. ShapeError with one of these.

    stats: a second result gives, of each query and head, the largest logit `top`, and `total`, the sum of exp(logit - top); a sink is
    one of the logits. So a key with logit s has probability exp(s - top) / total. Zeros for an empty interval.
    """
    m, h, _ = q.shape
    if products == "int8" and not (cells is None and seq is None and sinks is None and bias is None and softcap == 0):
        raise ShapeError("attention: products of int8 take neither cells nor sinks nor a bias nor a soft cap")
    g = k.shape[0]
    out, found = np.zeros((m, h, v.shape[2]), q.dtype), np.zeros((m, h, 2), q.dtype)
    for i in range(m):
        j = keys = np.arange(lo[i], hi[i])
        if cells is not None:
            j = cells[0 if seq is None else seq[i], j % cells.shape[1]]
        if len(j) == 0:
            continue
        kj = np.repeat(k[:, j].astype(q.dtype), h // g, axis=0)                      # [h, keys, e]
        vj = np.repeat(v[:, j].astype(q.dtype), h // g, axis=0)                      # [h, keys, f]
        if products == "int8":
            out[i] = attend_int8(q[i] * q.dtype.type(scale), kj, vj)
            continue
        s = np.einsum("he,hke->hk", q[i], kj) * q.dtype.type(scale)
        if bias is not None:
            s = s + bias[:, distance_columns(keys - (hi[i] - 1 if at is None else at[i]), bias.shape[1])]
        if softcap:
            s = softcap * np.tanh(s / softcap)
        p, top, total = _weigh(s, sinks)
        out[i] = np.einsum("hk,hkf->hf", p / total, vj)
        found[i] = np.concatenate([top, total], axis=-1)
    out = out.reshape(m, h * v.shape[2])
    return (out, found) if stats else out


attention.case(q=(1, 4, 64), k=(2, 40, 64), v=(2, 40, 64), lo=(1,), hi=(1,), scale=0.125)
attention.case(q=(9, 4, 64), k=(1, 40, 64), v=(1, 40, 32), lo=(9,), hi=(9,), cells=(2, 40), seq=(9,), scale=0.2, softcap=50.0)
attention.case(q=(9, 4, 80), k=(4, 33, 80), v=(4, 33, 80), lo=(9,), hi=(9,), sinks=(4,), scale=0.1)
attention.case(q=(0, 4, 64), k=(2, 40, 64), v=(2, 40, 64), lo=(0,), hi=(0,), scale=0.125)
attention.case(q=(9, 4, 64), k=(2, 200, 64), v=(2, 200, 64), lo=(9,), hi=(9,), bias=(4, 33), at=(9,), scale=0.125)
attention.case(q=(70, 3, 40), k=(3, 90, 40), v=(3, 90, 48), lo=(70,), hi=(70,), cells=(2, 90), seq=(70,), bias=(3, 7), scale=0.2, softcap=30.0)
attention.case(q=(90, 4, 72), k=(2, 90, 72), v=(2, 90, 72), lo=(90,), hi=(90,), scale=0.1, products="int8")
attention.case(q=(9, 4, 64), k=(2, 40, 64), v=(2, 40, 32), lo=(9,), hi=(9,), cells=(2, 40), seq=(9,), sinks=(4,), scale=0.2, softcap=20.0, stats=True)
attention.case(q=(2, 4, 64), k=(2, 900, 64), v=(2, 900, 64), lo=(2,), hi=(2,), scale=0.125, stats=True)

SUMS = ("sum", "square", "large", "entropy")
LARGE = 0.01                             # of a row's largest probability


def _infer_sums(args: tuple[Any, ...], params: dict[str, Any]) -> list[Any]:
    shapes, (b, l), (_, n, c) = key_sums._infer(args), args[5].shape, args[0].shape
    if n != b * l:
        raise ShapeError(f"key_sums: 'sums' has {n} keys, and {b} sequences of {l} cells have {b * l}")
    if len(params["kinds"]) != c or not all(0 <= kind < len(SUMS) for kind in params["kinds"]):
        raise ShapeError(f"key_sums: 'kinds' are {params['kinds']}; each of {c} channels needs one, 0 to {len(SUMS) - 1}")
    return shapes


@op(
    infer=_infer_sums,
    strided=("q", "k"),
    fault="a row reads key, cell or sequence {} of {}",
    flops=lambda sums, q, k, *a, **p: 2 * axis_max(q.shape[0]) * axis_max(q.shape[1]) * axis_max(k.shape[1]) * axis_max(q.shape[2]),
)
def key_sums(
    sums: F32["g n c"],
    q: F32["m h e"],
    k: Cache["g s e"],
    lo: I32["m"],
    hi: I32["m"],
    cells: I32["b l"],
    seq: I32["m"] | None,
    stats: F32["m h 2"],
    weights: F32["m c"],
    *,
    scale: float,
    softcap: float = 0.0,
    kinds: tuple[int, ...],
) -> Same["sums"]:
    """Add to the sums of each key what the queries of an attention give it, weights[i, c] times a statistic of its probability p.

    Arguments are those of `attention`, and its second result. Key j of sequence n has its sums at n * l + j % l. Channel c is of kind
    SUMS[kinds[c]]: "sum" p (H2O, Zhang et al. 2023, arXiv:2306.14048); "square" p * p; "large" 1 where p is at least LARGE of the row's
    largest, the sink's included (VL-Cache, Tu et al. 2024, arXiv:2410.23317); "entropy" -p ln p. Query after query in the order of rows,
    and of the heads of a group: the bits do not depend on how a prompt is cut. A row without weights costs nothing.
    """
    (m, h, _), g, l = q.shape, k.shape[0], cells.shape[1]
    for i in range(m):
        if hi[i] <= lo[i] or not weights[i].any():
            continue
        n, slots = 0 if seq is None else seq[i], np.arange(lo[i], hi[i]) % l
        kj = k[:, cells[n, slots]].astype(q.dtype)                                   # [g, keys, e]
        for head in range(h // g):
            own = np.s_[i, head :: h // g]                                           # one head of each group
            s = np.einsum("ge,gke->gk", q[own], kj) * q.dtype.type(scale)
            if softcap:
                s = softcap * np.tanh(s / softcap)
            s, total = s - stats[own][:, :1], stats[own][:, 1:]
            p = np.exp(s) / total
            found = (p, p * p, np.exp(s) >= LARGE, p * (np.log(total) - s))
            for c, kind in enumerate(kinds):
                sums[:, n * l + slots, c] += weights[i, c] * found[kind]
    return sums


key_sums.case(sums=(2, 80, 4), q=(9, 4, 64), k=(2, 40, 64), lo=(9,), hi=(9,), cells=(2, 40), seq=(9,), stats=(9, 4, 2), weights=(9, 4), scale=0.2,
              softcap=20.0, kinds=(0, 1, 2, 3))
key_sums.case(sums=(1, 300, 1), q=(70, 6, 80), k=(1, 300, 80), lo=(70,), hi=(70,), cells=(1, 300), stats=(70, 6, 2), weights=(70, 1), scale=0.1,
              kinds=(0,))
key_sums.case(sums=(2, 40, 1), q=(0, 4, 64), k=(2, 40, 64), lo=(0,), hi=(0,), cells=(1, 40), stats=(0, 4, 2), weights=(0, 1), scale=0.1, kinds=(0,))


def _infer_both(args: tuple[Any, ...], params: dict[str, Any]) -> list[Any]:
    shapes, (b, l), (_, n, c) = attention_sums._infer(args), args[5].shape, args[8].shape
    if n != b * l:
        raise ShapeError(f"attention_sums: 'sums' has {n} keys, and {b} sequences of {l} cells have {b * l}")
    if len(params["kinds"]) != c or not all(0 <= kind < SUMS.index("entropy") for kind in params["kinds"]):
        raise ShapeError(f"attention_sums: 'kinds' are {params['kinds']}; each of {c} channels needs one, 0 to {SUMS.index('entropy') - 1}")
    return shapes


@op(
    infer=_infer_both,
    strided=("q", "k", "v"),
    fault="a row reads key, cell or sequence {} of {}",
    flops=_products,
)
def attention_sums(
    q: F32["m h e"],
    k: Cache["g s e"],
    v: Cache["g s f"],
    lo: I32["m"],
    hi: I32["m"],
    cells: I32["b l"],
    seq: I32["m"] | None,
    sinks: F32["h"] | None,
    sums: F32["g n c"],
    weights: F32["m c"],
    *,
    scale: float,
    softcap: float = 0.0,
    kinds: tuple[int, ...],
) -> tuple[F32["m h*f"], Same["sums"]]:
    """Do what `attention` and `key_sums` of its stats do, in one pass: probabilities that attention has computed are summed, all but "entropy".

    Keys do not go round in the cells: hi is at most l."""
    out, stats = attention.fn(q, k, v, lo, hi, cells, seq, sinks, scale=scale, softcap=softcap, stats=True)
    return out, key_sums.fn(sums, q, k, lo, hi, cells, seq, stats, weights, scale=scale, softcap=softcap, kinds=kinds)


attention_sums.case(q=(9, 4, 64), k=(2, 80, 64), v=(2, 80, 64), lo=(9,), hi=(9,), cells=(2, 40), seq=(9,), sinks=(4,), sums=(2, 80, 3), weights=(9, 3),
                    scale=0.2, softcap=20.0, kinds=(0, 1, 2))
attention_sums.case(q=(70, 6, 80), k=(1, 300, 80), v=(1, 300, 48), lo=(70,), hi=(70,), cells=(1, 300), sums=(1, 300, 1), weights=(70, 1), scale=0.1, kinds=(0,))
attention_sums.case(q=(0, 4, 64), k=(2, 40, 64), v=(2, 40, 64), lo=(0,), hi=(0,), cells=(1, 40), sums=(2, 40, 1), weights=(0, 1), scale=0.1, kinds=(0,))
