"""What other models of this process hold of the machine's memory: how a plan knows of them.

The memory that the system calls free lacks the pages that a model has touched. What it was promised beyond that looks free: caches that
were never filled, the encoder before its first picture. So a model is held by two numbers, what its plan counts and what of it is
resident, and another plan finds the difference taken.

    free for a plan = free by the system - sum over the others of (planned - resident)

Models register when they are made, are held weakly, and are forgotten when they are closed. While one is being loaded, a promise
stands for it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pyengine.hardware.facts import Hardware
from pyengine.memory.plan import MemoryPlan
from pyengine.records import dataclass

deciding = threading.RLock()         # held from a plan to its promise, so that two threads do not promise the same memory
_registered: weakref.WeakSet[Any] = weakref.WeakSet()        # of what has a method `held`
_lock = threading.Lock()             # of the set


@dataclass(frozen=True)
class Held:
    """What one model holds: bytes by device of the machine, planned, and how many of these are resident already.

    The process itself is no model's: it is there once, and is resident.
    """

    name: str
    planned: Mapping[str, int]
    resident: Mapping[str, int]

    def promised(self, device: str) -> int:
        """Return the bytes that it will still take of what looks free on a device."""
        return self.planned.get(device, 0) - self.resident.get(device, 0)

    def gone(self) -> Held:
        """Return the same as it counts where it is to go before: what is resident will be free."""
        return Held(self.name, {}, self.resident)


def planned_bytes(plan: MemoryPlan) -> dict[str, int]:
    """Return what a plan counts by device of the machine, without the process itself; parts of main memory are the CPU's."""
    found: dict[str, int] = {}
    for i in plan.items:
        if i.purpose not in ("mapped", "overhead"):
            device = i.device.partition(":")[0] if i.device.startswith("cpu:") else i.device
            found[device] = found.get(device, 0) + i.nbytes
    return found


def register(model: Any) -> None:
    """Count a model from now on, as long as it lives: its method `held` says what it holds."""
    with _lock:
        _registered.add(model)


def forget(model: Any) -> None:
    """Count a model no more."""
    with _lock:
        _registered.discard(model)


def held(without: Sequence[Any] = ()) -> list[Held]:
    """Return what the open models of this process hold, and those that are being loaded; `without` some of them."""
    with _lock:
        models = [m for m in _registered if m not in without]
    return [found for model in models if (found := model.held()) is not None]


class _Promise:
    """A model that is being loaded: nothing of it counts as resident."""

    def __init__(self, plan: MemoryPlan):
        self._held = Held(plan.model, planned_bytes(plan), {})

    def held(self) -> Held:
        """Return what it will hold."""
        return self._held


@contextmanager
def promised(plan: MemoryPlan) -> Iterator[None]:
    """Keep what a plan counts for it, until its model is loaded and registered."""
    promise = _Promise(plan)
    register(promise)
    try:
        yield
    finally:
        forget(promise)


def beside(machine: Hardware, others: Sequence[Held]) -> Hardware:
    """Return the machine with what is free beside the others."""
    devices = [d._replace(free=max(0, d.free - sum(h.promised(d.id) for h in others))) for d in machine.devices]
    return machine._replace(devices=tuple(devices))
