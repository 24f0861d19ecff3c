"""What is compiled from csrc, for which instruction sets and with which flags: for setup.py, and for tests that compile."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

CSRC = Path(__file__).resolve().parent

_AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
_X86 = {
    "generic": [],
    "avx2": _AVX2,
    "avxvnni": [*_AVX2, "-mavxvnni"],                  # GCC 11, clang 12
    "avx512": [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512"],
}
_ARM = {
    "generic": [],
    "neon": ["-march=armv8.2-a+dotprod+fp16"],
    "i8mm": ["-march=armv8.2-a+dotprod+fp16+i8mm"],
    "sve256": ["-march=armv8.2-a+dotprod+fp16+i8mm+sve", "-msve-vector-bits=256"],
    "sme": ["-march=armv8.2-a+dotprod+fp16+i8mm+sme"],  # clang 18
}
_ISAS = {"x86_64": _X86, "AMD64": _X86, "amd64": _X86, "aarch64": _ARM, "arm64": _ARM}

# An instruction set that differs from another one in products with weights only: for it these files are compiled, and a table of their
# kernels (`codegen.generate` writes it); all other kernels are those of the set named (cpu/isa.c).
PRODUCTS = sorted([*CSRC.glob("cpu/linear*.c"), CSRC / "cpu" / "experts.c"])
TABLES = {"products": PRODUCTS}
PARTIAL = {"avxvnni": "avx2", "sve256": "i8mm", "sme": "i8mm"}

# What a compiler must be able to read, beside the flags, to build a partial set. GCC, which knows SME from 14 on, makes vectors of SVE out of
# ordinary code too where it is told of SME, and Apple's processors run SVE in streaming mode only.
_CLANG = "#if !defined(__clang__)\n#error\n#endif\n"
_READS = {"sve256": f"{_CLANG}#include <arm_neon_sve_bridge.h>\n", "sme": f"{_CLANG}#include <arm_sme.h>\n"}

# zig names processors by -mcpu with LLVM's words for features.
ZIG_WORDS = {"-march=armv8.2-a+dotprod+fp16": "-mcpu=generic+v8_2a+dotprod+fullfp16",
             "-march=armv8.2-a+dotprod+fp16+i8mm": "-mcpu=generic+v8_2a+dotprod+fullfp16+i8mm",
             "-march=armv8.2-a+dotprod+fp16+i8mm+sve": "-mcpu=generic+v8_2a+dotprod+fullfp16+i8mm+sve",
             "-march=armv8.2-a+dotprod+fp16+i8mm+sme": "-mcpu=generic+v8_2a+dotprod+fullfp16+i8mm+sme"}

# -ffp-contract=off: whether products and sums are fused is said in simd.h and never left to the compiler.
COMMON = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden",
          "-pthread"]
C_FLAGS = ["-std=gnu11", *COMMON]
CPP_FLAGS = ["-std=c++17", *COMMON]


def machine_of(system: str) -> str | None:
    """The processor in the name of a platform (`sysconfig.get_platform()`: linux-x86_64, macosx-11.0-arm64), None for several."""
    machine = system.rpartition("-")[2]
    return None if machine in ("universal2", "fat64", "intel") else machine


def sanitizer(name: str) -> list[str]:
    """What the flags above end with for a sanitizer: "address" (with undefined behaviour), "thread", or "" for none. Raises: ValueError.

    -O1 and -g1: with checks, and in full, unrolled kernels take the compiler minutes each.
    """
    kinds = {"": [], "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"], "thread": ["-fsanitize=thread"]}
    if name not in kinds:
        raise ValueError(f"PYENGINE_SANITIZE={name}: address or thread")
    return [*kinds[name], "-fno-omit-frame-pointer", "-g1", "-O1"] if name else []


def isas(machine: str, compiler: Sequence[str] = ()) -> dict[str, list[str]]:
    """The instruction sets built for a machine (as `platform.machine()` names it), with the flags of each.

    compiler: a command; partial sets that it does not know are left out: it is older than they are, or `_READS` says what it lacks.
    """
    found = _ISAS.get(machine, {"generic": []})
    return {isa: flags for isa, flags in found.items() if not compiler or isa not in PARTIAL or _knows(tuple(compiler), tuple(flags), isa)}


def left_out(machine: str, compiler: Sequence[str]) -> list[str]:
    """The instruction sets of a machine that this compiler, a command, cannot build."""
    return sorted(isas(machine).keys() - isas(machine, compiler).keys())


@functools.cache
def _knows(compiler: Sequence[str], flags: Sequence[str], isa: str) -> bool:
    words = [ZIG_WORDS.get(f, f) for f in flags] if "ziglang" in compiler else flags
    command = [*compiler, *words, "-E", "-x", "c", "-", "-o", os.devnull]
    return subprocess.run(command, input=_READS.get(isa, ""), text=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def have(isas: Iterable[str]) -> list[str]:
    """What tells cpu/isa.c which instruction sets there are beside the generic one."""
    return [f"-DPE_HAVE_{isa}" for isa in isas if isa != "generic"]


def sources() -> list[Path]:
    """All C files of the engine; the generated tables must be there already."""
    return sorted([*CSRC.glob("host/*.c"), *CSRC.glob("cpu/*.c"), *(CSRC / "gen" / "cpu" / f"{name}.c" for name in ("table", *TABLES))])


def per_isa(source: Path) -> bool:
    """Whether a file is compiled once for each instruction set, under the names that PE_NAME makes."""
    return re.search(r"\bPE_(KERNEL|NAME|SCRATCH)\(", source.read_text(encoding="utf-8")) is not None


def objects(machine: str, compiler: Sequence[str] = ()) -> list[tuple[Path, str, list[str]]]:
    """(C file, instruction set, its flags) of every object; "base" for files that are compiled once. compiler: as in `isas`."""
    out, built = [], isas(machine, compiler)
    for source in sources():
        if not per_isa(source):
            out.append((source, "base", have(built)))
            continue
        tables = source.stem in TABLES                        # of the partial sets only; the whole ones have all kernels in one
        wanted = {isa for isa in built if (isa in PARTIAL and (tables or source in PRODUCTS)) or (isa not in PARTIAL and not tables)}
        out += [(source, isa, [*flags, f"-DPE_ISA={isa}"]) for isa, flags in built.items() if isa in wanted]
    return out


def stale(obj: Path, also: Iterable[Path]) -> bool:
    """Whether an object must be compiled again: it, its list of files (-MMD), or one of these files is missing or newer.

    also: files that the compiler does not list, such as those that hold the flags.
    """
    listed = obj.with_suffix(".d")
    if not obj.exists() or not listed.exists():
        return True
    names = listed.read_text(encoding="utf-8").split(": ", 1)[1].replace("\\\n", " ").split()
    made = obj.stat().st_mtime
    return any(not p.exists() or p.stat().st_mtime > made for p in [*map(Path, names), *also])


def metal_sources() -> list[Path]:
    """Kernels for Macs and the headers that they include: an installation there holds them as texts, and compiles what it uses."""
    shared = (CSRC / name for name in ("functions.h", "quants.h", "taps.h", "weight.h", "gen/formats.h"))
    return [*sorted(p for p in (CSRC / "metal").iterdir() if p.suffix in (".metal", ".h")), *shared]


def abi_headers() -> list[Path]:
    """Headers of flat functions, which Python calls through cffi."""
    headers = sorted(h for folder in ("host", "cpu", "cuda") for h in CSRC.glob(f"{folder}/*.h"))
    return [h for h in headers if re.search(r"^PE_API ", h.read_text(encoding="utf-8"), re.M)]


def plain(text: str) -> str:
    """A header as cffi reads it: without comments, preprocessor lines, linkage blocks and PE_API."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    text = re.sub(r'#ifdef __cplusplus\s*(extern "C" \{|\})\s*#endif', "", text)
    text = re.sub(r"^\s*#(.*\\\n)*.*$", "", text, flags=re.M)
    return re.sub(r"\n\s*\n+", "\n", text.replace("PE_API ", ""))


def declarations(headers: Iterable[Path]) -> str:
    """Everything that cffi must read for the functions of these headers."""
    status = re.search(r"typedef enum pe_status \{.*?\} pe_status;", (CSRC / "pe.h").read_text(encoding="utf-8"), re.S)
    return plain(status.group(0)) + "".join(plain(h.read_text(encoding="utf-8")) for h in headers)
