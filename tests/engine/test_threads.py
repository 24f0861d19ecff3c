"""Models in several threads: one model's callers wait for each other, and get the numbers that each would get alone."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import numpy as np
import pytest

import pyengine as pe
from pyengine.errors import RequestError


def together(*works: Any) -> list[Any]:
    """Run functions at once, each in a thread; what they return. An exception of one fails the test."""
    out: list[Any] = [None] * len(works)
    start = threading.Barrier(len(works))

    def run(i: int) -> None:
        start.wait()
        try:
            out[i] = works[i]()
        except BaseException as error:
            out[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(works))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert not any(t.is_alive() for t in threads), "a thread hangs"
    for got in out:
        if isinstance(got, BaseException):
            raise got
    return out


def ids(n: int, seed: int) -> list[int]:
    return np.random.default_rng((seed, n)).integers(0, 300, n).tolist()


def test_one_model_in_two_threads_gives_right_logits(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=128, n_threads=1, n_seq=2)
    prompts = [ids(40, 1), ids(40, 2)]
    want = [model.logits(p) for p in prompts]
    for got in together(*(lambda p=p: [model.logits(p) for _ in range(40)] for p in prompts)):
        assert any(all(np.array_equal(g, w) for g in got) for w in want)


def test_streams_feeds_and_logits_of_one_model_side_by_side(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("gemma3_text")[0], n_ctx=128, n_threads=2, n_seq=4)
    alone = pe.load(tiny_gguf("gemma3_text")[0], n_ctx=128, n_threads=2)
    a, b = ids(30, 3), ids(25, 4)
    wanted = alone.logits(a), alone.generate(b, max_tokens=12, temperature=0).tokens, alone.feed(a)
    logits, tokens, fed, again = together(lambda: model.logits(a), lambda: model.generate(b, max_tokens=12, temperature=0).tokens,
                                          lambda: model.feed(a), lambda: model.generate(b, max_tokens=12, temperature=0).tokens)
    assert np.array_equal(logits, wanted[0]) and tokens == again == wanted[1] and np.array_equal(fed, wanted[2])


def test_pictures_of_one_model_in_two_threads(tiny_gguf) -> None:
    """The image cache keeps what one thread alone would have computed."""
    path = tiny_gguf("gemma3")[0]
    model, alone = (pe.load(path, n_ctx=128, n_threads=1, n_seq=2) for _ in range(2))
    pictures = [np.random.default_rng(i).integers(0, 255, (50, 60, 3), dtype=np.uint8) for i in range(12)]
    together(*(lambda own=pictures[k::2]: [model.encode_image(p) for p in own] for k in range(2)))
    for p in pictures:
        assert np.array_equal(model.encode_image(p), alone.encode_image(p))


def test_two_models_in_two_threads(tiny_gguf) -> None:
    """They share the process's threads, and take turns on them."""
    models = [pe.load(tiny_gguf(kind)[0], n_ctx=128, n_threads=2) for kind in ("llama", "qwen2")]
    prompt = ids(60, 5)
    want = [m.logits(prompt) for m in models]
    got = together(*(lambda m=m: [m.logits(prompt) for _ in range(60)] for m in models))
    for own, right in zip(got, want):
        assert all(np.array_equal(x, right) for x in own)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_of_fork_computes(tiny_gguf) -> None:
    """The parent's threads are not there; the child makes its own."""
    model = pe.load(tiny_gguf("llama")[0], n_ctx=64, n_threads=2)
    want = model.logits(ids(20, 1))
    out, into = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(60)
        os.write(into, b"y" if np.array_equal(model.logits(ids(20, 1)), want) else b"n")
        os._exit(0)
    os.close(into)
    assert os.read(out, 1) == b"y" and os.waitpid(child, 0)[1] == 0
    assert np.array_equal(model.logits(ids(20, 1)), want)


def test_blocks_of_logits_do_not_survive_another_step(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=128, n_seq=2)
    blocks = model.logit_blocks(ids(100, 1))
    next(blocks)
    model.generate(ids(5, 2), max_tokens=2, temperature=0)
    with pytest.raises(RequestError, match="another step of the model was run"):
        next(blocks)
