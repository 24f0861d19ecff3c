"""What a result was measured on and with: it stands in every JSON file. Nothing here names the machine or its user."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from pyengine import DISTRIBUTION

ROOT = Path(__file__).resolve().parent.parent
SIMD_FLAGS = ("avx", "fma", "f16c", "bmi2", "amx", "asimd", "sve", "i8mm", "bf16")      # beginnings of names


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else None


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():                                                      # macOS
        return {"model name": _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()}
    lines = [line.split(":", 1) for line in path.read_text().split("\n\n")[0].splitlines() if ":" in line]
    return {key.strip(): value.strip() for key, value in lines}


def last_level_cache() -> int:
    """Return the bytes of the largest cache that a core sees; 64 MiB where the system does not say."""
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s[:-1]) * {"K": 1 << 10, "M": 1 << 20}[s[-1]] for s in sizes), default=64 << 20)


def version(package: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """Describe CPU, system, tools and versions as plain data for JSON."""
    cpu = _cpuinfo()
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    compiler = _output("cc", "--version")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    commit = _output("git", "rev-parse", "HEAD") if (ROOT / ".git").exists() else None          # an installed package has none
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "family": "/".join(cpu[k] for k in ("cpu family", "model", "stepping") if k in cpu),
        "flags": [f for f in flags if f.startswith(SIMD_FLAGS)],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "last_level_cache": last_level_cache(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "compiler": compiler.splitlines()[0] if compiler else None,
        "python": platform.python_version(),
        "commit": commit and commit + (" and changes" if changed else ""),
        "versions": {"pyengine": version(DISTRIBUTION), **{p: version(p) for p in ("numpy", "llama-cpp-python")}},
    }
