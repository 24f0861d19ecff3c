"""What NVIDIA's assembler says of kernels: registers, spills, stack. nvcc compiles for cards that are not here."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from pyengine.backends.cuda.build import CUDA_FLAGS, nvcc

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
FLAGS = [f for f in CUDA_FLAGS if not f.startswith("-I")]      # those that do not name a folder of this machine
DECLARED = "csrc/gen/kernels.h"
KEPT = ROOT / "build" / "ptxas"                              # answers by the hash of what was compiled


class Kernel(NamedTuple):
    """One kernel for one target. spills: bytes stored and loaded."""

    name: str
    registers: int
    spills: int
    stack: int


def included(path: Path, seen: set[Path] | None = None) -> set[Path]:
    """Return a source and all files of csrc that it includes by `#include "..."`, and those they include."""
    seen = set() if seen is None else seen
    if path in seen or not path.is_file():
        return seen
    seen.add(path)
    for name in re.findall(r'^\s*#include "([^"]+)"', path.read_text(encoding="utf-8"), re.M):
        found = next((p for p in (path.parent / name, ROOT / "csrc" / name) if p.is_file()), None)
        if found is not None and "emulate" not in found.parts:
            included(found.resolve(), seen)
    return seen


def content(paths: Iterable[Path], code_only: bool = False) -> str:
    """Return a hash of files' names and texts; code_only: without comments, empty lines, the ends of lines, and what gen/kernels.h
    declares of ops that none of these files names."""
    texts = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in sorted(paths)}
    if code_only:
        texts = {name: re.sub(r"\s+\n", "\n", re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S)) for name, text in texts.items()}
        if DECLARED in texts:
            others = "".join(text for name, text in texts.items() if name != DECLARED)
            texts[DECLARED] = "".join(part for op, part in declarations(texts[DECLARED])
                                      if re.search(rf"\bpe_{op}_params\b|\bPE_{op.upper()}_|\(cuda, {op}\)", others))
    return hashlib.sha256("".join(f"{name}\0{text}\0" for name, text in texts.items()).encode()).hexdigest()[:16]


def declarations(header: str) -> list[tuple[str, str]]:
    """Return what gen/kernels.h declares of each op: (op, its part of the text)."""
    parts = re.split(r"(?=^#ifndef PE_\w+_PARAMS$)", header, flags=re.M)[1:]
    return [(re.search(r"PE_NAME\((\w+)\)", part)[1], part) for part in parts]


def sources() -> list[Path]:
    """Return the files with kernels."""
    return [p for p in sorted(CUDA.glob("*.cu")) if "__global__" in p.read_text(encoding="utf-8")]


def plain(name: str) -> str:
    """Shorten a demangled name: `binary_kernel<0>(...)` without its parameters, namespaces and return type."""
    name = re.sub(r"\(anonymous namespace\)::|\bpe::|^void ", "", name)
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return name[:i]
    return name


def demangled(names: list[str]) -> list[str]:
    """Return C++ names in words."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [plain(line) for line in done.stdout.splitlines()]


def parsed(text: str) -> list[Kernel]:
    """Read the assembler's `-v` output."""
    found: list[list[int]] = []
    names: list[str] = []
    for line in text.splitlines():
        if m := re.search(r"Compiling entry function '(\w+)'", line):
            names.append(m[1])
            found.append([0, 0, 0])
        elif found and (m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)):
            if found[-1][0] == 0:                            # functions that are called have lines of their own behind it
                found[-1][1:] = int(m[2]) + int(m[3]), int(m[1])
        elif found and (m := re.search(r"Used (\d+) registers", line)):
            found[-1][0] = int(m[1])
    return [Kernel(name, *numbers) for name, numbers in zip(demangled(names) if names else [], found)]


def compiled(path: Path, target: str, kept_only: bool = False) -> list[Kernel]:
    """Return what the assembler says of a file's kernels for a target; kept_only: nothing where that was not compiled before.

    Raises: RuntimeError with the compiler's words, warnings too.
    """
    mark = hashlib.sha256(f"{content(included(path), code_only=True)}{target}{FLAGS}".encode()).hexdigest()[:16]
    kept = KEPT / f"{path.stem}-{target}-{mark}.json"
    if kept.exists():
        return [Kernel(*k) for k in json.loads(kept.read_text(encoding="utf-8"))]
    if kept_only:
        return []
    KEPT.mkdir(parents=True, exist_ok=True)
    command = [nvcc(), f"-gencode=arch=compute_{target},code=sm_{target}", *CUDA_FLAGS, "-Xptxas", "-v", "-cubin", "-o", str(kept.with_suffix(".cubin")), str(path)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode or re.search(r"\bwarning\b", done.stdout):
        raise RuntimeError(f"{path.name} for sm_{target}:\n{done.stdout}")
    kept.with_suffix(".cubin").unlink()
    kernels = parsed(done.stdout)
    kept.write_text(json.dumps(kernels), encoding="utf-8")
    return kernels


def every(targets: Iterable[str], threads: int = 1, kept_only: bool = False) -> dict[str, dict[str, dict[str, Kernel]]]:
    """Return what the assembler says: by file, by kernel, by target."""
    jobs = [(path, target) for path in sources() for target in targets]
    with ThreadPoolExecutor(threads) as pool:
        made = list(pool.map(lambda job: compiled(*job, kept_only=kept_only), jobs))
    out: dict[str, dict[str, dict[str, Kernel]]] = {}
    for (path, target), kernels in zip(jobs, made):
        for k in kernels:
            out.setdefault(path.name, {}).setdefault(k.name, {})[target] = k
    return out
