"""Attention that adds a learned number by the distance from query to key, in buckets: T5 (arXiv:1910.10683, section 2.1) and MPNet."""

from __future__ import annotations

import numpy as np

from pyengine.files.weights import DerivedRef, Weights
from pyengine.graph.tensor import Tensor
from pyengine.nn.layers import constant


def relative_buckets(distance: np.ndarray, n_buckets: int, max_distance: int, bidirectional: bool) -> np.ndarray:
    """Return the bucket of each distance (key - query), as transformers' `T5Attention._relative_position_bucket`, in float32 as there.

    Half of the buckets are single distances, the others grow by a factor up to max_distance; beyond, all are one. bidirectional: keys behind
    the query have buckets of their own, else they count as distance 0.
    """
    own = n_buckets // 2 if bidirectional else n_buckets
    behind = np.where(distance > 0, own, 0) if bidirectional else np.zeros_like(distance)
    far = np.abs(distance) if bidirectional else np.maximum(-distance, 0)
    exact = own // 2
    ratio = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact)) / np.float32(np.log(max_distance / exact)) * np.float32(own - exact)
    return behind + np.where(far < exact, far, np.minimum(exact + ratio.astype(np.int64), own - 1))


class RelativeBias:
    """A table [n_buckets, heads] as `ops.attention` takes it: `bias` [heads, 2 max_distance + 1], one column a distance."""

    def __init__(self, w: Weights, heads: int, n_buckets: int, max_distance: int, bidirectional: bool):
        """Bind the table. Raises: InvalidModelError."""
        ref, reach = w.tensor("weight", (n_buckets, heads)), np.arange(-max_distance, max_distance + 1)
        buckets = relative_buckets(reach, n_buckets, max_distance, bidirectional)
        self.bias: Tensor = constant(DerivedRef(ref.name, (heads, len(reach)), (ref,), lambda a: a[buckets].T))
