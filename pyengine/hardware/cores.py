"""Physical cores, which of them are fast, and how many threads to take: what every load asks, so cheap to import."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pyengine.hardware.system import leading_int, MAX_CPUS, System
from pyengine.records import NamedTuple

CPU = "/sys/devices/system/cpu"

# Below these shares of the fastest core's value a core is one of the slow kind. Capacity is speed at full clock:
# RK3588's small cores have 0.4 of the big ones', the middle cores of three-kind phones 0.6 and more. Clocks say less:
# favoured cores of one kind differ by up to 9% (Ryzen 7950X3D: 5.25 and 5.75 GHz), dense or small ones by 25% and more.
SLOW_CAPACITY, SLOW_CLOCK = 0.6, 0.8


class Core(NamedTuple):
    """A physical core: the logical CPUs that it runs, its kind (performance or efficiency), its highest clock."""

    cpus: tuple[int, ...]
    kind: str = "performance"
    max_mhz: int | None = None

    def usable(self, affinity: frozenset[int] | None) -> bool:
        """Say whether a process that is bound to these CPUs can use it; None is no such bound."""
        return affinity is None or not affinity.isdisjoint(self.cpus)


def threads(cores: Sequence[Core], affinity: frozenset[int] | None, quota: float | None) -> int:
    """Return the number of threads that is best for kernels: one a physical performance core that the process may use.

    A second thread of a core shares its arithmetic units, and a slow core makes the others wait at the end of each op.
    A quota of 2.5 processors takes 3: they stand still for a sixth of the time, which is still more than 2 get done.
    """
    usable = [core for core in cores if core.usable(affinity)]
    n = len([core for core in usable if core.kind == "performance"] or usable) or len(affinity or ()) or 1
    return n if quota is None else max(1, min(n, math.ceil(quota)))


class LinuxCores:
    """Cores by sysfs: Documentation/ABI/testing/sysfs-devices-system-cpu, admin-guide/cputopology.rst."""

    def __init__(self, system: System):
        self.system = system

    def detect(self) -> list[Core]:
        """Return the physical cores; without a topology each logical CPU that the process may use counts as one."""
        system, groups, seen = self.system, [], set()
        for cpu in sorted(system.cpus(f"{CPU}/online")):
            if cpu not in seen:
                topology = f"{CPU}/cpu{cpu}/topology"          # core_cpus_list: since 5.3 for thread_siblings_list
                group = system.cpus(f"{topology}/core_cpus_list") or system.cpus(f"{topology}/thread_siblings_list")
                if not group:
                    system.note("cpu: no topology in sysfs; each logical CPU counts as a core")
                groups.append(sorted(group | {cpu}))
                seen.update(groups[-1])
        if not groups:
            system.note("cpu: sysfs does not list the processors; each logical CPU that may be used counts as a core")
            groups = [[cpu] for cpu in sorted(system.affinity() or {0})]
        clocks = [system.number(f"{CPU}/cpu{g[0]}/cpufreq/cpuinfo_max_freq") for g in groups]      # kHz
        return [Core(tuple(g), "performance" if fast else "efficiency", None if clock is None else clock // 1000)
                for g, fast, clock in zip(groups, self._fast(groups, clocks), clocks)]

    def _fast(self, groups: list[list[int]], clocks: list[int | None]) -> list[bool]:
        """Say of each core whether it is of the fast kind: by Intel's list of them, else by capacity, else by clock."""
        big = self.system.cpus("/sys/devices/cpu_core/cpus")                   # there on hybrid processors only
        if big:
            return [g[0] in big for g in groups]
        capacities = [self.system.number(f"{CPU}/cpu{g[0]}/cpu_capacity") for g in groups]
        for values, share in ((capacities, SLOW_CAPACITY), (clocks, SLOW_CLOCK)):
            known = [v for v in values if v]
            if len(known) == len(values) and min(known) < max(known):
                return [v >= share * max(known) for v in known]
        return [True] * len(groups)


class MacCores:
    """Cores by sysctl, whose header says that level 0 is the fastest. None can be chosen: CPUs are numbered here."""

    def __init__(self, system: System):
        self.system = system

    def levels(self) -> list[tuple[str, int, int, str]]:
        """Return (prefix of its names, cores, logical CPUs, kind) of each kind of core; Intel's Macs have one."""
        values, found = self.system.sysctl(), []
        number = lambda key: n if (n := leading_int(values.get(key, "")) or 0) < MAX_CPUS else 0  # noqa: E731
        for i in range(number("hw.nperflevels")):
            level = f"hw.perflevel{i}"
            n, n_cpus = number(f"{level}.physicalcpu"), number(f"{level}.logicalcpu")
            name = values.get(f"{level}.name", "Efficiency" if i else "Performance")       # older systems have none
            if n and n_cpus:
                found.append((level, n, n_cpus, "efficiency" if name == "Efficiency" else "performance"))
        n = number("hw.physicalcpu")
        return found or ([("hw", n, number("hw.logicalcpu") or n, "performance")] if n else [])

    def detect(self) -> list[Core]:
        """Return the physical cores; one where the system does not say."""
        found, n = [], 0
        for _, n_cores, n_cpus, kind in self.levels():
            for _ in range(n_cores):
                of_core = max(1, n_cpus // n_cores)
                found.append(Core(tuple(range(n, n + of_core)), kind))
                n += of_core
        if not found:
            self.system.note("cpu: sysctl does not say how many cores there are; one is assumed")
        return found or [Core((0,))]


class OtherCores:
    """Cores as psutil counts them: Windows and others. All count as fast."""

    def __init__(self, system: System):
        self.system = system

    def detect(self) -> list[Core]:
        """Return the physical cores; each logical CPU counts as one where psutil does not know."""
        import psutil

        self.system.note(f"cpu: on {self.system.platform} caches and kinds of cores are unknown; all count as fast")
        n_cpus = psutil.cpu_count() or 1
        n = psutil.cpu_count(logical=False) or n_cpus
        return [Core(tuple(range(i * n_cpus // n, (i + 1) * n_cpus // n))) for i in range(n)]


def physical_cores(system: System) -> list[Core]:
    """Return the machine's physical cores."""
    return {"linux": LinuxCores, "darwin": MacCores}.get(system.platform, OtherCores)(system).detect()
