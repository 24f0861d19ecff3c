"""Single kernels of the Metal backend on arrays of the host, on an Apple GPU or the emulator: each step's launches, as a program makes them.

Tensors that share memory on the host share it there too; every other one has a memory of its own, exactly as large as it is, so that the
emulator's checked form sees what reaches beyond. Working memory is filled with 0xFF, which is NaN.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from device_kernels import extent
from op_cases import CTensor, KernelError, Runner

from pyengine import errors
from pyengine.backends import faults
from pyengine.backends.cuda import codebooks
from pyengine.backends.metal.device import bind, Device, Memory
from pyengine.backends.metal.launch import Launch, LAUNCHERS, load_launchers, params_of, SCRATCH, Step, View
from pyengine.backends.metal.program import FAULT
from pyengine.dtype import dtype, I8
from pyengine.graph.op import REGISTRY

STATUS = {errors.GraphError: 1, errors.RequestError: 3}      # of pe_status


class MetalKernels(Runner):
    """Kernels of a device. `launches`: what the last run launched."""

    def __init__(self, device: Device):
        self.device = device
        self.launches: list[Launch] = []
        load_launchers()
        grids = codebooks.block()
        self._grids = self.memory(grids)

    def memory(self, data: np.ndarray) -> Memory:
        """Memory of the device that holds these bytes."""
        made = self.device.allocate(data.nbytes)
        made.array[:] = data
        return made

    def run(self, name: str, groups: Sequence[Sequence[CTensor]], n_out: int, params: dict[str, Any], threads: int = 1,
            repeat: int = 1) -> None:
        """Run a step of an op on the tensors of each argument. `threads` are the CPU's. Scratch is filled with 0xFF."""
        if name not in LAUNCHERS:
            pytest.skip(f"there are no Metal launches of {name}")
        op = REGISTRY[name]
        blocks = self._copied([t for g in groups for t in g])
        memories = [m for _, _, m in blocks]
        views = [[self._view(t, blocks) for t in g] for g in groups]
        inputs, outputs = dict(zip(op.args, views)), [v for g in views[len(views) - n_out :] for v in g]
        full = params_of(op, {p.name: params.get(p.name, p.default) for p in op.params.values()})
        n = SCRATCH[name](Step(name, inputs, outputs, full, None)) if name in SCRATCH else 0
        memories.append(self.memory(np.full(n, 0xFF, np.uint8)))
        scratch = View(len(memories) - 1, 0, I8, (n,), (1,), n) if n else None
        noted = self.device.allocate(FAULT.itemsize)
        own = {"fault": (noted, 0, FAULT.itemsize), "books": (self._grids, 0, self._grids.array.nbytes)}
        try:
            self.launches, self.memories = LAUNCHERS[name](Step(name, inputs, outputs, full, scratch)), memories
        except (errors.GraphError, errors.RequestError) as error:
            raise KernelError(STATUS.get(type(error), 5), str(error)) from error
        recording = self.device.record([bind(one, memories, own) for one in self.launches])
        for _ in range(repeat):
            recording.run()
        found = noted.array.view(FAULT)[0]
        if found["status"]:
            raise KernelError(int(found["status"]), faults.said(name, int(found["value"]), int(found["limit"])))
        for start, nbytes, memory in blocks:
            host(start, nbytes)[:] = memory.array

    def _copied(self, tensors: Sequence[CTensor]) -> list[tuple[int, int, Memory]]:
        """Copy what tensors lie in, ranges that overlap as one: (address on the host, bytes, memory of the device)."""
        ranges: list[list[int]] = []
        for start, end in sorted((t.data, t.data + n) for t in tensors if (n := extent(t))):
            if ranges and start < ranges[-1][1]:
                ranges[-1][1] = max(end, ranges[-1][1])
            else:
                ranges.append([start, end])
        return [(start, end - start, self.memory(host(start, end - start))) for start, end in ranges]

    def _view(self, t: CTensor, blocks: list[tuple[int, int, Memory]]) -> View:
        n, shape, strides = extent(t), tuple(t.shape[: t.ndim]), tuple(t.stride[: t.ndim])
        for i, (start, nbytes, _) in enumerate(blocks):
            if n and start <= t.data < start + nbytes:
                return View(i, t.data - start, dtype(t.dtype), shape, strides, n)
        return View(0, 0, dtype(t.dtype), shape, strides, 0)


def host(address: int, nbytes: int) -> np.ndarray:
    """The bytes of the host from an address on."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
