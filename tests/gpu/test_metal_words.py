"""The emulator of Metal: words of the language against NumPy, planted faults that it must find, and the texts that a Mac compiles."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csrc import build_rules
from pyengine.backends.building import CSRC
from pyengine.backends.metal import sources
from pyengine.backends.metal.device import bind, Device
from pyengine.backends.metal.emulated import EmulatedDevice, FLAGS
from pyengine.backends.metal.launch import Launch, View
from pyengine.backends.metal.trial import worked
from pyengine.dtype import I8
from pyengine.errors import GraphError

HERE = Path(__file__).resolve().parent
WORDS, PLANTED = HERE / "metal_words", HERE / "metal_planted"


def run(device: Device, place: Path, kernel: str, arrays: dict[str, np.ndarray], grid=(1, 1, 1), threads=(32, 1, 1), shared: int = 0,
        **args: Any) -> dict[str, np.ndarray]:
    """Launch a kernel on copies of arrays, and return them as they are afterwards."""
    memories, views = [], {}
    for name, a in arrays.items():
        memories.append(device.allocate(a.nbytes))
        memories[-1].array[:] = a.reshape(-1).view(np.uint8)
        views[name] = View(len(memories) - 1, 0, I8, (a.nbytes,), (1,), a.nbytes)
    device.record([bind(Launch(kernel, args, views, grid, threads, shared), memories, {}, place)]).run()
    return {n: m.array.view(a.dtype).reshape(a.shape) for m, (n, a) in zip(memories, arrays.items())}


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "checked"])
def words(request: pytest.FixtureRequest) -> Device:
    """Both forms; they differ in which elements of a matrix a thread holds."""
    return EmulatedDevice(request.param, WORDS)


# ---- words -------------------------------------------------------------------------------------------------------------


def test_collectives(words: Device) -> None:
    x = np.random.default_rng(1).integers(-99, 100, 64).astype(np.int32)
    got = run(words, WORDS, "collectives", {"x": x, "out": np.zeros((64, 10), np.int32)}, grid=(2, 1, 1))["out"].reshape(2, 32, 10)
    for g, v in zip(got, x.reshape(2, 32)):
        lanes = np.arange(32)
        bits = int(sum(1 << i for i in lanes if v[i] > 0))
        assert (g[:, :3] == [v.sum(), v.max(), v.min()]).all() and (g[:, 3] == v[::-1]).all() and (g[:, 4] == v[lanes ^ 5]).all()
        assert (g[:, 5] == np.cumsum(v) - v).all() and (g[:, 6] == np.cumsum(v)).all() and (g[:, 7].view(np.uint32) == bits).all()
        assert (g[:, 8] == v[0]).all() and (g[:, 9] == 2 * (v > 90).any() + 1).all()


def test_indices(words: Device) -> None:
    got = run(words, WORDS, "indices", {"out": np.full((6, 60, 8), -1, np.int32)}, grid=(3, 2, 1), threads=(20, 3, 1))["out"]
    for y, x in np.ndindex(6, 60):
        number = y % 3 * 20 + x % 20
        assert got[y, x].tolist() == [x // 20, y // 3, x % 20, y % 3, number, number % 32, number // 32, 2]


def test_matrices(words: Device) -> None:
    rng = np.random.default_rng(2)
    a, b, c = rng.integers(-8, 9, (3, 8, 8)).astype(np.float32)
    got = run(words, WORDS, "matrices", {"a": a, "b": b, "c": c, "out": np.zeros((8, 8), np.float32)}, shared=8 * 12 * 2)["out"]
    np.testing.assert_array_equal(got, a @ b + c @ b.T)


def test_halves_round_as_numpy(words: Device) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    rng = np.random.default_rng(3)
    x = rng.integers(0, 1 << 32, 1 << 16, np.uint32).view(np.float32)
    x[:30000] = (rng.standard_normal(30000) * 10.0 ** rng.uniform(-9, 6, 30000)).astype(np.float32)
    x[30000:30006] = [65519.9, 65520, 2.0**-25, 2.0**-25 * 1.0001, -(2.0**-24) * 1.5, np.inf]
    got = run(words, WORDS, "narrow", {"x": x, "y": np.zeros(len(x), np.float16), "h": every, "z": np.zeros(len(x), np.float32)},
              grid=(2048, 1, 1), n=len(x))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(got["y"], x.astype(np.float16))
    np.testing.assert_array_equal(got["z"], every.astype(np.float32))


def test_vectors(words: Device) -> None:
    rng = np.random.default_rng(4)
    x, p = rng.standard_normal((32, 4)).astype(np.float32), rng.standard_normal((32, 3)).astype(np.float32)
    got = run(words, WORDS, "vectors", {"x": x, "p": p, "out": np.zeros((32, 3, 4), np.float32)})["out"]
    v = x * 2 + np.concatenate([p, np.ones((32, 1), np.float32)], 1)
    np.testing.assert_allclose(got[:, 0], v, rtol=1e-6)
    np.testing.assert_array_equal(got[:, 1], got[:, 0][:, [2, 3, 0, 1]] * np.float32(0.5))
    np.testing.assert_array_equal(got[:, 2, :2], got[:, 0, :2].astype(np.float16).astype(np.float32))
    np.testing.assert_allclose(got[:, 2, 2], (got[:, 0] ** 2).sum(1), rtol=1e-6)
    np.testing.assert_array_equal(got[:, 2, 3], np.maximum(got[:, 0, 2], 1))


def test_barriers_and_atomics_between_threadgroups(words: Device) -> None:
    x = np.random.default_rng(5).integers(-1000, 1000, 5000).astype(np.int32)
    got = run(words, WORDS, "sums", {"x": x, "out": np.zeros(1, np.int32), "most": np.zeros(1, np.uint32)}, grid=(40, 1, 1),
              threads=(128, 1, 1), shared=512, n=len(x))
    assert got["out"][0] == x.sum() and got["most"][0] == x.max()


def test_what_is_replayed_sees_what_came_before() -> None:
    assert worked(EmulatedDevice(False))


# ---- planted faults ----------------------------------------------------------------------------------------------------


def line_of(kernel: str) -> int:
    """The number of the line that is marked as this kernel's fault."""
    lines = (PLANTED / "planted.metal").read_text(encoding="utf-8").splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.endswith(f"PLANTED: {kernel} */"))


