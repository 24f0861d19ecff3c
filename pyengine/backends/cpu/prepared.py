"""A program counted for the CPU: packed weights, and the working memory that kernels ask for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pyengine.backends.base import Declared, Progress
from pyengine.backends.cpu.program import Program
from pyengine.backends.prepared import arguments, Counted, States
from pyengine.compiler.arena import contiguous_strides, Turns
from pyengine.compiler.codegen import pack_params
from pyengine.dtype import DType
from pyengine.graph.tensor import axis_max, Node
from pyengine.native import engine, lib


class Prepared(Counted):
    """See `base.Prepared`."""

    def __init__(self, declared: Declared, turns: Turns | None, passes: Sequence[str] | None, kernels: frozenset[str], isa: str,
                 n_threads: int, in_place: bool = False):
        self.isa, self.n_threads, self.in_place = isa, n_threads, in_place
        self._scratch: dict[Any, int] = {}                   # answers of `scratch_bytes`: most layers ask the same
        super().__init__(declared, turns, passes, kernels)

    def packed_bytes(self, dtype: DType, shape: Sequence[int]) -> int:
        """Return the bytes of a matrix, or of experts' matrices, each by itself, with 16 rows interleaved; 0: no packed form."""
        if len(shape) not in (2, 3):
            return 0
        return math.prod(shape[:-2]) * int(lib.pe_pack_bytes(dtype.id, *shape[-2:]))

    def scratch_bytes(self, node: Node, states: States | None = None) -> int:
        """Return the working memory of a kernel at the largest shapes; with `states`, those of its caches are these."""
        if not self.has_kernel(node):
            return 0
        tensors: list[Any] = []
        ids: tuple[list[Any], list[Any]] = ([], [])
        for side, args in zip(ids, arguments(node)):
            for parts in args:
                side.append(tuple(range(len(tensors), len(tensors) + len(parts))))
                for t in parts:
                    resident, shape = self.residents.get(id(t.node)), tuple(axis_max(a) for a in t.shape)
                    dtype = resident.dtype if resident else t.dtype
                    if states and self.layout.of(t).root.name in states:
                        shape = states[self.layout.of(t).root.name]
                    tensors.append((dtype, t.dtype, shape))
        key = node.op.name, tuple(tensors), *map(tuple, ids), node.params
        if key not in self._scratch:
            specs = [{"base": 0, "offset": 0, "dtype": d.id, "shape": [(n, -1) for n in shape],
                      "strides": [(n, -1) for n in contiguous_strides(shape, plain)]} for d, plain, shape in tensors]
            spec = {"op": node.op.name, "inputs": ids[0], "outputs": ids[1], "params": pack_params(node.op, dict(node.params)),
                    "scratch_offset": 0, "scratch_bytes": 0}
            self._scratch[key] = engine.scratch_bytes(self.isa, spec, specs, self.n_threads)
        return self._scratch[key]

    def load(self, progress: Progress | None = None) -> Program:
        """Allocate memory, read and pack the weights (in parallel), and return the program."""
        return Program(self, progress)
