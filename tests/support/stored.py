"""A weight without a file."""

from __future__ import annotations

import numpy as np

from pyengine.dtype import dtype
from pyengine.graph.tensor import make_leaf, Tensor
from pyengine.native.blocks import dequantize, quantize


class Stored:
    """A matrix as a file has it: what a constant's source offers."""

    def __init__(self, values: np.ndarray, kind: str):
        self.name, self.shape, self.dtype = f"stored.{kind}", values.shape, dtype(kind)
        raw = quantize(values, self.dtype).reshape(-1)
        memory = np.zeros(raw.size + 64, np.uint8)
        start = -memory.ctypes.data % 64                     # files align tensors
        self.bytes = memory[start : start + raw.size]
        self.bytes[:] = raw
        self.values = values.copy() if kind == "F32" else dequantize(self.bytes, self.dtype).reshape(self.shape)

    def view(self) -> np.ndarray:
        return self.bytes

    def drop(self) -> bool:
        return True

    def constant(self) -> Tensor:
        return make_leaf("constant", self.name, self.shape, self.dtype, self)
