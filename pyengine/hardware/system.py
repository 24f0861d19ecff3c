"""The machine as detectors read it: files, commands, environment. A test hands over a recorded machine instead."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

MAX_CPUS = 1 << 16                   # no machine has more; a list that names more is no list of CPUs
COMMAND_SECONDS = 5.0                # longest wait for a system program; sysctl and vm_stat take milliseconds


def run_command(*command: str) -> str | None:
    """Return what a program wrote to standard output; None if it is not there or wrote nothing."""
    import subprocess

    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMMAND_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout or None


def own_affinity() -> frozenset[int] | None:
    """Return the logical CPUs that this process may run on; None where the system has no such set (macOS)."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def load_nvml() -> Any:
    """Return the module pynvml (the package nvidia-ml-py). Raises: ImportError."""
    import pynvml

    return pynvml


def parse_cpus(text: str) -> frozenset[int]:
    """Return the set that a kernel list such as "0-3,8" names; a part that is no range of CPUs is left out."""
    found: set[int] = set()
    for part in text.split(","):
        first, last = (whole_int(end) for end in (part.partition("-")[0], part.rpartition("-")[2]))
        if first is not None and last is not None and last < MAX_CPUS:
            found.update(range(first, last + 1))
    return frozenset(found)


class System:
    """The system that detectors examine. Detectors leave in `notes` what they could not find out, and what is assumed instead."""

    def __init__(self, root: str = "/", platform: str = sys.platform, machine: str | None = None,
                 environ: Mapping[str, str] = os.environ, run: Callable[..., str | None] = run_command,
                 affinity: Callable[[], frozenset[int] | None] = own_affinity, nvml: Callable[[], Any] = load_nvml):
        self.root, self.platform, self.environ = root.rstrip("/"), platform, environ
        self.run, self.affinity, self.nvml = run, affinity, nvml
        uname = os.uname().machine if hasattr(os, "uname") else environ.get("PROCESSOR_ARCHITECTURE", "unknown")
        self.machine = machine or uname
        self.notes: list[str] = []
        self._sysctl: dict[str, str] | None = None

    def note(self, text: str) -> None:
        """Remember what the reader of the result must know, without repetition."""
        if text not in self.notes:
            self.notes.append(text)

    def text(self, path: str) -> str | None:
        """Return a file's text without white space around it; None if it cannot be read."""
        try:
            with open(self.root + path, encoding="utf-8", errors="replace") as file:
                return file.read().strip()
        except OSError:
            return None

    def number(self, path: str) -> int | None:
        """Return the number that a file holds; None if it cannot be read or says something else ("max", -1)."""
        text = self.text(path)
        return None if text is None else whole_int(text)

    def cpus(self, path: str) -> frozenset[int]:
        """Return the logical CPUs that a file lists; empty if it cannot be read."""
        return parse_cpus(self.text(path) or "")

    def names(self, path: str, prefix: str = "") -> list[str]:
        """Return a folder's entries that are `prefix` and a number, by number; empty if there is no such folder."""
        try:
            found = os.listdir(self.root + path)
        except OSError:
            return []
        numbered = [n for n in found if n.startswith(prefix) and n.removeprefix(prefix).isdecimal()]
        return sorted(numbered, key=lambda n: int(n.removeprefix(prefix)))

    def exists(self, path: str) -> bool:
        """Say whether there is such a file or folder."""
        return os.path.exists(self.root + path)

    def pairs(self, path: str, separator: str | None = None) -> dict[str, str]:
        """Return a file's lines "key value" as a dictionary; of a repeated key, the first."""
        return split_pairs(self.text(path) or "", separator)

    def sysctl(self) -> dict[str, str]:
        """Return what macOS says about its hardware, by sysctl's names."""
        if self._sysctl is None:
            self._sysctl = split_pairs(self.run("sysctl", "hw", "machdep.cpu", "iogpu") or "", ":")
        return self._sysctl


def split_pairs(text: str, separator: str | None = None) -> dict[str, str]:
    """Return lines "key value" as a dictionary; of a repeated key, the first."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        key, value = (*line.strip().split(separator, 1), "", "")[:2]
        found.setdefault(key.strip(), value.strip())
    return found


def whole_int(text: str) -> int | None:
    """Return the number that a text is; None if it is not one, or not one of 64 bits."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 20 else None


def leading_int(text: str) -> int | None:
    """Return the number that a text begins with: 24684092 of "24684092 kB"."""
    return whole_int(text[:len(text) - len(text.lstrip("0123456789"))])
