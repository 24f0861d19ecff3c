"""Main memory that this process may take: what the system can free, within the limits of its control groups.

Swap is never counted: weights that are read once a token would be read from the disk once a token.
"""

from __future__ import annotations

from collections.abc import Iterator

from pyengine.hardware.system import leading_int, split_pairs, System

# Of versions 2 and 1: limits, usage, and the line of memory.stat that counts unused pages of files.
FILES = ((("memory.max", "memory.high"), "memory.current", "inactive_file"),
         (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"))
NO_LIMIT = 2**60                     # control groups of version 1 write 2**63 rounded down to a page for "no limit"


class Cgroups:
    """The control groups of this process, of version 1, 2 or both: containers and services are limited by them.

    A limit of any group on the way from the process's own to the top holds, so each is read. In a container without a
    namespace of its own, /proc/self/cgroup names the path that the host sees; the fourth field of mountinfo says which
    part of it is mounted. Linux: Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst, cgroup_namespaces(7).
    """

    def __init__(self, system: System):
        self.system = system

    def memory(self) -> list[tuple[int, int]]:
        """Return (limit, used) in bytes of each group that has a limit, the process's own first.

        Used is without `inactive_file`: pages of files that nobody has touched lately are counted as used by the group
        and are dropped by the kernel before it refuses memory to it. A model file just read is such pages. (Kubernetes
        counts a container's working set so.) Pages in use by others of the group, and active ones, stay counted.
        memory.high counts as a limit: beyond it the kernel slows the group down to a crawl.
        """
        found = []
        for folder in self._folders("memory"):
            for limits, usage, stat in FILES:
                numbers = [self.system.number(f"{folder}/{name}") for name in limits]
                known = [n for n in numbers if n is not None and n < NO_LIMIT]
                if known:
                    unused = leading_int(self.system.pairs(f"{folder}/memory.stat").get(stat, "")) or 0
                    found.append((min(known), max(0, (self.system.number(f"{folder}/{usage}") or 0) - unused)))
        return found

    def cpu_quota(self) -> float | None:
        """Return the processors' time that the tightest group gives (1.5: a CPU and a half); None: no limit."""
        found = []
        for folder in self._folders("cpu"):
            quota, _, period = (self.system.text(f"{folder}/cpu.max") or "").partition(" ")
            pair = (leading_int(quota), leading_int(period))
            if pair == (None, None):                                           # version 1, which has -1 for "no limit"
                pair = tuple(self.system.number(f"{folder}/cpu.cfs_{name}_us") for name in ("quota", "period"))
            if pair[0] and pair[1]:
                found.append(pair[0] / pair[1])
        return min(found, default=None)

    def _folders(self, controller: str) -> Iterator[str]:
        """Yield the folders of this process's groups, from its own up to the mounted top."""
        for version2, controllers, path in self._paths():
            if not (version2 or controller in controllers):
                continue
            for top, mounted, of_version2, options in self._mounts():
                if of_version2 != version2 or not (version2 or controller in options):
                    continue
                above, parts = ([p for p in folder.split("/") if p] for folder in (top, path))
                parts = parts[len(above):] if parts[:len(above)] == above else []
                if ".." in parts:                                              # a group outside of the namespace's top
                    parts = []
                for n in range(len(parts), -1, -1):
                    yield "/".join((mounted, *parts[:n]))
                break

    def _paths(self) -> Iterator[tuple[bool, list[str], str]]:
        for line in (self.system.text("/proc/self/cgroup") or "").splitlines():
            number, controllers, path = (line.split(":", 2) + ["", ""])[:3]    # "0::/a/b" or "4:memory:/a/b"
            yield number == "0" and not controllers, controllers.split(","), path

    def _mounts(self) -> Iterator[tuple[str, str, bool, list[str]]]:
        for line in (self.system.text("/proc/self/mountinfo") or "").splitlines():
            before, _, after = line.partition(" - ")
            left, right = before.split(), after.split()
            if len(left) > 4 and right[:1] in (["cgroup"], ["cgroup2"]):
                yield left[3], left[4], right[0] == "cgroup2", right[-1].split(",")


class LinuxMemory:
    """(total, available) by /proc/meminfo, where MemAvailable is what the kernel can give without swapping."""

    def __init__(self, system: System):
        self.system = system

    def detect(self) -> tuple[int, int]:
        """Return bytes in all and bytes that can be taken; (0, 0) where the system does not say."""
        lines = self.system.pairs("/proc/meminfo", ":")
        total, free, available = (leading_int(lines.get(k, "")) for k in ("MemTotal", "MemFree", "MemAvailable"))
        if total is None:
            self.system.note("memory: /proc/meminfo does not say how much there is; 0 is assumed")
            return 0, 0
        if available is None:
            self.system.note("memory: the kernel does not say what is available (before 3.14); what is free counts")
        return total * 1024, min(total, free or 0 if available is None else available) * 1024


class MacMemory:
    """(total, available) by sysctl and vm_stat: free, speculative and inactive pages can be taken."""

    def __init__(self, system: System):
        self.system = system

    def detect(self) -> tuple[int, int]:
        """Return bytes in all and bytes that can be taken; (0, 0) where the system does not say."""
        total = leading_int(self.system.sysctl().get("hw.memsize", ""))
        text = self.system.run("vm_stat") or ""
        pages = [leading_int(split_pairs(text, ":").get(f"Pages {k}", "")) for k in ("free", "speculative", "inactive")]
        size = leading_int(text.partition("page size of ")[2])
        if total is None or size is None or None in pages:
            self.system.note("memory: sysctl or vm_stat do not say how much there is; 0 is assumed")
            return total or 0, 0
        return total, min(total, size * sum(pages))


class OtherMemory:
    """(total, available) as psutil has it: Windows and others."""

    def __init__(self, system: System):
        self.system = system

    def detect(self) -> tuple[int, int]:
        """Return bytes in all and bytes that can be taken."""
        import psutil

        found = psutil.virtual_memory()
        return found.total, found.available


def main_memory(system: System) -> tuple[int, int]:
    """Return the machine's (total, available) bytes, without limits of control groups."""
    kind = {"linux": LinuxMemory, "darwin": MacMemory}.get(system.platform, OtherMemory)
    return kind(system).detect()
