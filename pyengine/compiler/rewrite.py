"""Rebuild a graph by a rule: what every rewriter uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyengine.graph.graph import topological
from pyengine.graph.tensor import Node, Tensor


def rebuild(outputs: Sequence[Tensor], rule: Callable[[Node, tuple[Any, ...]], Sequence[Tensor] | None],
            leaf: Callable[[Node], Sequence[Tensor]] = lambda node: node.outputs, nodes: Sequence[Node] | None = None) -> list[Tensor]:
    """Copy the graph bottom up. `rule(node, new_args)` gives the outputs that replace a node's, or None to keep it; `leaf(node)`
    those that replace a leaf's. nodes: `topological(outputs)`, where it is known."""
    new: dict[int, Sequence[Tensor]] = {}                                      # of nodes that change

    def moved(arg: Any) -> Any:
        if isinstance(arg, tuple):
            return tuple(moved(a) for a in arg)
        return arg if arg is None or id(arg.node) not in new else new[id(arg.node)][arg.index]

    for node in topological(outputs) if nodes is None else nodes:
        if node.op is None:
            made = leaf(node)
        else:
            args = node.args
            for t in node.inputs:
                if id(t.node) in new:
                    args = tuple([moved(a) for a in args])
                    break
            made = rule(node, args)
            if made is None:
                made = node.outputs if args is node.args else node.with_args(args).outputs
        if made is not node.outputs:
            new[id(node)] = made
    return [moved(t) for t in outputs]


def make(op: Any, args: Sequence[Any], params: dict[str, Any]) -> tuple[Tensor, ...]:
    """Make a new node and return its outputs."""
    out = op.node([list(a) if isinstance(a, tuple) else a for a in args], params)
    return (out,) if isinstance(out, Tensor) else out
