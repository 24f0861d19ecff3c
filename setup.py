"""Compile csrc into one extension, pyengine._engine. C code is generated from the op declarations first.

Files that use PE_KERNEL or PE_NAME are compiled once for each instruction set; the best that the machine has is chosen at run time.
PYENGINE_SANITIZE=1 builds with the address and undefined-behaviour sanitizers.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
sys.path.insert(0, str(ROOT))

AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512"]
ISAS = {
    "x86_64": {"generic": [], "avx2": AVX2, "avx512": AVX512},
    "aarch64": {"generic": [], "neon": ["-march=armv8.2-a+dotprod+fp16"]},
}
ISAS["AMD64"], ISAS["arm64"] = ISAS["x86_64"], ISAS["aarch64"]

COMMON = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden",
          "-pthread"]
C_FLAGS = ["-std=gnu11", *COMMON]
CPP_FLAGS = ["-std=c++17", *COMMON]
ABI_HEADERS = ["dequant.h", "sampling.h", "cpu/pack.h", "limits.h", "bpe.h", "quantize.h"]  # flat functions that Python calls through cffi


def plain(text: str) -> str:
    """A header as cffi reads it: without comments, preprocessor lines, linkage blocks and PE_API."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    text = re.sub(r'#ifdef __cplusplus\s*(extern "C" \{|\})\s*#endif', "", text)
    text = re.sub(r"^\s*#(.*\\\n)*.*$", "", text, flags=re.M)
    return re.sub(r"\n\s*\n+", "\n", text.replace("PE_API ", ""))


def write_abi(path: Path) -> None:
    """pyengine/_abi.py: the flat functions as cffi wants them, parsed now and not at every start."""
    from cffi import FFI

    status = re.search(r"typedef enum pe_status \{.*?\} pe_status;", (CSRC / "pe.h").read_text(), re.S)
    ffi = FFI()
    ffi.cdef(plain(status.group(0)) + "".join(plain((CSRC / h).read_text()) for h in ABI_HEADERS))
    ffi.set_source("pyengine._abi", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    ffi.emit_python_code(str(path))


class Build(build_ext):
    def build_extensions(self) -> None:
        from pyengine.compiler import codegen

        codegen.generate(CSRC)
        isas = ISAS.get(os.environ.get("PYENGINE_ARCH", platform.machine()), {"generic": []})
        for folder in {ROOT / "pyengine", Path(self.get_ext_fullpath("pyengine._engine")).resolve().parent}:
            write_abi(folder / "_abi.py")
        jobs: list[tuple[Path, str, list[str]]] = []
        for src in sorted([*CSRC.glob("*.c"), *(CSRC / "cpu").glob("*.c"), CSRC / "gen" / "table.c", *(CSRC / "bind").glob("*.cpp")]):
            per_isa = src.name == "table.c" or re.search(r"PE_(KERNEL|NAME)\(", src.read_text())
            if per_isa:
                jobs += [(src, isa, [*C_FLAGS, *flags, f"-DPE_ISA={isa}"]) for isa, flags in isas.items()]
            else:
                jobs.append((src, "base", CPP_FLAGS if src.suffix == ".cpp" else C_FLAGS))
        have = [f"-DPE_HAVE_{isa}" for isa in isas if isa != "generic"]
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"] if os.environ.get("PYENGINE_SANITIZE") else []
        headers = [*CSRC.rglob("*.h"), Path(__file__)]
        newest = max(h.stat().st_mtime for h in headers)

        def compile_one(job: tuple[Path, str, list[str]]) -> str:
            src, isa, flags = job
            out = Path(self.build_temp) / ("san" if sanitize else "obj") / isa
            obj = out / src.relative_to(ROOT).with_suffix(".o")
            if obj.exists() and obj.stat().st_mtime > max(newest, src.stat().st_mtime):
                return str(obj)
            include = [str(CSRC / "gen"), pybind11.get_include(), *self.compiler.include_dirs]
            made = self.compiler.compile([str(src.relative_to(ROOT))], output_dir=str(out), include_dirs=include,
                                         extra_postargs=[*flags, *have, *sanitize])
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
