"""Graphs: build with ops, compile once, run many times.

    with pe.Graph() as g:
        x = g.input("x", (pe.Dim("m", max=512), 64))
        y = ops.silu(ops.linear(x, [w])[0])

Nothing is computed here: `pyengine.backends.graph` has the `Graph` that compiles and runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from pyengine.arguments import whole
from pyengine.dtype import DType, dtype as dtype_of
from pyengine.errors import GraphError, shown
from pyengine.graph.tensor import Axis, described, Dim, make_leaf, Node, Tensor


class Graph:
    """A named set of inputs, constants and states. Building computes nothing."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.states: dict[str, Tensor] = {}
        self.tables: dict[str, Tensor] = {}

    def __enter__(self) -> Graph:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def __repr__(self) -> str:
        kinds = (("", self.inputs), ("states: ", self.states), ("tables: ", self.tables))
        return f"Graph({'; '.join(kind + ', '.join(map(described, leaves.values())) for kind, leaves in kinds if leaves)})"

    def _leaf(self, table: dict[str, Tensor], kind: str, name: str, shape: Sequence[Axis], dtype: str | DType) -> Tensor:
        if not isinstance(name, str) or not name:
            raise GraphError(f"graph: the name of {kind} is a text, got {shown(name)}")
        if not isinstance(shape, (tuple, list)):
            raise GraphError(f"graph: {name!r}: a shape is a tuple of ints and Dims, got {shown(shape)}")
        for a in shape:
            if isinstance(a, Dim) and (not isinstance(a.name, str) or not a.name):
                raise GraphError(f"graph: {name!r}: the name of a Dim is a text, got {shown(a.name)}")
            if isinstance(a, Dim):
                whole(f"graph: {name!r}: the most of Dim {a.name!r}", a.max, 0, None)
        shape = tuple(a if isinstance(a, Dim) else whole(f"graph: {name!r}: an axis", a, 0, None) for a in shape)
        if not isinstance(dtype, (str, DType)):
            raise GraphError(f"graph: {name!r}: a dtype is named, as 'F32', got {shown(dtype)}")
        if name in self.inputs or name in self.states or name in self.tables:
            raise GraphError(f"graph: '{name}' is declared twice")
        table[name] = make_leaf(kind, name, shape, dtype if isinstance(dtype, DType) else dtype_of(dtype))
        return table[name]

    def input(self, name: str, shape: Sequence[Axis], dtype: str | DType = "F32") -> Tensor:
        """Declare an array that is given at each run."""
        return self._leaf(self.inputs, "input", name, shape, dtype)

    def state(self, name: str, shape: Sequence[int], dtype: str | DType = "F32", memory: str | None = None) -> Tensor:
        """Declare memory that outlives a run (a KV cache); it starts as zeros and ops such as cache_append change it.

        memory: states that name the same, and have the same shape and dtype, are one memory: who fills a run sees to it that no two of them
        write the same cells.
        """
        made = self._leaf(self.states, "state", name, shape, dtype)
        made.node.source = memory
        for other in self.states.values():
            if memory is not None and other.node.source == memory and (other.shape, other.dtype) != (made.shape, made.dtype):
                raise GraphError(f"graph: {name!r} and {other.name!r} share memory {memory!r}, but not their shape and dtype")
        return made

    def table(self, name: str, shape: Sequence[int]) -> Tensor:
        """Declare an int32 input that keeps its value from run to run: the host writes what changes (where cells lie)."""
        return self._leaf(self.tables, "table", name, shape, "I32")

    def constant(self, array: np.ndarray) -> Tensor:
        """Add an array that never changes."""
        from pyengine.graph.op import as_tensor

        return as_tensor(array)


def topological(outputs: Iterable[Tensor]) -> list[Node]:
    """Return the nodes that `outputs` need, inputs before users, in a fixed order."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[Node | None] = [t.node for t in reversed(list(outputs))]
    while stack:
        node = stack.pop()
        if node is None:                                     # the inputs of the node below it are done
            order.append(stack.pop())
        elif node not in seen:
            seen.add(node)
            if not node.inputs:
                order.append(node)
                continue
            stack += (node, None)
            for t in reversed(node.inputs):
                if t.node not in seen:
                    stack.append(t.node)
    return order


def users(nodes: Iterable[Node]) -> dict[tuple[int, int], list[Node]]:
    """Map (id of node, output index) to the nodes that read it, once per reading."""
    table: dict[tuple[int, int], list[Node]] = {}
    for node in nodes:
        for t in node.inputs:
            table.setdefault((id(t.node), t.index), []).append(node)
    return table


def check_names(nodes: Sequence[Node]) -> None:
    """Refuse two inputs, states or tables of one name: those of several graphs, of which a run could fill only one."""
    seen: set[str] = set()
    for node in nodes:
        if node.op is None and node.kind != "constant":
            if node.name in seen:
                raise GraphError(f"two graphs declare {node.name!r}, and what they declare is used together; give one of them another name")
            seen.add(node.name)


def check_states(nodes: Sequence[Node]) -> None:
    """Refuse graphs whose meaning would depend on the order in which memory is overwritten."""
    read = users(nodes)
    for node in nodes:
        if node.op is None:
            continue
        for spec in node.op.results:
            if spec.kind == "Same":
                source = node.op.argument(node.args, spec.axes[0])
                if len(read[id(source.node), source.index]) > 1:
                    raise GraphError(
                        f"{node.op.name}: '{spec.axes[0]}' ({source.name or 'unnamed'}) is changed in place, so nothing else may "
                        "read its old value; use the op's result instead"
                    )
                if source.node.op is None and source.node.kind != "state":
                    raise GraphError(f"{node.op.name}: '{spec.axes[0]}' is changed in place, so it must be a state")
