"""Weights on their way from a mapped file to a card: packed by all threads of the host into pinned memory, and sent while the next are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pyengine.backends.base import Progress
from pyengine.backends.cuda.library import Memory, Queue
from pyengine.backends.prepared import Resident, source_dtype
from pyengine.errors import GraphError
from pyengine.files.weights import files_of
from pyengine.native import engine
from pyengine.native.blocks import dequantize, ensure_codebooks

STAGED = 32 << 20                                            # bytes of each of two buffers; a matrix is sent in pieces of this size
GROUP = 16                                                   # rows that are packed together

Fill = Callable[[np.ndarray], None]
Piece = tuple[int, int, Fill]                                # place in the weights, bytes, what writes them into a buffer


class Staging:
    """Two pinned buffers: one is filled while the other is on its way."""

    def __init__(self, queue: Queue, size: int):
        self.queue, self.buffers, self._next = queue, [Memory(queue.own, queue.device, size, pinned=True) for _ in range(2)], 0
        self.arrays = [b.array() for b in self.buffers]

    def send(self, to: int, nbytes: int, fill: Fill) -> None:
        """Fill a buffer and put its copy to an address into the queue."""
        i, own = self._next, self.queue.own
        own("wait_mark", self.queue.handle, i)
        fill(self.arrays[i][:nbytes])
        self.queue.copy(to, self.buffers[i].address, nbytes)
        own("mark", self.queue.handle, i)
        self._next = 1 - i


def load(residents: Sequence[Resident], address: int, queue: Queue, pool: Any, progress: Progress | None) -> None:
    """Bring constants to their offsets behind an address of the device; the file's pages behind them are released.

    Raises: InvalidModelError for a file that was cut or written to meanwhile.
    """
    total, done = sum(r.nbytes for r in residents), 0
    ensure_codebooks(source_dtype(r.tensor) for r in residents)
    largest = max((r.nbytes for r in residents), default=0)
    staging = Staging(queue, max(1, min(STAGED, largest), *(_group_bytes(r) for r in residents if r.form == "packed")))
    for r in residents:
        for offset, nbytes, fill in pieces(r, staging.buffers[0].nbytes, pool):
            staging.send(address + r.offset + offset, nbytes, fill)
            done += nbytes
            if progress:
                progress(done, total)
        if not isinstance(r.tensor.node.source, np.ndarray):
            r.tensor.node.source.drop()
    queue.wait()
    for file in files_of(r.tensor.node.source for r in residents):
        file.check()


def pieces(r: Resident, most: int, pool: Any) -> Iterator[Piece]:
    """Cut a constant into pieces of at most so many bytes."""
    source = r.tensor.node.source
    raw = np.ascontiguousarray(source if isinstance(source, np.ndarray) else source.view()).reshape(-1).view(np.uint8)
    if r.form == "packed":
        yield from _packed(r, raw, most, pool)
    elif isinstance(source, np.ndarray) or source.dtype == r.dtype:
        for at in range(0, raw.size, most):
            part = raw[at : at + most]
            yield at, part.size, _copier(part)
    elif r.dtype.name == "F32":                              # a small tensor: norm weights in F16, say
        numbers = dequantize(raw, source.dtype).reshape(-1).view(np.uint8)
        for at in range(0, numbers.size, most):
            part = numbers[at : at + most]
            yield at, part.size, _copier(part)
    else:
        raise GraphError(f"{r.tensor.name}: {source.dtype} cannot be converted to {r.dtype}")


def _copier(part: np.ndarray) -> Fill:
    def fill(buffer: np.ndarray) -> None:
        buffer[:] = part

    return fill


def _group_bytes(r: Resident) -> int:
    """Return the bytes of a group of rows, which is never cut."""
    *lead, n, _ = (int(a) for a in r.tensor.shape)
    return r.nbytes // (math.prod(lead) * -(-n // GROUP))


def _packed(r: Resident, raw: np.ndarray, most: int, pool: Any) -> Iterator[Piece]:
    """Cut a matrix, or the matrices of experts one after the other, into runs of whole groups of rows."""
    *lead, n, k = (int(a) for a in r.tensor.shape)
    times = math.prod(lead)
    if n % GROUP == 0:                                       # no group holds rows of two matrices
        n, times = n * times, 1
    row, groups, group = raw.size // (n * times), -(-n // GROUP), _group_bytes(r)
    step = most // group
    for i in range(times):
        for first in range(0, groups, step):
            held = min(step, groups - first)
            rows = min(n - first * GROUP, held * GROUP)
            start = raw.ctypes.data + (i * n + first * GROUP) * row

            def fill(buffer: np.ndarray, start: int = start, rows: int = rows) -> None:
                engine.pack(pool, r.dtype.unpacked.id, start, rows, k, buffer.ctypes.data)

            yield (i * groups + first) * group, held * group, fill
