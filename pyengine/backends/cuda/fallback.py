"""A step without a kernel: its op's own declaration, in NumPy, on copies of what lies on the device. Slow; it is counted, and plans say so."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from pyengine.backends.host import NUMPY, tensor_over
from pyengine.errors import GraphError
from pyengine.graph.tensor import axis_value, Node, Tensor
from pyengine.native import ffi
from pyengine.native.blocks import dequantize


class Fallback:
    """A stand-in for a compiled run of one step: `program` has address_of, dtype_of, queue, prepared and dim_names.

    Raises: GraphError for a cache whose format NumPy has not.
    """

    def __init__(self, program: Any, node: Node):
        self.layout, self.queue, self.dim_names, self.node = program.prepared.layout, program.queue, program.dim_names, node
        self._places = {(id(t.node), t.index): (program.address_of(t), program.dtype_of(t)) for t in (*node.inputs, *node.outputs)}
        self._outcome = ffi.new("pe_card_outcome *")
        self._timed, self._seconds = False, 0.0
        for t in node.inputs:
            if t.dtype.name not in NUMPY and self.layout.of(t).root.node.kind != "constant":
                raise GraphError(f"{node.op.name}: has no kernel here, and the reference reads no {t.dtype} of a state")

    def run(self, dims: Any, first: int) -> tuple[int, Any]:
        """Compute the step; returns (status, what it says) as compiled runs do."""
        started = time.perf_counter() if self._timed else 0.0
        values, node = {name: int(dims[i]) for i, name in enumerate(self.dim_names)}, self.node
        result = node.op.fn(*(self._value(arg, values) for arg in node.args), **dict(node.params))
        for t, array in zip(node.outputs, result if isinstance(result, (tuple, list)) else [result]):
            self._write(t, values, array)
        if self._timed:
            self._seconds += time.perf_counter() - started
        return 0, self._outcome

    def _value(self, arg: Any, dims: dict[str, int]) -> Any:
        if isinstance(arg, tuple):
            return [self._read(t, dims)[1] for t in arg]
        return None if arg is None else self._read(arg, dims)[1]

    def _read(self, t: Tensor, dims: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes from a tensor's first element to its last, copied, and its numbers: over them, or dequantized."""
        address, dtype = self._places[id(t.node), t.index]
        shape = tuple(axis_value(a, dims) for a in t.shape)
        strides = tuple(axis_value(a, dims) for a in self.layout.of(t).strides)
        if dtype.name not in NUMPY:
            raw = self._fetched(address, dtype.size(int(np.prod(shape))))
            return raw, dequantize(raw, dtype).reshape(shape)
        extent = 0 if 0 in shape else dtype.nbytes + sum((n - 1) * s for n, s in zip(shape, strides))
        raw = self._fetched(address, extent)
        return raw, tensor_over(raw, 0, shape, dtype, strides) if extent else np.zeros(shape, NUMPY[dtype.name])

    def _fetched(self, address: int, nbytes: int) -> np.ndarray:
        raw = np.empty(nbytes, np.uint8)
        self.queue.copy(raw.ctypes.data, address, nbytes)
        self.queue.wait()
        return raw

    def _write(self, t: Tensor, dims: dict[str, int], values: np.ndarray) -> None:
        """Write a result, leaving what lies between its elements as it is."""
        raw, numbers = self._read(t, dims)
        if numbers.size:
            numbers[...] = values
            self.queue.copy(self._places[id(t.node), t.index][0], raw.ctypes.data, raw.size)
            self.queue.wait()

    def profile(self, on: bool) -> None:
        """Start (and reset) or stop the clock."""
        self._timed, self._seconds = on, 0.0

    def seconds(self) -> list[float]:
        """Return the seconds spent since `profile(True)`."""
        return [self._seconds]
