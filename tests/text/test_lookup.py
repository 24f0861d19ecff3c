"""The index of prompt lookup against a naive search."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from pyengine.errors import RequestError
from pyengine.text.lookup import CHAIN, DRAFTED, Lookup, Match, MOST, most_drafted

TEXTS = st.lists(st.integers(-1, 3), max_size=120) | st.lists(st.integers(0, 1), max_size=120)


def agreeing(text: list[int], at: int) -> int:
    n = 0
    while n < min(at, MOST) and text[at - 1 - n] == text[len(text) - 1 - n] >= 0:
        n += 1
    return n


def naive(text: list[int]) -> Match | None:
    places = [at for at in range(len(text) - 1, 0, -1) if agreeing(text, at)]
    places = [at for at in places if agreeing(text, at) > 1][:CHAIN] or places[:1]
    return max((Match(at, agreeing(text, at)) for at in places), key=lambda m: m.length, default=None)


@given(TEXTS, st.lists(st.integers(0, 120), max_size=5))
def test_longest_match(text: list[int], cuts: list[int]) -> None:
    lookup, at = Lookup(), 0
    for cut in [*sorted(cuts), len(text)]:                   # however it grows
        lookup.extend(text[at:cut])
        at = max(at, cut)
    assert lookup.tokens == text and len(lookup) == len(text)
    assert lookup.longest() == naive(text)


@given(TEXTS.filter(len), st.integers(0, 119), st.integers(0, 200))
def test_what_follows(text: list[int], at: int, n: int) -> None:
    at = at % len(text)
    period = text[at:]
    wanted = [period[i % len(period)] for i in range(n)]
    assert Lookup(text).after(at, n) == wanted[: wanted.index(-1) if -1 in wanted else n]


def test_long_matches_are_as_good_as_the_limit() -> None:
    text = [1, *range(2, 100), 5, *range(2, 100)]
    assert Lookup(text).longest() == Match(99, MOST)
    assert Lookup([]).longest() is None and Lookup([3]).longest() is None


def test_what_may_be_asked_for() -> None:
    assert [most_drafted(x, 7) for x in (None, True, False, 5, 0)] == [7, DRAFTED, 0, 5, 0]
    for wrong in ("yes", -1, 2000, 1.5, [3]):
        with pytest.raises(RequestError, match="speculate"):
            most_drafted(wrong, 7)
