"""Contents of the caches: copied, rotated, gathered and written."""

from __future__ import annotations

import numpy as np

from pyengine.dtype import DType
from pyengine.nn.rope import Rope
from pyengine.ops.rope import rotate


def turn(cells: np.ndarray, dtype: DType, rope: Rope, by: int) -> np.ndarray:
    """Keys uint8 [heads, n, bytes] turned on by a number of positions."""
    bits = np.ascontiguousarray(cells).view(dtype.numpy)
    x = (bits.astype(np.uint32) << 16).view(np.float32) if dtype.name == "BF16" else bits.astype(np.float32)
    angle = np.float32(by) * rope.inv_freq.astype(np.float64)
    table = np.broadcast_to(np.concatenate([np.cos(angle), np.sin(angle)]).astype(np.float32), (len(x), 2 * len(angle)))
    y = rotate(x, table, rope.interleaved)
    if dtype.name == "BF16":                                 # round to nearest, ties to even
        u = y.view(np.uint32)
        return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16).view(np.uint8)
    return y.astype(dtype.numpy).view(np.uint8)
