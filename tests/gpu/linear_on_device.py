"""`linear` and `expert_linear` of the CUDA library on matrices of tests/kernels/test_linear_kernels.py."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import test_linear_kernels as cpu
from device_kernels import DeviceKernels
from op_cases import CTensor

from pyengine.native import ffi, lib


class LinearOnDevice(DeviceKernels):
    """The interface of test_linear_kernels.Kernels, of which `threads` mean nothing here."""

    weight, linear, experts, run_on = cpu.Kernels.weight, cpu.Kernels.linear, cpu.Kernels.experts, cpu.Kernels.run_on

    def pack(self, m: cpu.Matrix) -> np.ndarray:
        """The packed matrix."""
        n, k = m.n, m.k
        held = np.zeros(int(lib.pe_pack_bytes(m.id, n, k)), np.uint8)
        source, target = (ffi.cast("void *", a.ctypes.data) for a in (m.raw, held))
        assert lib.pe_pack_groups(m.id, source, n, k, 0, -(-n // 16), target) == 0
        return held


def tensor(data: np.ndarray, kind: int, shape: Sequence[int], strides: Sequence[int]) -> tuple[CTensor, Any]:
    """A descriptor of bytes, and the bytes."""
    pad = [0] * (cpu.MAX_DIMS - len(shape))
    return CTensor(data.ctypes.data, kind, len(shape), (ctypes.c_int64 * cpu.MAX_DIMS)(*shape, *pad),
                   (ctypes.c_int64 * cpu.MAX_DIMS)(*strides, *pad)), data
