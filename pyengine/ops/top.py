"""The largest logits of each row, from which most requests choose a token without the others.

Axes: m rows, n logits of each, k of them that are kept, s partial sums of weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyengine.dtype import dtype
from pyengine.errors import ShapeError
from pyengine.graph.op import F32, I32, op
from pyengine.graph.tensor import axis_max

MOST = 256                               # that kernels of cards keep
_LANES, _CHUNK, _LEAST = 16, 4096, -87   # csrc/weight.h


def _top_k_infer(args: tuple[Any, ...], params: dict[str, Any]) -> list[Any]:
    top_k.match(args)
    (m, width), n, k = args[0].shape, params["n"], params["k"]
    if not isinstance(width, int) or not 1 <= k <= min(n, MOST) or n > width:
        raise ShapeError(f"top_k: {k} of {n} of rows of {width}; at most {MOST} can be kept")
    return [((m, k), dtype("F32")), ((m, k), dtype("I32")), ((m, -(-n // _CHUNK) * _LANES), dtype("F32"))]


@op(infer=_top_k_infer, flops=lambda x, n, k: 25 * axis_max(x.shape[0]) * n, rowwise=True)
def top_k(x: F32["m w"], *, n: int, k: int) -> tuple[F32["m k"], I32["m k"], F32["m s"]]:
    """Find the k largest of the first n numbers of each row: (they, where they stand, sums of exp(x - largest)), the largest first.

    Of equals the lower place comes first; what is no logit, NaN and inf, counts as the largest of all.
    Sums: of numbers i of the same 4096 with the same i % 16, ascending, [ceil(n / 4096), 16] in a row. Kernels compute weights as
    csrc/weight.h does, so that sums have the bits of the sampler's (csrc/host/sampling.h).
    """
    x = x[:, :n]
    wrong = ~(x < np.inf)
    ids = np.argsort(-np.where(wrong, np.inf, x), axis=-1, kind="stable")[:, :k].astype(np.int32)
    values = np.take_along_axis(x, ids, axis=-1)
    away = x - values[:, :1]
    weights = np.where(away > _LEAST, np.exp(np.fmax(away, _LEAST)), 0)
    chunks = -(-n // _CHUNK)
    weights = np.pad(weights, [(0, 0), (0, -n % _CHUNK)]).reshape(len(x), chunks, _CHUNK // _LANES, _LANES)
    return values, ids, weights.sum(axis=2).reshape(len(x), chunks * _LANES).astype(x.dtype)


top_k.case(x=(3, 300), n=300, k=40)
top_k.case(x=(2, 8), n=8, k=8)
top_k.case(x=(2, 1027), n=1001, k=256)                       # rows of a head that are no tokens
top_k.case(x=(1, 9000), n=8999, k=7)
top_k.case(x=(5, 64), n=17, k=1)
top_k.case(x=(0, 50), n=50, k=4)