@pytest.mark.parametrize("checked", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kernel", ["a_barrier_beside_a_collective", "a_collective_of_half_a_simdgroup"])
def test_threads_that_do_not_meet_are_found(kernel: str, checked: bool) -> None:
    with pytest.raises(GraphError, match=kernel):
        run(EmulatedDevice(checked, PLANTED), PLANTED, kernel, {"out": np.zeros(64, np.float32)}, threads=(64, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("kernel,said,shared,grid", [
    ("no_barrier", "no thread of this block has written", 256, 1), ("one_too_far", "out of bounds", 0, 1),
    ("never_written", "no thread of this block has written", 256, 1), ("beyond_threadgroup_memory", "out of bounds", 256, 1),
    ("a_race_of_groups", "a race", 0, 2)])
def test_wrong_accesses_are_found(kernel: str, said: str, shared: int, grid: int) -> None:
    arrays = {"out": np.zeros(64, np.float32)} | ({"x": np.zeros(32, np.float32)} if kernel == "one_too_far" else {})
    with pytest.raises(GraphError, match=rf"{kernel}.*{said}.*planted\.\w+:{line_of(kernel)}"):
        run(EmulatedDevice(True, PLANTED), PLANTED, kernel, arrays, (grid, 1, 1), (64, 1, 1), shared,
            **({"n": 32} if kernel == "one_too_far" else {}))


def test_threads_that_have_returned_are_not_waited_for() -> None:
    got = run(EmulatedDevice(False, PLANTED), PLANTED, "early_return_before_a_barrier", {"out": np.zeros(64, np.float32)}, threads=(64, 1, 1))
    assert got["out"].tolist() == [0.0] * 32 + [1.0] * 32


# ---- texts -------------------------------------------------------------------------------------------------------------


def test_a_declaration_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.metal").write_text(
        "/* kernel void no(device float *a [[buffer(0)]]) */\nstruct odd_args { int n, shape[3]; long far; float eps; };\n"
        "PE_CONSTANT(bool, FLAG, 1);\nkernel void yes(constant odd_args &a [[buffer(4)]],\n device const float *x [[buffer(1)]], "
        "device half* y [[buffer(2)]], uint2 at [[thread_position_in_grid]]) { }\n")
    library, kernel = sources.kernel("yes", tmp_path)
    assert list(library.kernels) == ["yes"] and library.constants["FLAG"] == sources.Constant("FLAG", 1, "bool")
    assert [(p.name, p.kind, p.index, p.writes) for p in kernel.parameters] == [
        ("a", "buffer", 4, False), ("x", "buffer", 1, False), ("y", "buffer", 2, True), ("at", "thread_position_in_grid", 0, False)]
    packed = library.pack("odd_args", dict(n=1, shape=[2, 3], far=-1, eps=0.5))
    assert packed == np.array([1, 2, 3, 0, -1, -1, *np.float32([0.5]).view(np.int32), 0], np.int32).tobytes()
    with pytest.raises(GraphError, match="fields"):
        library.pack("odd_args", dict(n=1))
    with pytest.raises(GraphError, match="no kernel maybe"):
        sources.kernel("maybe", tmp_path)
    with pytest.raises(GraphError, match="different types"):
        sources.kernels_of("kernel void f(uint a [[thread_position_in_grid]], uint3 b [[threadgroup_position_in_grid]]) {}", "x", {})
    with pytest.raises(GraphError, match="cannot be read"):
        sources.kernels_of("kernel void f(device float *a) {}", "x", {})
    with pytest.raises(GraphError, match="no field"):
        sources.structs_of("struct f_args { half x; };")


def test_what_an_installation_holds_is_enough(tmp_path: Path, monkeypatch) -> None:
    """The files that setup.py copies on a Mac give the same libraries."""
    for source in build_rules.metal_sources():
        target = tmp_path / source.relative_to(CSRC)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    here = sources.libraries()
    monkeypatch.setattr(sources, "folder", lambda: tmp_path / "metal")
    assert sources.libraries(tmp_path / "metal") == here and len(here) > 8


def optional_buffers(library: sources.Library, kernel: sources.Kernel) -> list[str]:
    """Buffers that the kernel's body asks for before it reads them."""
    text = sources.without_comments(library.text)
    return [p.name for p in kernel.parameters if p.kind == "buffer" and not p.args
            and re.search(rf"(if \(|\(|&& ){p.name}( \?|\)| &&)|= {p.name} \?", text)]


def test_a_specialized_text_compiles_on_its_own(tmp_path: Path) -> None:
    """What a Mac gets for one launch: one kernel, constants as numbers, missing buffers as null. As C++; Metal's compiler is not here."""
    compiler = shutil.which("g++") or shutil.which("c++") or pytest.skip("needs a C++ compiler")
    parts = []
    for library in sources.libraries().values():
        for kernel in library.kernels.values():
            missing = optional_buffers(library, kernel)
            text = sources.specialized(library, kernel, dict.fromkeys(library.constants, 1), missing)
            assert "PE_CONSTANT(" not in text.replace("#define PE_CONSTANT(", "") and text.count("kernel void") == 1
            assert all(f"{name} = nullptr;" in text for name in missing)
            parts.append(re.sub(r"\[\[\w+(\(\d+\))?\]\]", "", text))
    assert len(parts) > 15
    seen = '#include "emulate/metal.h"\n#undef PE_CONSTANT\n'
    for i, text in enumerate(parts[:: max(1, len(parts) // 3)]):
        source = tmp_path / f"{i}.cpp"
        source.write_text(seen + "namespace metal {\n" + text + "\n}\n")
        done = subprocess.run([compiler, *FLAGS, f"-I{CSRC}", "-Wno-unused", "-O0", "-fsyntax-only", source], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:3000]


def test_sources_use_words_of_the_language_only() -> None:
    """No C++ that Metal lacks: virtual functions, exceptions, new, double, goto, includes of the standard library, `thread` as a name."""
    for library in sources.libraries().values():
        text = re.sub(r"#if !?defined\(__METAL_VERSION__\).*?#endif", "", sources.without_comments(library.text), flags=re.S)
        found = re.findall(r"\b(?:double|goto|new|throw|try|virtual|std::\w+|if constexpr|goto|dynamic_cast|typeid|auto &)\b", text)
        assert not found, f"{library.name}.metal: {sorted(set(found))}"
