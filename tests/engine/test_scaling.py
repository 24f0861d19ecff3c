"""Twice as much of anything in a request takes at most twice the work: lines of Python that are run are counted, not seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pyengine as pe
from pyengine.cache.policy import seen_across
from pyengine.chat.boxes import find_boxes
from pyengine.engine.request import Stops
from pyengine.media.messages import split
from pyengine.programs.rows import lay_out_rows, MediaSegment, TokenSegment


def lines(work: Callable[[], Any]) -> int:
    """Count the lines that are run."""
    n = 0

    def count(frame: Any, event: str, arg: Any) -> Any:
        nonlocal n
        n += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        work()
    finally:
        sys.settrace(before)
    return n


def picture_seen_across(rows: int = 1) -> MediaSegment:
    return MediaSegment(np.zeros((rows, 2), np.float32), np.zeros((1, 1), np.int32), 1, None, True, False, b"digest", token=7)


WORKS: dict[str, Callable[[int], Callable[[], Any]]] = {
    "adjacent pictures that are seen across": lambda n: lambda: lay_out_rows([picture_seen_across()] * n),
    "pictures that are seen across": lambda n: lambda: lay_out_rows([picture_seen_across(), TokenSegment([1])] * n),
    "segments": lambda n: lambda: lay_out_rows([TokenSegment([1])] * n),
    "messages": lambda n: lambda: split([{"role": "user", "content": "hello"}] * n),
    "parts": lambda n: lambda: split([{"role": "user", "content": [{"type": "text", "text": "a"}, b"picture"] * n}]),
    "a stop that is held": lambda n: lambda: push(["a" * n + "b"], "a" * n),
    "stops": lambda n: lambda: push([f"{i}." for i in range(n)], "text"),
    "characters": lambda n: lambda: push(["</s>", "<|"], "a<" * n),
    "boxes": lambda n: lambda: find_boxes('{"bbox_2d": [1, 2, 3, 4], "label": "a"},' * n, (10, 10), (10, 10)),
    "labels without an end": lambda n: lambda: find_boxes('{"label": "a' * n, (10, 10), (10, 10)),
}


def push(stops: list[str], text: str) -> None:
    found = Stops(stops)
    for char in text:
        found.push(char)


@pytest.mark.parametrize("what", WORKS)
def test_the_work_is_linear(what: str) -> None:
    one, four = (lines(WORKS[what](n)) for n in (100, 400))
    assert four <= 5 * one


def test_a_long_prompt(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=64)
    for make in (lambda n: [3] * n, lambda n: ["ab"] * n, lambda n: "ab " * n):
        model._prompts.prompt(make(1))
        one, four = (lines(lambda: lay_out_rows(model._prompts.prompt(make(n))[0])) for n in (100, 400))      # noqa: B023  used at once
        assert four <= 5 * one


def test_text_that_is_held_is_not_copied() -> None:
    """A stop that is as long as the answer once copied the answer at each token."""
    stops, pieces = Stops(["a" * 900 + "b"]), ["a" * (1 + i % 3) for i in range(300)]
    for piece in pieces:
        assert stops.push(piece) == ""
    assert all(held is piece for held, piece in zip(stops.held, pieces, strict=True))
    assert stops.push("x") == "".join(pieces) + "x" and not stops.held


def test_rows_see_the_last_run_of_pictures() -> None:
    """As `seen_across` says of all pictures."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        kinds = rng.random(12) < 0.6
        segments = [picture_seen_across(int(rng.integers(1, 5))) if k else TokenSegment([1]) for k in kinds]
        sees, pictures, total = lay_out_rows(segments).sees, [], 0
        for i, s in enumerate(segments):
            if kinds[i]:
                total += len(s.embedding)
                pictures.append((i, total))
            assert tuple(sees[:, i]) == seen_across(pictures)
