"""Codebooks of the IQ1, IQ2 and IQ3 formats: data that gguf-py carries, handed to C when a file first needs them."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np

from pyengine import native
from pyengine.dtype import DType

_NAMES = frozenset(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"))
_lock = threading.Lock()


def ensure_codebooks(dtypes: Iterable[DType]) -> None:
    """Set the codebook of every dtype that has one; the others pass. Cheap when all have been set before.

    The tables are `gguf.quants.<format>.grid`, rows of 8 elements (IQ3: 4), as int8.
    """
    for dtype in {dtype.unpacked for dtype in dtypes}:
        if dtype.name not in _NAMES or native.lib.pe_codebook(dtype.id) != native.ffi.NULL:
            continue
        from gguf import quants  # only the files that need it pay for the import

        quant = getattr(quants, dtype.name)
        quant.init_grid()
        table = np.ascontiguousarray(quant.grid, dtype=np.int8)
        with _lock:
            status = native.lib.pe_set_codebook(dtype.id, native.ffi.from_buffer(table), table.nbytes)
        if status != 0:
            raise RuntimeError(f"{dtype.name}: gguf-py's codebook of {table.nbytes} bytes is not the expected one")
