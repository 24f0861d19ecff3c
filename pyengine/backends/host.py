"""Memory of the host as states and tensors: what backends that compute on the host have in common."""

from __future__ import annotations

import numpy as np

from pyengine.backends.base import State
from pyengine.dtype import DType
from pyengine.graph.tensor import Tensor

NUMPY = {"F32": np.float32, "F16": np.float16, "I32": np.int32}
NO_NUMBERS = np.empty(0, np.float32)     # stands for an output that is a changed state


class HostState(State):
    """A state over bytes of the host, uint8 [heads, cells, bytes of a cell]."""

    def __init__(self, t: Tensor, memory: np.ndarray):
        self.shape, self.dtype, self.nbytes = tuple(int(a) for a in t.shape), t.dtype, t.nbytes_max
        self.memory = memory.reshape(*self.shape[:-1], t.dtype.size(self.shape[-1]))

    def gather(self, cells: np.ndarray) -> np.ndarray:
        """Return a copy of these cells' bytes."""
        return self.memory[:, cells]

    def scatter(self, cells: np.ndarray, data: np.ndarray) -> None:
        """Write bytes into these cells."""
        self.memory[:, cells] = data

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy cells to others of the same state."""
        self.memory[:, target] = self.memory[:, source]


def tensor_over(memory: np.ndarray, start: int, shape: tuple[int, ...], dtype: DType, strides: tuple[int, ...] | None = None) -> np.ndarray:
    """Return an array of plain numbers over bytes of the host, from byte `start` on."""
    return np.ndarray(shape, NUMPY[dtype.name], memory.data, start, strides)
