"""The Metal sources as clang reads them: what a Mac's compiler would refuse and the emulator cannot see."""

from __future__ import annotations

import re
from typing import Any

import pytest
from metal_language import messages

from pyengine.backends.metal import sources


@pytest.fixture(scope="module")
def index() -> Any:
    """Clang's parser."""
    clang = pytest.importorskip("clang.cindex", reason="needs libclang: pip install -r requirements/test.txt")
    return clang.Index.create()


@pytest.mark.parametrize("name", sorted(sources.libraries()))
def test_types_and_address_spaces_agree(index: Any, name: str) -> None:
    assert messages(index, sources.libraries()[name].text) == []


@pytest.mark.parametrize("name", sorted(k for library in sources.libraries().values() for k in library.kernels))
def test_a_kernel_is_compiled_alone_with_its_constants(index: Any, name: str) -> None:
    """As it is sent to a Mac: function constants are numbers in the text, and buffers that a launch leaves out are null."""
    library, kernel = sources.kernel(name)
    spare = [p.name for p in kernel.parameters if p.kind == "buffer" and not p.args and p.type.endswith("*")][1:]
    for value, missing in ((1, []), (2, spare[-2:])):
        text = sources.specialized(library, kernel, dict.fromkeys(library.constants, value), missing)
        assert messages(index, text) == []


KERNEL = ("#include <metal_stdlib>\nusing namespace metal;\n%s\n"
          "kernel void k(device float *x [[buffer(0)]], threadgroup float *t [[threadgroup(0)]]) { %s }")


@pytest.mark.parametrize("before,body,said", [
    ("", "thread float *y = x;", "cannot initialize"),
    ("static inline float f(threadgroup const float *p) { return *p; }", "x[0] = f(x);", "no matching function"),
    ("static inline void f(threadgroup float *p) { *p = 1; }", "f(t + 1); x[0] = float4(1.0f) + half4(half(1));", "half4|vector"),
    ("static inline float f(const float *p) { return *p; }", "x[0] = t[0];", "without an address space"),
    ("", "x[0] = erf(t[0]);", "undeclared"),
    ("constant int N = 3;", "N = 4;", "const"),
], ids=["device to thread", "device to threadgroup", "two vectors", "no space", "no such function", "constant"])
def test_what_metal_would_refuse_is_found(index: Any, before: str, body: str, said: str) -> None:
    found = messages(index, KERNEL % (before, body))
    assert found and re.search(said, " ".join(found)), found
