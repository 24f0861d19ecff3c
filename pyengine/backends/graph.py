"""Graphs that compile themselves: what the library gives to its users as `pyengine.Graph`.

    with pe.Graph() as g:
        x = g.input("x", (pe.Dim("m", max=512), 64))
        y = ops.silu(ops.linear(x, [w])[0])
    program = g.compile(y)
    program.run(x=array)

A graph is compiled by fusions (`pyengine.compiler.passes`), a plan of memory (`pyengine.compiler.arena`) and a backend.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyengine.arguments import takes, whole
from pyengine.backends import backend
from pyengine.backends.base import Program
from pyengine.errors import GraphError, shown
from pyengine.graph import graph
from pyengine.graph.tensor import Tensor


class Graph(graph.Graph):
    """A named set of inputs, constants and states. Building computes nothing; `compile` turns it into a program."""

    @takes()
    def compile(self, outputs: Tensor | Sequence[Tensor], device: str = "cpu", n_threads: int | None = None,
                passes: Sequence[str] | None = None, strict: bool = False) -> Program:
        """Make a program that computes `outputs` from the graph's inputs.

        device: "cpu", "reference" (NumPy), or "null" (plans and traces, computes nothing); passes: names from
        `pyengine.compiler.passes.PASSES` (default all).
        Ops without a kernel on the device are computed by the NumPy reference; `strict` refuses them (GraphError).
        Returns a program with `run(**inputs)`: one array, or a list for a list. Raises: GraphError, RequestError.
        """
        single = isinstance(outputs, Tensor)
        targets = [outputs] if single else list(outputs) if isinstance(outputs, (list, tuple)) else []
        if not targets or not all(isinstance(t, Tensor) for t in targets):
            raise GraphError(f"compile: the outputs are a tensor or a list of tensors, got {shown(outputs)}")
        n_threads = None if n_threads is None else whole("n_threads", n_threads, 1)
        return backend(device, n_threads=n_threads).compile(targets, passes=passes, single=single, strict=strict)
