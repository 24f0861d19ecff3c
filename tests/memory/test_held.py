"""What models of one process hold: counted beside each other, by pages that are there, until they are closed or gone."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

import pyengine as pe
from pyengine import hardware
from pyengine.errors import PlanError
from pyengine.hardware.pages import resident
from pyengine.memory import held
from pyengine.native import engine

MIB = 2**20


@pytest.fixture
def free(monkeypatch):
    """free(bytes): what the system calls free from now on; the models of this process count."""
    found = hardware.detect()

    def set_to(n: int) -> None:
        device = found.devices[0]._replace(total=n, free=n)
        monkeypatch.setattr(hardware, "detect", lambda system=None: found._replace(devices=(device,)))

    gc.collect()
    monkeypatch.setattr(held, "_registered", type(held._registered)())         # those of other tests stay out of it
    return set_to


def of(name: str) -> list[held.Held]:
    return [h for h in held.held() if h.name == name]


def test_resident_counts_the_pages_that_were_written() -> None:
    buffer = engine.Buffer(64 * MIB, False)
    assert resident(buffer.address, buffer.nbytes) == 0 and resident(buffer.address, 0) == 0
    np.frombuffer(buffer, np.uint8)[10 * MIB : 13 * MIB] = 1
    assert resident(buffer.address, buffer.nbytes) == 3 * MIB
    assert resident(buffer.address + 10 * MIB + 5, 100) == 100 and resident(buffer.address + 12 * MIB, 2 * MIB) == MIB
    del buffer


def test_a_model_is_held_by_its_plan_and_by_its_pages(free, tiny_gguf) -> None:
    path = tiny_gguf("llama")[0]
    with pe.load(path, n_ctx=4096, n_seq=8, n_threads=1) as model:
        [found] = of("f32.gguf")
        overhead = model.plan.of("overhead")
        assert found.planned == {"cpu": model.plan.total - overhead}
        assert model.plan.of("weights") <= found.resident["cpu"] < found.planned["cpu"] / 2
        model.generate([5] * 3000, max_tokens=2, temperature=0)
        [filled] = of("f32.gguf")
        assert found.resident["cpu"] + model.plan.of("kv") // 16 < filled.resident["cpu"] <= filled.planned["cpu"]
    assert not of("f32.gguf")


def test_a_second_plan_finds_what_is_free_beside_the_first(free, tiny_gguf) -> None:
    one, other = tiny_gguf("llama")[0], tiny_gguf("gemma3_text")[0]
    free(600 * MIB)
    alone = pe.plan(other, n_ctx=1024)
    assert alone.available == {"cpu": 600 * MIB} and alone.held == () and "other models" not in alone.table()
    model = pe.load(one, n_ctx=8192, n_seq=32, n_threads=1)
    [found] = held.held()
    beside = pe.plan(other, n_ctx=1024)
    kept = found.promised("cpu")
    assert beside.available == {"cpu": 600 * MIB - kept} and beside.held == (("f32.gguf", kept),) and kept > 40 * MIB
    assert beside.items == alone.items and "available beside the other models of this process" in beside.table()
    free(beside.total + kept - 1)
    with pytest.raises(PlanError, match="does not fit.*\n.*(.*\n)*.*f32.gguf: "):
        pe.load(other, n_ctx=1024)
    free(beside.total + kept)
    pe.load(other, n_ctx=1024, n_threads=1).close()
    model.close()
    assert pe.plan(other, n_ctx=1024).held == ()


def test_a_model_that_nobody_holds_is_not_counted(free, tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=256, n_threads=1)
    assert len(held.held()) == 1
    del model
    gc.collect()
    assert held.held() == []


def test_what_is_being_loaded_is_promised(free, tiny_gguf) -> None:
    path, seen = tiny_gguf("llama")[0], []
    free(600 * MIB)

    def progress(done: int, total: int) -> None:
        seen.append(held.held()[0].promised("cpu"))

    def load() -> None:
        with pe.load(path, n_ctx=1024, n_threads=1, progress=progress) as model:
            seen.append(held.planned_bytes(model.plan)["cpu"])

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    assert len(seen) > 1 and len(set(seen)) == 1 and held.held() == []


def test_what_goes_before_counts_as_free(free, tiny_gguf) -> None:
    machine = hardware.detect()
    stays, goes = held.Held("a", {"cpu": 50}, {"cpu": 20}), held.Held("b", {"cpu": 70}, {"cpu": 40})
    found = held.beside(machine, [stays, goes.gone()])
    assert found.devices[0].free == machine.devices[0].free - 30 + 40
    assert [d.free for d in found.devices[1:]] == [d.free for d in machine.devices[1:]]


def test_parts_of_memory_are_the_processors(free, tiny_gguf) -> None:
    parts = {"cpu:0": 200 * MIB, "cpu:1": 200 * MIB}
    with pe.load(tiny_gguf("llama")[0], n_ctx=512, n_threads=1, device=parts) as model:
        [found] = held.held()
        assert found.planned == {"cpu": model.plan.total - model.plan.of("overhead")} and found.resident["cpu"] >= model.plan.of("weights")
        assert pe.plan(tiny_gguf("llama")[0], n_ctx=512, device=parts).available == parts
