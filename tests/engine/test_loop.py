"""A loop that serves everybody: answers are those that each would get alone, whoever else is there, comes, goes or dawdles."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from typing import Any

import numpy as np
import pytest

import pyengine as pe
from pyengine.engine import loop as loops
from pyengine.errors import BusyError, ContextOverflowError, RequestError


def ids(n: int, seed: int) -> list[int]:
    return np.random.default_rng((seed, n)).integers(0, 300, n).tolist()


@pytest.fixture
def model(tiny_gguf) -> Any:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=256, n_threads=1, n_seq=4)
    yield model
    model.loop.close()


def test_answers_are_those_of_generate(model, tiny_gguf) -> None:
    alone = pe.load(tiny_gguf("llama")[0], n_ctx=256, n_threads=1)
    prompts = [ids(n, n) for n in (3, 150, 20, 90, 7, 61, 2, 33, 128, 12)]
    want = [alone.generate(p, max_tokens=20, seed=i) for i, p in enumerate(prompts)]
    handles = [model.submit(p, max_tokens=20, seed=i, client=str(i % 3)) for i, p in enumerate(prompts)]
    for handle, right in zip(handles, want):
        got = handle.result(60)
        assert got == right and got.tokens == right.tokens and got.finish == right.finish
    assert handles[0].done and handles[0].error is None and not handles[0].cancel()


def test_pieces_are_given_once_and_the_result_is_the_whole(model) -> None:
    handle = model.submit(ids(8, 1), max_tokens=24, seed=3)
    first = next(handle)
    assert first + "".join(handle) == handle.result(60) == handle.result(0)
    assert list(handle) == []


def test_a_conversation_is_submitted_too(model) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert model.submit(messages=messages, max_tokens=8, temperature=0).result(60) == model.chat(messages, max_tokens=8, temperature=0)


def test_asynchronous_readers(model) -> None:
    want = [model.generate(ids(6, i), max_tokens=16, seed=i) for i in range(6)]

    async def read(i: int) -> str:
        return "".join([piece async for piece in model.submit(ids(6, i), max_tokens=16, seed=i)])

    async def wait(i: int) -> str:
        return await model.submit(ids(6, i), max_tokens=16, seed=i)

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(read(i) for i in range(6)), *(wait(i) for i in range(6)))

    assert asyncio.run(all_of_them()) == want * 2


def test_watched_answers_are_taken_as_they_come(model) -> None:
    want = [model.generate(ids(6, i), max_tokens=60, seed=i) for i in range(6)]

    async def watched() -> tuple[list[str], list[int]]:
        over, handles = asyncio.Event(), [model.submit(ids(6, i), max_tokens=60, seed=i) for i in range(6)]
        texts, times, ended = [""] * 6, [0] * 6, set[int]()

        def look(i: int) -> None:
            new, done = handles[i].take()
            texts[i] += "".join(p if isinstance(p, str) else p.text for p in new)
            times[i] += 1
            if done:
                ended.add(i)
            if len(ended) == 6:
                over.set()

        for i, handle in enumerate(handles):
            handle.watch(lambda i=i: look(i))
            look(i)                                          # what came before it was watched
        await asyncio.wait_for(over.wait(), 60)
        return texts, times

    texts, times = asyncio.run(watched())
    assert texts == want and max(times) > 2


def test_an_event_loop_that_ends_early_stalls_nobody(model) -> None:
    async def leave() -> Any:
        handle = model.submit(ids(6, 1), max_tokens=60, seed=1)
        await handle.__anext__()
        task = asyncio.ensure_future(handle.__anext__())
        await asyncio.sleep(0)
        task.cancel()
        return handle

    assert asyncio.run(leave()).result(60) == model.generate(ids(6, 1), max_tokens=60, seed=1)


def test_cancelled_answers_end_within_a_step(model) -> None:
    handle = model.submit(ids(6, 1), max_tokens=None, temperature=0)
    others = [model.submit(ids(5, i), max_tokens=30, seed=i) for i in range(3)]
    waiting = model.submit(ids(6, 9), max_tokens=5)                            # there are four places
    next(handle)
    assert waiting.cancel() and waiting.result(5) == "" and waiting.report.finish == "cancelled"
    steps = model.stats["steps"]
    assert handle.cancel()
    text = handle.result(5)
    assert text.finish == "cancelled" and model.stats["steps"] - steps <= 60 and not handle.cancel()
    assert model.generate(ids(6, 1), max_tokens=len(text.tokens), temperature=0).tokens == text.tokens
    for i, other in enumerate(others):
        assert other.result(60) == model.generate(ids(5, i), max_tokens=30, seed=i)
    assert not any(s.active for s in model._runner.cells.conversations)


def test_clients_take_turns(tiny_gguf) -> None:
    """One client's hundred requests do not keep another's one waiting."""
    model = pe.load(tiny_gguf("llama")[0], n_ctx=64, n_threads=1)
    ended: list[str] = []
    with model._scheduler.lock:                              # so that nothing is done before all of them wait
        handles = [model.submit(ids(4, i), max_tokens=3, client="greedy") for i in range(30)]
        handles.append(model.submit(ids(4, 99), max_tokens=3, client="modest"))
        for handle in handles:
            handle.on_done(lambda h: ended.append(h.client))
    for handle in handles:
        handle.result(60)
    assert ended.index("modest") <= 2
    model.loop.close()


def test_turns_go_round(model) -> None:
    loop = loops.Loop(model._scheduler)
    made = {c: [loops.Handle(model._request(lambda: model._prompts.prompt(ids(3, 1)), 1, None, {}, False), loop, c) for _ in range(n)]
            for c, n in (("a", 4), ("b", 1), ("c", 2))}
    for client, handles in made.items():
        loop._waiting[client] = loops.deque(handles)
    assert [loop._next().client for _ in range(7)] == list("abcacaa")
    assert not loop._waiting


def test_a_short_prompt_overtakes_a_long_one(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=2048, n_threads=1, n_seq=2, n_batch=64)
    order: list[str] = []
    long, short = model.submit(ids(1500, 1), max_tokens=1, client="long"), model.submit(ids(40, 2), max_tokens=1, client="short")
    for handle in (long, short):
        handle.on_done(lambda h: order.append(h.client))
    long.result(60), short.result(60)
    assert order == ["short", "long"]
    model.loop.close()


def test_a_long_prompt_goes_on_beside_many_short_ones(model) -> None:
    requests = [model._request(lambda n=n: model._prompts.prompt(ids(n, n)), 1, None, {}, False) for n in (200, 30, 10, 20)]
    model._scheduler.active[:] = requests
    shares = model._scheduler._shares(64)
    model._scheduler.active.clear()
    assert [(len(r.rows), n) for r, n in shares] == [(200, 32), (10, 64), (20, 64), (30, 64)]


def test_a_full_queue_says_so(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=256, n_threads=1)
    model.loop.limit = 2
    handles = [model.submit(ids(4, 0), max_tokens=None, temperature=0)]
    next(handles[0])
    handles += [model.submit(ids(4, i), max_tokens=2) for i in (1, 2)]
    with pytest.raises(BusyError, match="2 requests are waiting"):
        model.submit(ids(4, 3), max_tokens=2)
    for handle in handles:
        handle.cancel()
    model.loop.close()
    with pytest.raises(RequestError, match="closed"):
        model.submit(ids(4, 3))


def test_what_cannot_be_served_is_refused_at_once(model) -> None:
    with pytest.raises(ContextOverflowError):
        model.submit(ids(300, 1))
    for wrong in ({}, {"prompt": "a", "messages": []}):
        with pytest.raises(RequestError, match="one of them"):
            model.submit(**wrong)


def test_an_error_of_a_request_is_its_own(model) -> None:
    bad = model.submit(ids(5, 1), max_tokens=4)
    bad._request.sampler.sample = lambda logits, allowed: 1 / 0
    good = model.submit(ids(5, 2), max_tokens=4, temperature=0)
    with pytest.raises(ZeroDivisionError):
        bad.result(60)
    assert good.result(60) == model.generate(ids(5, 2), max_tokens=4, temperature=0)


def test_an_error_of_the_engine_reaches_everybody(model, monkeypatch) -> None:
    monkeypatch.setattr(model._scheduler, "_compose", lambda: 1 / 0)
    handles = [model.submit(ids(5, i), max_tokens=4) for i in range(3)]
    for handle in handles:
        with pytest.raises(ZeroDivisionError):
            handle.result(60)
    monkeypatch.undo()
    assert model.submit(ids(5, 1), max_tokens=4, temperature=0).result(60).finish == "length"


def test_a_slow_reader_stalls_nobody(model) -> None:
    slow = model.submit(ids(5, 1), max_tokens=100, temperature=0)
    quick = [model.submit(ids(5, 2), max_tokens=10, temperature=0).result(60) for _ in range(3)]
    assert quick[0] == quick[2]
    assert slow.result(60) == model.generate(ids(5, 1), max_tokens=100, temperature=0)


def test_plain_calls_come_between_the_loops_steps(model) -> None:
    """`feed` and streams of other threads get the model although the loop is never idle."""
    busy = [model.submit(ids(5, i), max_tokens=None, temperature=0) for i in range(2)]
    for handle in busy:
        next(handle)
    for n in range(3):
        assert model.logits(ids(6, n)).shape == (6, model.n_vocab)
    between = [h.done for h in busy]
    assert len(model.stream(ids(5, 7), max_tokens=5, temperature=0).answer().tokens) == 5
    for handle in busy:
        handle.result(60)
    assert not any(between)


def test_many_threads_come_and_go(model, tiny_gguf) -> None:
    """Half of them leave at a random moment; those that stay get what they would get alone, and nothing is left behind."""
    alone = pe.load(tiny_gguf("llama")[0], n_ctx=256, n_threads=1)
    want = {i: alone.generate(ids(3 + 5 * (i % 7), i), max_tokens=4 + i % 23, seed=i) for i in range(60)}
    wrong: list[int] = []

    def ask(i: int) -> None:
        rng = random.Random(i)
        handle = model.submit(ids(3 + 5 * (i % 7), i), max_tokens=4 + i % 23, seed=i, client=str(i % 5))
        if i % 2:
            for _ in range(rng.randrange(4)):
                next(handle, None)
            handle.cancel()
            handle.result(60)
        elif handle.result(60) != want[i]:
            wrong.append(i)

    threads = [threading.Thread(target=ask, args=(i,), daemon=True) for i in want]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert not any(t.is_alive() for t in threads) and not wrong
    assert model.loop.n_running == model.loop.n_waiting == 0
    assert not any(s.active for s in model._runner.cells.conversations) and not model._scheduler.active


def test_the_thread_ends_and_comes_back(model, monkeypatch) -> None:
    monkeypatch.setattr(loops, "IDLE_SECONDS", 0.05)
    for _ in range(3):
        model.submit(ids(4, 1), max_tokens=2).result(60)
        deadline = time.monotonic() + 20
        while model.loop._thread is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert model.loop._thread is None


def test_a_model_that_nobody_holds_is_freed(tiny_gguf, monkeypatch) -> None:
    import weakref

    monkeypatch.setattr(loops, "IDLE_SECONDS", 0.05)
    model = pe.load(tiny_gguf("llama")[0], n_ctx=64, n_threads=1)
    model.submit(ids(4, 1), max_tokens=2).result(60)
    held = weakref.ref(model._runner)
    del model
    deadline = time.monotonic() + 20
    while held() is not None and time.monotonic() < deadline:
        time.sleep(0.02)
        gc.collect()
    assert held() is None
