"""Layers to devices: which part of memory holds what, and the step's graph cut accordingly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pyengine.backends.base import Backend, Declared
from pyengine.backends.chain import PreparedChain
from pyengine.backends.prepared import Counted
from pyengine.compiler.cut import cut
from pyengine.errors import RequestError
from pyengine.files.weights import behind_layers, layer_of
from pyengine.memory.settings import is_card
from pyengine.programs import step
from pyengine.records import NamedTuple


class Demand(NamedTuple):
    """What places must hold: bytes of each layer's weights and caches, of what belongs to no layer, and a run's on every device.

    apart     names of the experts' tensors, where they have a device of their own
    together  first layer and one past the last of those that must be on one device, because they read each other's caches
    """

    layers: Sequence[int]
    rest: int
    arena: int
    apart: frozenset[str] = frozenset()
    together: tuple[int, int] = (0, 0)


class Placement(NamedTuple):
    """A step's graph over devices: names of those used, the program of each, its layers, and a word about it."""

    devices: list[str]
    prepared: PreparedChain
    layers: list[list[int]]
    note: str


def demand(whole: Counted, caches: Mapping[int, int], owners: Sequence[int], experts_apart: bool) -> Demand:
    """Return what a step laid out on one device asks of places. caches: bytes by layer; owners: of each layer's cache."""
    layers = [caches.get(i, 0) for i in range(len(owners))]
    readers = [i for i, owner in enumerate(owners) if owner != i]
    together = (min(owners[i] for i in readers), readers[-1] + 1) if readers else (0, 0)
    apart = frozenset(r.name for r in whole.residents.values() if experts_apart and r.sparse)
    rest = 0
    for r in whole.residents.values():
        layer = layer_of(r.name)
        if layer is None:
            rest += r.held
        elif r.name not in apart:
            layers[layer] += r.held
    return Demand(layers, rest, whole.arena_bytes, apart, together)


def place(declared: Declared, need: Demand, free: Mapping[str, int], fixed: Mapping[str, int], expert_device: str | None,
          backend_of: Callable[[str], Backend]) -> Placement:
    """Divide a step's layers over devices in proportion to what they have free, and lay each part out; cards are filled before the CPU.

    free: bytes of each device; fixed: bytes that some of them hold beside. What does not fit is laid out too.
    Raises: RequestError where experts shall be apart and there are none.
    """
    names, where = sorted(free, key=is_card), expert_device
    if where and not need.apart:
        raise RequestError(f"expert_device={where!r}: the model has no experts")
    left = [max(1, free[name] - need.arena - fixed.get(name, 0)) for name in names]
    if where and len(names) > 1:
        left[names.index(where)] = 0                         # layers stay away from their experts
    found = filled(need, left, sum(not is_card(name) for name in names))
    used = sorted({*found, *([names.index(where)] if where else [])})
    devices: list[int] = []                                  # of each stage: runs of layers, between them the experts of one
    stages: dict[tuple[int, bool], int] = {}                 # (layer, its experts) -> stage
    with_experts = {layer_of(name) for name in need.apart}
    for layer, device in enumerate(found):
        for experts in (False, True):
            on = used.index(names.index(where) if where and experts else device)
            if not devices or (devices[-1] != on and (not experts or layer in with_experts)):
                devices.append(on)
            stages[layer, experts] = len(devices) - 1
    if devices[-1] != used.index(found[-1]):
        devices.append(used.index(found[-1]))                # the output head is where the last layer is

    def stage_of(name: str) -> int | None:
        layer, last = layer_of(name), len(devices) - 1
        if layer is not None:
            return stages[layer, name in need.apart]
        return last if behind_layers(name) else step.stage_of(name, last)

    parts = cut(declared.outputs, stage_of, devices)
    chain = PreparedChain.lay_out(parts, [backend_of(names[d]) for d in used], declared)
    note = "layers: " + ", ".join(f"{found.count(d)} on {names[d]}" for d in used if d in found)
    return Placement([names[d] for d in used], chain, [[i for i, on in enumerate(found) if on == d] for d in used],
                     note + (f", their experts on {where}" if where else ""))


def filled(need: Demand, left: Sequence[int], n_host: int) -> list[int]:
    """Return the device of each layer; the first `n_host` devices are of main memory, and get the first layers that cards cannot hold."""
    first, end = need.together
    if end > first:                                          # as one layer
        found = filled(need._replace(layers=[*need.layers[:first], sum(need.layers[first:end]), *need.layers[end:]], together=(0, 0)), left, n_host)
        return [*found[:first], *found[first : first + 1] * (end - first), *found[first + 1 :]]
    found, times = None, 1
    for n in range(len(need.layers)) if 0 < n_host < len(left) else ():
        rest = spread(need.layers[n:], left[n_host:], last=need.rest)
        if rest is not None:
            return [0] * n + [n_host + device for device in rest]
    if 0 < n_host < len(left):                               # not even the head
        left = left[:n_host]
    while found is None:                                     # what does not fit is laid out too, and refused with its table
        found, times = spread(need.layers, [n * times for n in left], last=need.rest), 2 * times
    return found


def spread(layers: Sequence[int], free: Sequence[int], first: int = 0, last: int = 0) -> list[int] | None:
    """Return the device of each layer, in order and in proportion to the devices' free memory; None if they do not fit.

    layers: bytes of each; free: bytes of each device; first, last: bytes that go with the first and with the last layer (embedding,
    output head). Minimises the largest share of memory used on any device, so none is full while another one idles.
    """
    def filled(share: float) -> list[int] | None:
        device, used, out = 0, float(first), []
        for i, n in enumerate(layers):
            n += last if i == len(layers) - 1 else 0
            while device < len(free) and used + n > share * free[device]:
                device, used = device + 1, float(0 if out else first)         # what comes first is where the first layer is
            if device == len(free):
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
