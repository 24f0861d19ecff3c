"""macOS and Windows: everything compiles with zig, and on Windows (by wine) the kernels, their threads and memory give this machine's bits."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import crossbuild
import pytest
from test_neon import every_call, differing

from csrc import build_rules


@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="needs Linux on x86-64")
def test_the_processor_has_what_it_says() -> None:
    """csrc/host/x86.h finds what the kernel lists."""
    engine = pytest.importorskip("pyengine._engine", reason="needs the compiled extension: pip install .")
    flags = set(Path("/proc/cpuinfo").read_text().split())
    avx2 = {"avx2", "fma", "f16c", "bmi2"} <= flags
    avxvnni = avx2 and "avx_vnni" in flags and "avxvnni" in build_rules.isas("x86_64", [shutil.which("cc") or "gcc"])
    avx512 = avx2 and {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"} <= flags
    assert [isa for isa in engine.isas() if isa != "generic"] == [isa for isa, has in (("avx512", avx512), ("avxvnni", avxvnni), ("avx2", avx2)) if has]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["macos-aarch64", "windows-x86_64", "windows-aarch64"])
def test_every_file_compiles(name: str) -> None:
    pytest.importorskip("pybind11", reason="needs pybind11: pip install -r requirements/build.txt")
    try:
        crossbuild.build(name)
        crossbuild.build_binding(name)
    except crossbuild.ToolMissing as missing:
        pytest.skip(str(missing))


@pytest.mark.slow
def test_windows_gives_the_bits_of_this_machine() -> None:
    try:
        crossbuild.emulator(crossbuild.TARGETS["windows-x86_64"])
        crossbuild.build("windows-x86_64")
    except crossbuild.ToolMissing as missing:
        pytest.skip(str(missing))
    crossbuild.build("native")
    here = crossbuild.instruction_sets("native")
    assert crossbuild.instruction_sets("windows-x86_64") == here
    calls = every_call()
    for isa in here:
        assert not (different := differing(calls, ("windows-x86_64", isa), ("native", isa))), f"{isa} differs in {different}"
