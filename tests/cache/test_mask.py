"""The one mask rule, drawn: rows are queries, columns are keys, # is seen."""

from __future__ import annotations

import numpy as np
import pytest

from pyengine.cache.policy import Chunked, Cross, Full, Policy, seen_across, Sliding


def draw(policy: Policy, n: int, span: tuple[int, int] | None = None) -> str:
    index = np.arange(n)
    end = None
    if span:
        end = np.where((index >= span[0]) & (index < span[1]), span[1], 0)
    lo, hi = policy.visible(index, end)
    return "\n".join("".join("#" if lo[i] <= j < hi[i] else "." for j in range(n)) for i in range(n))


@pytest.mark.parametrize(("policy", "span", "picture"), [
    (Full(), None, "#....\n##...\n###..\n####.\n#####"),
    (Sliding(2), None, "#....\n##...\n.##..\n..##.\n...##"),          # exactly `window` keys, the query among them
    (Sliding(1), None, "#....\n.#...\n..#..\n...#.\n....#"),
    (Sliding(99), None, "#....\n##...\n###..\n####.\n#####"),
    (Chunked(2), None, "#....\n##...\n..#..\n..##.\n....#"),
    (Full(), (1, 4), "#....\n####.\n####.\n####.\n#####"),            # a picture sees all of itself; text after it is causal
    (Sliding(2), (1, 4), "#....\n####.\n.###.\n..##.\n...##"),        # the window limits backwards only
])
def test_masks(policy: Policy, span: tuple[int, int] | None, picture: str) -> None:
    assert draw(policy, 5, span) == picture


def test_pictures_side_by_side_are_seen_together() -> None:
    """(number of the token, encoder rows up to its end) of each picture -> the rows that text behind them sees."""
    for pictures, seen in (([], (0, 0)), ([(0, 4)], (0, 4)), ([(3, 4), (7, 6)], (4, 6)), ([(3, 4), (4, 6)], (0, 6)),
                           ([(1, 4), (3, 6), (4, 7), (5, 9)], (4, 9)), ([(1, 4), (2, 6), (4, 7)], (6, 7))):
        assert seen_across(pictures) == seen


def test_slots_are_what_a_batch_needs_and_no_more() -> None:
    assert Full().slots(4096, 512) == 4096
    assert Sliding(512).slots(4096, 128) == 640
    assert Sliding(512).slots(300, 128) == 300
    assert Chunked(8192).slots(131072, 512) == 8704
    assert Cross(1601).slots(4096, 512) == 1601


@pytest.mark.parametrize("n_batch", [1, 3, 8])
def test_a_ring_never_overwrites_a_key_that_is_still_seen(n_batch: int) -> None:
    policy, n = Sliding(5), 60
    slots = policy.slots(1000, n_batch)
    cell_holds: dict[int, int] = {}
    for start in range(0, n, n_batch):
        index = np.arange(start, min(start + n_batch, n))
        for i in index:
            cell_holds[int(i) % slots] = int(i)
        for lo, hi in zip(*policy.visible(index)):
            assert all(cell_holds[j % slots] == j for j in range(lo, hi))
