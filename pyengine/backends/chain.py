"""One program on several devices: the programs of its parts, run one after the other, and what is copied between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyengine.compiler.cut import Part
from pyengine.graph.tensor import axis_value, Node, product, Tensor


class StagedPlan(NamedTuple):
    """Parts that a backend has laid out, nothing loaded; stands where one `Prepared` does."""

    parts: list[Part]
    prepared: list[Any]

    @classmethod
    def lay_out(cls, parts: list[Part], prepare: Callable[..., Any]) -> StagedPlan:
        """Lay out each part with a backend's `prepare`."""
        return cls(parts, [prepare(p.outputs, turns=p.turns) for p in parts])

    def load(self, progress: Callable[[int, int], None] | None = None) -> Chain:
        """Allocate memory on each device and read the weights."""
        return Chain(self.parts, [p.load(progress) for p in self.prepared])


Copies = list[tuple[np.ndarray, np.ndarray, Tensor]]                           # (from, to, shape)


class Chain:
    """The devices' programs as one: the same interface as a backend's program.

    Inputs that several devices read are written to the first of them and copied to the others; tables of cells too.
    """

    def __init__(self, parts: Sequence[Part], programs: Sequence[Any]):
        self.parts, self.programs = list(parts), list(programs)
        self.inputs: dict[str, np.ndarray] = {}
        self._shared: Copies = []                                              # inputs of several devices
        self._tables: list[tuple[np.ndarray, np.ndarray]] = []
        sent = {name for part in self.parts for name in part.sends}
        received: dict[str, list[tuple[np.ndarray, Tensor]]] = {name: [] for name in sent}
        states: dict[str, np.ndarray] = {}
        for program in self.programs:
            leaves = {n.name: n.outputs[0] for n in program.prepared.layout.leaves if n.kind == "input"}
            for name, array in program.inputs.items():
                if name in sent:
                    received[name].append((array, leaves[name]))
                elif name in self.inputs:
                    self._shared.append((self.inputs[name], array, leaves[name]))
                else:
                    self.inputs[name] = array
            for t in program.prepared.states:
                if t.dtype.name == "I32":
                    state = program.state(t.name)
                    self._tables += [(states[t.name], state)] if t.name in states else []
                    states.setdefault(t.name, state)
        turns = sorted((s, turn, d) for d, part in enumerate(self.parts) for turn, s in enumerate(part.stages))
        self._order: list[tuple[Any, int, Copies]] = []                        # program, its turn, what is copied afterwards
        for _, turn, d in turns:
            part, program = self.parts[d], self.programs[d]
            copies = [(program.outputs[i], target, t) for name, i in part.sends.items() if part.turns.outputs[i] == turn
                      for target, t in received[name]]
            self._order.append((program, turn, copies))
        places = {i: program.outputs[k] for part, program in zip(self.parts, self.programs) for i, k in part.results}
        self.outputs = [places[i] for i in range(len(places))]

    def state(self, name: str) -> np.ndarray:
        """The array over a state of plain numbers; of one that several devices have, the first."""
        return self._holder(name).state(name)

    def state_bytes(self, name: str) -> np.ndarray:
        """The bytes of a state."""
        return self._holder(name).state_bytes(name)

    def _holder(self, name: str) -> Any:
        return next(p for p in self.programs if name in p.state_address)

    def profile(self, on: bool) -> None:
        """Start (and reset) or stop the clock of each step."""
        for p in self.programs:
            p.profile(on)

    def seconds(self) -> list[tuple[Node, float]]:
        """Steps of all devices with the seconds spent in each."""
        return [timed for p in self.programs for timed in p.seconds()]

    def first_step_reading(self, name: str) -> int:
        """As a program's, of the one that runs last: outputs are computed there."""
        return self._order[-1][0].first_step_reading(name)

    def execute_named(self, first_step: int = 0, **dims: int) -> None:
        """Run all stages; from `first_step` of the last one's program on, only that."""
        if first_step:
            program, turn, _ = self._order[-1]
            program.execute_named(first_step, turn, **dims)
            return
        for source, table in self._tables:
            table[:] = source
        self._copy(self._shared, dims)                                         # before a turn reuses the memory of its inputs
        for program, turn, copies in self._order:
            program.execute_named(0, turn, **dims)
            self._copy(copies, dims)

    @staticmethod
    def _copy(copies: Copies, dims: dict[str, int]) -> None:
        for source, target, t in copies:
            n = axis_value(product(t.shape), dims)
            target.reshape(-1)[:n] = source.reshape(-1)[:n]
