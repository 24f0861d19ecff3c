"""Build tests/c/runner.c with the kernels, for this machine or others, and run op cases through it.

    python tests/support/crossbuild.py                     the runner for this machine and for 64-bit Arm Linux
    python tests/support/crossbuild.py TARGET ...          see TARGETS; for those that cannot run here, compile every C file
    python tests/support/crossbuild.py --count [TARGET]    NEON instructions for 32 weights in the inner loops of the products

What is compiled for which instruction set, and with which flags, is said by csrc/build_rules.py. Objects and runners lie in
build/cross/<target>; what is newer than all that it was made of is kept.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
RUNNER = ROOT / "tests" / "c" / "runner.c"
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from csrc import build_rules as rules  # noqa: E402  found through the line above

CSRC = rules.CSRC


class ToolMissing(Exception):
    """A compiler or an emulator is not installed; the text says how to install it."""


class BuildError(Exception):
    """Files that do not compile, with the compiler's output."""


@dataclass(frozen=True)
class Target:
    """What to build for, and with what: zig for its `triple`, the cross-compiler `gcc`, or this machine's own."""

    machine: str                 # as platform.machine() names it
    triple: str = ""
    gcc: str = ""
    runs: bool = True            # here or under qemu, so that linking makes sense
    sanitizer: str = ""          # as in build_rules.sanitizer

    @property
    def cross(self) -> bool:
        return bool(self.triple or self.gcc)

    @property
    def windows(self) -> bool:
        return "windows" in self.triple

    @property
    def isas(self) -> dict[str, list[str]]:
        return rules.isas(self.machine)

    def compiler(self) -> list[str]:
        """Raises: ToolMissing."""
        if self.triple:
            if importlib.util.find_spec("ziglang") is None:
                raise ToolMissing("needs zig's C compiler: pip install ziglang")
            return [sys.executable, "-m", "ziglang", "cc", "-target", self.triple]
        if self.gcc:
            if shutil.which(self.gcc) is None:
                raise ToolMissing(f"needs {self.gcc}: install gcc-aarch64-linux-gnu and libc6-dev-arm64-cross (Debian)")
            return [self.gcc]
        found = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if not found:
            raise ToolMissing("needs a C compiler: install gcc or clang, or set CC")
        return found.split()

    def flags(self, isa: str) -> list[str]:
        flags = self.isas[isa]
        return [rules.ZIG_WORDS.get(f, f) for f in flags] if self.triple else list(flags)


_HERE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
TARGETS = {
    "native": Target(_HERE),
    "native-thread": Target(_HERE, sanitizer="thread"),
    "linux-aarch64": Target("aarch64", "aarch64-linux-musl"),
    "linux-aarch64-gcc": Target("aarch64", gcc="aarch64-linux-gnu-gcc"),
    "macos-aarch64": Target("aarch64", "aarch64-macos", runs=False),
    "windows-x86_64": Target("x86_64", "x86_64-windows-gnu"),
    "windows-aarch64": Target("aarch64", "aarch64-windows-gnu", runs=False),
}


# Bytes of vectors: in streaming mode, which the emulator makes 32 where nobody asks, and of SVE otherwise, 64 there.
SVL, SVE = "sme-default-vector-length={}", "sve-default-vector-length={}"
LENGTHS = f"{SVL.format(64)},{SVE.format(32)}"                               # those that sme and sve256 are for


def emulator(target: Target, cpu: str = LENGTHS) -> list[str]:
    """What stands before a program of that target to run it here; cpu: settings of an emulated Arm processor. Raises: ToolMissing."""
    if target.windows and sys.platform != "win32":
        if shutil.which("wine"):
            return ["wine"]
        raise ToolMissing("needs wine: install wine and wine64 (Debian)")
    if target.sanitizer == "thread":
        return unshuffled()
    if target.machine == _HERE and sys.platform == "linux" or not target.cross:
        return []
    for name in (os.environ.get("PYENGINE_QEMU", ""), "qemu-aarch64-static", "qemu-aarch64"):
        if name and shutil.which(name):
            return [name, "-cpu", f"max,{cpu}"]
    raise ToolMissing("needs qemu-aarch64: install qemu-user-static (Debian, Ubuntu)")


def emulator_version(target: Target) -> tuple[int, ...]:
    """Of QEMU; empty where nothing is emulated by it. Raises: ToolMissing."""
    command = emulator(target)
    if "-cpu" not in command:
        return ()
    said = subprocess.run([command[0], "--version"], check=True, capture_output=True, text=True).stdout
    return tuple(map(int, re.search(r"version (\d+)\.(\d+)", said).groups()))


