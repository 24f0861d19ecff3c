"""Many requests on one model: each answer is bitwise the one that its request gets alone, whoever joins, leaves or fails."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pyengine as pe
from pyengine.errors import ContextOverflowError, PlanError, RequestError
from pyengine.schedule import BESIDE, Request

KINDS = ("llama", "gemma3_text", "gemma3", "qwen2_5_vl")
N_CTX = 256


def ids(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng((seed, n)).integers(0, 300, n).tolist()


def picture(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prompts(kind: str) -> list[list[Any]]:
    """Lengths on both sides of n_batch, windows and pages; two with a common beginning."""
    plain = [ids(3), ids(70, 1), ids(17, 2), ids(130, 3), [*ids(70, 1)[:66], 9, 8, 7], ids(1, 4)]
    if kind not in ("gemma3", "qwen2_5_vl"):
        return plain
    a, b = picture(1), picture(2, 90, 70)
    return [*plain[:4], [4, a, *ids(9)], [*ids(30, 5), b, 7, a, 8], [4, a, 5, 6]]


@pytest.fixture
def seen(monkeypatch) -> dict[int, list[np.ndarray]]:
    """Logits that each request was given, by the id of its report."""
    found: dict[int, list[np.ndarray]] = {}
    take = Request.take

    def spy(self: Request, logits: np.ndarray) -> None:
        found.setdefault(id(self.report), []).append(logits.copy())
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
    step = model._runner.step

    def spy(work: Any) -> Any:
        steps.append([(w.sequence.row, w.stop - w.start, len(w.rows) > 1) for w in work])
        return step(work)

    monkeypatch.setattr(model._runner, "step", spy)
    return steps


def test_a_long_prompt_does_not_stall_others(tiny_gguf, monkeypatch) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=1024, n_batch=512, n_seq=3)
    steps = rows_of_steps(model, monkeypatch)
    quick = model.stream(ids(5), max_tokens=40, **options(model))
    next(quick)
    long, other = model.stream(ids(1000, 1), max_tokens=3, **options(model)), model.stream(ids(300, 2), max_tokens=3, **options(model))
    long.begin()
    other.begin()
    before = len(steps)
    assert len(quick.answer().tokens) == 40
    beside = steps[before:]
    row = quick.report.sequence.row
    assert all((row, 1, False) in work for work in beside)                       # a token in every step
    assert max(sum(n for _, n, of_prompt in work if of_prompt) for work in beside) == BESIDE
    assert [sum(n for _, n, of_prompt in work if of_prompt) for work in beside[:7]] == [BESIDE] * 7
    assert len(long.answer().tokens) == len(other.answer().tokens) == 3


def test_a_picture_beside_others_takes_its_own_rows_only(tiny_gguf, monkeypatch) -> None:
    """16 soft tokens in one step, where n_batch leaves 15 beside the other one: a step of its own, and nothing more in it."""
    path = tiny_gguf("gemma3", mm_tokens_per_image=16, text_config={"sliding_window": 6})[0]
    monkeypatch.setattr("pyengine.schedule.BESIDE", 4)
    for n_batch, alone in ((16, True), (40, False)):
        model = pe.load(path, n_ctx=N_CTX, n_batch=n_batch, n_seq=2)
        steps = rows_of_steps(model, monkeypatch)
        quick = model.stream(ids(5), max_tokens=40, **options(model))
        next(quick)
        before = len(steps)
        seeing = model.stream([*ids(6), picture(1), *ids(20)], max_tokens=2, **options(model))
        seeing.begin()
        quick.answer()
        row = quick.report.sequence.row
        prompt = [sum(n for _, n, of_prompt in work if of_prompt) for work in steps[before:]]
        assert sum(n > 4 for n in prompt) == 1 and max(prompt) == 16
        assert sum((row, 1, False) not in work for work in steps[before:]) == alone
        assert len(seeing.answer().tokens) == 2


def test_they_are_served_in_the_order_in_which_they_came(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=N_CTX, n_batch=32, n_seq=2)
    streams = [model.stream(ids(40, i), max_tokens=4, **options(model)) for i in range(6)]
    for s in streams:
        s.begin()
    finished: list[int] = []
    while len(finished) < 6:
        model._scheduler.advance()
        finished += [i for i, s in enumerate(streams) if s._request.finished and i not in finished]
    assert finished == sorted(finished)


def free_rows(model: pe.Model) -> int:
    return model.n_seq - sum(s.active for s in model._runner.cells.sequences)


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
    step = model._runner.step

    def collecting(work: Any) -> Any:
        held.clear()
        return step(work)

    monkeypatch.setattr(model._runner, "step", collecting)
    assert other.answer().tokens == want and free_rows(model) == 2


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("where", ["program", "cells", "sampler", "copy"])
def test_an_interruption_leaves_a_usable_model(tiny_gguf, monkeypatch, kind: str, where: str) -> None:
    model = pe.load(tiny_gguf(kind)[0], n_ctx=N_CTX, n_batch=24, n_seq=3)
    first, second = ids(70, 1), [*ids(70, 1)[:68], 5, 6]
    want = [model.generate(p, max_tokens=6, **options(model)).tokens for p in (first, second)]
    owner, name = {"program": (model.program, "execute_named"), "cells": (model._runner.cells, "cells_of"),
                   "copy": (model._runner, "copy"), "sampler": (Request, "take")}[where]
    for count in (1, 2, 3, 5):
        model.reset()
        model.generate(first, max_tokens=6, **options(model))                    # forks and copies come from here
        with monkeypatch.context() as patch:
            original, calls = getattr(owner, name), Counter()

            def interrupt(*args: Any, **kwargs: Any) -> Any:
                calls["n"] += 1
                if calls["n"] == count:
                    raise KeyboardInterrupt
                return original(*args, **kwargs)

            patch.setattr(owner, name, interrupt)
            streams = [model.stream(p, max_tokens=6, **options(model)) for p in (first, second)]
            with pytest.raises(KeyboardInterrupt):
                for s in streams:
                    s.begin()
                for s in streams:
                    s.answer()
        for s in streams:
            s.close()
        assert free_rows(model) == 3
        before = [sorted(f) for f in model._runner.cells._free]
        model._runner.cells.recount()
        assert before == [sorted(f) for f in model._runner.cells._free]
        assert [a.tokens for a in model.generate_many([first, second], max_tokens=6, **options(model))] == want


def test_an_error_is_one_request_s_own(tiny_gguf, monkeypatch) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=64, n_batch=24, n_seq=3)
    want = model.generate(ids(20, 1), max_tokens=20, **options(model)).tokens
    full = model.stream(ids(60, 2), max_tokens=None, **options(model))
    bad = model.stream(ids(20, 3), max_tokens=20, **options(model))
    good = model.stream(ids(20, 1), max_tokens=20, **options(model))

    def broken(logits: np.ndarray) -> Any:
        raise RequestError("this sampler is broken")

    monkeypatch.setattr(bad._request.sampler, "sample", broken)
    for s in (full, bad, good):
        s.begin()
    assert good.answer().tokens == want
    with pytest.raises(ContextOverflowError, match="context of 64 tokens is full after 5 generated ones"):
        full.answer()
    with pytest.raises(RequestError, match="sampler is broken"):
        bad.answer()
    assert free_rows(model) == 3
    with pytest.raises(RequestError, match="prompt is empty"):
        model.generate([])


def test_without_a_row_a_request_is_refused_and_waits_for_nobody(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=64, n_batch=8)
    blocks = model.logit_blocks(ids(30))
    next(blocks)
    with pytest.raises(PlanError, match="all 1 sequences are in use"):
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
    assert free - len(cells._free[0]) == 2                                       # 101 tokens of its own
    c = ask(3, *range(100))
    assert len(cells.sequences) == 3 and c.n_cached == 64
    assert ask(1, *range(100), 7).n_cached == 165                                # the first conversation is continued, not b or c
    assert b.report.sequence in cells.sequences
    d = ask(4, *range(100))                                                      # b is the oldest now: it goes
    assert d.n_cached == 64 and b.report.sequence not in cells.sequences and c.report.sequence in cells.sequences
    assert ask(3, *range(100), 7).n_cached == 165


def test_pictures_are_found_by_digest(tiny_gguf) -> None:
    for kind in ("gemma3", "qwen2_5_vl"):
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
