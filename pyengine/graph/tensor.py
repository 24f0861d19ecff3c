"""Symbolic tensors: what a graph is made of. Nothing here computes.

A `Tensor` is one output of a `Node`; a `Node` is an op applied to tensors. Shapes are NumPy's (row-major). An axis is an
int, or a `Dim`: a number that is known only when the program runs (rows in this step, rows whose logits are wanted), with a
largest value that the memory plan uses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pyengine.dtype import DType
from pyengine.errors import ShapeError
from pyengine.records import dataclass


@dataclass(frozen=True)
class Dim:
    """A run-time axis: `scale` x the value of `name`, at most `scale` x `max`."""

    name: str
    max: int
    scale: int = 1

    def __mul__(self, k: int) -> Dim:
        return Dim(self.name, self.max, self.scale * k)

    __rmul__ = __mul__

    def __floordiv__(self, k: int) -> Dim:
        if self.scale % k:
            raise ShapeError(f"axis {self} cannot be divided by {k}")
        return Dim(self.name, self.max, self.scale // k)

    def __repr__(self) -> str:
        return self.name if self.scale == 1 else f"{self.scale}*{self.name}"


Axis = int | Dim
Shape = tuple[Axis, ...]


def axis_max(axis: Axis) -> int:
    """Return the largest value of an axis."""
    return axis if isinstance(axis, int) else axis.max * axis.scale


def axis_value(axis: Axis, dims: dict[str, int]) -> int:
    """Return the value of an axis when the run-time dims have these values."""
    return axis if isinstance(axis, int) else dims[axis.name] * axis.scale


def product(axes: Sequence[Axis]) -> Axis:
    """Multiply axes, at most one of which may be a `Dim`."""
    n, dim = 1, None
    for a in axes:
        if isinstance(a, int):
            n *= a
        elif dim is None:
            dim = a
        else:
            raise ShapeError(f"the product of two run-time axes {dim} and {a} is not supported")
    return n if dim is None else dim * n


class Node:
    """An op applied to arguments. Leaves have `op` None and a `kind`: input, constant or state. Never changed once it is made.

    A graph is made and rewritten pass by pass, thousands of nodes before the first token: this and `Tensor` are plain classes,
    since frozen dataclasses take several times as long to make.
    """

    __slots__ = ("args", "inputs", "kind", "name", "op", "outputs", "params", "source")

    def __init__(self, op: Any, args: tuple[Any, ...] = (), params: tuple[tuple[str, Any], ...] = (), kind: str = "op", name: str = "",
                 source: Any = None):
        self.op = op                                   # pyengine.graph.op.Op, or None for a leaf
        self.args = args                               # Tensor | None | tuple[Tensor, ...] in the order of the declaration
        self.params = params
        self.kind, self.name = kind, name
        self.source = source                           # constants: ndarray or WeightRef; states: the name of the memory that several share
        self.outputs: tuple[Tensor, ...] = ()
        flat: list[Tensor] = []                        # list arguments flattened, absent ones left out
        for a in args:
            if isinstance(a, tuple):
                flat.extend(a)
            elif a is not None:
                flat.append(a)
        self.inputs = tuple(flat)

    def with_args(self, args: tuple[Any, ...]) -> Node:
        """Return a node with the same op on other arguments of the same shapes and dtypes."""
        node = Node(self.op, args, self.params)
        node.outputs = tuple([Tensor(node, t.shape, t.dtype, t.index) for t in self.outputs])
        return node

    def __repr__(self) -> str:
        return f"<{self.op.name if self.op else self.kind} {self.name}>"


class Tensor:
    """One value in a graph: `shape` slowest axis first, `dtype` from pyengine.dtype, `index` among its node's outputs."""

    __slots__ = ("dtype", "index", "node", "shape")

    def __init__(self, node: Node, shape: Shape, dtype: DType, index: int = 0):
        self.node, self.shape, self.dtype, self.index = node, shape, dtype, index

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def size(self) -> int:
        """Elements when every run-time axis has its largest value."""
        return math.prod(axis_max(a) for a in self.shape)

    @property
    def nbytes_max(self) -> int:
        """Bytes when every run-time axis has its largest value."""
        return self.dtype.size(self.size)

    def __repr__(self) -> str:
        return f"Tensor({self.node!r}, shape={self.shape}, {self.dtype.name})"

    def __len__(self) -> int:
        if not self.shape or not isinstance(self.shape[0], int):
            raise TypeError(f"length of {self!r} is not known before it runs")
        return self.shape[0]


def described(t: Tensor) -> str:
    """Describe an input or an output for people: "x [m, 8]", with the format where it is not F32."""
    name, dtype = f"{t.name} " if t.name else "", "" if t.dtype.name == "F32" else f" {t.dtype.name}"
    return f"{name}[{', '.join(map(str, t.shape))}]{dtype}"


def make_leaf(kind: str, name: str, shape: Sequence[Axis], dtype: DType, source: Any = None) -> Tensor:
    """Make a tensor that no op computes: kind is input, constant or state (memory that outlives a run: KV caches)."""
    node = Node(None, kind=kind, name=name, source=source)
    out = Tensor(node, tuple(shape), dtype)
    node.outputs = (out,)
    return out
