"""Kernels, pool and program under sanitizers: what leaves its tensor by one element is found, and no two threads race.

Small programs of tests/c, compiled here; `make sanitize` runs the engine itself, and the tests of kernels, in the same way.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cbuild
import crossbuild
import pytest

from csrc import build_rules as rules
from pyengine.native import engine

ROOT = Path(__file__).resolve().parents[2]
PARTS = [rules.CSRC / "cpu" / f"{name}.c" for name in ("pool", "program", "pack")]
FAULTS = ("read_behind", "write_behind", "write_before", "read_dead", "read_scratch_behind", "write_weights_behind", "read_between_rows",
          "read_other_weights")


def built(name: str, sanitizer: str, folder: Path) -> Path:
    """A program of tests/c with the pool and the program loop. Skips where the compiler has no such sanitizer."""
    out = folder / f"{name}-{sanitizer}"
    command = [*cbuild._compiler(), *rules.C_FLAGS, *rules.sanitizer(sanitizer), ROOT / "tests" / "c" / f"{name}.c", *PARTS, "-o", out]
    nothing = folder / "nothing.c"
    nothing.write_text("int main(void) { return 0; }\n")
    if subprocess.run([*cbuild._compiler(), *rules.sanitizer(sanitizer), nothing, "-o", folder / "nothing"], capture_output=True).returncode:
        pytest.skip(f"needs a compiler with the sanitizer '{sanitizer}'")
    subprocess.run(command, check=True)
    return out


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """Run a program without what was loaded into this one. A hang fails the test."""
    env = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "ASAN_OPTIONS", "UBSAN_OPTIONS")}
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120, env=env)


@pytest.fixture(scope="module")
def red_zones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("red_zones", "address", tmp_path_factory.mktemp("red_zones"))


def test_a_right_program_passes_the_address_sanitizer(red_zones: Path) -> None:
    done = run(red_zones, "right")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_one_element_beside_a_tensor_is_found(red_zones: Path, fault: str) -> None:
    done = run(red_zones, fault)
    assert done.returncode and "use-after-poison" in done.stderr and "in faulty" in done.stderr, done.stderr


def test_pools_and_programs_of_several_threads(tmp_path: Path) -> None:
    """Also that a program in which a kernel refuses ends: members that were slow to see it once waited for ever."""
    program = built("threads", "thread", tmp_path)
    if "unexpected memory mapping" in (done := run(*crossbuild.unshuffled(), program, 3, 3, 3)).stderr:
        pytest.skip("ThreadSanitizer does not run in this kernel's layout of addresses")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.slow
def test_no_kernel_races() -> None:
    """All declared cases and weight formats, on each instruction set, by threads that ThreadSanitizer watches."""
    from test_neon import every_call

    crossbuild.build("native-thread")
    for isa in crossbuild.instruction_sets("native-thread"):
        done = crossbuild.run("native-thread", isa, 3, [call for _, call in every_call()])
        assert not [d.message for d in done if d.status]


@pytest.mark.skipif(not getattr(engine, "SANITIZED", False), reason="needs a build with the address sanitizer: `make sanitize`")
def test_weights_that_were_counted_too_small_are_found(tmp_path: Path) -> None:
    """The whole way: a program of the engine whose memory for weights ends before they do."""
    program = tmp_path / "wrong.py"
    program.write_text("""
import sys
import numpy as np
import pyengine as pe
from pyengine import ops
from pyengine.backends.base import Declared
from pyengine.backends.cpu import Backend

with pe.Graph() as g:
    x = g.input("x", (7, 64))
    y = ops.linear(x, [g.constant(np.ones((32, 64), np.float16))])
prepared = Backend(2).prepare(Declared(list(y)))
prepared.weight_bytes -= int(sys.argv[1])
print(prepared.load().run(x=np.ones((7, 64), np.float32))[0][0, 0])
""")
    for less in (0, 128):
        done = subprocess.run([sys.executable, str(program), str(less)], capture_output=True, text=True, timeout=300,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
        assert bool(done.returncode) == bool(less) and ("use-after-poison" in done.stderr) == bool(less), done.stderr
        assert less or done.stdout == "64.0\n"
