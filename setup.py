"""Compile csrc into one extension, pyengine._engine. C code is generated from the op declarations first.

Files that use PE_KERNEL or PE_NAME are compiled once for each instruction set; the best that the machine has is chosen at run time.
PYENGINE_SANITIZE=address builds with the address and undefined-behaviour sanitizers, PYENGINE_SANITIZE=thread with ThreadSanitizer.
What is built for other machines, with zig: release/wheel.py.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
sys.path.insert(0, str(ROOT))

from csrc import build_rules as rules  # noqa: E402  found through the line above


def machine_built_for() -> str:
    """The processor as `platform.machine()` names it there: Python's platform says so, where that is not both kinds of a Mac."""
    return rules.machine_of(sysconfig.get_platform()) or platform.machine()


def write_abi(path: Path) -> None:
    """pyengine/_abi.py: the flat functions as cffi wants them, parsed now and not at every start."""
    from cffi import FFI

    ffi = FFI()
    ffi.cdef(rules.declarations(rules.abi_headers()))
    ffi.set_source("pyengine._abi", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    ffi.emit_python_code(str(path))


def copy_metal(folder: Path) -> None:
    """The sources of Metal kernels, where an installed package finds them."""
    for source in rules.metal_sources():
        target = folder / source.relative_to(CSRC)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


class Build(build_ext):
    def build_extensions(self) -> None:
        from pyengine.compiler import codegen

        if self.compiler.compiler_type == "msvc":
            raise SystemExit("setup.py: the C files need GCC or clang, and this is Microsoft's compiler: docs/portability.md, 'Windows'")
        if sys.platform == "darwin":
            os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")       # python.org's Python would have both
        codegen.generate(CSRC, rules.TABLES)
        machine = os.environ.get("PYENGINE_ARCH") or machine_built_for()
        for folder in {ROOT / "pyengine", Path(self.get_ext_fullpath("pyengine._engine")).resolve().parent}:
            write_abi(folder / "_abi.py")
            if sysconfig.get_platform().startswith("macosx") and folder != ROOT / "pyengine":
                copy_metal(folder / "_metal")
        if left := rules.left_out(machine, self.compiler.compiler):
            print(f"setup.py: not built, since {' '.join(self.compiler.compiler)} cannot: {', '.join(left)}", file=sys.stderr)
        jobs = [(source, isa, [*rules.C_FLAGS, *flags]) for source, isa, flags in rules.objects(machine, self.compiler.compiler)]
        if "ziglang" in os.environ.get("CC", ""):
            jobs = [(source, isa, [rules.ZIG_WORDS.get(f, f) for f in flags]) for source, isa, flags in jobs]
        jobs += [(source, "base", rules.CPP_FLAGS) for source in sorted((CSRC / "bind").glob("*.cpp"))]
        wanted = os.environ.get("PYENGINE_SANITIZE", "")
        sanitize = rules.sanitizer(wanted)

        def compile_one(job: tuple[Path, str, list[str]]) -> str:
            source, isa, flags = job
            out = Path(self.build_temp) / (wanted or "obj") / isa
            obj = out / source.relative_to(ROOT).with_suffix(".o")
            if not rules.stale(obj, [Path(__file__), Path(rules.__file__)]):
                return str(obj)
            include = [str(CSRC), pybind11.get_include(), *self.compiler.include_dirs]
            made = self.compiler.compile([str(source.relative_to(ROOT))], output_dir=str(out), include_dirs=include,
                                         extra_postargs=["-MMD", *flags, *sanitize])
            return made[0]

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            objects = list(pool.map(compile_one, jobs))
        for ext in self.extensions:
            ext.extra_objects = objects
            ext.extra_link_args = [*sanitize, "-pthread"]
            self.build_extension(ext)

    def build_extension(self, ext: Extension) -> None:
        path = self.get_ext_fullpath(ext.name)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(ext.extra_objects, path, libraries=["m"], extra_postargs=ext.extra_link_args,
                                         build_temp=self.build_temp, target_lang="c++")


# Beside pyengine in a checkout, and inside of it where it is installed: other programs may have packages of these names.
INSIDE = ("bench", "converters")


def packages() -> list[str]:
    """All packages by their installed names."""
    inside = find_packages(str(ROOT), include=[f"{name}{end}" for name in INSIDE for end in ("", ".*")])
    return find_packages(str(ROOT), include=["pyengine", "pyengine.*"]) + [f"pyengine.{name}" for name in inside]


setup(packages=packages(), package_dir={f"pyengine.{name}": name for name in INSIDE}, ext_modules=[Extension("pyengine._engine", [])],
      cmdclass={"build_ext": Build})
