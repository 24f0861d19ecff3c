"""C++ sources for the emulator: the text of each .metal file inside the namespace `metal`, with a thunk for each of its kernels."""

from __future__ import annotations

import re
from pathlib import Path

from pyengine.backends.metal.sources import Kernel, Library, Parameter
from pyengine.errors import GraphError

_HERE = "metal::emulated::"
_VECTORS = {                                                 # attribute of a kernel's parameter -> its value, a uint3 of metal.h
    "thread_position_in_threadgroup": f"{_HERE}thread_in_group()",
    "threadgroup_position_in_grid": f"{_HERE}group_in_grid()",
    "threads_per_threadgroup": f"{_HERE}threads_of_group()",
    "threadgroups_per_grid": f"{_HERE}groups_of_grid()",
    "thread_position_in_grid": f"({_HERE}group_in_grid() * {_HERE}threads_of_group() + {_HERE}thread_in_group())",
}
_NUMBERS = {                                                 # and those that are one number
    "thread_index_in_threadgroup": f"{_HERE}thread_number()",
    "simdgroup_index_in_threadgroup": f"{_HERE}group_number()",
    "thread_index_in_simdgroup": f"{_HERE}lane()",
    "simdgroups_per_threadgroup": f"{_HERE}simdgroups()",
}
_MEMBERS = {"uint": ".x", "uint2": ".xy", "uint3": "", "ushort": ".x"}


def _argument(p: Parameter) -> str:
    plain = p.type.rstrip("*& ")
    if p.kind == "threadgroup":
        if p.index:
            raise GraphError(f"metal: '{p.name}' is threadgroup({p.index}); kernels take all their memory as threadgroup(0)")
        return f"reinterpret_cast<{plain} *>({_HERE}memory_of_group())"
    if p.kind == "buffer":
        return f"*static_cast<{plain} *>(b[{p.index}])" if p.type.endswith("&") else f"static_cast<{plain} *>(b[{p.index}])"
    if p.kind in _VECTORS:
        return _VECTORS[p.kind] + _MEMBERS[plain]
    if p.kind not in _NUMBERS:
        raise GraphError(f"metal: '{p.name}' has the attribute {p.kind}, which the emulator does not know")
    return _NUMBERS[p.kind]


def thunk(kernel: Kernel) -> str:
    """Return the function that runs one thread of a kernel on buffers by number."""
    arguments = ",\n      ".join(map(_argument, kernel.parameters))
    return f"void thread_of_{kernel.name}(void *const *b) {{\n  (void)b;\n  {kernel.name}(\n      {arguments});\n}}\n"


def source(library: Library, path: Path) -> str:
    """Return the C++ source of a library whose file lies at `path`: its text without attributes (one is named as an address space)."""
    text = re.sub(r"\[\[\w+(\(\d+\))?\]\]", "", path.read_text(encoding="utf-8"))
    setters = []
    for c in sorted(library.constants.values(), key=lambda c: c.index):
        value = f"as_type<float>(v[{c.index}])" if c.type == "float" else f"v[{c.index}] != 0" if c.type == "bool" else f"({c.type})v[{c.index}]"
        setters.append(f"  {c.name} = {value};\n")
    rows = "".join(f'  {{"{n}", reinterpret_cast<const void *>(&metal::{n}), metal::thread_of_{n}, metal::constants_of_{library.name}}},\n'
                   for n in library.kernels)
    return (f'#include "emulate/metal/device.h"\n#include "emulate/metal.h"\nnamespace metal {{\n#line 1 "{path}"\n{text}'
            + f'#line 1 "thunks of {library.name}"\n' + "".join(map(thunk, library.kernels.values()))
            + f"static void constants_of_{library.name}(const int32_t *v) {{\n  (void)v;\n{''.join(setters)}}}\n}}  // namespace metal\n"
            + f"extern const pe_metal_entry pe_metal_table_{library.name}[];\n"
            + f"const pe_metal_entry pe_metal_table_{library.name}[] = {{\n{rows}  {{nullptr, nullptr, nullptr, nullptr}}}};\n")


def index(names: list[str]) -> str:
    """Return the C++ source of the list of all libraries' tables."""
    declared = "".join(f"extern const pe_metal_entry pe_metal_table_{n}[];\n" for n in names)
    return (f'#include "emulate/metal/device.h"\n{declared}'
            f"const pe_metal_entry *const pe_metal_tables[] = {{{', '.join(f'pe_metal_table_{n}' for n in names)}, nullptr}};\n")
