"""The .metal sources as texts: what a library is compiled from, and the kernels, arguments and function constants that it declares.

csrc/metal/common.h says how they are written, so that plain patterns find them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pyengine.errors import GraphError

_FORMATS = {"int": "i", "uint": "I", "float": "f", "long": "q"}
POSITIONS = ("thread_position_in_grid", "thread_position_in_threadgroup", "threadgroup_position_in_grid", "threads_per_threadgroup",
             "threadgroups_per_grid")                        # attributes that must be of one type in a kernel (MSL specification, 5.2.3.6)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel: a buffer by its number, threadgroup memory, or an attribute of the thread.

    kind     buffer | threadgroup | the attribute's name
    type     as it is declared, without address space and name
    args     name of the _args struct that the buffer holds, or ""
    writes   whether the kernel may write to the buffer
    """

    name: str
    kind: str
    index: int
    type: str
    args: str = ""
    writes: bool = False


@dataclass(frozen=True)
class Kernel:
    """A kernel: its name, the library (a file's stem) and its parameters in order."""

    name: str
    library: str
    parameters: tuple[Parameter, ...]

    def buffer(self, name: str) -> Parameter:
        """Return the buffer of that name. Raises: GraphError."""
        for p in self.parameters:
            if p.kind == "buffer" and p.name == name:
                return p
        raise GraphError(f"metal: kernel {self.name} has no buffer '{name}'")

    @property
    def arguments(self) -> Parameter | None:
        """The parameter that holds the kernel's _args."""
        return next((p for p in self.parameters if p.args), None)


@dataclass(frozen=True)
class Constant:
    """A function constant: its number in the library and its type (bool, int, uint, float)."""

    name: str
    index: int
    type: str


@dataclass(frozen=True)
class Library:
    """One .metal file: its text with all includes in place, and what it declares."""

    name: str
    text: str
    kernels: Mapping[str, Kernel]
    constants: Mapping[str, Constant]
    structs: Mapping[str, tuple[tuple[str, str, int], ...]]

    def pack(self, name: str, values: Mapping[str, Any]) -> bytes:
        """Pack the fields of an _args struct. Raises: GraphError for fields that are missing or unknown."""
        fields = self.structs[name]
        if set(values) != {f for f, _, _ in fields}:
            raise GraphError(f"metal: {name} of {self.name}.metal has fields {[f for f, _, _ in fields]}, given are {sorted(values)}")
        out = b""
        for field, letter, count in fields:
            out += b"\0" * (-len(out) % struct.calcsize(letter))
            value = values[field]
            many = [value] if count == 0 else [*value, *[0] * (count - len(value))]
            out += struct.pack(f"={len(many)}{letter}", *many)
        return out + b"\0" * (-len(out) % max([struct.calcsize(letter) for _, letter, _ in fields], default=4))


def folder() -> Path:
    """Return where the sources lie: beside the package in a checkout, in it where it is installed."""
    package = Path(__file__).resolve().parents[2]
    for place in (package.parent / "csrc" / "metal", package / "_metal" / "metal"):
        if place.is_dir():
            return place
    raise GraphError("metal: this installation has no Metal sources (csrc/metal)")


def with_includes(path: Path, seen: set[Path] | None = None) -> str:
    """Return a source's text with the text of each header that it includes, once, in its place."""
    seen = set() if seen is None else seen
    out = []
    for line in path.read_text(encoding="utf-8").splitlines():
        found = re.match(r'\s*#include "(.+)"', line)
        if not found or found[1].endswith("emulate/metal.h"):
            out.append(line)
            continue
        header = (path.parent / found[1]).resolve()
        for beside in (folder(), folder().parent):
            header = header if header.exists() else (beside / found[1]).resolve()
        if header not in seen:
            seen.add(header)
            out.append(with_includes(header, seen))
    return "\n".join(out)


def without_comments(text: str) -> str:
    """Return C text with a blank for each comment."""
    return re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.S)


def structs_of(text: str) -> dict[str, tuple[tuple[str, str, int], ...]]:
    """Find structs named *_args: (field, letter of `struct`, how many; 0 for a plain field) of each, in order."""
    found = {}
    for name, body in re.findall(r"\bstruct\s+(\w+_args)\s*\{(.*?)\}\s*;", text, re.S):
        fields = []
        for kind, names in re.findall(r"(\w+)\s+([^;]+);", body):
            for field in names.split(","):
                one = re.fullmatch(r"\s*(\w+)\s*(?:\[(\d+)\])?\s*", field)
                if one is None or kind not in _FORMATS:
                    raise GraphError(f"metal: {name}: '{kind} {field.strip()}' is no field that can be passed")
                fields.append((one[1], _FORMATS[kind], int(one[2] or 0)))
        found[name] = tuple(fields)
    return found


