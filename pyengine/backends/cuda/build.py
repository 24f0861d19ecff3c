"""The library of CUDA kernels: `python -m pyengine.backends.cuda` makes it with nvcc, in the package, for cards from sm_75 on.

$PYENGINE_CUDA_TARGETS="90a" builds for some cards only, in a fraction of the time. `emulated` builds the same files with a C++ compiler
for the emulator of csrc/emulate, where no card is.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from pyengine.backends.building import CSRC, Job, library, ROOT
from pyengine.compiler import codegen
from pyengine.errors import GraphError

TARGETS = ("75", "80", "86", "89", "90a", "100", "120")      # the last one's PTX too, for what comes after it

# -fmad=false, -ffp-contract=off: whether products and sums are fused is said in the kernels and never left to the compiler.
CUDA_FLAGS = ("-std=c++17", "-O3", "-fmad=false", f"-I{CSRC}", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra")
# -O1: all kernels take a compiler 56 seconds of a processor, with -O2 96.
EMULATED_FLAGS = ("-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
                  "-Wno-unknown-pragmas", f"-I{CSRC}", f"-ffile-prefix-map={ROOT}/=")
# Each load and store calls the emulator as it would ThreadSanitizer, which is not linked; loads of 16 bytes stay whole.
CHECKED_FLAGS = ("-DPE_CHECKED", "-fno-tree-sra", "-fno-tree-fre", "-fno-tree-pre", "-fno-tree-forwprop", "-fsanitize=thread",
                 "--param", "tsan-instrument-func-entry-exit=0")


def sources() -> list[Path]:
    """Return the files of kernels and of the runtime, and the table of kernels, made anew. Raises: GraphError outside of a checkout."""
    if not (CSRC / "cuda").is_dir():
        raise GraphError(f"there is no {CSRC / 'cuda'}: CUDA's kernels are compiled in a checkout of pyengine only")
    codegen.generate(CSRC)
    return [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "gen" / "cuda" / "table.c"]


def gencode(targets: Sequence[str]) -> list[str]:
    """Return nvcc's options for these targets, with the last one's PTX."""
    codes = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in targets]
    last = targets[-1].rstrip("a")
    return [*codes, f"-gencode=arch=compute_{last},code=compute_{last}"]


def nvcc() -> str:
    """Return the path of nvcc. Raises: GraphError where there is none."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise GraphError("nvcc is not on the path: install NVIDIA's CUDA toolkit (12 or newer), or give its bin folder in $PATH")
    return found


def for_cards(to: Path, targets: Sequence[str] = TARGETS) -> None:
    """Compile for cards; `to` is the library."""
    compiler = nvcc()
    command = (compiler, *gencode(targets), *CUDA_FLAGS)
    jobs = [Job(path, (*command, "-x", "cu")) for path in sources()]
    made = library("cuda", jobs, [compiler, "-shared", "-cudart", "static", *gencode(targets)], ROOT / "build" / "cuda")
    new = to.with_suffix(f".{os.getpid()}")
    shutil.copy(made, new)
    new.replace(to)


def emulated(checked: bool = False) -> Path:
    """Compile for the emulator, plainly or so that every access to memory is checked, and return the library."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "c++"
    common = (compiler, *EMULATED_FLAGS)
    watched = CHECKED_FLAGS if checked else ()
    jobs = [Job(path, (*common, *watched, "-x", "c++")) for path in sources()]
    jobs += [Job(path, (*common, "-O2", *watched[:1])) for path in sorted((CSRC / "emulate").glob("*.cpp"))]
    return library("cuda-checked" if checked else "cuda", jobs, [compiler, "-shared", "-pthread"], ROOT / "build" / "emulated")


def main(to: Path) -> None:
    """Make the library for the cards that $PYENGINE_CUDA_TARGETS names, or for all."""
    wanted = os.environ.get("PYENGINE_CUDA_TARGETS")
    try:
        for_cards(to, wanted.replace(",", " ").split() if wanted else TARGETS)
    except GraphError as error:
        sys.exit(str(error))
    print(f"made {to}")
