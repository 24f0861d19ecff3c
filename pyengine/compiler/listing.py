"""A graph as text, and as Graphviz's dot."""

from __future__ import annotations

from collections.abc import Sequence

from pyengine.graph.graph import topological
from pyengine.graph.tensor import Tensor


def to_dot(outputs: Sequence[Tensor], title: str = "graph") -> str:
    """Render the graph in Graphviz's language; constants are left out, edges carry shapes."""
    nodes = topological(outputs)
    number = {id(n): i for i, n in enumerate(nodes)}
    colour = {"input": "lightblue", "table": "lightcyan", "state": "khaki", "op": "white"}
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


def to_text(outputs: Sequence[Tensor]) -> str:
    """Render one line a node: number, op, shapes of the results, and what it reads."""
    number: dict[int, int] = {}
    lines = []
    for node in topological(outputs):
        if node.op is None:
            continue
        number[id(node)] = len(number)
        parts = [f"%{number[id(t.node)]}" if t.node.op else t.name or t.node.kind for t in node.inputs]
        shapes = ", ".join(" x ".join(map(str, t.shape)) for t in node.outputs)
        lines.append(f"%{number[id(node)]:<4} {node.op.name:14} {shapes:24} <- {', '.join(parts)}")
    return "\n".join(lines)
