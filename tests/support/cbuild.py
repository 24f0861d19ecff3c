"""Compile single C files of `csrc` for a test and open them through cffi.

The engine's own library is used where it is built and has the functions; this stands in for it elsewhere, so that the
portable C can be tested, also under other compilers and flags, without building everything.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path

import cffi
import pytest

from csrc import build_rules as rules
from pyengine.compiler import codegen
from pyengine.errors import PyEngineError

CSRC = rules.CSRC
FLAGS = (
    *("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"),
)


def _compiler() -> list[str]:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        pytest.skip("needs a C compiler: install gcc or clang, or set CC")
    return compiler.split()


def compile_c(sources: tuple[str, ...], headers: tuple[str, ...], extra_flags: tuple[str, ...] = ()):
    """Compile files of `csrc` to a shared library; return (ffi, lib). Skips the test if there is no C compiler."""
    codegen.generate(CSRC)
    ffi = cffi.FFI()
    ffi.cdef(rules.declarations(CSRC / header for header in headers))
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "library.so")
        files = [str(CSRC / source) for source in sources]
        subprocess.run([*_compiler(), *FLAGS, *extra_flags, *files, "-o", str(library), "-lm"], check=True)
        return ffi, ffi.dlopen(str(library))


@contextlib.contextmanager
def native(*symbols: str):
    """Give `pyengine.native` if it is built and has the functions, else a stand-in compiled here for the while."""
    try:
        from pyengine import native as built

        if all(hasattr(built.lib, symbol) for symbol in symbols):
            yield built
            return
    except (ImportError, PyEngineError):  # the extension is not built
        pass
    stand_in = types.ModuleType("pyengine.native")
    stand_in.ffi, stand_in.lib = compile_c(("host/dequant.c", "host/sampling.c"), ("host/dequant.h", "host/sampling.h"))
    users = ("pyengine.native", "pyengine.native.blocks", "pyengine.text.repetition", "pyengine.text.sampling")
    kept = {name: sys.modules.pop(name, None) for name in users}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pyengine.native", stand_in)
        patch.setattr(sys.modules["pyengine"], "native", stand_in, raising=False)
        yield stand_in
    for name in users:
        sys.modules.pop(name, None)
        if kept[name] is not None:
            sys.modules[name] = kept[name]


def object_of(source: Path, isa: str, compiler: str, flags: Sequence[str]) -> Path:
    """The object of a C file, below build/tests/`isa`: made anew where it is older than what it is made of, else as another test made it."""
    out = rules.CSRC.parent / "build" / "tests" / isa / f"{source.stem}.o"
    if rules.stale(out, [Path(rules.__file__)]):
        out.parent.mkdir(parents=True, exist_ok=True)
        made, listed = out.with_suffix(f".{os.getpid()}.o"), out.with_suffix(f".{os.getpid()}.d")      # two tests at once must not read halves
        subprocess.run([compiler, *flags, "-MMD", "-MF", str(listed), "-c", str(source), "-o", str(made)], check=True)
        listed.replace(out.with_suffix(".d"))
        made.replace(out)
    return out


def run_sanitized(sources: tuple[Path, ...], program: Path) -> None:
    """Build a program with the address and undefined-behaviour sanitizers and run it; a finding fails the test."""
    codegen.generate(CSRC)
    sanitize = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
    flags = tuple(flag for flag in FLAGS if flag not in ("-shared", "-fPIC", "-O3"))
    build = [*_compiler(), *flags, *sanitize, *map(str, sources), "-o", str(program), "-lm"]
    if subprocess.run(build, capture_output=True).returncode:
        pytest.skip("needs a compiler with the address and undefined-behaviour sanitizers (libasan, libubsan)")
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
