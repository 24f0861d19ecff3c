"""A program counted for a Metal device: weights in the CPU's packed form, and the working memory that kernels ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pyengine.backends.base import Declared, Progress
from pyengine.backends.metal.device import Device
from pyengine.backends.metal.launch import LAUNCHERS, params_of, SCRATCH, Step, View
from pyengine.backends.metal.program import Program
from pyengine.backends.prepared import arguments, Counted, States
from pyengine.compiler.arena import contiguous_strides, Turns
from pyengine.dtype import DType
from pyengine.graph.tensor import axis_max, Node, Tensor
from pyengine.native import lib


class Prepared(Counted):
    """See `base.Prepared`. device: gives the memory when it is loaded; isa: the device's name."""

    def __init__(self, declared: Declared, turns: Turns | None, passes: Sequence[str] | None, device: Device, n_threads: int, isa: str):
        self.device, self.n_threads, self.isa = device, n_threads, isa
        self._scratch: dict[Any, int] = {}
        super().__init__(declared, turns, passes, frozenset(LAUNCHERS))

    def packed_bytes(self, dtype: DType, shape: Sequence[int]) -> int:
        """Return the bytes of a matrix, or of experts' matrices, with 16 rows interleaved as csrc/cpu/pack.h draws it; 0: no packed form."""
        return math.prod(shape[:-2]) * int(lib.pe_pack_bytes(dtype.id, *shape[-2:])) if len(shape) in (2, 3) else 0

    def scratch_bytes(self, node: Node, states: States | None = None) -> int:
        """Return the working memory of a step at the largest shapes; with `states`, those of its caches are these."""
        if node.op.name not in SCRATCH:
            return 0
        inputs, outputs = arguments(node)
        views = {name: [self._largest(t, states) for t in parts] for name, parts in zip(node.op.args, inputs)}
        results = [self._largest(t, states) for parts in outputs for t in parts]
        key = node.op.name, tuple((n, tuple((v.dtype.id, v.shape) for v in vs)) for n, vs in views.items()), node.params
        if key not in self._scratch:
            self._scratch[key] = SCRATCH[node.op.name](Step(node.op.name, views, results, params_of(node.op, dict(node.params)), None))
        return self._scratch[key]

    def _largest(self, t: Tensor, states: Mapping[str, tuple[int, ...]] | None) -> View:
        """Return a tensor of the largest shape, which lies nowhere."""
        resident, shape = self.residents.get(id(t.node)), tuple(axis_max(a) for a in t.shape)
        if states and self.layout.of(t).root.name in states:
            shape = states[self.layout.of(t).root.name]
        dtype = resident.dtype if resident else t.dtype
        return View(0, 0, dtype, shape, tuple(int(s) for s in contiguous_strides(shape, t.dtype)), 0)

    def load(self, progress: Progress | None = None) -> Program:
        """Allocate memory, read and pack the weights, and return the program."""
        return Program(self, progress)
