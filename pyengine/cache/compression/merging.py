"""What becomes of cells that are evicted: dropped, or merged into the kept cell whose key is nearest by cosine.

For each head, k_c the kept keys, k_e the evicted ones. LOOK-M (arXiv:2406.18139), section 3.3, with many to one:

    c(e) = argmax_c  k_e . k_c / (|k_e| |k_c|)                 the nearest; of equals the first
    averaged   k_c' = (k_c + sum_e k_e) / (1 + n_c)            over the n_c evicted whose nearest is c
    pivotal    k_c' = (k_c + sum_e (k_e + k_c) / 2) / (1 + n_c)
    weighted   k_c' = (k_c + sum_e s_e k_e) / (1 + n_c)        s_e the cosine of e and c
    attention  k_c' = (a_c k_c + sum_e a_e k_e) / (a_c + sum_e a_e)

Values are merged by the same places and weights, those of keys. A key of length 0 has the cosine 0 to all others.

"attention" is not LOOK-M's: a is the attention that text paid to each key while the prompt was read, so a patch that the question looked
at outweighs those that it did not. For values it is the sum that attention would have made of them (KVMerger, arXiv:2407.08454, weighs by
attention too, with a kernel of distances).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pyengine.errors import RequestError
from pyengine.native import ffi, lib

RULES = ("none", "averaged", "pivotal", "weighted", "attention")


def merged(rule: str, kept: np.ndarray, keys: np.ndarray, values: np.ndarray, sums: np.ndarray | None = None,
           n_threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return keys and values [h, b, e] of the kept positions int64 [h, b], with the other rows of [h, n, e] merged into them by a rule.

    Computed in float64, returned in the dtypes of keys and values; the same for any number of threads, which share the heads.
    Raises: RequestError for shapes that do not fit, positions out of range or order, and keys that are not finite.
    """
    kept, keys, values = np.asarray(kept), np.asarray(keys), np.asarray(values)
    check(kept, keys, values)
    if rule == "attention" and (sums is None or np.shape(sums) != keys.shape[:2]):
        raise RequestError(f"merge='attention' needs text's attention to each key, sums [{keys.shape[0]}, {keys.shape[1]}]")
    if rule == "none" or kept.shape[1] in (0, keys.shape[1]):
        return tuple(np.take_along_axis(x, kept[..., None], axis=1) for x in (keys, values))   # type: ignore[return-value]

    def head(h: int) -> tuple[np.ndarray, np.ndarray]:
        return merged_head(rule, kept[h], keys[h], values[h], None if sums is None else np.asarray(sums[h], np.float64))

    if n_threads > 1 and len(keys) > 1:
        with ThreadPoolExecutor(min(n_threads, len(keys))) as pool:
            heads = list(pool.map(head, range(len(keys))))
    else:
        heads = [head(h) for h in range(len(keys))]
    return np.stack([k for k, _ in heads]), np.stack([v for _, v in heads])


def check(kept: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
    """Raise a RequestError unless kept [h, b] are ascending positions in keys and values [h, n, e]."""
    if keys.ndim != 3 or values.ndim != 3 or keys.shape[:2] != values.shape[:2]:
        raise RequestError(f"keys and values must be [heads, n, e] of the same heads and n, got {list(keys.shape)} and "
                           f"{list(values.shape)}")
    if kept.ndim != 2 or len(kept) != len(keys) or not np.issubdtype(kept.dtype, np.integer):
        raise RequestError(f"kept must be positions [{len(keys)}, budget], got {kept.dtype} {list(kept.shape)}")
    if kept.size and (kept.min() < 0 or kept.max() >= keys.shape[1] or (np.diff(kept, axis=1) <= 0).any()):
        raise RequestError(f"kept must be ascending positions below {keys.shape[1]} in each head")


def merged_head(rule: str, kept: np.ndarray, keys: np.ndarray, values: np.ndarray, sums: np.ndarray | None) -> tuple[Any, Any]:
    """Return one head's keys and values [b, e] of keys and values [n, e]."""
    there = np.zeros(len(keys), np.bool_)
    there[kept] = True
    evicted = np.flatnonzero(~there)
    exact = np.ascontiguousarray(keys, np.float64)
    closest, cosine = nearest(exact, kept, evicted)
    order = np.argsort(closest, kind="stable")
    homes, starts, counts = np.unique(closest[order], return_index=True, return_counts=True)
    weights = {"weighted": cosine, "attention": sums[evicted] if sums is not None else None}.get(rule)

    def together(rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        added = rows[evicted[order]].astype(np.float64)                        # [m, e], those of one home side by side
        if weights is not None:
            added *= weights[order, None]
        total, own, n = np.add.reduceat(added, starts, axis=0), out[homes], counts[:, None]
        if rule == "attention":
            mine = sums[kept[homes], None]                                     # type: ignore[index]
            whole = mine + np.add.reduceat(weights[order], starts)[:, None]    # type: ignore[index]
            out[homes] = np.where(whole > 0, (mine * own + total) / np.where(whole > 0, whole, 1), own)
        else:
            out[homes] = (own + ((total + n * own) / 2 if rule == "pivotal" else total)) / (1 + n)
        return out

    return tuple(together(x, x[kept].astype(np.float64)).astype(x.dtype) for x in (exact.astype(keys.dtype, copy=False), values))


def nearest(keys: np.ndarray, kept: np.ndarray, evicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return of each evicted row of keys, float64 [n, e], which of the kept ones is nearest by cosine, int32 [m], and the cosine, float64.

    kept, evicted: rows, int64. Exact: csrc/host/nearest.h says how. Raises: RequestError for keys that are not finite.
    """
    keys = np.ascontiguousarray(keys, np.float64)
    kept, evicted = np.ascontiguousarray(kept, np.int64), np.ascontiguousarray(evicted, np.int64)
    closest, cosine = np.empty(len(evicted), np.int32), np.empty(len(evicted), np.float64)
    scratch = np.empty(lib.pe_nearest_scratch(len(kept), keys.shape[1]), np.uint8)
    asked = ffi.new("pe_nearest_input *", {"width": keys.shape[1], "n_kept": len(kept), "n_evicted": len(evicted)})
    asked.keys, asked.kept, asked.evicted = (ffi.cast(f"{kind} *", x.ctypes.data)
                                             for kind, x in (("double", keys), ("int64_t", kept), ("int64_t", evicted)))
    status = lib.pe_nearest(ffi.NULL, asked, ffi.cast("void *", scratch.ctypes.data), ffi.cast("int32_t *", closest.ctypes.data),
                            ffi.cast("double *", cosine.ctypes.data))
    if status:
        raise RequestError("keys that are merged must be finite: one of them holds NaN or infinity, or its length overflows")
    return closest, cosine
