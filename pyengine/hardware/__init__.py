"""What this machine has, and how much of it this process may take: memory, cores, instruction sets, GPUs.

    from pyengine import hardware
    hardware.detect().to_json()          # everything; what could not be found out is in `notes`
    hardware.available_memory()          # the questions that loading a model asks, answered without looking at the rest
    hardware.default_threads()

Detectors are small classes over a `System`: files below a root, commands, environment. Tests hand over recorded ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyengine.hardware.memory import Cgroups, main_memory
from pyengine.hardware.system import System

if TYPE_CHECKING:
    from pyengine.hardware.facts import Hardware

__all__ = ["System", "available_memory", "default_threads", "detect", "memory_limit", "most_threads"]


def memory_limit(system: System | None = None) -> tuple[int, int] | None:
    """Return (limit, used) in bytes of the control group of this process that has the smallest limit; None without one.

    Used is without file pages that can be dropped: see `Cgroups.memory`.
    """
    return min(Cgroups(system or System()).memory(), default=None)


def available_memory(system: System | None = None) -> int:
    """Return the bytes of main memory that can be taken now: what the system can free and control groups allow."""
    return _memory(system or System())[1]


def default_threads(system: System | None = None) -> int:
    """Return how many threads the engine takes unless it is told otherwise: physical performance cores it may use."""
    from pyengine.hardware.cores import physical_cores, threads

    system = system or System()
    return threads(physical_cores(system), system.affinity(), Cgroups(system).cpu_quota())


def most_threads(system: System | None = None) -> int:
    """Return how many threads can run at once: processors that this process may use, within its control groups' share of time."""
    import math
    import os

    system = system or System()
    quota = Cgroups(system).cpu_quota()
    usable = len(system.affinity() or ()) or os.cpu_count() or 1
    return min(usable, math.ceil(quota)) if quota else usable


def detect(system: System | None = None) -> Hardware:
    """Return all that can be found out about this machine. Takes some ten milliseconds, more with NVIDIA's library."""
    from pyengine.hardware import cpu, gpu
    from pyengine.hardware.facts import Device, Hardware, Memory

    system = system or System()
    total, available, limit = _memory(system)
    memory, processor = Memory(total, available, *(limit or (None, None))), cpu.processor(system)
    host = Device("cpu", processor.name, 0, total if limit is None else min(total, limit[0]), available)
    devices, nodes = (host, *gpu.devices(system, memory)), tuple(cpu.NumaNodes(system).detect())
    return Hardware(devices, memory, processor, nodes, tuple(system.notes))


def _memory(system: System) -> tuple[int, int, tuple[int, int] | None]:
    """Return the machine's bytes, those that can be taken, and the smallest limit with what is used of it.

    A group with a larger limit may have less memory left if others in it have taken more, so what is left in each group counts.
    """
    (total, available), groups = main_memory(system), Cgroups(system).memory()
    return total, max(0, min([available, *(limit - used for limit, used in groups)])), min(groups, default=None)
