"""Several models in one process: loaded by name, unloaded by plan, never under a request; on a machine of given memory, by a given clock."""

from __future__ import annotations

import gc
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies

from pyengine import hardware
from pyengine.engine.load import Candidate
from pyengine.engine.residents import FOR_EVER, keep_alive_of, Residents
from pyengine.errors import ModelNotFoundError, PlanError, RequestError
from pyengine.memory import held

MIB = 2**20


class Clock:
    """Seconds that pass when they are told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def memory(monkeypatch) -> Any:
    """memory(bytes): a machine of so much memory, of which this process's models have what they have touched."""
    found = hardware.detect()
    gc.collect()
    monkeypatch.setattr(held, "_registered", type(held._registered)())         # those of other tests stay out of it
    size = [16 * 2**30]

    def detect(system: Any = None) -> Any:
        taken = sum(h.resident.get("cpu", 0) for h in held.held())
        device = found.devices[0]._replace(total=size[0], free=size[0] - taken)
        return found._replace(devices=(device,))

    monkeypatch.setattr(hardware, "detect", detect)
    return lambda n: size.__setitem__(0, n)


@pytest.fixture
def files(tiny_gguf) -> dict[str, Path]:
    """Three models of about the same size."""
    return {name: tiny_gguf("llama", outtype)[0] for name, outtype in (("a", "f32"), ("b", "f16"), ("c", "q8_0"))}


@pytest.fixture
def residents(files, clock, memory) -> Any:
    def open_(name: str) -> Candidate:
        if name not in files:
            raise ModelNotFoundError(f"no {name}")
        opened.append(name)
        return Candidate.open(files[name], n_ctx=8192, n_seq=64, n_threads=1)

    opened: list[str] = []
    with Residents(open_, clock=clock) as found:
        found.opened = opened
        yield found


@pytest.fixture
def total(files, residents) -> int:
    """Bytes that each of the models takes beside the process, within a few percent: caches are nearly all of them."""
    plans = [Candidate.open(path, n_ctx=8192, n_seq=64, n_threads=1).fit().plan for path in files.values()]
    sizes = [sum(held.planned_bytes(p).values()) for p in plans]
    assert max(sizes) < 1.1 * min(sizes) and min(sizes) > 120 * MIB > 2 * plans[0].of("overhead")
    return max(sizes)


def names(residents: Residents) -> set[str]:
    return {r.name for r in residents.ps()}


def use(residents: Residents, name: str, **more: Any) -> str:
    with residents.using(name, **more) as model:
        return str(model.generate([5, 6, 7], max_tokens=3, temperature=0))


