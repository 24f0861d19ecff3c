"""The grids of IQ1 .. IQ3, which kernels look codes up in, as one block of bytes: `pe_codebooks` of csrc/cuda/dequant.h."""

from __future__ import annotations

import numpy as np

from pyengine.dtype import dtype
from pyengine.native import ffi, lib
from pyengine.native.blocks import ensure_codebooks

# In the order of the struct: the format whose grid it is, rows, bytes of a row. IQ1_S and IQ1_M have the same.
GRIDS = (("IQ2_XXS", 256, 8), ("IQ2_XS", 512, 8), ("IQ2_S", 1024, 8), ("IQ3_XXS", 256, 4), ("IQ3_S", 512, 4), ("IQ1_S", 2048, 8))
BOOKS = frozenset([*(name for name, _, _ in GRIDS), "IQ1_M"])
BYTES = sum(rows * width for _, rows, width in GRIDS)


def block() -> np.ndarray:
    """Return all grids, as bytes, one after the other."""
    formats = [dtype(name) for name, _, _ in GRIDS]
    ensure_codebooks(formats)
    grids = [ffi.buffer(lib.pe_codebook(d.id), rows * width) for d, (_, rows, width) in zip(formats, GRIDS)]
    return np.frombuffer(b"".join(map(bytes, grids)), np.uint8)
