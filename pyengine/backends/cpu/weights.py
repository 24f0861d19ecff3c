"""Constants on their way from files into memory: packed for kernels, converted to float32, or mapped where they lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyengine.backends.base import Progress
from pyengine.backends.prepared import Resident, source_dtype
from pyengine.errors import GraphError
from pyengine.files.weights import files_of
from pyengine.native import engine
from pyengine.native.blocks import dequantize, ensure_codebooks


def mapped_view(r: Resident) -> np.ndarray:
    """Return the bytes of a constant that is read where its file is mapped."""
    return r.tensor.node.source.view()


def load(residents: Sequence[Resident], memory: Any, pool: Any, progress: Progress | None) -> None:
    """Bring constants into `memory`, an engine.Buffer or bytes, at their offsets; the file's pages behind them are released.

    Raises: InvalidModelError for a file that was cut or written to meanwhile.
    """
    total, done = sum(r.nbytes for r in residents), 0
    data = np.frombuffer(memory, np.uint8) if memory.nbytes else np.empty(0, np.uint8)
    ensure_codebooks(source_dtype(r.tensor) for r in residents)
    for r in residents:
        source = r.tensor.node.source
        if r.form != "mapped":
            raw = np.ascontiguousarray(source if isinstance(source, np.ndarray) else source.view())
            if r.form == "packed":
                _pack(r, raw, data.ctypes.data + r.offset, pool)
            elif isinstance(source, np.ndarray) or source.dtype == r.dtype:
                data[r.offset : r.offset + r.nbytes] = raw.reshape(-1).view(np.uint8)
            elif r.dtype.name == "F32":                      # a small tensor: norm weights in F16, say
                dequantize(raw, source.dtype, out=data[r.offset : r.offset + r.nbytes].view(np.float32))
            else:
                raise GraphError(f"{r.tensor.name}: {source.dtype} cannot be converted to {r.dtype}")
            if not isinstance(source, np.ndarray):
                source.drop()
        done += r.nbytes
        if progress:
            progress(done, total)
    for file in files_of(r.tensor.node.source for r in residents):
        file.check()


def _pack(r: Resident, raw: np.ndarray, address: int, pool: Any) -> None:
    """Pack a matrix, or the experts' matrices one after the other: as one where no group of 16 rows holds rows of two."""
    *lead, n, k = (int(a) for a in r.tensor.shape)
    times = math.prod(lead)
    if n % 16 == 0:
        n, times = n * times, 1
    for i in range(times):
        engine.pack(pool, r.dtype.unpacked.id, raw.ctypes.data + i * (raw.nbytes // times), n, k, address + i * (r.nbytes // times))
