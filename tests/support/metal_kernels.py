"""Single kernels of the Metal backend on arrays of the host, on an Apple GPU or the emulator: each step's launches, as a program makes them.

Tensors that share memory on the host share it there too; every other one has a memory of its own, exactly as large as it is, so that the
emulator's checked form sees what reaches beyond. Working memory is filled with 0xFF, which is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from op_cases import CTensor, KernelError, Runner

from pyengine.backends import faults
from pyengine.backends.cuda import codebooks
from pyengine.backends.metal.device import Bound, Device, Memory
from pyengine.backends.metal.launch import Launch, LAUNCHERS, load_launchers, NoKernel, SCRATCH, Step, View
from pyengine.backends.metal.program import FAULT
from pyengine.backends.metal.sources import kernel
from pyengine.dtype import dtype, I8
from pyengine.errors import GraphError
from pyengine.graph.op import REGISTRY
from pyengine.native import lib


def extent(t: CTensor) -> int:
    """The bytes from a tensor's first element to its last."""
    shape, strides, form = list(t.shape[: t.ndim]), list(t.stride[: t.ndim]), dtype(t.dtype)
    if 0 in shape:
        return 0
    if form.is_packed:
        return math.prod(shape[:-2]) * int(lib.pe_pack_bytes(form.unpacked.id, *shape[-2:]))
    if shape:
        shape[-1] //= form.block
    return form.nbytes + sum((n - 1) * s for n, s in zip(shape, strides))


class MetalKernels(Runner):
    """Kernels of a device. `launches`: names, grids and seconds of the last run's, for tests that ask what was launched."""

    def __init__(self, device: Device):
        load_launchers()
        self.device = device
        self.launches: list[Launch] = []

    def run(self, name: str, groups: Sequence[Sequence[CTensor]], n_out: int, params: dict[str, Any], threads: int = 1,
            repeat: int = 1) -> None:
        """Run a kernel on the tensors of each argument. `threads` are the CPU's."""
        if name not in LAUNCHERS:
            pytest.skip(f"there is no Metal kernel of {name}")
        op, memories = REGISTRY[name], [self.device.allocate(FAULT.itemsize)]
        ranges = self._copied([t for g in groups for t in g], memories)
        views = [[self._view(t, ranges) for t in g] for g in groups]
        full = {p.name: params.get(p.name, p.default) for p in op.params.values()}
        full = {n: op.params[n].choices.index(v) if op.params[n].kind == "enum" else v for n, v in full.items()}
        step = Step(name, dict(zip(op.args, views)), [v for g in views[len(views) - n_out :] for v in g], full, None)
        nbytes = SCRATCH[name](step) if name in SCRATCH else 0
        if nbytes:
            memories.append(self.device.allocate(nbytes))
            memories[-1].array[:] = 0xFF
            step = Step(name, step.inputs, step.outputs, full, View(len(memories) - 1, 0, I8, (nbytes,), (1,), nbytes))
        try:
            self.launches = LAUNCHERS[name](step)
        except NoKernel as error:
            raise KernelError(5, str(error)) from None
        self._launch(name, memories, repeat)
        for start, n, number in ranges:
            (np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * n).from_address(start)))[:] = memories[number].array

    def _launch(self, name: str, memories: list[Memory], repeat: int) -> None:
        recording = self.device.record([self._bound(one, memories) for one in self.launches])
        fault = memories[0].array.view(FAULT)[0]
        for _ in range(repeat):
            try:
                recording.run()
            except GraphError as error:
                raise AssertionError(str(error)) from None
            if fault["status"]:
                raise KernelError(int(fault["status"]), faults.said(name, int(fault["value"]), int(fault["limit"])))

    def _bound(self, one: Launch, memories: list[Memory]) -> Bound:
        library, k = kernel(one.kernel)
        buffers = {k.buffer(n).index: (memories[v.memory], v.offset, v.nbytes) for n, v in one.buffers.items() if v is not None}
        for p in k.parameters:
            if p.kind == "buffer" and p.name == "fault":
                buffers[p.index] = memories[0], 0, FAULT.itemsize
            if p.kind == "buffer" and p.name == "books":
                grids = codebooks.block()
                memories.append(self.device.allocate(grids.nbytes))
                memories[-1].array[:] = grids.view(np.uint8)
                buffers[p.index] = memories[-1], 0, grids.nbytes
        args = library.pack(k.arguments.args, one.args) if k.arguments else b""
        return Bound(library, k, dict(one.constants), args, buffers, one.grid, one.threads, one.shared_bytes)

    def _copied(self, tensors: Sequence[CTensor], memories: list[Memory]) -> list[tuple[int, int, int]]:
        """Copy what tensors lie in, ranges that overlap as one: (address on the host, bytes, number of the memory)."""
        ranges: list[list[int]] = []
        for start, end in sorted((t.data, t.data + n) for t in tensors if (n := extent(t))):
            if ranges and start < ranges[-1][1]:
                ranges[-1][1] = max(end, ranges[-1][1])
            else:
                ranges.append([start, end])
        out = []
        for start, end in ranges:
            memories.append(self.device.allocate(end - start))
            memories[-1].array[:] = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * (end - start)).from_address(start))
            out.append((start, end - start, len(memories) - 1))
        return out

    def _view(self, t: CTensor, ranges: list[tuple[int, int, int]]) -> View:
        n = extent(t)
        place = [(m, t.data - start) for start, size, m in ranges if n and start <= t.data < start + size]
        memory, offset = place[0] if place else (0, 0)
        return View(memory, offset, dtype(t.dtype), tuple(t.shape[: t.ndim]), tuple(t.stride[: t.ndim]), n)
