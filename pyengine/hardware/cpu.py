"""Processors: their name, kinds of cores, caches and NUMA nodes."""

from __future__ import annotations

from collections import Counter

from pyengine.hardware.cores import CPU, MacCores, physical_cores, threads
from pyengine.hardware.facts import Cache, CoreKind, Cpu, NumaNode
from pyengine.hardware.memory import Cgroups
from pyengine.hardware.system import leading_int, System

# Names of Arm's cores by "CPU part", where "CPU implementer" is 0x41: Linux, arch/arm64/include/asm/cputype.h.
ARM_PARTS = {
    0xD03: "Cortex-A53", 0xD05: "Cortex-A55", 0xD07: "Cortex-A57", 0xD08: "Cortex-A72", 0xD0B: "Cortex-A76",
    0xD0C: "Neoverse-N1", 0xD40: "Neoverse-V1", 0xD41: "Cortex-A78", 0xD44: "Cortex-X1", 0xD46: "Cortex-A510",
    0xD47: "Cortex-A710", 0xD48: "Cortex-X2", 0xD49: "Neoverse-N2", 0xD4D: "Cortex-A715", 0xD4E: "Cortex-X3",
    0xD4F: "Neoverse-V2", 0xD80: "Cortex-A520", 0xD81: "Cortex-A720", 0xD82: "Cortex-X4", 0xD84: "Neoverse-V3",
}
NAME_KEYS = ("model name", "cpu", "uarch")       # of /proc/cpuinfo: x86 and others, POWER, RISC-V
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class LinuxCpu:
    """Name and caches by /proc/cpuinfo and sysfs."""

    def __init__(self, system: System):
        self.system = system

    def name(self) -> str:
        """Return the processor's name; of Arm's, the kinds of its cores."""
        info = self.system.text("/proc/cpuinfo") or ""
        fields = [(k.strip(), v.strip()) for k, _, v in (line.partition(":") for line in info.splitlines())]
        for key in NAME_KEYS:
            if value := next((v for k, v in fields if k == key and v), None):
                return value
        vendors, parts = ([v for k, v in fields if k == f"CPU {key}"] for key in ("implementer", "part"))
        kinds = dict.fromkeys(self._arm(vendor, part) for vendor, part in zip(vendors, parts))
        if not kinds:
            self.system.note("cpu: /proc/cpuinfo has no name of the processor")
        return " + ".join(kinds) or "unknown"

    def _arm(self, vendor: str, part: str) -> str:
        try:
            return ARM_PARTS[int(part, 16)] if vendor == "0x41" else f"implementer {vendor} part {part}"
        except (KeyError, ValueError):
            return f"Arm part {part}"

    def caches(self) -> list[Cache]:
        """Return the data and unified caches, by level, the larger first."""
        system, found = self.system, Counter()
        for cpu in sorted(system.cpus(f"{CPU}/online")):
            folder = f"{CPU}/cpu{cpu}/cache"
            for index in system.names(folder, "index"):
                shared = system.cpus(f"{folder}/{index}/shared_cpu_list") or {cpu}
                if cpu == min(shared) and system.text(f"{folder}/{index}/type") in ("Data", "Unified"):
                    level, text = system.number(f"{folder}/{index}/level"), system.text(f"{folder}/{index}/size") or ""
                    nbytes = (leading_int(text) or 0) * UNITS.get(text[-1:], 1)                # "48K"
                    if level and nbytes:
                        found[level, -nbytes, len(shared)] += 1
        if not found:
            system.note("cpu: sysfs does not list caches")
        return [Cache(level, -nbytes, n, n_cpus) for (level, nbytes, n_cpus), n in sorted(found.items())]


class MacCpu:
    """Name and caches by sysctl."""

    def __init__(self, system: System):
        self.system = system

    def name(self) -> str:
        """Return the processor's name."""
        return self.system.sysctl().get("machdep.cpu.brand_string", "unknown")

    def caches(self) -> list[Cache]:
        """Return the data and unified caches, by level, the larger first."""
        values, found = self.system.sysctl(), []
        for prefix, n_cores, n_cpus, _ in MacCores(self.system).levels():
            of_core = max(1, n_cpus // n_cores)
            of_l2 = min(n_cpus, leading_int(values.get(f"{prefix}.cpusperl2", "")) or of_core)
            for level, key, shared in ((1, "l1d", of_core), (2, "l2", of_l2), (3, "l3", n_cpus)):
                if nbytes := leading_int(values.get(f"{prefix}.{key}cachesize", "")):
                    found.append(Cache(level, nbytes, -(-n_cpus // shared), shared))
        return sorted(found, key=lambda c: (c.level, -c.nbytes))


class OtherCpu:
    """The name as Python's platform module has it; caches stay unknown."""

    def __init__(self, system: System):
        self.system = system

    def name(self) -> str:
        """Return the processor's name."""
        import platform

        return platform.processor() or "unknown"

    def caches(self) -> list[Cache]:
        """Return nothing."""
        return []


class NumaNodes:
    """NUMA nodes by sysfs; none elsewhere. Documentation/ABI/stable/sysfs-devices-node."""

    def __init__(self, system: System):
        self.system = system

    def detect(self) -> list[NumaNode]:
        """Return the nodes, by number."""
        system, found = self.system, []
        for node in system.names("/sys/devices/system/node", "node"):
            folder, sizes = f"/sys/devices/system/node/{node}", {}
            for line in (system.text(f"{folder}/meminfo") or "").splitlines():
                words = line.split()                                           # Node 0 MemTotal: 24684092 kB
                if len(words) > 3:
                    sizes[words[2]] = (leading_int(words[3]) or 0) * 1024
            found.append(NumaNode(int(node.removeprefix("node")), tuple(sorted(system.cpus(f"{folder}/cpulist"))),
                                  sizes.get("MemTotal:", 0), sizes.get("MemFree:", 0)))
        return found


def processor(system: System) -> Cpu:
    """Return all about the processors."""
    from pyengine.native import engine

    reader = {"linux": LinuxCpu, "darwin": MacCpu}.get(system.platform, OtherCpu)(system)
    cores, affinity, quota = physical_cores(system), system.affinity(), Cgroups(system).cpu_quota()
    kinds = []
    for kind in ("performance", "efficiency"):
        those = [core for core in cores if core.kind == kind]
        if those:
            clock = max((core.max_mhz for core in those if core.max_mhz), default=None)
            kinds.append(CoreKind(kind, len(those), sum(len(core.cpus) for core in those),
                                  sum(core.usable(affinity) for core in those), clock))
    return Cpu(reader.name(), system.machine, len(cores), sum(len(core.cpus) for core in cores), tuple(kinds),
               None if affinity is None else tuple(sorted(affinity)), quota, threads(cores, affinity, quota),
               tuple(reader.caches()), tuple(engine.isas()))