def until(true: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# -- loading --------------------------------------------------------------------------------------------------------------


def test_a_model_is_loaded_when_it_is_asked_for_and_only_once(residents) -> None:
    with ThreadPoolExecutor(8) as pool:
        texts = set(pool.map(lambda _: use(residents, "a"), range(8)))
    assert len(texts) == 1 and residents.opened == ["a"] and names(residents) == {"a"}
    lease = residents.lease("a").result(0)                   # it is there: at once
    assert lease.waited < 1 and lease.model is residents.ps()[0].model
    lease.release()


def test_what_opening_raises_is_told_to_all_who_wait(residents) -> None:
    for future in [residents.lease("nothing") for _ in range(3)]:
        with pytest.raises(ModelNotFoundError, match="no nothing"):
            future.result(20)
    assert use(residents, "a")


def test_loaded_models_go_on_while_another_one_is_loaded(residents, monkeypatch) -> None:
    use(residents, "a")
    wait, load = threading.Event(), Candidate.fit
    monkeypatch.setattr(Candidate, "fit", lambda self, *args: wait.wait(20) and load(self, *args))
    future = residents.lease("b")
    for _ in range(3):
        assert use(residents, "a")
    assert not future.done()
    wait.set()
    future.result(20).release()


# -- unloading by plan ----------------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_and_no_more_than_must(residents, clock, memory, total) -> None:
    memory(int(2.5 * total))
    for name in ("a", "b", "a"):
        clock.now += 1
        use(residents, name)
    assert names(residents) == {"a", "b"}
    clock.now += 1
    use(residents, "c")
    assert names(residents) == {"a", "c"} and residents.opened == ["a", "b", "c"]
    memory(8 * total)
    use(residents, "b")
    assert names(residents) == {"a", "b", "c"}
    assert [r.name for r in residents.ps()] != ["a", "b", "c"] and residents.ps()[-1].name == "a"


def test_a_model_that_works_stays_until_its_requests_have_ended(residents, memory, total) -> None:
    memory(int(1.5 * total))
    lease = residents.lease("a").result(20)
    want = use(residents, "a")
    other = residents.lease("b")
    late = None
    until(lambda: residents._there["a"].leaving)
    late = residents.lease("a")                              # comes behind b, or a busy model would keep it waiting for ever
    with pytest.raises(TimeoutError):
        other.result(0.2)
    assert str(lease.model.generate([5, 6, 7], max_tokens=3, temperature=0)) == want and names(residents) == {"a"}
    lease.release()
    with other.result(20) as b:
        assert names(residents) == {"b"} and lease.model.closed and not late.done() and not b.closed
    with late.result(20) as again:
        assert again is not lease.model and names(residents) == {"a"} and b.closed
        assert str(again.generate([5, 6, 7], max_tokens=3, temperature=0)) == want


def test_two_models_in_the_memory_of_one_serve_everybody(residents, memory, total) -> None:
    memory(int(1.5 * total))
    alone = {name: use(residents, name) for name in ("a", "b")}
    with ThreadPoolExecutor(6) as pool:
        asked = ["a", "b"] * 12
        assert list(pool.map(lambda name: use(residents, name), asked)) == [alone[name] for name in asked]
    assert len(names(residents)) == 1


def test_a_lease_that_nobody_holds_keeps_nothing(residents, memory, total) -> None:
    memory(int(1.5 * total))
    lease = residents.lease("a").result(20)
    future = residents.lease("b")
    future.cancel()
    del lease, future
    gc.collect()
    assert use(residents, "c") and names(residents) == {"c"} and "b" not in residents.opened[2:]


def test_what_fits_nowhere_is_refused_with_what_would(residents, memory, total) -> None:
    use(residents, "a")
    memory(total // 2)
    with pytest.raises(PlanError, match="(?s)does not fit.*these would fit:.*n_ctx=") as error:
        use(residents, "b")
    assert error.value.plan.alternatives and names(residents) == {"a"}         # nobody goes for nothing


def test_what_is_kept_for_ever_is_named_where_it_would_have_to_go(residents, memory, total) -> None:
    memory(int(2.5 * total))
    use(residents, "a", keep=FOR_EVER)
    use(residents, "b", keep=FOR_EVER)
    with pytest.raises(PlanError, match="(?s)does not fit.*what would have to go is kept for ever: 'a'; stop it first") as error:
        use(residents, "c")
    assert not error.value.plan.fits and error.value.plan.held and names(residents) == {"a", "b"}
    assert residents.stop("a") and not residents.stop("a")
    use(residents, "c")
    assert names(residents) == {"b", "c"}


def test_the_context_does_not_depend_on_who_is_there(files, clock, memory, total) -> None:
    """Without a context that is asked for, the plan beside others would make it smaller: they go instead."""
    with Residents(lambda name: Candidate.open(files[name], n_seq=512, n_threads=1), clock=clock) as found:
        memory(600 * MIB)
        contexts = {}
        for name in ("a", "b"):
            with found.using(name) as model:
                contexts[name] = model.n_ctx
        assert contexts == {"a": 256, "b": 256}
        memory(int(found.ps()[0].model.plan.total * 1.4))
        with found.using("c") as model:
            assert model.n_ctx == 256 and names(found) == {"c"}


# -- keep_alive -----------------------------------------------------------------------------------------------------------


def test_a_model_goes_when_its_time_is_up(residents, clock) -> None:
    use(residents, "a")
    use(residents, "b", keep=60.0)
    assert [round(r.expires) for r in residents.ps()] in ([60, 300], [300, 60])
    clock.now += 61
    residents.expire()
    assert names(residents) == {"a"}
    clock.now += 230
    use(residents, "a")                                      # a use begins its time again, and leaves its length
    clock.now += 299
    residents.expire()
    assert names(residents) == {"a"}
    clock.now += 2
    with residents.using("a", keep=FOR_EVER):
        clock.now += 1e6
        residents.expire()
    clock.now += 1e9
    residents.expire()
    assert names(residents) == {"a"} and residents.ps()[0].expires == math.inf


def test_at_once_and_by_the_thread(files, memory) -> None:
    with Residents(lambda name: Candidate.open(files[name], n_ctx=256, n_threads=1)) as found:
        use(found, "a", keep=0.0)
        until(lambda: not names(found))
        use(found, "b", keep=0.2)
        assert names(found) == {"b"}
        until(lambda: not names(found))
        until(lambda: found._thread is None)                 # nothing to do any more
        use(found, "a")
        assert found._thread.is_alive()
    assert found._thread is None or not found._thread.is_alive()


def test_stop_lets_requests_end(residents) -> None:
    lease = residents.lease("a").result(20)
    assert residents.stop("a") and names(residents) == {"a"}
    assert lease.model.generate([5, 6], max_tokens=2, temperature=0) is not None
    lease.release()
    until(lambda: not names(residents))
    assert not residents.stop("a") and lease.model.closed


def test_closing_ends_everything(residents) -> None:
    lease = residents.lease("a").result(20)
    residents.close()
    assert lease.model.closed and names(residents) == set()
    lease.release()
    with pytest.raises(RequestError, match="closed"):
        residents.lease("a")


@pytest.mark.parametrize("value, seconds", [
    (300, 300), (0, 0), ("5m", 300), ("1h30m", 5400), ("300ms", 0.3), ("1.5h", 5400), ("90", 90), ("0", 0), (-1, FOR_EVER), ("-1", FOR_EVER),
    ("-1m", FOR_EVER), (2.5, 2.5), ("24h", 86400), (1e300, FOR_EVER)])
def test_times_in_ollamas_forms(value: Any, seconds: float) -> None:
    assert keep_alive_of(value) == pytest.approx(seconds)


@pytest.mark.parametrize("value", ["", "5x", "m", "5m3", "--1", "+-1s", "1e3", "five", True, None, [], {}, float("nan"), "9" * 100, "5 m"])
def test_other_forms_are_refused(value: Any) -> None:
    with pytest.raises(RequestError, match="keep_alive"):
        keep_alive_of(value)


@given(strategies.one_of(strategies.text(), strategies.integers(), strategies.floats(), strategies.text("0123456789.hms-+nµu")))
def test_any_time_is_one_or_is_refused(value: Any) -> None:
    try:
        assert keep_alive_of(value) >= 0
    except RequestError:
        pass


# -- nothing is left ------------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_thirty_rounds_leave_nothing(residents, memory, total) -> None:
    memory(int(1.5 * total))
    for _ in range(3):
        use(residents, "a"), use(residents, "b")
    files_open, before, threads = len(os.listdir("/proc/self/fd")), resident_bytes(), threading.active_count()
    for _ in range(15):
        use(residents, "a"), use(residents, "b")
    assert len(os.listdir("/proc/self/fd")) <= files_open and threading.active_count() <= threads
    assert resident_bytes() - before < 12 * MIB
