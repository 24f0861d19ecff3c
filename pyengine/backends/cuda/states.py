"""States in a card's memory: cells gathered, written and copied there."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pyengine.backends.base import State
from pyengine.backends.cuda.library import Memory, numbers, Queue
from pyengine.graph.tensor import Tensor


def runs(*cells: np.ndarray) -> Iterator[tuple[int, int]]:
    """Find the stretches in which all of these arrays count up by one: (first place, how many)."""
    n = len(cells[0])
    if n == 0:
        return
    breaks = np.zeros(n - 1, bool)
    for one in cells:
        breaks |= np.diff(one) != 1
    starts = [0, *(np.flatnonzero(breaks) + 1).tolist(), n]
    for start, end in zip(starts, starts[1:]):
        yield start, end - start


class DeviceState(State):
    """A state in memory of a device, [heads, cells, bytes of a cell], from an offset on."""

    def __init__(self, t: Tensor, memory: Memory, offset: int, queue: Queue):
        self.shape, self.dtype, self.nbytes = tuple(int(a) for a in t.shape), t.dtype, t.nbytes_max
        self.memory, self.address, self.queue = memory, memory.address + offset, queue
        self.heads, self.cells, self.cell_bytes = self.shape[0], self.shape[1], t.dtype.size(self.shape[-1])

    def gather(self, cells: np.ndarray) -> np.ndarray:
        """Return a copy of these cells' bytes."""
        cells = self._checked(cells)
        out = np.empty((self.heads, len(cells), self.cell_bytes), np.uint8)
        for at, n in runs(cells):
            self.queue.copy(out.ctypes.data + at * self.cell_bytes, self.address + int(cells[at]) * self.cell_bytes, n * self.cell_bytes,
                            self.heads, out.strides[0], self.cells * self.cell_bytes)
        self.queue.wait()
        return out

    def scatter(self, cells: np.ndarray, data: np.ndarray) -> None:
        """Write bytes into these cells."""
        cells = self._checked(cells)
        data = np.ascontiguousarray(np.broadcast_to(np.asarray(data, np.uint8), (self.heads, len(cells), self.cell_bytes)))
        for at, n in runs(cells):
            self.queue.copy(self.address + int(cells[at]) * self.cell_bytes, data.ctypes.data + at * self.cell_bytes, n * self.cell_bytes,
                            self.heads, self.cells * self.cell_bytes, data.strides[0])
        self.queue.wait()

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy cells to others of the same state."""
        source, target = self._checked(source), self._checked(target)
        rows = [(int(source[at]), int(target[at]), n) for at, n in runs(source, target)]
        if rows:
            self.queue.own("copy_cells", self.queue.handle, self.address, self.heads, self.cells, self.cell_bytes,
                           numbers([i for row in rows for i in row]), len(rows))
            self.queue.wait()

    def _checked(self, cells: np.ndarray) -> np.ndarray:
        """Return cells as numbers from 0 on. Raises: IndexError for one that there is not."""
        cells = np.arange(self.cells)[np.asarray(cells)]     # as an array of the host would be indexed
        return cells.reshape(-1)


