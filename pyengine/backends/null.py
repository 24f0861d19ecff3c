"""The null backend: plans and traces a graph, computes nothing. For tests of the planner and for looking at graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyengine.compiler import passes as fusion
from pyengine.errors import GraphError
from pyengine.compiler.arena import lay_out, Layout
from pyengine.graph.tensor import Tensor


class Program:
    """A plan without memory: `layout` and `trace`."""

    def __init__(self, layout: Layout):
        self.layout = layout

    @property
    def trace(self) -> list[str]:
        """One line a step: op, result's shape, arena offset."""
        lines = []
        for node in self.layout.steps:
            t = node.outputs[0]
            root = self.layout.of(t).root
            where = f"arena+{self.layout.offsets[id(root)]}" if id(root) in self.layout.offsets else root.name
            lines.append(f"{node.op.name:14} {' x '.join(map(str, t.shape)):24} {where}")
        return lines

    def run(self, **inputs: Any) -> Any:
        """Refuse: nothing can be computed here."""
        raise GraphError("the null backend plans and traces; it does not compute")


class Backend:
    """See the module's docstring."""

    def __init__(self, n_threads: int | None = None):
        self.n_threads = n_threads

    def compile(self, outputs: Sequence[Tensor], passes: Sequence[str] | None = None, single: bool = False) -> Program:
        """Plan with no working memory for kernels."""
        return Program(lay_out(fusion.apply(outputs, passes), lambda node: 0))
