"""The null backend: plans and traces a graph, computes nothing. For tests of the planner and for looking at graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from pyengine.backends import base
from pyengine.backends.host import HostState, NO_NUMBERS, NUMPY
from pyengine.backends.prepared import Counted, States
from pyengine.compiler.arena import is_changed_state, Layout, Turns
from pyengine.dtype import DType
from pyengine.errors import GraphError
from pyengine.graph.tensor import axis_max, Node, Tensor


def host_arrays(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Return an array of zeros for each tensor, run-time axes at their largest; an empty one for a changed state."""
    return [NO_NUMBERS if is_changed_state(t) else np.zeros([axis_max(a) for a in t.shape], NUMPY[t.dtype.name]) for t in tensors]


class Prepared(Counted):
    """A graph laid out with no working memory for kernels."""

    def packed_bytes(self, dtype: DType, shape: Sequence[int]) -> int:
        """Return 0: nothing is packed."""
        return 0

    def scratch_bytes(self, node: Node, states: States | None = None) -> int:
        """Return 0."""
        return 0

    def load(self, progress: base.Progress | None = None) -> Program:
        """Return the program; no weights are read."""
        return Program(self)


class Program(base.Program):
    """Inputs, outputs and states without anything between them."""

    def __init__(self, prepared: Prepared):
        self.prepared = prepared
        leaves = [n.outputs[0] for n in prepared.layout.leaves if n.kind == "input"]
        self.inputs = dict(zip((t.name for t in leaves), host_arrays(leaves)))
        self.tables = dict(zip((t.name for t in prepared.tables), host_arrays(prepared.tables)))
        self.outputs = host_arrays(prepared.layout.outputs)
        self.states = {t.name: HostState(t, np.zeros(t.nbytes_max, np.uint8)) for t in prepared.states}

    @property
    def layout(self) -> Layout:
        """The plan."""
        return self.prepared.layout

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

    def execute(self, entry: str | None = None, turn: int | None = None, **dims: int) -> None:
        """Refuse: nothing can be computed here."""
        raise GraphError("the null backend plans and traces; it does not compute")

    def run(self, **arrays: Any) -> Any:
        """Refuse, whatever the inputs."""
        self.execute()

    def profile(self, on: bool) -> None:
        """Do nothing: there is no time to measure."""

    def seconds(self) -> list[tuple[Node, float]]:
        """Return no seconds for each step."""
        return [(node, 0.0) for node in self.layout.steps]


class Backend(base.Backend):
    """See the module's docstring."""

    name: ClassVar[str] = "null"

    def __init__(self, n_threads: int | None = None):
        self.n_threads = n_threads

    def prepare(self, declared: base.Declared, turns: Turns | None = None, passes: Sequence[str] | None = None) -> Prepared:
        """Plan with no working memory for kernels."""
        return Prepared(declared, turns, passes, None)