def _parameter(text: str, structs: Mapping[str, Any]) -> Parameter:
    found = re.fullmatch(r"\s*(.+?)([&*\s])\s*(\w+)\s*\[\[(\w+)(?:\((\d+)\))?\]\]\s*", text, re.S)
    if found is None:
        raise GraphError(f"metal: a kernel's parameter cannot be read: {text.strip()!r}")
    before, mark, name, kind, index = found[1], found[2].strip(), found[3], found[4], int(found[5] or 0)
    words = before.replace("*", " * ").replace("&", " & ").split()
    space = [w for w in words if w in ("device", "constant", "threadgroup")]
    plain = " ".join(w for w in words if w not in ("device", "constant", "threadgroup"))
    base = plain.replace("const ", "").strip()
    return Parameter(name, kind, index, f"{plain} {mark}".strip(), base if base in structs else "",
                     kind == "buffer" and space == ["device"] and "const" not in words)


def kernels_of(text: str, library: str, structs: Mapping[str, Any]) -> dict[str, Kernel]:
    """Find the kernels of a source. Raises: GraphError for a parameter that cannot be."""
    found = {}
    for start in re.finditer(r"\bkernel\s+void\s+(\w+)\s*\(", text):
        depth, end = 1, start.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        parts = re.split(r",(?![^\[\(]*[\]\)])", text[start.end() : end - 1])
        found[start[1]] = Kernel(start[1], library, tuple(_parameter(p, structs) for p in parts))
        if len({p.type for p in found[start[1]].parameters if p.kind in POSITIONS}) > 1:
            raise GraphError(f"metal: positions in {start[1]} are of different types")
    return found


def parsed(name: str, text: str) -> Library:
    """Read a source with its includes."""
    plain = without_comments(text)
    structs = structs_of(plain)
    constants = {n: Constant(n, int(i), kind) for kind, n, i in re.findall(r"^\s*PE_CONSTANT\((\w+), (\w+), (\d+)\);", plain, re.M)}
    return Library(name, text, kernels_of(plain, name, structs), constants, structs)


def _extent(text: str, kernel: Kernel) -> tuple[int, int, int]:
    """Return where a kernel begins, where its body does (after the brace), and where it ends."""
    start = re.search(rf"\bkernel\s+void\s+{kernel.name}\s*\(", text)
    assert start is not None
    body = text.index("{", start.end()) + 1
    depth, end = 1, body
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return start.start(), body, end


def specialized(library: Library, own: Kernel, constants: Mapping[str, Any], missing: Sequence[str]) -> str:
    """Return a library's text with one of its kernels only, function constants as numbers, and null for the buffers that are missing.

    So a compiler needs no values beside the text, and drops what a launch has no use for.
    """
    text = without_comments(library.text)
    for other in library.kernels.values():
        start, body, end = _extent(text, other)
        if other.name != own.name:
            text = text[:start] + text[end:]
            continue
        head, nulls = text[start:body], ""
        for p in (p for p in own.parameters if p.name in missing):
            found = re.search(rf"(device[^,(]*?[*\s]){p.name}\s*\[\[buffer\({p.index}\)\]\]\s*,?", head)
            if found is None:
                raise GraphError(f"metal: '{p.name}' of {own.name} is no buffer that may be missing")
            head = head[: found.start()] + head[found.end() :]
            nulls += f"\n  {found[1].strip()}{p.name} = nullptr;"
        text = text[:start] + re.sub(r",\s*\)", ")", head) + nulls + text[body:]
    for c in library.constants.values():
        value = constants.get(c.name, 0)
        said = str(bool(value)).lower() if c.type == "bool" else f"{float(value)!r}f" if c.type == "float" else str(int(value))
        text = re.sub(rf"PE_CONSTANT\({c.type}, {c.name}, {c.index}\);", f"constant {c.type} {c.name} = {said};", text)
    return text


@lru_cache(maxsize=4)
def libraries(place: Path | None = None) -> dict[str, Library]:
    """Return all .metal files of a folder (default: ours) by name. Raises: GraphError where two kernels have the same name."""
    found = {p.stem: parsed(p.stem, with_includes(p)) for p in sorted((place or folder()).glob("*.metal"))}
    names = [k for library in found.values() for k in library.kernels]
    if len(set(names)) != len(names):
        raise GraphError(f"metal: kernels with the same name: {sorted({n for n in names if names.count(n) > 1})}")
    return found


@lru_cache(maxsize=None)
def kernel(name: str, place: Path | None = None) -> tuple[Library, Kernel]:
    """Return a kernel of a folder (default: ours) and its library. Raises: GraphError if there is none."""
    for library in libraries(place).values():
        if name in library.kernels:
            return library, library.kernels[name]
    raise GraphError(f"metal: there is no kernel {name}")
