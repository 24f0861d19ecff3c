"""Arrays into the bytes of GGUF's formats and back, over csrc/host/quantize.h and csrc/host/dequant.h."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np

from pyengine import native
from pyengine.dtype import DType
from pyengine.errors import RequestError, ShapeError
from pyengine.native import ffi, lib

# what quantize() writes; the other formats of GGUF can only be read
QUANTIZABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def quantize(values: np.ndarray, dtype: DType, isa: str | None = None) -> np.ndarray:
    """Return float32 `values` [..., n] as bytes, uint8 [..., dtype.size(n)]. The interpreter's lock is released meanwhile.

    Codes and scales are searched for the least sum of squared differences (csrc/cpu/encode_blocks.c); Q8_0 gives ggml's bytes.
    `isa` forces an instruction set ("avx512", "avxvnni", "avx2", "sme", "sve256", "i8mm", "neon", "generic").
    Raises: RequestError for NaN, infinities, and values too large for the format's float16 scales, with the place of the worst;
    for a dtype that cannot be written and an instruction set that is not here. ShapeError where rows are not whole blocks.
    """
    if dtype.name not in QUANTIZABLE:
        raise RequestError(f"no quantizer writes {dtype}; known are {', '.join(QUANTIZABLE)}")
    values = np.ascontiguousarray(values, np.float32)
    if values.ndim == 0:
        raise ShapeError(f"{dtype}: a single number has no rows")
    out = np.empty((*values.shape[:-1], dtype.size(values.shape[-1])), np.uint8)
    if dtype.name == "F32":
        out[...] = values.view(np.uint8)
        return out
    status = lib.pe_quantize(isa.encode() if isa else ffi.NULL, dtype.id, ffi.cast("float *", values.ctypes.data),
                             ffi.cast("void *", out.ctypes.data), values.size)
    if status == lib.PE_BAD_VALUE:
        finite = np.isfinite(values)
        worst = np.unravel_index((~finite if not finite.all() else np.abs(values)).argmax(), values.shape)
        why = f"{dtype} cannot hold it" if finite.all() else "only finite numbers can be quantized"
        raise RequestError(f"element {[int(i) for i in worst]} is {values[worst]:g}: {why}")
    if status:
        raise RequestError(f"this machine or build has no quantizer for the instruction set {isa!r}")
    return out


def dequantize(raw: np.ndarray, dtype: DType, out: np.ndarray | None = None) -> np.ndarray:
    """Return the values of uint8 `raw` [..., bytes of a row] as float32 [..., n], bit for bit as gguf-py computes them.

    out: contiguous float32 array of as many elements, which is filled instead of a new one.
    Raises: RequestError for a format that has no values.
    """
    ensure_codebooks([dtype])
    raw = np.ascontiguousarray(raw)
    if out is None:
        out = np.empty((*raw.shape[:-1], raw.shape[-1] // dtype.nbytes * dtype.block), np.float32)
    status = lib.pe_dequantize_row(dtype.id, ffi.cast("void *", raw.ctypes.data), ffi.cast("float *", out.ctypes.data), out.size)
    if status:
        raise RequestError(f"{dtype} cannot be turned into float32")
    return out


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