def runner_of(name: str) -> Path:
    return ROOT / "build" / "cross" / name / ("runner.exe" if TARGETS[name].windows else "runner")


def environment(target: Target) -> dict[str, str]:
    """What a program of that target is run with. Wine keeps its own disk below build/, and says only what programs say."""
    own = {"WINEPREFIX": str(ROOT / "build" / "cross" / "wine"), "WINEDEBUG": "-all"} if target.windows else {}
    return {**os.environ, **own}


def unshuffled() -> list[str]:
    """What stands before a program with ThreadSanitizer, which does not know every layout of addresses that Linux chooses."""
    return ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []


# ---- building ----------------------------------------------------------------------------------------------------


def _jobs(target: Target) -> list[tuple[Path, str]]:
    """(file, instruction set) of every object; "base" for files that are compiled once."""
    from pyengine.compiler import codegen

    codegen.generate(CSRC, rules.TABLES)
    jobs = [(RUNNER, "base")] if target.runs else []
    return jobs + [(source, isa) for source, isa, _ in rules.objects(target.machine, target.compiler())]


def build(name: str) -> Path:
    """Compile what has changed and link; return the runner (for targets that do not run here, the folder of objects).

    Raises: ToolMissing; BuildError with all that does not compile.
    """
    target, folder = TARGETS[name], ROOT / "build" / "cross" / name
    compiler = target.compiler()
    jobs = _jobs(target)

    def compile_one(job: tuple[Path, str]) -> tuple[Path, bool, str]:
        """The object, whether it is there, and what the compiler said."""
        source, isa = job
        out = folder / isa / f"{source.stem}.o"
        if not rules.stale(out, [Path(__file__), Path(rules.__file__)]):
            return out, True, ""
        out.parent.mkdir(parents=True, exist_ok=True)
        own = rules.have(rules.isas(target.machine, compiler)) if isa == "base" else [*target.flags(isa), f"-DPE_ISA={isa}"]
        own += rules.sanitizer(target.sanitizer)
        # Two builds at once must not read halves.
        made, listed = out.with_suffix(f".{os.getpid()}"), out.with_suffix(f".{os.getpid()}.d")
        command = [*compiler, *rules.C_FLAGS, *own, f"-I{CSRC}", "-MMD", "-MF", str(listed), "-c", str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if not done.returncode:
            listed.replace(out.with_suffix(".d"))
            made.replace(out)
        said = f"{source.relative_to(ROOT)} for {isa}:\n{done.stderr.strip()}\n" if done.stderr else ""
        return out, not done.returncode, said

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        results = list(pool.map(compile_one, jobs))
    broken = [said for _, made, said in results if not made]
    if broken:
        raise BuildError(f"{name}: {len(broken)} of {len(jobs)} files do not compile\n" + "\n".join(broken))
    print("".join(said for _, _, said in results), end="", file=sys.stderr)
    if not target.runs:
        return folder
    objects, runner = [o for o, _, _ in results], runner_of(name)
    if not runner.exists() or runner.stat().st_mtime < max(o.stat().st_mtime for o in objects):
        made = folder / f"{os.getpid()}-{runner.name}"
        static = ["-static"] if target.cross else []
        command = [*compiler, *static, *map(str, objects), "-o", str(made), *([] if target.windows else ["-lm", "-pthread"]),
                   *rules.sanitizer(target.sanitizer)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"{name}: the runner does not link\n{done.stderr}")
        made.replace(runner)
    return runner


def build_binding(name: str) -> Path:
    """Compile csrc/bind/engine.cpp for a target that zig builds for; return the object.

    It reads this Python's headers, which say the same of every 64-bit system but Windows: tests/c/windows has what differs there.

    Raises: ToolMissing; BuildError.
    """
    import pybind11

    target, folder = TARGETS[name], ROOT / "build" / "cross" / name
    compiler = ["c++" if word == "cc" else word for word in target.compiler()]
    out, headers = folder / "base" / "engine.o", folder / "python"
    if not rules.stale(out, [Path(__file__), Path(rules.__file__)]):
        return out
    for include in {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}:
        shutil.copytree(include, headers, dirs_exist_ok=True)
    if target.windows:
        shutil.copy(ROOT / "tests" / "c" / "windows" / "pyconfig.h", headers)
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [*compiler, *rules.CPP_FLAGS, f"-I{CSRC}", f"-I{pybind11.get_include()}", f"-I{headers}", "-MMD", "-MF",
               str(out.with_suffix(".d")), "-c", str(CSRC / "bind" / "engine.cpp"), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{name}: csrc/bind/engine.cpp does not compile\n{done.stderr}")
    return out


# ---- running: the files of runner.c ------------------------------------------------------------------------------

PLAIN, PACK, SAME = 0, 1, 2
MAGIC = int.from_bytes(b"pecases1", "little")


@dataclass
class Memory:
    """One tensor of a case. `raw` is its memory, or with `pack` a matrix in its file's layout; strides are in bytes.

    same: this is another tensor's memory (an output that is one of the inputs).
    """

    dtype: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    raw: bytes
    pack: bool = False
    same: Memory | None = None


@dataclass
class Call:
    """A kernel with its arguments, each a list of tensors (none where one is absent); the last n_out are outputs."""

    op: str
    params: bytes
    arguments: list[list[Memory]]
    n_out: int = 1


@dataclass
class Outcome:
    """What a kernel left: its status and message, and the memory of each tensor of its outputs."""

    status: int
    message: str
    outputs: list[bytes] = field(default_factory=list)


def _words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def _bytes(b: bytes) -> bytes:
    return _words(len(b)) + b + bytes(-len(b) % 8)


def _encode(call: Call) -> bytes:
    flat = [t for group in call.arguments for t in group]
    out = [_bytes(call.op.encode()), _bytes(call.params), _words(len(call.arguments) - call.n_out, call.n_out),
           _words(*map(len, call.arguments))]
    for t in flat:
        fill = (0,) * (6 - len(t.shape))
        role = PLAIN if t.same is None and not t.pack else PACK if t.pack else SAME
        out.append(_words(role, t.dtype, len(t.shape), *t.shape, *fill, *t.strides, *fill))
        if t.same is None:
            out.append(_bytes(t.raw))
        else:
            out.append(_words(next(i for i, other in enumerate(flat) if other is t.same)))
    return b"".join(out)


def run(name: str, isa: str, threads: int, calls: Sequence[Call], codebooks: dict[int, np.ndarray] | None = None,
        cpu: str = LENGTHS, timeout: float = 600) -> list[Outcome]:
    """Run calls one after another on a target that has been built. cpu: as in `emulator`.

    Raises: ToolMissing; RuntimeError when the runner ends early, naming the op that left its memory.
    """
    books = codebooks or {}
    tables = [_words(d) + _bytes(t.tobytes()) for d, t in books.items()]
    parts = [_words(MAGIC, len(books)), *tables, _words(len(calls)), *map(_encode, calls)]
    with tempfile.TemporaryDirectory() as folder:
        cases, results = Path(folder, "cases"), Path(folder, "results")
        cases.write_bytes(b"".join(parts))
        command = [*emulator(TARGETS[name], cpu), str(runner_of(name)), isa, str(threads), str(cases), str(results)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment(TARGETS[name]))
        if done.returncode:
            raise RuntimeError(f"{name} {isa}, {threads} threads: exit code {done.returncode}: {done.stderr.strip()}")
        data = results.read_bytes()
    at = 0

    def word() -> int:
        nonlocal at
        at += 8
        return struct.unpack_from("<q", data, at - 8)[0]

    def blob() -> bytes:
        nonlocal at
        n = word()
        at += -(-n // 8) * 8
        return data[at - -(-n // 8) * 8 :][:n]

    out = []
    for call in calls:
        status, message = word(), blob().decode()
        out.append(Outcome(status, message, [blob() for group in call.arguments[-call.n_out :] for _ in group]))
    assert at == len(data)
    return out


def instruction_sets(name: str, cpu: str = LENGTHS) -> list[str]:
    """Those that a built target can run here; cpu: as in `emulator`."""
    command = [*emulator(TARGETS[name], cpu), str(runner_of(name))]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment(TARGETS[name])).stdout.split()


# ---- counting instructions ---------------------------------------------------------------------------------------

_PRODUCTS = {"sdot": 1, "smmla": 2, "smopa": 32}                                # rows of weights x 4 of k x rows of x: 4, 8, 256; twice, of SVE
_BRANCH = re.compile(r"(?:b|b\.\w+|cbn?z|tbn?z)\s.*?0x([0-9a-f]+) <")


def _loops(code: Path) -> dict[str, list[list[str]]]:
    """The instructions of each loop, shortest first, by function: from the target of a branch back to the branch."""
    tool = shutil.which("llvm-objdump")
    if tool is None:
        raise ToolMissing("needs llvm-objdump: install llvm")
    text = subprocess.run([tool, "-d", "--no-show-raw-insn", "--mattr=+dotprod,+fullfp16,+i8mm,+sve2,+sme", str(code)], check=True,
                          capture_output=True, text=True).stdout
    out = {}
    for name, body in re.findall(r"^[0-9a-f]+ <(\w+)>:\n(.*?)(?:\n\n|\Z)", text, re.M | re.S):
        lines = [(int(a, 16), ins.strip()) for a, _, ins in (line.partition(":") for line in body.splitlines())]
        number = {a: i for i, (a, _) in enumerate(lines)}
        found = [(number.get(int(m[1], 16), i + 1), i) for i, (_, ins) in enumerate(lines) if (m := _BRANCH.match(ins))]
        out[name] = sorted(([ins for _, ins in lines[a : b + 1]] for a, b in found if a <= b), key=len)
    return out


def _cell(loops: list[list[str]], rows: int, least: float = 1) -> str:
    """Instructions of the shortest loop with the products of so many rows and `least` of a step, and those of the stack."""
    for loop in loops:
        steps = sum(_PRODUCTS.get(i.split()[0], 0) * (1 + (" z" in i)) for i in loop) / (32 * rows)
        if steps >= least:
            return f"{len(loop) / steps / 16:.1f} ({sum('[sp' in i for i in loop) / steps / 16:.1f})"
    raise BuildError(f"no loop of {rows} rows is found")


def _unpacked(loops: list[list[str]]) -> str:
    """Those of the shortest loop that stores the 32 vectors of codes of a whole step."""
    for loop in loops:
        stored = [i for i in loop if re.match(r"st(?:u?r|p)\s+[qz]|st2\s|st1[bwd]\s", i) and "[sp" not in i]
        stores = len(stored) + sum(i.startswith(("stp", "st2")) or " z" in i.replace("\t", " ").replace("{", "") for i in stored)
        if stores >= 32:
            return f"{len(loop) / 16:.1f} ({sum('[sp' in i for i in loop) / 16:.1f})"
    raise BuildError("no loop that stores a step is found")


def instruction_counts(name: str) -> str:
    """A table: instructions for one block of 32 weights of one matrix row, and in brackets those that touch the stack.

    decode: the loop for 1 and for 2 rows of x; unpack: the loop that opens a panel, once for all rows of x; tile: the loop that
    multiplies it with 4 rows, or 16 with SME. A step is 16 such blocks, and for each row of x 32 sdot or 16 smmla; for 16 rows 8 smopa.
    """
    from pyengine.dtype import PACKED_FORMS

    build(name)
    objects = ROOT / "build" / "cross" / name
    few = {isa: _loops(objects / isa / "linear_few.o") for isa in ("neon", "sve256")}
    tiles = {isa: _loops(objects / isa / "linear_tiles.o") for isa in ("neon", "i8mm", "sve256")}
    outer = _loops(objects / "sme" / "linear_sme.o")
    kinds = ["decode, 1 row", "decode, 2 rows", "unpack", "tile, 4 rows"]
    heads = ["format", *kinds, *(f"i8mm: {k}" for k in kinds[2:]), *(f"sve256: {k}" for k in kinds), "sme: unpack", "sme: tile, 16 rows"]
    rows = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for form, packed in PACKED_FORMS.items():
        if packed.steps is None:
            continue
        tile = "zero128" if packed.zero == 128 else packed.steps
        cells = []
        for isa, loops in tiles.items():  # neon takes a part of 4 rows of the weights after the other
            cells += [_cell(few[isa][f"decode_{form}_{n}"], n) for n in (1, 2) if isa in few]
            cells += [_unpacked(loops[f"unpack_{form}"]), _cell(loops[f"tile_{tile}"], 4, 1 / 4 if isa == "neon" else 1)]
        cells += [_unpacked(outer[f"unpack_{form}"]), _cell(outer[f"integers_{'zero' if tile == 'zero128' else tile}"], 16)]
        rows.append("| " + " | ".join([form, *cells]) + " |")
    return "\n".join(rows)


def main(names: Sequence[str]) -> int:
    if names and names[0] == "--count":
        print(instruction_counts(*names[1:] or ["linux-aarch64"]))
        return 0
    status = 0
    for name in names or ("native", "linux-aarch64"):
        if name not in TARGETS:
            print(f"no target {name!r}; there are {', '.join(TARGETS)}", file=sys.stderr)
            return 2
        try:
            built = build(name)
            if TARGETS[name].triple:
                build_binding(name)
            can = f", runs {', '.join(instruction_sets(name))}" if TARGETS[name].runs else ": all C files compile"
            print(f"{name}: {built.relative_to(ROOT)}{can}")
        except (ToolMissing, BuildError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
