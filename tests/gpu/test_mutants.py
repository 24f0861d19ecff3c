"""Faults that are planted in the CUDA kernels themselves: each is found by the emulator's checks, at a line of its file.

A mutant is one file of csrc/cuda with one piece of text replaced, compiled beside all other files as they are.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from linear_on_device import LinearOnDevice
from op_cases import KernelError, rng_of, stored
from test_linear_kernels import Matrix, rows_of

from pyengine.backends.building import CSRC, Job, library, ROOT
from pyengine.backends.cuda import build
from pyengine.backends.cuda.library import Library
from pyengine.graph.op import REGISTRY

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler: install g++")]


def mutated(file: str, old: str, new: str) -> Library:
    """The checked library with one change; `old` occurs once."""
    text = (CSRC / "cuda" / file).read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} times {old!r}"
    path = ROOT / "build" / "emulated" / "mutants" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace(old, new))
    common = (os.environ.get("CXX", "g++"), *build.EMULATED_FLAGS)
    kernels = (*common, *build.CHECKED_FLAGS, "-x", "c++")
    jobs = [Job(p, kernels) if p.name != file else Job(path, (*kernels, f"-iquote{CSRC / 'cuda'}")) for p in build.sources()]
    jobs += [Job(p, (*common, "-DPE_CHECKED")) for p in sorted((CSRC / "emulate").glob("*.cpp"))]
    return Library(library("cuda-mutant", jobs, [common[0], "-shared", "-pthread"], ROOT / "build" / "emulated"), True)


def product(name: str, n: int, k: int, m: int) -> Callable[[LinearOnDevice], None]:
    """A product of m rows with an [n, k] matrix of a format."""
    def run(kernels: LinearOnDevice) -> None:
        rng = rng_of((name, n, k, m))
        w = Matrix(rng, name, n, k)
        kernels.linear(rows_of(rng, m, k), [w])
    return run


def softmax(kernels: LinearOnDevice) -> None:
    """Rows that a block's warps share: the largest element of all is needed by each."""
    x = rng_of("softmax").standard_normal((3, 4096)).astype(np.float32)
    kernels.call("softmax", [x], [np.zeros_like(x)], {"scale": 1.0})


def matmul(kernels: LinearOnDevice) -> None:
    """A product of activations whose sizes are no multiples of a tile's."""
    rng = rng_of("matmul")
    x, y = (rng.standard_normal(shape).astype(np.float32) for shape in ((70, 50), (66, 50)))
    kernels.call("matmul", [x, y], [np.zeros((70, 66), np.float32)], {})


def attention(kernels: LinearOnDevice) -> None:
    """Rows that see each other, over keys and values of F16: slices of both take turns in one buffer."""
    rng, m = rng_of("attention"), 40
    q, cache, lo = rng.standard_normal((m, 1, 128)).astype(np.float32), stored(rng.standard_normal((1, m, 128)), "F16"), np.zeros(m, np.int32)
    inputs = [q, cache, cache, lo, lo + m, *[None] * (len(REGISTRY["attention"].args) - 5)]
    kernels.call("attention", inputs, [np.zeros((m, 128), np.float32)], {"scale": 0.125})


@dataclass(frozen=True)
class Mutant:
    """What is replaced in which file, what runs, and what must be said."""

    file: str
    old: str
    new: str
    run: Callable[[LinearOnDevice], None]
    said: str


TILES = product("Q4_K", 100, 1280, 70)
MUTANTS = {
    "no barrier before a stage is read": Mutant("linear_tiles.cu", "__syncthreads(); /* the stage", "/* the stage", TILES, "has written so far"),
    "one group too many under way": Mutant("linear_tiles.cu", "cp_async_wait<S - 2>()", "cp_async_wait<S - 1>()", TILES, "that is still under way"),
    "scales read before all lanes wrote theirs": Mutant("linear_tiles.cu", "expanded);\n  __syncwarp();", "expanded);", TILES, "has written so far"),
    "maxima read before all are there": Mutant("norm.cu", "  __syncthreads();\n", "", softmax, "has written so far"),
    "a slice replaced while others read it": Mutant("attention_float.cu", "__syncthreads();\n      held.store", "held.store", attention,
                                                    "a race: it writes shared memory"),
    "a tile over the last row": Mutant("matmul.cu", "row + i < p.x.rows", "row + i <= p.x.rows", matmul, "out of bounds: writes")}


def found(name: str) -> str:
    """What the checks say of a mutant."""
    m = MUTANTS[name]
    try:
        m.run(LinearOnDevice(mutated(m.file, m.old, m.new), 0))
    except KernelError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_in_a_kernel_is_found(name: str) -> None:
    """In a process of its own: a process has room for the thread-local variables of five such libraries beside what else it loads."""
    code = "import sys, test_mutants; print(test_mutants.found(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, name], cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), *sys.path))},
                          capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    m, said = MUTANTS[name], done.stdout
    assert m.said in said and "kernel " in said and re.search(rf"{m.file}:|csrc/cuda/\w+.h:", said), said
