"""One graph on several devices: cut into stages that run one after the other, each a program with memory of its own.

A node belongs to the stage of the latest layer that it depends on; what depends on no layer (embeddings, rope tables) is computed
in every stage that needs it. A value that a later stage needs is an output of its own stage and an input there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyengine.graph import topological
from pyengine.passes import rebuild
from pyengine.tensor import Node, Tensor, axis_value, make_leaf, product

ANYWHERE = -1


@dataclass(frozen=True)
class Stage:
    """Part of a graph. `sends` are those of its outputs that later stages read, by the name of the input there; `results` are the
    places of the whole graph's outputs among its own: (number in the whole graph, number here)."""

    outputs: list[Tensor]
    sends: dict[str, int]
    results: list[tuple[int, int]]


def cut(outputs: Sequence[Tensor], stage_of: Callable[[str], int | None], n: int) -> list[Stage]:
    """Cut a graph into n stages. stage_of: the stage of a constant or state by its name, None for those that are needed anywhere.

    Outputs that depend on no layer belong to the last stage.
    """
    stage: dict[int, int] = {}
    for node in topological(outputs):
        own = stage_of(node.name) if node.kind in ("constant", "state") and node.name else None
        stage[id(node)] = max([ANYWHERE if own is None else own, *(stage[id(t.node)] for t in node.inputs)])

    def home(t: Tensor) -> int:
        return n - 1 if stage[id(t.node)] == ANYWHERE else stage[id(t.node)]

    wanted: list[dict[tuple[int, int], Tensor]] = [{} for _ in range(n)]       # values that a stage must give, in order
    for i, t in enumerate(outputs):
        wanted[home(t)][id(t.node), t.index] = t
    names: dict[tuple[int, int], str] = {}
    made: list[list[Tensor]] = [[] for _ in range(n)]
    for s in reversed(range(n)):                                               # later stages say what earlier ones must send
        def received(node: Node, s: int = s) -> Sequence[Tensor] | None:
            if not 0 <= stage[id(node)] < s:
                return None
            leaves = []
            for t in node.outputs:
                key = id(node), t.index
                names.setdefault(key, f"from{stage[id(node)]}.{len(names)}")
                wanted[stage[id(node)]][key] = t
                leaves.append(make_leaf("input", names[key], t.shape, t.dtype))
            return leaves

        made[s] = _part(list(wanted[s].values()), received)
    result = []
    for s in range(n):
        places = {key: i for i, key in enumerate(wanted[s])}
        sends = {names[key]: i for key, i in places.items() if key in names}
        result.append(Stage(made[s], sends, [(i, places[id(t.node), t.index]) for i, t in enumerate(outputs) if home(t) == s]))
    return result


def _part(outputs: list[Tensor], received: Callable[[Node], Sequence[Tensor] | None]) -> list[Tensor]:
    """A copy of the graph in which nodes of earlier stages are inputs; what only they need is left behind."""
    border: dict[int, Sequence[Tensor]] = {}
    needed = [t.node for t in outputs]
    seen: set[int] = set()
    while needed:                                                              # from the outputs back to the border
        node = needed.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        leaves = received(node) if node.op is not None else None
        if leaves is not None:
            border[id(node)] = leaves
        else:
            needed += [t.node for t in node.inputs]
    return rebuild(outputs, lambda node, args: border.get(id(node)))


@dataclass(frozen=True)
class StagedPlan:
    """Stages that a backend has laid out, nothing loaded; stands where one `Prepared` does."""

    stages: list[Stage]
    prepared: list[Any]

    def load(self, progress: Callable[[int, int], None] | None = None) -> Chain:
        """Allocate memory on each device and read the weights."""
        return Chain(self.stages, [p.load(progress) for p in self.prepared])


class Chain:
    """The stages' programs as one: the same interface as a backend's program.

    Inputs that several stages read are written to the first of them and copied to the others; tables of cells too.
    """

    def __init__(self, stages: Sequence[Stage], programs: Sequence[Any]):
        self.stages, self.programs = list(stages), list(programs)
        self.inputs: dict[str, np.ndarray] = {}
        self._shared: list[tuple[np.ndarray, np.ndarray, Tensor]] = []         # inputs of several stages: (from, to, shape)
        self._sent: list[list[tuple[np.ndarray, np.ndarray, Tensor]]] = []     # before each stage, from earlier ones
        self._tables: list[tuple[np.ndarray, np.ndarray]] = []
        states: dict[str, np.ndarray] = {}
        sent: dict[str, np.ndarray] = {}
        for stage, program in zip(self.stages, self.programs):
            received = []
            leaves = {n.name: n.outputs[0] for n in program.prepared.layout.leaves if n.kind == "input"}
            for name, array in program.inputs.items():
                if name in sent:
                    received.append((sent[name], array, leaves[name]))
                elif name in self.inputs:
                    self._shared.append((self.inputs[name], array, leaves[name]))
                else:
                    self.inputs[name] = array
            self._sent.append(received)
            sent |= {name: program.outputs[i] for name, i in stage.sends.items()}
            for t in program.prepared.states:
                if t.dtype.name == "I32":
                    state = program.state(t.name)
                    self._tables += [(states[t.name], state)] if t.name in states else []
                    states.setdefault(t.name, state)
        places = {i: program.outputs[k] for stage, program in zip(self.stages, self.programs) for i, k in stage.results}
        self.outputs = [places[i] for i in range(len(places))]

    def state(self, name: str) -> np.ndarray:
        """The array over a state of plain numbers; of one that several stages have, the first."""
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
        """Steps of all stages with the seconds spent in each."""
        return [timed for p in self.programs for timed in p.seconds()]

    def first_step_reading(self, name: str) -> int:
        """As a program's, of the last stage: outputs are computed there."""
        return self.programs[-1].first_step_reading(name)

    def execute_named(self, first_step: int = 0, **dims: int) -> None:
        """Run all stages; from `first_step` of the last one on, only that."""
        if first_step:
            self.programs[-1].execute_named(first_step, **dims)
            return
        for source, table in self._tables:
            table[:] = source
        self._copy(self._shared, dims)                                         # before a stage reuses the memory of its inputs
        for received, program in zip(self._sent, self.programs):
            self._copy(received, dims)
            program.execute_named(**dims)

    @staticmethod
    def _copy(copies: Sequence[tuple[np.ndarray, np.ndarray, Tensor]], dims: dict[str, int]) -> None:
        for source, target, t in copies:
            n = axis_value(product(t.shape), dims)
            target.reshape(-1)[:n] = source.reshape(-1)[:n]


def spread(layers: Sequence[int], rooms: Sequence[int], first: int = 0, last: int = 0) -> list[int] | None:
    """The device of each layer, in order and in proportion to the devices' room; None if they do not fit.

    layers: bytes of each; rooms: bytes of each device; first, last: bytes that go with the first and with the last layer (embedding,
    output head). The fullest device is as little full as can be, so no device is used to the brim while another one idles.
    """
    def filled(share: float) -> list[int] | None:
        device, used, out = 0, float(first), []
        for i, n in enumerate(layers):
            n += last if i == len(layers) - 1 else 0
            while device < len(rooms) and used + n > share * rooms[device]:
                device, used = device + 1, float(0 if out else first)         # what comes first is where the first layer is
            if device == len(rooms):
                return None
            used += n
            out.append(device)
        return out

    low, high = 0.0, 1.0
    best = filled(high)
    for _ in range(40 if best is not None else 0):
        middle = (low + high) / 2
        found = filled(middle)
        if found is None:
            low = middle
        else:
            high, best = middle, found
    return best
