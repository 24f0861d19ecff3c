"""Single kernels of the CUDA backend on arrays of the host: each is copied to the device, exactly as large as it is, and back afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from op_cases import CTensor, KernelError, Runner

from pyengine.backends import faults
from pyengine.backends.cuda import codebooks
from pyengine.backends.cuda.describe import Described
from pyengine.backends.cuda.library import Library, Memory, Queue
from pyengine.backends.cuda.program import Compiled
from pyengine.compiler.codegen import pack_params
from pyengine.dtype import dtype
from pyengine.graph.op import REGISTRY
from pyengine.native import ffi, lib


def extent(t: CTensor) -> int:
    """The bytes from a tensor's first element to its last."""
    shape, strides = list(t.shape[: t.ndim]), list(t.stride[: t.ndim])
    if 0 in shape:
        return 0
    form = dtype(t.dtype)
    if form.is_packed:
        return math.prod(shape[:-2]) * int(lib.pe_pack_bytes(form.unpacked.id, *shape[-2:]))
    if shape:
        shape[-1] //= form.block
    return form.nbytes + sum((n - 1) * s for n, s in zip(shape, strides))


class DeviceKernels(Runner):
    """Kernels of a library. Outputs, inputs and scratch are memory of their own each, unless they share it on the host too."""

    def __init__(self, own: Library, device: int = 0):
        self.own, self.queue = own, Queue(own, device)
        grids = codebooks.block()
        self._grids = Memory(own, device, grids.nbytes)
        self.queue.copy(self._grids.address, grids.ctypes.data, grids.nbytes)
        self.queue.wait()
        own("set_codebooks", self.queue.handle, self._grids.address)
        self.kernels = own.kernels()

    def run(self, name: str, groups: Sequence[Sequence[CTensor]], n_out: int, params: dict[str, Any], threads: int = 1,
            repeat: int = 1) -> None:
        """Run a kernel on the tensors of each argument, directly, or as a graph if it is repeated. `threads` are the CPU's."""
        if name not in self.kernels:
            pytest.skip(f"there is no CUDA kernel of {name}")
        op = REGISTRY[name]
        packed = pack_params(op, {p.name: params.get(p.name, p.default) for p in op.params.values()})
        blocks = self._copied([t for g in groups for t in g])
        needs = self._described(name, groups, n_out, packed, blocks, 0, 0)
        tensors, nodes = needs.arrays()
        n = int(self.own.flat.pe_card_scratch(tensors, len(tensors), nodes))
        assert n >= 0, f"no kernel {name}"
        scratch, dirt = Memory(self.own, self.queue.device, n), np.full(n, 0xFF, np.uint8)
        if "checked" not in self.own.path.name:                                     # that one knows what nobody wrote
            self.queue.copy(scratch.address, dirt.ctypes.data, n)
            self.queue.wait()
        made = self._described(name, groups, n_out, packed, blocks, scratch.address, n)
        none = made.transfers([])
        program = Compiled(self.queue, made, 1, none, none, [])
        for _ in range(repeat):
            status, said = program.run(ffi.new("int64_t[]", 1), 0)
            if status:
                text = faults.said(name, said.value, said.limit) if said.seen else ffi.string(said.message).decode()
                raise KernelError(status, text or ffi.string(self.own.flat.pe_card_error()).decode())
        for start, nbytes, memory in blocks:
            self.queue.copy(start, memory.address, nbytes)
        self.queue.wait()

    def tolerance(self, name: str, params: dict[str, Any], cache: str) -> tuple[float, float]:
        """Return the error allowed: no int8 has its errors."""
        return (2e-2, 1.0) if name == "attention" and params.get("products") == "int8" else super().tolerance(name, params, cache)

    def _copied(self, tensors: Sequence[CTensor]) -> list[tuple[int, int, Memory]]:
        """Copy what tensors lie in, ranges that overlap as one: (address on the host, bytes, memory of the device)."""
        ranges: list[list[int]] = []
        for start, end in sorted((t.data, t.data + n) for t in tensors if (n := extent(t))):
            if ranges and start < ranges[-1][1]:
                ranges[-1][1] = max(end, ranges[-1][1])
            else:
                ranges.append([start, end])
        out = []
        for start, end in ranges:
            memory = Memory(self.own, self.queue.device, end - start)
            self.queue.copy(memory.address, start, end - start)
            out.append((start, end - start, memory))
        self.queue.wait()
        return out

    def _described(self, name: str, groups: Sequence[Sequence[CTensor]], n_out: int, params: bytes, blocks: list[tuple[int, int, Memory]],
                   scratch: int, scratch_bytes: int) -> Described:
        made = Described({})

        def add(t: CTensor) -> int:
            place = [m.address + t.data - start for start, n, m in blocks if extent(t) and start <= t.data < start + n]
            return made.tensor(place[0] if place else 0, t.dtype, list(t.shape[: t.ndim]), list(t.stride[: t.ndim]))

        ids = [[add(t) for t in g] for g in groups]
        made.node(name, ids[: len(ids) - n_out], ids[len(ids) - n_out :], params, scratch, scratch_bytes)
        return made
