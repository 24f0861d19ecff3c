"""The CUDA runtime on a card or the emulator: memory, copies, graphs, faults, clocks, steps without a kernel, and what it says when something is missing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from stored import Stored

from pyengine import ops
from pyengine.backends import backend
from pyengine.backends.base import Declared
from pyengine.backends.chain import PreparedChain
from pyengine.backends.cuda import Backend, weights
from pyengine.backends.cuda.library import Library, library, Memory, Queue
from pyengine.backends.cuda.states import DeviceState, runs
from pyengine.compiler.cut import cut
from pyengine.dtype import dtype
from pyengine.errors import GraphError, PlanError, PyEngineError, RequestError
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Dim, make_leaf, Tensor
from pyengine.native import ffi


@pytest.fixture(scope="module")
def own(cuda_device: str) -> Backend:
    made = backend(cuda_device, n_threads=2)
    assert isinstance(made, Backend)
    return made


def randn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def fetched(own: Library, queue: Queue, memory: Memory) -> np.ndarray:
    out = np.empty(memory.nbytes, np.uint8)
    queue.copy(out.ctypes.data, memory.address, memory.nbytes)
    queue.wait()
    return out


# -- memory and copies ----------------------------------------------------------------------------------------------------


def test_too_much_memory_is_a_plan_that_fails(own: Backend) -> None:
    with pytest.raises(PlanError, match="the device's memory is full: cudaMalloc"):
        Memory(own.own, own.index, 1 << 45)
    assert fetched(own.own, Queue(own.own, own.index), Memory(own.own, own.index, 64)).size == 64                  # and goes on


@pytest.mark.parametrize("width", [16, 48, 18])
def test_cells_are_copied_in_runs_of_any_number(own: Backend, width: int) -> None:
    """More runs than one launch takes, cells that are multiples of 16 bytes and not."""
    n, heads = 1000, 3
    t = make_leaf("state", "s", (heads, n, width // 2), dtype("F16"))
    memory, queue = Memory(own.own, own.index, t.nbytes_max), Queue(own.own, own.index)
    state, rng = DeviceState(t, memory, 0, queue), np.random.default_rng(width)
    want = rng.integers(0, 256, (heads, n, width), dtype=np.uint8)
    state.scatter(np.arange(n), want)
    cells = rng.permutation(n)
    source, target = cells[:400], cells[400:800]
    state.copy(source, target)
    state.copy(np.arange(0), np.arange(0))
    want[:, target] = want[:, source]
    assert np.array_equal(state.gather(np.arange(n)), want)
    assert np.array_equal(state.gather(cells[:7]), want[:, cells[:7]])
    with pytest.raises(IndexError):
        state.gather(np.array([n]))


def test_runs_are_as_long_as_cells_count_up() -> None:
    assert list(runs(np.array([4, 5, 6, 2, 3, 9]))) == [(0, 3), (3, 2), (5, 1)]
    assert list(runs(np.array([4, 5, 6]), np.array([1, 2, 9]))) == [(0, 2), (2, 1)] and list(runs(np.array([], int))) == []


def test_of_a_table_only_what_changed_is_sent(own: Backend) -> None:
    queue, n = Queue(own.own, own.index), 5000
    table, shadow, device = np.arange(n, dtype=np.int32), np.zeros(n, np.int32), Memory(own.own, own.index, 4 * n)

    def sent() -> np.ndarray:
        own.own("send_changes", queue.handle, device.address, ffi.cast("void *", table.ctypes.data), ffi.cast("void *", shadow.ctypes.data), 4 * n)
        return fetched(own.own, queue, device).view(np.int32)

    assert np.array_equal(sent(), table) and np.array_equal(shadow, table)
    zeros = np.zeros(n, np.int32)
    queue.copy(device.address, zeros.ctypes.data, 4 * n)     # what is not sent again is seen to be missing
    table[[0, 4999]] = 7
    changed = np.flatnonzero(sent())
    assert changed.min() == 0 + 0 and changed.max() == 4999 and 1024 <= len(changed) <= 2 * 1024 and not sent()[1024:4096].any()


@pytest.mark.parametrize(("kind", "shape"), [("Q4_K", (40, 256)), ("Q8_0", (300, 64)), ("F32", (33, 32)), ("Q4_0", (3, 20, 64)), ("Q4_0", (3, 32, 64))])
def test_weights_are_sent_in_pieces_as_they_would_be_in_one(own: Backend, monkeypatch, kind: str, shape: tuple[int, ...]) -> None:
    from stored import Stored

    values = randn(*shape)

    def sent(most: int) -> np.ndarray:
        g = Graph()
        monkeypatch.setattr(weights, "STAGED", most)
        w = Stored(values, kind).constant()
        x = g.input("x", (Dim("m", 4), shape[-1]))
        y = ops.linear(x, [w])[0] if len(shape) == 2 else ops.expert_linear(x, [w], g.input("chosen", (Dim("m", 4), 1), "I32"))
        program = own.prepare(Declared([y])).load()
        return fetched(own.own, program.queue, program.weights)

    assert np.array_equal(sent(1 << 12), sent(1 << 30))


# -- programs -------------------------------------------------------------------------------------------------------------


def square(own: Backend) -> Any:
    g = Graph()
    x = g.input("x", (Dim("m", 100), 8))
    return own.compile([ops.scale(x, factor=3.0)], single=True)


def test_dims_that_come_again_are_replayed_and_few_graphs_are_kept(own: Backend) -> None:
    program = square(own)
    for times, replayed in ((1, 0), (2, 1), (3, 2)):
        x = randn(5, 8, seed=times)
        assert np.array_equal(program.run(x=x), x * np.float32(3)) and program.graphs() == (replayed, min(1, replayed))
    for n in [*range(100), *range(100), *range(100)]:        # each of more than are kept
        x = randn(n, 8, seed=n)
        assert np.array_equal(program.run(x=x), x * np.float32(3))
    assert program.graphs()[1] == 64


def test_the_first_step_with_a_fault_is_heard_and_the_next_run_is_clean(own: Backend) -> None:
    g, m = Graph(), Dim("m", 4)
    ids, more = g.input("ids", (m,), "I32"), g.input("more", (m,), "I32")
    program = own.compile([ops.add(ops.rows(randn(5, 8), ids), ops.rows(randn(7, 8), more))], single=True)
    want = program.run(ids=[1, 2], more=[6, 0])
    for _ in range(3):                                       # launched, recorded, replayed
        with pytest.raises(RequestError, match="rows: id 9 of 7"):
            program.run(ids=[4, 0], more=[9, 0])
    with pytest.raises(RequestError, match="rows: id -?[0-9]+ of 5"):
        program.run(ids=[70, 0], more=[1, 99])
    assert np.array_equal(program.run(ids=[1, 2], more=[6, 0]), want)


def test_each_step_is_timed(own: Backend) -> None:
    g = Graph()
    x = g.input("x", (Dim("m", 100), 64))
    program = own.compile([ops.softmax(ops.rms_norm(x, randn(64), eps=1e-5))], single=True)
    program.run(x=randn(9, 64))
    assert [s for _, s in program.seconds()] == [0, 0]
    program.profile(True)
    before = program.graphs()
    for _ in range(3):
        program.run(x=randn(9, 64))
    assert [n.op.name for n, _ in program.seconds()] == ["rms_norm", "softmax"] and min(s for _, s in program.seconds()) > 0
    program.profile(False)
    assert program.graphs() == before and program.run(x=randn(9, 64)).shape == (9, 64)


def test_steps_without_a_kernel_go_to_the_reference_on_copies(own: Backend, monkeypatch) -> None:
    g, m = Graph(), Dim("m", 6)
    x, cells = g.input("x", (m, 2, 32)), g.input("cells", (m,), "I32")
    k = ops.cache_append(g.state("k", (2, 9, 32), "F16"), ops.scale(x, factor=2.0), cells)
    q = ops.softmax(ops.rms_norm(x, randn(32), eps=1e-5).reshape(-1, 64))
    outputs = [q, ops.attention(ops.scale(x, factor=0.5), k, k, g.input("lo", (m,), "I32"), g.input("hi", (m,), "I32"), scale=0.2)]
    given = {"x": randn(4, 2, 32), "cells": [3, 4, 8, 0], "lo": [3, 3, 3, 0], "hi": [4, 5, 5, 1]}
    want = own.compile(outputs).run(**given)
    monkeypatch.setattr(own, "kernels", own.kernels - {"rms_norm", "cache_append", "scale"})
    program = own.compile(outputs)
    assert program.prepared.fallbacks == {"rms_norm": 1, "cache_append": 1, "scale": 2}
    for _ in range(3):
        for a, b in zip(program.run(**given), want):
            assert np.abs(a - b).max() < 1e-4
    with pytest.raises(GraphError, match="has no kernel for cache_append"):
        own.compile(outputs, strict=True)


def test_programs_and_queues_may_go_in_any_order(own: Backend) -> None:
    program = square(own)
    queue, turns = program.queue, program._turns
    program.run(x=randn(3, 8))
    handle, queue.handle = queue.handle, None
    own.own.flat.pe_card_queue_free(handle)                  # its owner first
    del turns, program


# -- several devices ------------------------------------------------------------------------------------------------------


def layers() -> list[Tensor]:
    """Four layers with constants of names that say which one; all but the first read what the first gives, which is a result too."""
    x = first = Graph().input("x", (Dim("m", 8), 32))
    for i in range(4):
        w = Stored(randn(32, 32, seed=i), "F32")
        w.name = f"blk.{i}.w"
        x = ops.add(ops.silu(ops.linear(x, [w.constant()])[0]), first)
        first = x if i == 0 else first
    return [first, ops.softmax(x)]


def on_devices(places: list[int], names: list[str]) -> Any:
    parts = cut(layers(), lambda name: int(name.split(".")[1]) if name.startswith("blk") else None, places)
    return PreparedChain.lay_out(parts, [backend(name, n_threads=1) for name in names], Declared(layers())).load()


def test_devices_copy_to_each_other(own: Backend) -> None:
    """Only what the CPU reads, and results, come to the host; the bits are those of one device."""
    if own.own.count() < 2:
        pytest.skip("needs two devices")
    cards = [f"{own.name}:{i}" for i in (0, 1)]
    one = own.compile(layers())
    for places, names in (([0, 1, 0, 1], cards), ([0, 1, 2, 1], [*cards, "cpu"])):
        chain = on_devices(places, names)
        linked = {name for name, _ in chain.prepared.linked}
        for n in (8, 3, 3, 3):                               # replayed in the end
            x = randn(n, 32, seed=n)
            want = one.run(x=x)
            chain.inputs["x"][:n] = x
            chain.execute(m=n)
            for i, program in enumerate(chain.programs):
                assert all(not program.inputs[name].any() for name in program.inputs if (name, i) in chain.prepared.linked)
            if "cpu" not in names:
                assert all(np.array_equal(got[:n], exact) for got, exact in zip(chain.outputs, want))
            assert all(np.abs(got[:n] - exact).max() < 1e-5 for got, exact in zip(chain.outputs, want))
        assert len(linked) >= (3 if len(names) == 2 else 1), linked
        sent = [(name, program.outputs[i]) for part, program in zip(chain.parts, chain.programs) for name, i in part.sends.items()
                if i in getattr(program.prepared, "kept", ())]
        assert not any(array.any() for _, array in sent) and {name for name, _ in sent} <= linked and (sent or "cpu" in names)
    with pytest.raises(GraphError, match="takes no 'y'"):
        chain.programs[1].take("y", chain.programs[0], 0, {"m": 1})


# -- what is missing ------------------------------------------------------------------------------------------------------


def test_drivers_that_will_not_do(monkeypatch, cuda_device: str) -> None:
    if not cuda_device.endswith("-emulated"):
        pytest.skip("the emulator's driver can be of any version")
    own = library(True)
    for version, text in (("0", "there is no NVIDIA driver"), ("11080", "the driver can do CUDA 11.8, and .* was built with ")):
        monkeypatch.setenv("PYENGINE_EMULATED_DRIVER", version)
        with pytest.raises(PyEngineError, match=text):
            own.count()


def test_a_number_that_there_is_not(own: Backend) -> None:
    with pytest.raises(GraphError, match=f"there is no device {own.name}:99; there are "):
        Backend(index=99, emulated=own.own.emulated)
    with pytest.raises(GraphError, match="by the CPU only"):
        Backend(emulated=own.own.emulated, in_place=True)


def test_a_compiler_says_what_is_wrong(tmp_path) -> None:
    from pyengine.backends.building import Job, library as build

    wrong = tmp_path / "wrong.c"
    wrong.write_text("int f(void) { return nothing; }\n")
    with pytest.raises(GraphError, match=r"(?s)wrong.c does not compile:.*nothing"):
        build("a", [Job(wrong, ("cc", "-fPIC"))], ["cc", "-shared"], tmp_path / "built")
    with pytest.raises(GraphError, match="cannot be compiled: no-such-compiler"):
        build("a", [Job(wrong, ("no-such-compiler",))], ["cc"], tmp_path / "built")


def test_what_has_not_changed_is_not_compiled_again(tmp_path, monkeypatch) -> None:
    from pyengine.backends.building import Job, library as build

    monkeypatch.delenv("PYENGINE_OBJECTS", raising=False)
    header, source, other = (tmp_path / n for n in ("a.h", "a.c", "b.c"))
    header.write_text("#define N 3\n")
    source.write_text('#include "a.h"\nint f(void) { return N; }\n')
    other.write_text("int g(void) { return 1; }\n")
    jobs = [Job(p, ("cc", "-fPIC", "-O1")) for p in (source, other)]

    def made() -> tuple[str, dict[str, int]]:
        path = build("a", jobs, ["cc", "-shared"], tmp_path / "built")
        return path.name, {p.name: p.stat().st_mtime_ns for p in (tmp_path / "built" / "objects").glob("*.o")}

    first = made()
    assert len(first[1]) == 2 and made() == first
    header.write_text("#define N 4\n")
    second = made()
    assert second[0] != first[0] and len(second[1]) == 3 and first[1].items() <= second[1].items()
    header.write_text("#define N 3\n")
    assert made() == (first[0], second[1])                   # as it was: linked anew, nothing compiled


