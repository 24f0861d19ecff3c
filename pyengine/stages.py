"""One graph on several devices: cut into stages that run one after the other, each on one of the devices.

A node belongs to the stage of the latest layer that it depends on; what depends on no layer (embeddings, rope tables) is computed
on every device that needs it. Stages of one device are turns of one program: they share an arena, weights and states. A value that
another device needs is an output of its own program and an input there, copied when its stage is over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyengine.graph import topological
from pyengine.passes import rebuild
from pyengine.planner import Turns
from pyengine.tensor import Node, Tensor, axis_value, make_leaf, product

ANYWHERE = -1


class Part(NamedTuple):
    """What one device computes of a graph.

    stages   numbers of its stages, in order: its turns
    sends    those of its outputs that other devices read, by the name of the input there
    results  the places of the whole graph's outputs among its own: (number in the whole graph, number here)
    """

    outputs: list[Tensor]
    turns: Turns
    stages: list[int]
    sends: dict[str, int]
    results: list[tuple[int, int]]


def cut(outputs: Sequence[Tensor], stage_of: Callable[[str], int | None], devices: Sequence[int]) -> list[Part]:
    """Cut a graph into stages; stage s runs on device number devices[s]. Returns the part of each device, 0 .. max(devices).

    stage_of: the stage of a constant, state or input by its name, None for those that are needed anywhere. Outputs that depend on
    no layer belong to the last stage.
    """
    n, nodes = len(devices), topological(outputs)
    stage: dict[int, int] = {}
    for node in nodes:
        own = stage_of(node.name) if node.op is None and node.name else None
        stage[id(node)] = max([ANYWHERE if own is None else own, *(stage[id(t.node)] for t in node.inputs)])

    def home(node: Node) -> int:
        return n - 1 if stage[id(node)] == ANYWHERE else stage[id(node)]

    wanted: list[dict[tuple[int, int], Tensor]] = [{} for _ in range(n)]       # values that a stage must give, in order
    names: dict[tuple[int, int], str] = {}                                     # of those that other devices read
    for node in nodes:
        for t in node.inputs if stage[id(node)] != ANYWHERE else ():
            there = stage[id(t.node)]
            if t.node.op is not None and there != ANYWHERE and devices[there] != devices[stage[id(node)]]:
                names.setdefault((id(t.node), t.index), f"from{there}.{len(names)}")
                wanted[there][id(t.node), t.index] = t
    for t in outputs:
        wanted[home(t.node)][id(t.node), t.index] = t
    kept = {(id(t.node), t.index) for t in outputs}
    parts = []
    for device in range(max(devices) + 1):
        stages = [s for s in range(n) if devices[s] == device and wanted[s]]
        keys = [key for s in stages for key in wanted[s]]
        places = {key: i for i, key in enumerate(keys)}
        arrivals: dict[str, int] = {}

        def received(node: Node, device: int = device, stages: list[int] = stages, arrivals: dict[str, int] = arrivals) -> Any:
            """Inputs that stand for the outputs of a node of another device."""
            s = stage[id(node)]
            if s == ANYWHERE or devices[s] == device:
                return None
            leaves = []
            for t in node.outputs:
                name = names.get((id(t.node), t.index), f"unread{s}.{t.index}")
                arrivals[name] = next((turn for turn, later in enumerate(stages) if later > s), 0)
                leaves.append(make_leaf("input", name, t.shape, t.dtype))
            return leaves

        made = _part([wanted[s][key] for s in stages for key in wanted[s]], received)
        turns = Turns(tuple(turn for turn, s in enumerate(stages) for _ in wanted[s]), tuple(key in kept for key in keys), arrivals)
        results = [(i, places[id(t.node), t.index]) for i, t in enumerate(outputs) if devices[home(t.node)] == device]
        parts.append(Part(made, turns, stages, {names[key]: i for key, i in places.items() if key in names}, results))
    return parts


def _part(outputs: list[Tensor], received: Callable[[Node], Sequence[Tensor] | None]) -> list[Tensor]:
    """A copy of the graph in which nodes of other devices are inputs; what only they need is left behind."""
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
