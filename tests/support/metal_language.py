"""What clang says of a Metal source: its types and address spaces, against declarations of Metal's words (tests/support/msl/metal_stdlib).

Metal's compiler is on Macs only, and the emulator's knows no address spaces. Here a `device` pointer that becomes a plain one, vectors of
different types in one sum, or a word that Metal does not have, are errors as they would be there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent / "msl"
FLAGS = ("-x", "c++", "-std=c++20", "-nostdinc", "-D__METAL_VERSION__=310", f"-I{HERE}", "-Wall", "-Wextra", "-Wno-unused-function",
         "-Wno-undefined-internal", "-Wno-unused-const-variable", "-Wno-unused-parameter", "-Wno-unknown-pragmas")
# A pointer or reference without an address space, in a declaration: Metal wants one everywhere.
PLAIN = re.compile(r"^\s*(?:static inline |const |static )*(?:\w+ [&*]\w+\(|\w+ \*\w+ =)|[(,]\s*(?:const )?\w+ [&*]\w+(?=[,)])", re.M)


def as_cpp(text: str) -> str:
    """The source in words that clang knows."""
    text = re.sub(r"\[\[\w+(\(\w+\))?\]\]", "", text)
    text = re.sub(r"#define PE_CONSTANT\(type, name, index\) constant", "#define PE_CONSTANT(type, name, index) extern constant", text)
    return re.sub(r"(?<!\w)(float|half|u?int|u?long|u?short|u?char)([234])\((?!\s*\*)", r"make_\1\2(", text)


def messages(index: Any, text: str) -> list[str]:
    """Errors and warnings of a source with its includes in place, and pointers without an address space."""
    source = as_cpp(text)
    found = index.parse("source.metal", args=[*FLAGS, "-ferror-limit=0"], unsaved_files=[("source.metal", source)])
    lines = source.splitlines()
    out = [f"{d.spelling}: {lines[d.location.line - 1].strip()}" for d in found.diagnostics if d.severity >= 2]
    code = re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.S)
    return out + [f"a pointer without an address space: {m[0].strip()}" for m in PLAIN.finditer(code) if "return" not in m[0]]
