"""One program on several devices: the programs of its parts, run one after the other, and what is copied between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyengine.backends import base
from pyengine.backends.base import Backend, Declared, Prepared, Progress
from pyengine.compiler.cut import Part
from pyengine.graph.tensor import axis_value, Node, product, Tensor
from pyengine.records import NamedTuple

Copies = list[tuple[np.ndarray, np.ndarray, Tensor]]                           # (from, to, shape)


Takes = list[tuple[base.Program, str, base.Program, int]]                      # (who takes, which input, from whom, which output)


class PreparedChain(NamedTuple):
    """Parts that backends have laid out, nothing loaded; stands where one `Prepared` does.

    linked  (input, number of the device): what a device takes from another one without the host
    """

    parts: list[Part]
    prepared: list[Prepared]
    linked: frozenset[tuple[str, int]] = frozenset()

    @classmethod
    def lay_out(cls, parts: list[Part], backends: Sequence[Backend], declared: Declared) -> PreparedChain:
        """Lay out each part of what was declared with the backend of its device. Entries are in the program that runs last."""
        last = max(range(len(parts)), key=lambda d: max(parts[d].stages, default=-1))
        asked = [frozenset(k for i, k in p.results if i in declared.asked) - frozenset(p.sends.values()) for p in parts]
        made = [own.prepare(Declared(p.outputs, declared.entries if d == last else {}, asked[d]), p.turns)
                for d, (p, own) in enumerate(zip(parts, backends))]
        linked = set[tuple[str, int]]()
        for part, giver in zip(parts, made):
            for name, i in part.sends.items():
                takers = [d for d, p in enumerate(made) if any(n.kind == "input" and n.name == name for n in p.layout.leaves)]
                direct = {(name, d) for d in takers if made[d].linked(name, giver)}
                if len(direct) == len(takers) and i not in {k for _, k in part.results}:
                    giver.keep(i)
                linked |= direct
        return cls(parts, made, frozenset(linked))

    @property
    def fallbacks(self) -> dict[str, int]:
        """Steps of all parts without a kernel."""
        names = {name for p in self.prepared for name in p.fallbacks}
        return {name: sum(p.fallbacks.get(name, 0) for p in self.prepared) for name in sorted(names)}

    def load(self, progress: Progress | None = None) -> Chain:
        """Allocate memory on each device and read the weights."""
        return Chain(self, [p.load(progress) for p in self.prepared])


class Chain(base.Program):
    """The devices' programs as one.

    Inputs that several devices read are written to the first of them and copied to the others; tables of cells too. A state that
    several devices have is the first one's.
    """

    def __init__(self, prepared: PreparedChain, programs: Sequence[base.Program]):
        self.prepared, self.parts, self.programs = prepared, prepared.parts, list(programs)
        self.inputs, self.tables = {}, {}
        self._shared: Copies = []                                              # inputs of several devices
        self._copied: list[tuple[np.ndarray, np.ndarray]] = []                 # and tables
        received: dict[str, list[tuple[np.ndarray, Tensor]]] = {name: [] for part in self.parts for name in part.sends}
        takers: dict[str, list[base.Program]] = {name: [] for name in received}
        for d, program in enumerate(self.programs):
            leaves = {n.name: n.outputs[0] for n in program.prepared.layout.leaves if n.kind == "input"}
            for name, array in program.inputs.items():
                if (name, d) in prepared.linked:
                    takers[name].append(program)
                elif name in received:
                    received[name].append((array, leaves[name]))
                elif name in self.inputs:
                    self._shared.append((self.inputs[name], array, leaves[name]))
                else:
                    self.inputs[name] = array
            for name, table in program.tables.items():
                if name in self.tables:
                    self._copied.append((self.tables[name], table))
                else:
                    self.tables[name] = table
        self.states = {name: state for program in reversed(self.programs) for name, state in program.states.items()}
        turns = sorted((s, turn, d) for d, part in enumerate(self.parts) for turn, s in enumerate(part.stages))
        self._order: list[tuple[base.Program, int, Copies, Takes]] = []        # program, its turn, what is copied and taken afterwards
        for _, turn, d in turns:
            part, program = self.parts[d], self.programs[d]
            copies = [(program.outputs[i], target, t) for name, i in part.sends.items() if part.turns.outputs[i] == turn
                      for target, t in received[name]]
            takes = [(taker, name, program, i) for name, i in part.sends.items() if part.turns.outputs[i] == turn for taker in takers[name]]
            self._order.append((program, turn, copies, takes))
        places = {i: (program, k) for part, program in zip(self.parts, self.programs) for i, k in part.results}
        self._made_by = [places[i] for i in range(len(places))]                # of each output: the program, and its number there
        self.outputs = [program.outputs[k] for program, k in self._made_by]

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.programs))})"

    def execute(self, entry: str | None = None, turn: int | None = None, **dims: int) -> None:
        """Run all stages; from an entry on, only the last turn, which contains it."""
        if entry is not None:
            program, last, *_ = self._order[-1]
            program.execute(entry, last, **dims)
            return
        for source, table in self._copied:
            table[:] = source
        self._copy(self._shared, dims)                                         # before a turn reuses the memory of its inputs
        for program, own, copies, takes in self._order:
            program.execute(None, own, **dims)
            self._copy(copies, dims)
            for taker, name, giver, output in takes:
                taker.take(name, giver, output, dims)

    def read(self, output: int, first: int, n: int) -> np.ndarray:
        """Return rows of an output of the last run."""
        program, number = self._made_by[output]
        return program.read(number, first, n)

    def resident(self) -> int:
        """Return the bytes of all devices' memory that are there already."""
        return sum(p.resident() for p in self.programs)

    @staticmethod
    def _copy(copies: Copies, dims: dict[str, int]) -> None:
        for source, target, t in copies:
            n = axis_value(product(t.shape), dims)
            target.reshape(-1)[:n] = source.reshape(-1)[:n]

    def profile(self, on: bool) -> None:
        """Start (and reset) or stop the clock of each step."""
        for p in self.programs:
            p.profile(on)

    def seconds(self) -> list[tuple[Node, float]]:
        """Return steps of all devices with the seconds spent in each."""
        return [timed for p in self.programs for timed in p.seconds()]
