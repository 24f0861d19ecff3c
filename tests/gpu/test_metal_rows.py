"""`rows` on Metal: tables of every format, packed and as files have them, bit for bit; the tests of the CPU's kernel, and more formats."""

from __future__ import annotations

import ctypes
from typing import Any

import gguf
import numpy as np
import pytest
from metal_kernels import MetalKernels
from op_cases import CTensor, MAX_DIMS, rng_of
from test_linear_kernels import array, Matrix, PACKED, test_rows, test_rows_of_media  # noqa: F401

from pyengine.backends import backend
from pyengine.dtype import dtype
from pyengine.native import ffi, lib
from pyengine.native.blocks import ensure_codebooks

# Formats without a packed form whose blocks may hold any bytes but for their scale, a float16 at this byte (None: no float16).
OTHERS = {"IQ1_S": 0, "IQ1_M": None, "IQ2_XXS": 0, "IQ2_XS": 0, "IQ2_S": 0, "IQ3_XXS": 0, "IQ3_S": 0, "TQ1_0": 52, "NVFP4": None}


class Tables(MetalKernels):
    """`rows` of a device on arrays of the host."""

    def weight(self, m: Matrix, packed: bool = True) -> tuple[CTensor, Any]:
        """A matrix, in memory from a multiple of 64 on."""
        n = int(lib.pe_pack_bytes(m.id, m.n, m.k)) if packed else m.raw.nbytes
        held = np.empty(n + 64, np.uint8)
        at = held[-held.ctypes.data % 64 :][:n]
        if packed:
            source, target = (ffi.cast("void *", a.ctypes.data) for a in (m.raw, at))
            assert lib.pe_pack_groups(m.id, source, m.n, m.k, 0, -(-m.n // 16), target) == 0
        else:
            at[:] = m.raw.reshape(-1).view(np.uint8)
        strides = (ctypes.c_int64 * MAX_DIMS)(m.raw.strides[0], m.block_bytes)
        return CTensor(at.ctypes.data, m.id + PACKED * packed, 2, (ctypes.c_int64 * MAX_DIMS)(m.n, m.k), strides), held

    def run_on(self, name: str, args: list[list[tuple[CTensor, Any]]], n_out: int, params: dict[str, Any], threads: int = 1) -> None:
        """Run on tensors that come with the memory which they describe."""
        self.run(name, [[t for t, _ in group] for group in args], n_out, params, threads)


@pytest.fixture(scope="session")
def kernels(metal_device: str) -> Tables:
    """Kernels of the device that is tested."""
    return Tables(backend(metal_device).device)


@pytest.mark.parametrize("name", OTHERS)
def test_rows_of_formats_that_are_never_packed(kernels: Tables, name: str) -> None:
    form, rng, n, k = dtype(name), rng_of(("others", name)), 5, 512
    ensure_codebooks([form])
    raw = rng.integers(0, 256, (n, k // form.block, form.nbytes), np.uint8)
    if OTHERS[name] is not None:
        raw[..., OTHERS[name] : OTHERS[name] + 2] = rng.uniform(0.01, 1, raw.shape[:2]).astype(np.float16)[..., None].view(np.uint8)
    if name == "IQ1_M":                                      # its scale is made of the upper nibbles of four words: keep it finite
        raw[..., 55] &= 0x3F
    want = gguf.quants.dequantize(raw.reshape(n, -1), gguf.GGMLQuantizationType[name]).astype(np.float32)
    held = np.empty(raw.nbytes + 64, np.uint8)
    at = held[-held.ctypes.data % 64 :][: raw.nbytes]
    at[:] = raw.reshape(-1)
    table = CTensor(at.ctypes.data, form.id, 2, (ctypes.c_int64 * MAX_DIMS)(n, k), (ctypes.c_int64 * MAX_DIMS)(raw.strides[0], form.nbytes))
    ids, out = np.array([4, 0, 3, 1], np.int32), np.full((4, k), np.nan, np.float32)
    kernels.run_on("rows", [[(table, held)], [array(ids)], [], [array(out)]], 1, {"scale": 2.0})
    np.testing.assert_array_equal(out, 2 * want[ids])
