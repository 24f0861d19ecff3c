"""Graphs: build with ops, compile once, run many times.

    with pe.Graph() as g:
        x = g.input("x", (pe.Dim("m", max=512), 64))
        y = ops.silu(ops.linear(x, [w])[0])
    program = g.compile(y)
    program.run(x=array)

A graph is compiled by passes (`pyengine.passes`), a memory plan (`pyengine.planner`) and a backend (`pyengine.backends`).
`python -m pyengine.graph MODEL --dot` draws the graph of a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pyengine.dtype import DType, dtype as dtype_of
from pyengine.errors import GraphError
from pyengine.tensor import Axis, Node, Tensor, make_leaf


class Graph:
    """A named set of inputs, constants and states. Building computes nothing."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.states: dict[str, Tensor] = {}

    def __enter__(self) -> Graph:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def _leaf(self, table: dict[str, Tensor], kind: str, name: str, shape: Sequence[Axis], dtype: str | DType) -> Tensor:
        if name in self.inputs or name in self.states:
            raise GraphError(f"graph: '{name}' is declared twice")
        table[name] = make_leaf(kind, name, shape, dtype if isinstance(dtype, DType) else dtype_of(dtype))
        return table[name]

    def input(self, name: str, shape: Sequence[Axis], dtype: str | DType = "F32") -> Tensor:
        """An array that is given at each run."""
        return self._leaf(self.inputs, "input", name, shape, dtype)

    def state(self, name: str, shape: Sequence[int], dtype: str | DType = "F32") -> Tensor:
        """Memory that outlives a run (a KV cache); it starts as zeros and ops such as cache_append change it."""
        return self._leaf(self.states, "state", name, shape, dtype)

    def constant(self, array: np.ndarray) -> Tensor:
        """An array that never changes."""
        from pyengine.op import as_tensor

        return as_tensor(array)

    def compile(self, outputs: Tensor | Sequence[Tensor], device: str = "cpu", n_threads: int | None = None,
                passes: Sequence[str] | None = None) -> Any:
        """Make a program that computes `outputs` from the graph's inputs.

        device: "cpu", "reference" (NumPy), or "null" (plans and traces, computes nothing); passes: names from
        `pyengine.passes.PASSES` (default all). Returns an object with `run(**inputs)`: one array, or a list for a list.
        """
        from pyengine.backends import backend

        single = isinstance(outputs, Tensor)
        targets = [outputs] if single else list(outputs)
        return backend(device, n_threads=n_threads).compile(targets, passes=passes, single=single)


def topological(outputs: Iterable[Tensor]) -> list[Node]:
    """Nodes that `outputs` need, inputs before users, in a fixed order."""
    order: list[Node] = []
    seen: set[int] = set()
    stack: list[Node | None] = [t.node for t in reversed(list(outputs))]
    while stack:
        node = stack.pop()
        if node is None:                                     # the inputs of the node below it are done
            order.append(stack.pop())
        elif id(node) not in seen:
            seen.add(id(node))
            stack += (node, None)
            for t in reversed(node.inputs):
                if id(t.node) not in seen:
                    stack.append(t.node)
    return order


def users(nodes: Iterable[Node]) -> dict[tuple[int, int], list[Node]]:
    """(id of node, output index) -> nodes that read it, once per reading."""
    table: dict[tuple[int, int], list[Node]] = {}
    for node in nodes:
        for t in node.inputs:
            table.setdefault((id(t.node), t.index), []).append(node)
    return table


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


def to_dot(outputs: Sequence[Tensor], title: str = "graph") -> str:
    """The graph in Graphviz's language; constants are left out, edges carry shapes."""
    nodes = topological(outputs)
    number = {id(n): i for i, n in enumerate(nodes)}
    colour = {"input": "lightblue", "state": "khaki", "op": "white"}
    lines = [f'digraph "{title}" {{', '  node [shape=box, style="rounded,filled", fontname="Helvetica"];']
    for n in nodes:
        if n.kind == "constant":
            continue
        weights = [t.name for t in n.inputs if t.node.kind == "constant" and t.name]
        label = "\\n".join([n.op.name if n.op else f"{n.kind} {n.name}", *weights])
        lines.append(f'  n{number[id(n)]} [label="{label}", fillcolor={colour[n.kind]}];')
        for t in n.inputs:
            if t.node.kind != "constant":
                shape = " x ".join(map(str, t.shape))
                lines.append(f'  n{number[id(t.node)]} -> n{number[id(n)]} [label="{shape}"];')
    return "\n".join([*lines, "}"])


def main() -> None:
    """`python -m pyengine.graph MODEL [--dot] [--no-passes]`: print a model's graph as text or for Graphviz."""
    import argparse

    from pyengine import passes
    from pyengine.planning import model_graph

    parser = argparse.ArgumentParser(prog="python -m pyengine.graph", description=main.__doc__)
    parser.add_argument("model")
    parser.add_argument("--dot", action="store_true", help="Graphviz text: pipe it into `dot -Tsvg`")
    parser.add_argument("--no-passes", action="store_true", help="the graph as the model wrote it, before fusion")
    args = parser.parse_args()
    outputs = model_graph(args.model)
    if not args.no_passes:
        outputs = passes.apply(outputs)
    if args.dot:
        print(to_dot(outputs, args.model))
        return
    number: dict[int, int] = {}
    for node in topological(outputs):
        if node.op is None:
            continue
        number[id(node)] = len(number)
        parts = [f"%{number[id(t.node)]}" if t.node.op else t.name or t.node.kind for t in node.inputs]
        shapes = ", ".join(" x ".join(map(str, t.shape)) for t in node.outputs)
        print(f"%{number[id(node)]:<4} {node.op.name:14} {shapes:24} <- {', '.join(parts)}")


if __name__ == "__main__":
    main()
