"""Which layers, experts and encoders go to cards: plans of tiny models for machines with emulated cards of any size."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import pytest

import pyengine as pe
from pyengine.backends import cuda, metal
from pyengine.errors import PyEngineError, RequestError, UnsupportedModelError
from pyengine.hardware.facts import Device
from pyengine.memory import devices
from pyengine.memory.placement import Demand, filled
from pyengine.memory.settings import Settings

GIB = 1 << 30
CARD = "cuda-emulated:{}".format


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch, machine: Callable[..., None]) -> Callable[..., None]:
    """cards(bytes...): emulated cards with so much memory, which `auto` may use, beside 8 GiB of main memory."""

    def there(*free: int) -> None:
        machine(8 * GIB)
        found = [Device("cuda-emulated", "emulated", i, n, n) for i, n in enumerate(free)]
        monkeypatch.setattr(devices, "devices", lambda kind, emulated=False: found if kind == "cuda" else [])

    return there


def layers_on(plan: pe.MemoryPlan) -> dict[str, list[int]]:
    """The layers with caches on each device."""
    found: dict[str, list[int]] = {}
    for i in plan.items:
        if i.purpose == "kv" and i.layer is not None:
            found.setdefault(i.device, []).append(i.layer)
    return found


def test_auto_takes_the_card_that_holds_all(tiny_gguf, cards) -> None:
    path = tiny_gguf("llama")[0]
    cards(1 * GIB, 2 * GIB)
    plan = pe.plan(path)
    assert layers_on(plan) == {CARD(1): [0, 1, 2]} and plan.fits and "which has the memory" in plan.notes[0]
    assert plan.of("sampler", CARD(1)) == 0 < plan.of("sampler", "cpu") and plan.of("arena", "cpu") > 0
    cards()
    assert layers_on(pe.plan(path)) == {"cpu": [0, 1, 2]}
    cards(2 * GIB)
    assert set(layers_on(pe.plan(path, device="cpu"))) == {"cpu"} == set(layers_on(pe.plan(path, mmap=True)))


def test_heads_that_cards_do_not_take_stay_on_the_cpu(tiny_gguf, cards) -> None:
    """Before anything is loaded `auto` says so, and takes the CPU."""
    wide = tiny_gguf("gemma4_text", global_head_dim=576)[0]
    cards(2 * GIB)
    plan = pe.plan(wide, n_ctx=64)
    assert plan.fits and set(layers_on(plan)) == {"cpu"} and any("heads of 512 elements at most, and this model has 576" in n for n in plan.notes)
    assert set(layers_on(pe.plan(tiny_gguf("gemma4_text")[0], n_ctx=64))) == {CARD(0)}


@pytest.mark.parametrize("device", [CARD(0), [CARD(0), "cpu"], "metal-emulated"])
def test_a_card_that_does_not_take_the_heads_is_refused(tiny_gguf, device: object) -> None:
    with pytest.raises(UnsupportedModelError, match="this model has 576; give device='cpu'"):
        pe.load(tiny_gguf("gemma4_text", global_head_dim=576)[0], n_ctx=64, device=device)


@pytest.mark.parametrize("kv_dtype", ["kivi4", "kivi2"])
def test_keys_by_channel_go_to_a_card(tiny_gguf, cards, kv_dtype: str) -> None:
    cards(2 * GIB)
    plan = pe.plan(tiny_gguf("llama", head_dim=32)[0], n_ctx=512, kv_dtype=kv_dtype)
    assert plan.fits and set(layers_on(plan)) == {CARD(0)} and not any("no kernel" in n for n in plan.notes)


def test_a_card_that_does_not_take_so_many_experts_is_refused(tiny_gguf, cards, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_gguf("mixtral")[0]
    for kind in (cuda.Backend, metal.Backend):
        monkeypatch.setattr(kind, "experts", 3)
    for device in (CARD(0), "metal-emulated"):
        with pytest.raises(UnsupportedModelError, match="chooses from 3 experts at most, and this model has 5; give device='cpu'"):
            pe.load(path, n_ctx=64, device=device)
    cards(2 * GIB)
    plan = pe.plan(path, n_ctx=64)
    assert plan.fits and set(layers_on(plan)) == {"cpu"} and any("3 experts at most" in n for n in plan.notes)


def test_auto_divides_layers_where_no_card_holds_all(tiny_gguf, cards) -> None:
    path = tiny_gguf("llama", num_hidden_layers=8)[0]
    cards(2 * GIB)
    all_, arena = pe.plan(path, n_ctx=64, device=CARD(0)).on(CARD(0)), pe.plan(path, n_ctx=64, device=CARD(0)).of("arena", CARD(0))
    cards(arena + (all_ - arena) * 3 // 4, arena + (all_ - arena) * 3 // 4)
    two = pe.plan(path, n_ctx=64)
    assert two.fits and set(layers_on(two)) == {CARD(0), CARD(1)} and layers_on(two)[CARD(1)][-1] == 7
    cards(arena + (all_ - arena) * 3 // 4)
    part = pe.plan(path, n_ctx=64)
    assert part.fits and set(layers_on(part)) == {"cpu", CARD(0)} and layers_on(part)["cpu"][0] == 0 and layers_on(part)[CARD(0)][-1] == 7
    cards(arena // 2)
    assert set(layers_on(pe.plan(path, n_ctx=64))) == {"cpu"}


def test_an_encoder_goes_to_the_cpu_where_the_card_has_no_room_for_it(tiny_gguf, cards) -> None:
    path = tiny_gguf("gemma3")[0]
    cards(2 * GIB)
    beside = pe.plan(path, n_ctx=256, device=CARD(0))
    assert beside.of("encoder", CARD(0)) > 0 == beside.of("encoder", "cpu")
    cards(beside.on(CARD(0)) - 1)
    apart = pe.plan(path, n_ctx=256, device=CARD(0))
    assert apart.fits and apart.of("encoder", "cpu") > 0 == apart.of("encoder", CARD(0))
    cards(2 * GIB)
    assert pe.plan(path, n_ctx=256, device=CARD(0), encoder_device="cpu").of("encoder", "cpu") > 0


def test_a_context_that_nobody_asked_for_is_what_the_card_holds(tiny_gguf, cards) -> None:
    path = tiny_gguf("llama", max_position_embeddings=4096)[0]
    cards(2 * GIB)
    small = pe.plan(path, n_ctx=512, device=CARD(0)).on(CARD(0))
    cards(small * 8 // 7 + 4096)
    plan = pe.plan(path, device=CARD(0))
    assert plan.fits and 128 <= plan.n_ctx <= 1024 and any("stay free" in note for note in plan.notes)


def test_cards_are_filled_before_the_cpu() -> None:
    need = Demand([10] * 8, 5, 0)
    assert filled(need, [1000, 45], 1) == [0] * 4 + [1] * 4
    assert filled(need, [1000, 45, 20], 1) == [0] * 3 + [1] * 4 + [2]
    assert filled(need, [1000, 85], 1) == [1] * 8
    assert filled(need, [1000, 14], 1) == [0] * 8               # not the head and a layer
    assert filled(need, [40, 45], 0) == [0] * 4 + [1] * 4       # cards alone, in proportion


@pytest.mark.parametrize(("given", "found"), [
    ("cuda", "cuda:0"), (["cuda", "cpu"], {"cuda:0": None, "cpu": None}), (["cuda:1"], "cuda:1"), ({"cuda:1": None}, "cuda:1"),
    ({"cuda:1": 5}, {"cuda:1": 5}), (["cpu"], "cpu"), ("auto", "auto"), ({"cpu:0": 3, "cpu:1": 4}, {"cpu:0": 3, "cpu:1": 4})])
def test_how_devices_are_named(monkeypatch, given, found) -> None:
    monkeypatch.delenv("PYENGINE_DEVICE", raising=False)
    want = Settings(device=given)
    want.check()
    assert want.device == found


def test_a_default_device_of_the_environment(monkeypatch) -> None:
    for text, found in (("cuda:1", "cuda:1"), ("cuda:0,cpu", {"cuda:0": None, "cpu": None})):
        monkeypatch.setenv("PYENGINE_DEVICE", text)
        for given in ("auto", None):
            want = Settings(device=given)
            want.check()
            assert want.device == found
    want = Settings(device="cpu")
    want.check()
    assert want.device == "cpu"


@pytest.mark.parametrize("given", ["tpu", "cuda:x", [], {}, ["cuda:0", "cpu:0"], {"cpu": 1, "cpu:0": 1}, {"cuda:0": 0}, {"cuda:0": True}, {"cpu:0": None}, 5])
def test_devices_that_are_none(given) -> None:
    with pytest.raises(RequestError, match="device"):
        Settings(device=given).check()


def test_a_card_that_is_not_there_says_why(tiny_gguf, monkeypatch) -> None:
    library = import_module("pyengine.backends.cuda.library")                  # the package has a function of this name
    monkeypatch.setattr(library, "BUILT", library.BUILT.parent / "nowhere" / "_cuda.so")
    with pytest.raises(PyEngineError, match="make cuda"):
        pe.plan(tiny_gguf("llama")[0], device="cuda")
