"""The NumPy backend: runs each op's own declaration, one after another. Slow and obviously right: the oracle of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyengine.compiler import passes as fusion
from pyengine.errors import GraphError
from pyengine.graph.graph import check_states, topological
from pyengine.graph.tensor import Tensor

_NUMPY = {"F32": np.float32, "F16": np.float16, "I32": np.int32}


def constant_array(t: Tensor) -> np.ndarray:
    """A constant as float32 (or int32); block formats are dequantized by gguf-py."""
    source = t.node.source
    if isinstance(source, np.ndarray):
        return source
    import gguf

    blob = np.array(source.view())
    shape = tuple(int(n) for n in t.shape)
    row_bytes = source.dtype.size(shape[-1])
    kind = gguf.GGMLQuantizationType(source.dtype.id)
    return gguf.quants.dequantize(blob.reshape(-1, row_bytes), kind).reshape(shape).astype(np.float32)


class Program:
    """A graph in order; `dtype` float64 gives an oracle with rounding errors far below those of kernels."""

    def __init__(self, outputs: list[Tensor], single: bool, dtype: Any = np.float32):
        self.outputs, self.single, self.dtype = outputs, single, dtype
        self.nodes = topological(outputs)
        check_states(self.nodes)
        self.values: dict[tuple[int, int], np.ndarray] = {}
        for node in self.nodes:
            t = node.outputs[0]
            if node.kind == "constant":
                array = constant_array(t)
                self.values[id(node), 0] = array if array.dtype == np.int32 else array.astype(dtype)
            elif node.kind == "state":
                if t.dtype.name not in _NUMPY:
                    raise GraphError(f"reference: states of dtype {t.dtype.name} are not supported; use F32 or F16")
                self.values[id(node), 0] = np.zeros(t.shape, _NUMPY[t.dtype.name])

    def run(self, **inputs: np.ndarray) -> Any:
        """Compute the outputs from arrays by input name."""
        values = self.values

        def value(arg: Any) -> Any:
            if isinstance(arg, tuple):
                return [value(a) for a in arg]
            return None if arg is None else values[id(arg.node), arg.index]

        for node in self.nodes:
            if node.kind == "input":
                if node.name not in inputs:
                    raise GraphError(f"run: input '{node.name}' is missing")
                array = np.asarray(inputs[node.name])
                values[id(node), 0] = array if node.outputs[0].dtype.name == "I32" else array.astype(self.dtype)
            elif node.op is not None:
                result = node.op.fn(*map(value, node.args), **dict(node.params))
                for t, array in zip(node.outputs, result if isinstance(result, (tuple, list)) else [result]):
                    values[id(node), t.index] = array
        out = [values[id(t.node), t.index] for t in self.outputs]
        return out[0] if self.single else out


class Backend:
    """See the module's docstring."""

    def __init__(self, n_threads: int | None = None):
        self.n_threads = n_threads

    def compile(self, outputs: Sequence[Tensor], passes: Sequence[str] | None = None, single: bool = False,
                dtype: Any = np.float32) -> Program:
        """Order the graph; passes are applied too, so that a fused op's reference is tested."""
        return Program(fusion.apply(outputs, passes), single, dtype)
