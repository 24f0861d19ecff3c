"""A step without a kernel: its op's own declaration, in NumPy, on the program's memory. Slow; it is counted, and plans say so."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from pyengine.backends.host import NUMPY, tensor_over
from pyengine.errors import GraphError
from pyengine.graph.tensor import axis_value, Node, Tensor
from pyengine.native.blocks import dequantize


class Fallback:
    """Stands where a compiled program of one step does: `program` has place_of, memory_of, prepared and dim_names.

    Raises: GraphError for a cache whose format NumPy has not.
    """

    def __init__(self, program: Any, node: Node):
        self.program, self.node = program, node
        self._timed, self._seconds = False, 0.0
        for t in node.inputs:
            if t.dtype.name not in NUMPY and program.prepared.layout.of(t).root.node.kind != "constant":
                raise GraphError(f"{node.op.name}: has no kernel here, and the reference reads no {t.dtype} of a state")

    def run(self, pool: Any, dims: list[int], first: int) -> tuple[int, int, str]:
        """Compute the step; returns (status, number of the failed step, message) as compiled programs do."""
        started = time.perf_counter() if self._timed else 0.0
        values, node = dict(zip(self.program.dim_names, dims)), self.node
        result = node.op.fn(*(self._value(arg, values) for arg in node.args), **dict(node.params))
        for t, array in zip(node.outputs, result if isinstance(result, (tuple, list)) else [result]):
            self._array(t, values)[...] = array
        if self._timed:
            self._seconds += time.perf_counter() - started
        return 0, -1, ""

    def _value(self, arg: Any, dims: dict[str, int]) -> Any:
        if isinstance(arg, tuple):
            return [self._array(t, dims) for t in arg]
        return None if arg is None else self._array(arg, dims)

    def _array(self, t: Tensor, dims: dict[str, int]) -> np.ndarray:
        """A tensor's numbers: over its memory, or dequantized where a constant is in blocks."""
        layout, (_, start, dtype) = self.program.prepared.layout, self.program.place_of(t)
        place, memory = layout.of(t), self.program.memory_of(t)
        shape = tuple(axis_value(a, dims) for a in t.shape)
        if dtype.name not in NUMPY:
            return dequantize(memory[: dtype.size(int(np.prod(shape)))], dtype).reshape(shape)
        return tensor_over(memory, start, shape, dtype, tuple(axis_value(a, dims) for a in place.strides))

    def profile(self, on: bool) -> None:
        """Start (and reset) or stop the clock."""
        self._timed, self._seconds = on, 0.0

    def seconds(self) -> list[float]:
        """Return the seconds spent since `profile(True)`."""
        return [self._seconds]
