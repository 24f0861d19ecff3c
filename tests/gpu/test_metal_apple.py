"""How a Mac's GPU is driven, against a stand-in for pyobjc's Metal: buffers, texts, recordings, messages. Whether Apple agrees, no test here says."""

from __future__ import annotations

import sys

import fake_metal
import numpy as np
import pytest

import pyengine as pe
from pyengine import ops
from pyengine.backends.metal import apple, Backend
from pyengine.backends.metal.apple import AppleDevice
from pyengine.backends.metal.trial import worked
from pyengine.errors import GraphError, RequestError
from pyengine.graph.tensor import Dim


@pytest.fixture(params=["indirect", "encoder"])
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> fake_metal.FakeDevice:
    monkeypatch.setenv("PYENGINE_METAL_REPLAY", request.param)
    return fake_metal.install(monkeypatch)


def backend_of(device: AppleDevice) -> Backend:
    own = Backend(emulated=True)
    own.device = device
    return own


def test_launches_are_replayed(fake: fake_metal.FakeDevice) -> None:
    assert worked(AppleDevice()) and fake.compiled == 1 and fake.queue.committed == 2


def test_a_graph_runs_and_is_recorded_once_for_each_size(fake: fake_metal.FakeDevice) -> None:
    rng = np.random.default_rng(0)
    weight, gain = rng.standard_normal((40, 64)).astype(np.float32), rng.standard_normal(64).astype(np.float32)
    with pe.Graph() as g:
        x = g.input("x", (Dim("m", max=9), 64))
        y = ops.softmax(ops.linear(ops.rms_norm(x, gain, eps=1e-6), [weight])[0])
    program = backend_of(AppleDevice()).compile([y], single=True, strict=True)
    want = backend_of(AppleDevice())
    for m in (3, 9, 3):
        a = rng.standard_normal((m, 64)).astype(np.float32)
        h = a / np.sqrt((a * a).mean(1, keepdims=True) + 1e-6) * gain @ weight.T
        e = np.exp(h - h.max(1, keepdims=True))
        np.testing.assert_allclose(program.run(x=a), e / e.sum(1, keepdims=True), rtol=2e-5, atol=1e-7)
    assert fake.queue.committed == 3 and len(program._recorded) == 2 and want.kernels
    program.profile(True)
    program.execute(m=3)
    assert all(s >= 0.5 for _, s in program.seconds())


def test_faults_are_errors(fake: fake_metal.FakeDevice) -> None:
    with pe.Graph() as g:
        ids = g.input("ids", (Dim("m", max=4),), dtype="I32")
        y = ops.rows(np.ones((5, 32), np.float32), ids)
    program = backend_of(AppleDevice()).compile([y], single=True)
    with pytest.raises(RequestError, match="rows: id 7 of 5"):
        program.run(ids=np.array([1, 7], np.int32))
    assert (program.run(ids=np.array([1, 4], np.int32)) == 1).all()


def test_mapped_memory_begins_within_a_page(fake: fake_metal.FakeDevice) -> None:
    pages = np.zeros(5 * apple.PAGE, np.uint8)
    start = -pages.ctypes.data % apple.PAGE + 100
    pages[start : start + 4000] = np.arange(4000) % 251
    memory = AppleDevice().mapped(pages[start : start + 4000])
    assert memory is not None and memory.start == 100 and (memory.buffer.array[100:4100] == np.arange(4000) % 251).all() and fake.mapped == 1


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "darwin":
        pytest.skip("this is a Mac")
    with pytest.raises(GraphError, match="needs a Mac.*metal-emulated"):
        AppleDevice()
    fake_metal.install(monkeypatch)
    monkeypatch.setitem(sys.modules, "Metal", None)
    with pytest.raises(GraphError, match="pip install pyobjc-framework-Metal"):
        AppleDevice()
    with pytest.raises(GraphError, match="metal:1"):
        Backend(index=1)


def test_replay_that_does_not_work_is_given_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Outside of a Mac the trial fails; the device says so and encodes instead."""
    if sys.platform == "darwin":
        pytest.skip("this is a Mac")
    monkeypatch.delenv("PYENGINE_METAL_REPLAY", raising=False)
    apple.replays.cache_clear()
    fake_metal.install(monkeypatch)
    device = AppleDevice()
    apple.replays.cache_clear()
    assert not device.indirect and "each launch is encoded" in caplog.text and worked(device)
