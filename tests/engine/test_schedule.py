"""Many requests on one model: each answer is bitwise the one that its request gets alone, whoever joins, leaves or fails."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cases
import pyengine as pe
from pyengine.dtype import dtype as dtype_of
from pyengine.errors import ContextOverflowError, PlanError, RequestError
from pyengine.nn.rope import Rope
from pyengine.cache.store import Rotation, rotate_keys
from pyengine.engine.request import Request
from pyengine.engine.scheduler import BESIDE
from pyengine.programs.step import Row

KINDS = cases.kinds(own_cache=True)
N_CTX = 256


def ids(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng((seed, n)).integers(0, 300, n).tolist()


def picture(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prompts(kind: str) -> list[list[Any]]:
    """Lengths on both sides of n_batch, windows and pages; two with a common beginning."""
    plain = [ids(3), ids(70, 1), ids(17, 2), ids(130, 3), [*ids(70, 1)[:66], 9, 8, 7], ids(1, 4)]
    if not cases.find(kind).sees:
        return plain
    a, b = picture(1), picture(2, 90, 70)
    return [*plain[:4], [4, a, *ids(9)], [*ids(30, 5), b, 7, a, 8], [4, a, 5, 6]]


@pytest.fixture
def seen(monkeypatch) -> dict[int, list[np.ndarray]]:
    """Logits that each request was given, by the id of its report."""
    found: dict[int, list[np.ndarray]] = {}
    reports = []                                             # kept, so that no other gets their ids
    take = Request.take

    def spy(self: Request, logits: Row) -> None:
        reports.append(self.report)
        found.setdefault(id(self.report), []).append(logits.whole().copy())
        take(self, logits)

    monkeypatch.setattr(Request, "take", spy)
    return found


def options(model: pe.Model) -> dict[str, Any]:
    """Sampling that never ends by itself."""
    return {"temperature": 0.8, "seed": 3, "logit_bias": tuple((i, -1e9) for i in model.tokenizer.eog_ids)}


@pytest.mark.parametrize("kind", KINDS)
def test_each_gets_the_bits_that_it_gets_alone(tiny_gguf, seen, kind: str) -> None:
    path, wanted = tiny_gguf(kind)[0], prompts(kind)
    model = pe.load(path, n_ctx=N_CTX, n_batch=512, n_threads=1)
    alone = []
    for p in wanted:
        model.reset()
        answer = model.stream(p, max_tokens=9, **options(model)).answer()
        alone.append((answer.tokens, seen[id(answer.report)], answer.report))
    for n_threads, n_batch, n_seq in ((1, 24, 3), (2, 150, 4), (3, 9, 7)):
        model = pe.load(path, n_ctx=N_CTX, n_batch=n_batch, n_threads=n_threads, n_seq=n_seq)
        streams = [model.stream(p, max_tokens=9, **options(model)) for p in wanted]
        texts = [""] * len(streams)
        for i, s in enumerate(streams):                      # they join at different times, and are read in turns
            s.begin()
            for j in range(i + 1):
                texts[j] += next(streams[j], "")
        for s, (tokens, logits, _) in zip(streams, alone):
            s.answer()
            assert s.report.tokens == tokens and len(tokens) == 9
            for got, want in zip(seen[id(s.report)], logits, strict=True):
                assert np.array_equal(got, want)
        again = model.generate_many(wanted, max_tokens=9, **options(model))      # from what is cached now
        assert [a.tokens for a in again] == [tokens for tokens, _, _ in alone]


def rows_of_steps(model: pe.Model, monkeypatch) -> list[list[tuple[int, int, bool]]]:
    """Of each step from now on: (row of the sequence, rows, of a prompt?)."""
    steps: list[list[tuple[int, int, bool]]] = []
    step = model._runner.run

    def spy(work: Any) -> Any:
        steps.append([(w.conversation.row, w.stop - w.start, len(w.rows) > 1) for w in work])
        return step(work)

    monkeypatch.setattr(model._runner, "run", spy)
    return steps


def test_a_long_prompt_does_not_stall_others(tiny_gguf, monkeypatch) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=1024, n_batch=512, n_seq=3, speculate=False)
    steps = rows_of_steps(model, monkeypatch)
    quick = model.stream(ids(5), max_tokens=40, **options(model))
    next(quick)
    long, other = model.stream(ids(1000, 1), max_tokens=3, **options(model)), model.stream(ids(300, 2), max_tokens=3, **options(model))
    long.begin()
    other.begin()
    before = len(steps)
    assert len(quick.answer().tokens) == 40
    beside = steps[before:]
    row = quick.report.conversation.row
    assert all((row, 1, False) in work for work in beside)                       # a token in every step
    assert max(sum(n for _, n, of_prompt in work if of_prompt) for work in beside) == BESIDE
    assert [sum(n for _, n, of_prompt in work if of_prompt) for work in beside[:7]] == [BESIDE] * 7
    assert len(long.answer().tokens) == len(other.answer().tokens) == 3


def test_a_picture_beside_others_takes_its_own_rows_only(tiny_gguf, monkeypatch) -> None:
    """16 soft tokens in one step, where n_batch leaves 15 beside the other one: a step of its own, and nothing more in it."""
    path = tiny_gguf("gemma3", mm_tokens_per_image=16, text_config={"sliding_window": 6})[0]
    monkeypatch.setattr("pyengine.engine.scheduler.BESIDE", 4)
    for n_batch, alone in ((16, True), (40, False)):
        model = pe.load(path, n_ctx=N_CTX, n_batch=n_batch, n_seq=2, speculate=False)
        steps = rows_of_steps(model, monkeypatch)
        quick = model.stream(ids(5), max_tokens=40, **options(model))
        next(quick)
        before = len(steps)
        seeing = model.stream([*ids(6), picture(1), *ids(20)], max_tokens=2, **options(model))
        seeing.begin()
        quick.answer()
        row = quick.report.conversation.row
        prompt = [sum(n for _, n, of_prompt in work if of_prompt) for work in steps[before:]]
        assert sum(n > 4 for n in prompt) == 1 and max(prompt) == 16
        assert sum((row, 1, False) not in work for work in steps[before:]) == alone
        assert len(seeing.answer().tokens) == 2


def test_they_are_served_in_the_order_in_which_they_came(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=N_CTX, n_batch=32, n_seq=2, speculate=False)
    streams = [model.stream(ids(40, i), max_tokens=4, **options(model)) for i in range(6)]
    for s in streams:
        s.begin()
    finished: list[int] = []
    while len(finished) < 6:
        model._scheduler.advance()
        finished += [i for i, s in enumerate(streams) if s._request.finished and i not in finished]
    assert finished == sorted(finished)


def free_rows(model: pe.Model) -> int:
    return model.n_seq - sum(s.active for s in model._runner.cells.conversations)


def test_closed_forgotten_and_collected_streams_free_their_rows(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=N_CTX, n_batch=16, n_seq=3)
    closed, dropped, kept, waiting = (model.stream(ids(50, i), max_tokens=5, **options(model)) for i in range(4))
    for s in (closed, dropped, kept, waiting):
        s.begin()
    next(closed)
    assert free_rows(model) == 0
    closed.close()
    assert free_rows(model) == 1 and list(closed) == []
    waiting.close()
    circle = [dropped]
    circle.append(circle)
    del dropped, circle
    gc.collect()
    assert free_rows(model) == 2
    assert len(kept.answer().tokens) == 5 and free_rows(model) == 3
    unread = model.stream(ids(5), max_tokens=1)
    unread.close()
    assert list(unread) == [] and not model._scheduler.waiting
    model.reset()
    assert model.generate(ids(50, 2), max_tokens=5, **options(model)).tokens == kept.report.tokens


def test_a_stream_collected_in_the_middle_of_a_step(tiny_gguf, monkeypatch) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=N_CTX, n_batch=16, n_seq=2)
    want = model.generate(ids(20, 1), max_tokens=6, **options(model)).tokens
    held = [model.stream(ids(30, 2), max_tokens=50, **options(model))]
    other = model.stream(ids(20, 1), max_tokens=6, **options(model))
    next(held[0])
    other.begin()
    step = model._runner.run

    def collecting(work: Any) -> Any:
        held.clear()
        return step(work)

    monkeypatch.setattr(model._runner, "run", collecting)
    assert other.answer().tokens == want and free_rows(model) == 2


def interrupted(function: Any, count: int) -> Any:
    """The function, whose call number `count` is Ctrl-C."""
    calls = itertools.count(1)

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == count:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("kind", cases.kinds(sees=False, own_cache=True))
@pytest.mark.parametrize("where", ["program", "cells", "sampler", "copy"])
def test_an_interruption_leaves_a_usable_model(tiny_gguf, monkeypatch, kind: str, where: str) -> None:
    model = pe.load(tiny_gguf(kind)[0], n_ctx=N_CTX, n_batch=24, n_seq=3, speculate=False)              # steps are counted
    first, second = ids(70, 1), [*ids(70, 1)[:68], 5, 6]
    want = [model.generate(p, max_tokens=6, **options(model)).tokens for p in (first, second)]
    owner, name = {"program": (model.program, "execute"), "cells": (model._runner.cells, "cells_of"),
                   "copy": (model._runner.store, "copy"), "sampler": (Request, "take")}[where]
    for count in (1, 2, 3, 5):
        model.reset()
        model.generate(first, max_tokens=6, **options(model))                    # forks and copies come from here
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted(getattr(owner, name), count))
            streams = [model.stream(p, max_tokens=6, **options(model)) for p in (first, second)]
            with pytest.raises(KeyboardInterrupt):
                for s in streams:
                    s.begin()
                for s in streams:
                    s.answer()
        for s in streams:
            s.close()
        assert free_rows(model) == 3
        before = [sorted(f) for f in model._runner.cells._free], model._runner.cells._states.tolist()
        model._runner.cells.recount()
        assert before == ([sorted(f) for f in model._runner.cells._free], model._runner.cells._states.tolist())
        assert [a.tokens for a in model.generate_many([first, second], max_tokens=6, **options(model))] == want


def test_an_error_is_one_request_s_own(tiny_gguf, monkeypatch) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=64, n_batch=24, n_seq=3)
    want = model.generate(ids(20, 1), max_tokens=20, **options(model)).tokens
    full = model.stream(ids(60, 2), max_tokens=None, **options(model))
    bad = model.stream(ids(20, 3), max_tokens=20, **options(model))
    good = model.stream(ids(20, 1), max_tokens=20, **options(model))

    def broken(logits: np.ndarray, allowed: Any) -> Any:
        raise RequestError("this sampler is broken")

    monkeypatch.setattr(bad._request.sampler, "sample", broken)
    for s in (full, bad, good):
        s.begin()
    assert good.answer().tokens == want
    answer = full.answer()                                   # the context holds 4 more; the fifth is never read
    assert len(answer.tokens) == 5 and answer.finish == "length"
    with pytest.raises(RequestError, match="sampler is broken"):
        bad.answer()
    assert free_rows(model) == 3
    with pytest.raises(RequestError, match="prompt is empty"):
        model.generate([])


def test_without_a_row_a_request_is_refused_and_waits_for_nobody(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=64, n_batch=8)
    blocks = model.logit_blocks(ids(30))
    next(blocks)
    with pytest.raises(PlanError, match="all 1 conversations are in use"):
        model.generate(ids(5), max_tokens=2)
    blocks.close()
    assert len(model.generate(ids(5), max_tokens=2, **options(model)).tokens) == 2


def test_prefixes_are_shared_by_pages_and_oldest_conversations_go(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=N_CTX, n_batch=64, n_seq=3)
    cells, system = model._runner.cells, ids(64, 1)

    def ask(*tail: int) -> Any:
        return model.generate([*system, *tail], max_tokens=1, **options(model))

    a = ask(1, *range(100))
    assert a.n_cached == 0
    free = len(cells._free[0])
    b = ask(2, *range(100))
    assert b.n_cached == 64 and dict(cells.shared()) == {0: 1}                   # a page, held by both
    assert free - len(cells._free[0]) == 2                                       # 201 tokens of its own
    c = ask(3, *range(100))
    assert len(cells.conversations) == 3 and c.n_cached == 64
    assert ask(1, *range(100), 7).n_cached == 165                                # the first conversation is continued, not b or c
    assert b.report.conversation in cells.conversations
    d = ask(4, *range(100))                                                      # b is the oldest now: it goes
    assert d.n_cached == 64 and b.report.conversation not in cells.conversations and c.report.conversation in cells.conversations
    assert ask(3, *range(100), 7).n_cached == 165


def test_asking_again_costs_no_other_conversation(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=N_CTX, n_batch=64, n_seq=3)
    prompts = [[*ids(8, 1), i, *range(20)] for i in range(3)]
    for prompt in prompts:
        model.generate(prompt, max_tokens=60, **options(model))
    assert [model.generate(p, max_tokens=60, **options(model)).n_cached for p in prompts] == [28, 28, 28]


def test_pictures_are_found_by_digest(tiny_gguf) -> None:
    for kind in cases.kinds(sees=True, own_cache=True):
        model = pe.load(tiny_gguf(kind)[0], n_ctx=N_CTX, n_seq=3)
        one = model.generate([1, picture(1), *ids(20)], max_tokens=1, **options(model))
        again, other = (model.generate([1, picture(n), *ids(20), 5], max_tokens=1, **options(model)) for n in (1, 2))
        assert again.n_cached == one.n_prompt and other.n_cached < 5


def test_feed_keeps_its_conversation_whatever_others_do(tiny_gguf) -> None:
    for n_seq in (1, 2):
        model = pe.load(tiny_gguf("llama")[0], n_ctx=N_CTX, n_batch=16, n_seq=n_seq)
        text = ids(60, 1)
        want = model.logits(text)[-1]
        model.feed(text[:40])
        model.generate([*text[:40], 9, 9], max_tokens=3, **options(model))       # goes on from it, in its place
        assert np.array_equal(model.feed(text[40:]), want)
        with pytest.raises(ContextOverflowError):
            model.feed([1] * N_CTX)
        model.reset()
        assert np.array_equal(model.feed(text), want)


# ---- removal from the middle ----------------------------------------------------------------------------------------


def as_floats(cells: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes of cells as float64 [heads, n, elements]."""
    cells = np.ascontiguousarray(cells)
    if dtype == "bf16":
        return (cells.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return cells.view({"f32": np.float32, "f16": np.float16}[dtype]).astype(np.float64)


def turned(x: np.ndarray, rope: Any, by: int) -> np.ndarray:
    """Keys [heads, n, elements] turned by `by` positions, as products of complex numbers."""
    f = len(rope.inv_freq)
    pairs = x[..., : 2 * f].reshape(*x.shape[:-1], f, 2) if rope.interleaved else np.stack([x[..., :f], x[..., f : 2 * f]], axis=-1)
    z = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * by * rope.inv_freq.astype(np.float64))
    y = np.stack([z.real, z.imag], axis=-1)
    y = y.reshape(*x.shape[:-1], 2 * f) if rope.interleaved else np.concatenate([y[..., 0], y[..., 1]], axis=-1)
    return np.concatenate([y, x[..., 2 * f :]], axis=-1)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_keys_are_rotated(dtype: str, interleaved: bool) -> None:
    """Partial rotary too: the last 6 of 22 elements stay. Half a unit in the last place of each format."""
    rope = Rope((1 / 10_000 ** (np.arange(8) / 8)).astype(np.float32), 1.3, interleaved)
    x = np.random.default_rng(0).normal(size=(2, 9, 22)).astype(np.float32)
    bits = (x.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bf16" else x.astype({"f32": "f4", "f16": "f2"}[dtype])
    got = as_floats(rotate_keys(bits.view(np.uint8), dtype_of(dtype), Rotation(rope.inv_freq, interleaved), -37), dtype)
    want = turned(as_floats(bits.view(np.uint8), dtype), rope, -37)
    assert np.all(np.abs(got - want) <= {"f32": 2**-22, "f16": 2**-11, "bf16": 2**-8}[dtype] * 1.01 * np.maximum(1e-3, np.abs(want)) + 3e-7)
    assert np.array_equal(got[..., 16:], as_floats(bits.view(np.uint8), dtype)[..., 16:])


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("kind", cases.kinds(sees=False, ring=False, recurrent=False, own_cache=True))
def test_removal_is_what_numpy_makes_of_the_cache(tiny_gguf, kind: str, dtype: str) -> None:
    """Values of later tokens depend on removed ones, so the comparison is with the same cells moved and turned, not with a prompt."""
    path, text, (a, b) = tiny_gguf(kind)[0], ids(200, 1), (20, 140)
    one, two = (pe.load(path, n_ctx=N_CTX, n_seq=2, kv_dtype=dtype) for _ in range(2))
    alone = two.generate([*text[:70], 5], max_tokens=9, **options(one)).tokens
    two.reset()
    one.feed([*text, 4])
    beside = one.stream([*text[:70], 5], max_tokens=9, **options(one))          # shares a page, to which the removal reaches
    next(beside)
    assert beside.report.n_cached == 70 and dict(one._runner.cells.shared()) == {0: 1}
    cells, s = one._runner.cells, one._fed
    at = cells.cells_of(0, s, np.arange(201))
    before = [tuple(as_floats(c.gather(at), dtype) for c in layer.states) for layer in one._runner.store.layers]
    one.shift(a, b)
    two.feed([*text[:a], *text[b:], 4])
    for i, (keys, values) in enumerate(before):
        keys[:, b:] = turned(keys[:, b:], one._ropes[i], a - b)
        at = two._runner.cells.cells_of(0, two._fed, np.arange(201 - b + a))
        (theirs, ours), moved = (runner.store.layers[i] for runner in (two._runner, one._runner)), cells.cells_of(0, s, np.arange(201 - b + a))
        for cache, own, x in zip(theirs.states, ours.states, (keys, values)):
            x = np.delete(x, slice(a, b), axis=1).astype(np.float32)
            got = as_floats(own.gather(moved), dtype)
            assert np.all(np.abs(got - x) <= {"f32": 1e-6, "f16": 2**-10, "bf16": 2**-7}[dtype] * np.abs(x) + 1e-6)
            if dtype == "f32":
                cache.scatter(at, np.ascontiguousarray(x).view(np.uint8))
            else:
                cache.scatter(at, own.gather(moved))
    got, want = one.feed(text[:9]), two.feed(text[:9])
    assert np.abs(got - want).max() <= 2e-5 * np.ptp(want)
    assert beside.answer().tokens == alone                                     # who shared pages keeps what it had
    assert one.generate([*text[:a], *text[b:], 4, 9], max_tokens=1).n_cached == a      # what moved is no prompt's prefix
    with pytest.raises(PlanError, match="gone for others"):
        for n in range(3):
            one.generate(ids(30, n), max_tokens=1)
        one.feed([1])
    one.reset()
    one.feed([1])


def test_removal_is_refused_where_it_would_be_wrong(tiny_gguf) -> None:
    for kind, settings, text in (("gemma3_text", {}, "bounded past"), ("qwen2_5_vl", {}, "M-RoPE"),
                                 ("llama", {"kv_dtype": "q8_0"}, "Q8_0 cache")):
        path = tiny_gguf(kind, **({"head_dim": 32} if settings else {}))[0]
        model = pe.load(path, n_ctx=64, n_batch=16, **settings)
        with pytest.raises(RequestError, match="no conversation"):
            model.shift(0, 1)
        logits = model.feed(ids(20))
        with pytest.raises(RequestError, match=text):
            model.shift(3, 9)
        model.reset()
        assert np.array_equal(model.feed(ids(20)), logits)
    model = pe.load(tiny_gguf("llama")[0], n_ctx=64)
    model.feed(ids(20))
    for start, stop in ((5, 5), (-1, 3), (3, 21)):
        with pytest.raises(RequestError, match="cannot be removed"):
            model.shift(start, stop)
