"""`linear` and `expert_linear` of the CUDA library on matrices of tests/kernels/test_linear_kernels.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import test_linear_kernels as cpu
from device_kernels import DeviceKernels
from op_cases import CTensor

from pyengine.backends.cuda.library import Memory
from pyengine.native import ffi, lib


class LinearOnDevice(DeviceKernels):
    """The interface of test_linear_kernels.Kernels, of which `threads` mean nothing here."""

    packed: dict[int, np.ndarray] = {}
    blocks: list[tuple[int, int, Memory]] = []
    weight, linear, experts, run_on = cpu.Kernels.weight, cpu.Kernels.linear, cpu.Kernels.experts, cpu.Kernels.run_on

    def pack(self, m: cpu.Matrix) -> np.ndarray:
        """The packed matrix, of which `address_of` says where it went."""
        n, k = m.n, m.k
        held = np.zeros(int(lib.pe_pack_bytes(m.id, n, k)), np.uint8)
        source, target = (ffi.cast("void *", a.ctypes.data) for a in (m.raw, held))
        assert lib.pe_pack_groups(m.id, source, n, k, 0, -(-n // 16), target) == 0
        self.packed[id(m)] = held
        return held

    def _copied(self, tensors: Sequence[CTensor]) -> list[tuple[int, int, Memory]]:
        self.blocks = super()._copied(tensors)
        return self.blocks

    def address_of(self, m: cpu.Matrix) -> int:
        """Where the matrix was in the device's memory in the last run."""
        at = self.packed[id(m)].ctypes.data
        return next(memory.address + at - start for start, n, memory in self.blocks if start <= at < start + n)
