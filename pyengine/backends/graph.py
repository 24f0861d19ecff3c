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
from pyengine.backends.base import Declared, Program
from pyengine.backends.prepared import Counted
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
        run_by = backend(device, n_threads=_threads(n_threads))
        return run_by.compile(_targets("compile", outputs), passes=passes, single=isinstance(outputs, Tensor), strict=strict)

    @takes()
    def plan(self, outputs: Tensor | Sequence[Tensor], device: str = "cpu", n_threads: int | None = None, passes: Sequence[str] | None = None) -> Counted:
        """Count what `compile` would load with the same arguments, and load nothing.

        Returns what has `weight_bytes`, `arena_bytes` and `state_bytes`, all that it would allocate, `operations` of the largest run, and `fallbacks`:
        the ops that the device has no kernel for. Raises: GraphError, RequestError.
        """
        return backend(device, n_threads=_threads(n_threads)).prepare(Declared(_targets("plan", outputs)), passes=passes)


def _threads(n_threads: int | None) -> int | None:
    return None if n_threads is None else whole("n_threads", n_threads, 1)


def _targets(name: str, outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs as a list. Raises: GraphError."""
    targets = [outputs] if isinstance(outputs, Tensor) else list(outputs) if isinstance(outputs, (list, tuple)) else []
    if not targets or not all(isinstance(t, Tensor) for t in targets):
        raise GraphError(f"{name}: the outputs are a tensor or a list of tensors, got {shown(outputs)}")
    return targets
