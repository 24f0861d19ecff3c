"""One graph on several devices: cut into stages that run one after the other, each on one of the devices.

A node belongs to the stage of the latest layer that it depends on; what depends on no layer (embeddings, rope tables) is computed
on every device that needs it. Stages of one device are turns of one program: they share an arena, weights and states. A value that
another device needs is an output of its own program and an input there, copied when its stage is over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyengine.compiler.arena import Turns
from pyengine.compiler.rewrite import rebuild
from pyengine.graph.graph import topological
from pyengine.graph.tensor import make_leaf, Node, Tensor
from pyengine.records import NamedTuple

ANYWHERE = -1


class Part(NamedTuple):
    """The part of a graph that one device computes.

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
            """Return inputs that stand for the outputs of a node of another device."""
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
    """Copy the graph with nodes of other devices as inputs; what only they need is left out."""
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
