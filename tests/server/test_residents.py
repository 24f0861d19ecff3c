"""Several models in one process: loaded by name, unloaded by plan, never under a request; on a machine of given memory, by a given clock."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies

from pyengine import hardware
from pyengine.engine.load import Candidate
from pyengine.engine.residents import FOR_EVER, keep_alive_of, Residents
from pyengine.errors import ModelNotFoundError, PlanError, RequestError
from pyengine.files.stores import list_models
from pyengine.memory import held
from pyengine.server.app import application
from pyengine.server.models import load, Models

pytest.importorskip("httpx")
from starlette.testclient import TestClient  # noqa: E402  which needs httpx

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


def test_the_context_does_not_depend_on_who_is_there(tiny_gguf, clock, memory) -> None:
    """Without a context that is asked for, the plan beside others would make it smaller: they go instead."""
    path = tiny_gguf("llama", "f32", max_position_embeddings=8192)[0]
    with Residents(lambda name: Candidate.open(path, n_seq=64, n_threads=1), clock=clock) as found:
        memory(600 * MIB)
        contexts = {}
        for name in ("a", "b"):
            with found.using(name) as model:
                contexts[name] = model.n_ctx
        assert contexts == {"a": 8192, "b": 8192}
        memory(int(found.ps()[0].model.plan.total * 1.4))
        with found.using("c") as model:
            assert model.n_ctx == 8192 and names(found) == {"c"}


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


# -- over HTTP ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(files, tmp_path, monkeypatch) -> Path:
    """A folder of models a, b and c, which is all that this machine has."""
    for name in ("OLLAMA_MODELS", "HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "store"
    folder.mkdir()
    for name, path in files.items():
        shutil.copy(path, folder / f"{name}.gguf")
    monkeypatch.setenv("PYENGINE_MODELS", str(folder))
    return folder


@pytest.fixture
def models(store, memory) -> Any:
    found = Models((), list_models, {"n_ctx": 8192, "n_seq": 64, "n_threads": 1})
    yield found
    found.close()


@pytest.fixture
def client(models) -> Any:
    return TestClient(application(models), base_url="http://localhost:8080")


def in_memory(client: Any) -> dict[str, Any]:
    return {m["name"]: m for m in client.get("/api/ps").json()["models"]}


def test_any_model_is_listed_and_can_be_asked_for(client, models, store) -> None:
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["a", "b", "c"] and in_memory(client) == {}
    tags = client.get("/api/tags").json()["models"]
    assert [(m["name"], m["details"]["family"], m["details"]["quantization_level"]) for m in tags] == [
        ("a", "llama", "ALL_F32"), ("b", "llama", "F16"), ("c", "llama", "Q8_0")]
    assert tags[0]["size"] == (store / "a.gguf").stat().st_size and in_memory(client) == {}
    shown = client.post("/api/show", json={"model": "c"}).json()
    assert shown["capabilities"] == ["completion", "tools"] and shown["model_info"]["general.architecture"] == "llama" and in_memory(client) == {}
    for path, asked in (("/v1/chat/completions", {"model": "a", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}),
                        ("/v1/messages", {"model": "b", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}),
                        ("/tokenize", {"model": "c.gguf", "content": "Hi"})):
        assert client.post(path, json=asked).status_code == 200
    assert in_memory(client).keys() == {"a", "b", "c"} and all(r.users == 0 for r in models.residents.ps())
    (store / "a.gguf").rename(store / "d.gguf")              # new ones are found, and those that are loaded stay
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["b", "c", "d", "a"]
    assert client.post("/tokenize", json={"model": "d", "content": "Hi"}).status_code == 200


def test_names_that_mean_none_or_several_or_are_paths(client, store) -> None:
    (store / "bb.gguf").write_bytes((store / "b.gguf").read_bytes())
    (store / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    outside = store.parent / "outside.gguf"
    outside.write_bytes((store / "a.gguf").read_bytes())
    for name, status in (("b", 200), ("bb", 200), ("B:latest", 200), ("br", 400), ("", 404), ("e", 404), (str(outside), 404), (str(store / "a.gguf"), 404),
                         ("../outside.gguf", 404), ("store/a.gguf", 404)):
        got = client.post("/tokenize", json={"model": name, "content": "Hi"})
        assert got.status_code == status, (name, got.text)
    assert "broken.gguf" in client.post("/tokenize", json={"model": "broken", "content": "Hi"}).json()["error"]["message"]
    assert client.get("/api/tags").status_code == 200        # a file that is damaged does not spoil the list
    shutil.copy(store / "a.gguf", store / "bbb.gguf")
    (store / "b.gguf").unlink(), (store / "broken.gguf").unlink()
    client.get("/v1/models")
    said = client.post("/api/show", json={"model": "missing"})
    assert said.status_code == 404 and "served: a, bb, bbb, c" in said.json()["error"]


def test_keep_alive_of_ollamas_requests(client, models) -> None:
    loaded = client.post("/api/generate", json={"model": "a", "keep_alive": "10m"}).json()
    assert loaded["done_reason"] == "load" and loaded["done"]
    expires = datetime.fromisoformat(in_memory(client)["a"]["expires_at"].replace("Z", "+00:00")).timestamp() - time.time()
    assert 590 < expires <= 600
    assert client.post("/api/chat", json={"model": "a", "messages": [], "keep_alive": -1}).json()["done_reason"] == "load"
    assert in_memory(client)["a"]["expires_at"].startswith("23")               # in 292 years, which Ollama's client shows as for ever
    said = client.post("/api/generate", json={"model": "a", "keep_alive": "later"})
    assert said.status_code == 400 and said.json()["error"].startswith("keep_alive: ")
    assert client.post("/api/generate", json={"model": "a", "keep_alive": 0}).json()["done_reason"] == "unload" and in_memory(client) == {}
    assert client.post("/api/chat", json={"model": "b", "keep_alive": "0s"}).json()["done_reason"] == "unload" and in_memory(client) == {}
    asked = {"model": "b", "prompt": "Hi", "stream": False, "options": {"num_predict": 2, "temperature": 0}}
    first, second = (client.post("/api/generate", json=asked).json() for _ in range(2))
    assert first["response"] == second["response"]
    assert first["total_duration"] > first["load_duration"] > second["load_duration"] >= 0
    client.post("/api/generate", json={**asked, "keep_alive": 0})
    until(lambda: in_memory(client) == {})


def test_sizes_are_those_of_the_plans_and_the_refusal_says_what_would_go(client, models, memory, total) -> None:
    memory(int(1.5 * total))
    client.post("/api/generate", json={"model": "a", "keep_alive": -1})
    assert in_memory(client)["a"]["size"] == models.residents.ps()[0].model.plan.total
    said = client.post("/v1/completions", json={"model": "b", "prompt": "Hi"})
    assert said.status_code == 400 and "what would have to go is kept for ever: 'a'" in said.json()["error"]["message"]
    client.post("/api/generate", json={"model": "a", "keep_alive": 0})
    assert client.post("/v1/completions", json={"model": "b", "prompt": "Hi", "max_tokens": 1}).status_code == 200


def test_a_stream_keeps_its_model(client, models, memory, total) -> None:
    memory(int(1.5 * total))
    asked = {"model": "a", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 200, "temperature": 0, "stream": True, "logprobs": True}
    want = client.post("/v1/chat/completions", json={**asked, "stream": False}).json()["choices"][0]["message"]["content"]
    with ThreadPoolExecutor(2) as pool:
        streamed = pool.submit(lambda: client.post("/v1/chat/completions", json=asked).text)
        until(lambda: any(r.users for r in models.residents.ps()) or streamed.done())
        other = pool.submit(lambda: client.post("/v1/completions", json={"model": "b", "prompt": "Hi", "max_tokens": 2}))
        text = streamed.result(60)
        assert other.result(60).status_code == 200
    deltas = [json.loads(line[6:])["choices"][0]["delta"].get("content") for line in text.split("\n\n") if line.startswith("data: {")]
    assert "".join(filter(None, deltas)) == want and "error" not in text and text.endswith("[DONE]\n\n")
    until(lambda: all(r.users == 0 for r in models.residents.ps()))


def test_what_was_named_stays_and_can_be_loaded_again(files, memory) -> None:
    found = Models([load(str(files["a"]), n_ctx=128, n_threads=1)])
    client = TestClient(application(found), base_url="http://localhost:8080")
    asked = {"prompt": "Hi", "max_tokens": 3, "temperature": 0}
    want = client.post("/v1/completions", json=asked).json()["choices"][0]["text"]
    assert in_memory(client)["f32"]["expires_at"].startswith("23")
    client.post("/api/generate", json={"keep_alive": 0})
    assert in_memory(client) == {} and [m["id"] for m in client.get("/v1/models").json()["data"]] == ["f32"]
    assert client.post("/v1/completions", json=asked).json()["choices"][0]["text"] == want and found.running()[0][0].model.n_ctx == 128
    assert client.post("/v1/completions", json={**asked, "model": str(files["b"])}).status_code == 404
    found.close()


def test_a_client_that_leaves_before_its_model_is_there_loads_none(models, monkeypatch) -> None:
    from starlette.requests import ClientDisconnect, Request

    from pyengine.server import replies

    wait, load_ = threading.Event(), Candidate.fit
    monkeypatch.setattr(Candidate, "fit", lambda self, *args: wait.wait(20) and load_(self, *args))

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def ask(name: str) -> None:
        request = Request({"type": "http", "headers": [], "state": {"leases": []}}, receive)
        with pytest.raises(ClientDisconnect):
            await replies.using(request, models, name)

    first = models.residents.lease("a")                      # is being loaded
    asyncio.run(ask("b"))
    wait.set()
    with first.result(60), models.residents.lease("c").result(60):
        assert names(models.residents) == {"a", "c"}


# -- nothing is left ------------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_rounds_leave_nothing(residents, memory, total) -> None:
    memory(int(1.5 * total))
    for _ in range(2):
        use(residents, "a"), use(residents, "b")
    files_open, before, threads = len(os.listdir("/proc/self/fd")), resident_bytes(), threading.active_count()
    for _ in range(6):
        use(residents, "a"), use(residents, "b")
    assert len(os.listdir("/proc/self/fd")) <= files_open and threading.active_count() <= threads
    assert resident_bytes() - before < 3 * MIB               # 0.04 in 12 rounds
