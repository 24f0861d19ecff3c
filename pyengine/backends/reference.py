"""The NumPy backend: runs each op's own declaration, one after another. Slow and obviously right: the oracle of the others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from pyengine.backends import base
from pyengine.backends.host import HostState, NO_NUMBERS, NUMPY
from pyengine.backends.prepared import Counted, States
from pyengine.compiler.arena import is_changed_state, Turns
from pyengine.dtype import DType
from pyengine.errors import GraphError
from pyengine.files.weights import files_of
from pyengine.graph.tensor import axis_max, axis_value, Node, Tensor


def constant_array(t: Tensor) -> np.ndarray:
    """Return a constant as float32 (or int32); block formats are dequantized by gguf-py."""
    source = t.node.source
    if isinstance(source, np.ndarray):
        return source
    import gguf

    blob = np.array(source.view())
    for file in files_of([source]):
        file.check()
    shape = tuple(int(n) for n in t.shape)
    kind = gguf.GGMLQuantizationType(source.dtype.id)
    return gguf.quants.dequantize(blob.reshape(-1, source.dtype.size(shape[-1])), kind).reshape(shape).astype(np.float32)


class Prepared(Counted):
    """A graph counted as it lies in NumPy: constants as numbers of `dtype`, no packed forms, no working memory."""

    def __init__(self, declared: base.Declared, turns: Turns | None, passes: Sequence[str] | None, dtype: Any):
        super().__init__(declared, turns, passes, None)
        self.dtype = dtype
        self.weight_bytes = sum(axis_product(r.tensor) for r in self.residents.values()) * np.dtype(dtype).itemsize
        self.mapped_bytes = 0

    def packed_bytes(self, dtype: DType, shape: Sequence[int]) -> int:
        """Return 0: nothing is packed."""
        return 0

    def scratch_bytes(self, node: Node, states: States | None = None) -> int:
        """Return 0."""
        return 0

    def load(self, progress: base.Progress | None = None) -> Program:
        """Dequantize the constants and return the program."""
        return Program(self)


def axis_product(t: Tensor) -> int:
    """Count the elements of a tensor, run-time axes at their largest."""
    return int(np.prod([axis_max(a) for a in t.shape], dtype=np.int64))


class Program(base.Program):
    """A graph in order; float64 gives an oracle with rounding errors far below those of kernels."""

    def __init__(self, prepared: Prepared):
        self.prepared, self.dtype, layout = prepared, prepared.dtype, prepared.layout
        self._values: dict[tuple[int, int], np.ndarray] = {}
        self._seconds, self._timed = [0.0] * len(layout.steps), False
        self.inputs, self.tables, self.states = {}, {}, {}
        shared: dict[str | None, np.ndarray] = {}            # states that are one memory
        for node in layout.leaves:
            t = node.outputs[0]
            shared.pop(None, None)
            if node.kind == "constant":
                array = constant_array(t)
                self._values[id(node), 0] = array if array.dtype == np.int32 else array.astype(self.dtype)
            elif node.kind == "input":
                self.inputs[node.name] = np.zeros([axis_max(a) for a in t.shape], self._numpy(t))
            elif t.dtype.name not in NUMPY:
                raise GraphError(f"reference: states of dtype {t.dtype.name} are not supported; use F32 or F16")
            else:
                array = shared.get(node.source) if node.kind == "state" else None
                array = np.zeros([int(a) for a in t.shape], NUMPY[t.dtype.name]) if array is None else array
                self._values[id(node), 0] = shared[node.source] = array
                if node.kind == "table":
                    self.tables[node.name] = array
                else:
                    self.states[node.name] = HostState(t, array.reshape(-1).view(np.uint8))
        self.outputs = [NO_NUMBERS if is_changed_state(t) else np.zeros([axis_max(a) for a in t.shape], self._numpy(t)) for t in layout.outputs]

    def _numpy(self, t: Tensor) -> Any:
        return np.int32 if t.dtype.name == "I32" else self.dtype

    def execute(self, entry: str | None = None, turn: int | None = None, **dims: int) -> None:
        """Compute step by step on what stands in the inputs."""
        for node in self.prepared.layout.leaves:
            if node.kind == "input":
                shape = [axis_value(a, dims) for a in node.outputs[0].shape]
                self._values[id(node), 0] = self.inputs[node.name].reshape(-1)[: int(np.prod(shape))].reshape(shape)
        steps, turns = self.prepared.layout.steps, self.prepared.layout.turns
        begin, end = (0, len(steps)) if turn is None else turns[turn]
        for i in range(max(begin, 0 if entry is None else self.prepared.entry_step(entry)), end):
            self._step(i, steps[i])
        for t, out in zip(self.prepared.layout.outputs, self.outputs):
            if not is_changed_state(t) and (turn is None or self._computed(t)):
                value = self._value(t)
                out.reshape(-1)[: value.size] = value.reshape(-1)

    def kernel(self, node: Node) -> Any:
        """Return what computes a step: its op's declaration."""
        return node.op.fn

    def _step(self, number: int, node: Node) -> None:
        started = time.perf_counter() if self._timed else 0.0
        result = self.kernel(node)(*map(self._value, node.args), **dict(node.params))
        for t, array in zip(node.outputs, result if isinstance(result, (tuple, list)) else [result]):
            self._values[id(node), t.index] = array
        if self._timed:
            self._seconds[number] += time.perf_counter() - started

    def _computed(self, t: Tensor) -> bool:
        """Say whether a turn up to now has computed a tensor, or what it is a view of."""
        while t.node.op is not None and t.node.op.view:
            t = t.node.args[0]
        return (id(t.node), t.index) in self._values

    def _value(self, arg: Any) -> Any:
        """Return an argument's array; views are computed when they are read, so that they never outlive what they show."""
        if isinstance(arg, tuple):
            return [self._value(a) for a in arg]
        if arg is None:
            return None
        if arg.node.op is not None and arg.node.op.view:
            return arg.node.op.fn(*map(self._value, arg.node.args), **dict(arg.node.params))
        return self._values[id(arg.node), arg.index]

    def profile(self, on: bool) -> None:
        """Start (and reset) or stop the clock of each step."""
        self._seconds, self._timed = [0.0] * len(self._seconds), on

    def seconds(self) -> list[tuple[Node, float]]:
        """Return steps with the seconds spent in each."""
        return list(zip(self.prepared.layout.steps, self._seconds))


class Backend(base.Backend):
    """See the module's docstring. dtype: of all numbers that are computed."""

    name: ClassVar[str] = "reference"

    def __init__(self, n_threads: int | None = None, dtype: Any = np.float32):
        self.n_threads, self.dtype = n_threads, dtype

    def prepare(self, declared: base.Declared, turns: Turns | None = None, passes: Sequence[str] | None = None) -> Prepared:
        """Order the graph; passes are applied too, so that a fused op's reference is tested."""
        return Prepared(declared, turns, passes, self.dtype)
