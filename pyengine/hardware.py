"""What this machine has: memory that a process may take, cores, instruction set."""

from __future__ import annotations

from pathlib import Path

import psutil


def _number(path: str) -> int | None:
    """A number in a control file; None if it is absent or says "max"."""
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def memory_limit(root: str = "/sys/fs/cgroup") -> tuple[int, int] | None:
    """(limit, used) in bytes of the control group that this process is in, version 2 or 1; None without a limit."""
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        top = _number(f"{root}/{limit}")
        if top is not None and top < 2**60:
            return top, _number(f"{root}/{used}") or 0
    return None


def available_memory() -> int:
    """Bytes of main memory that can be taken now: what the system can free, within the container's limit."""
    free = psutil.virtual_memory().available
    limit = memory_limit()
    return free if limit is None else max(0, min(free, limit[0] - limit[1]))
