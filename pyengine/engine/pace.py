"""What a step takes by its number of rows, as measured of late: what decides how many drafted tokens pay."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

_ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)        # at which steps are measured; others count to the next of these
_SLOPE = 0.04                # what a row is thought to add to a step of one, before it is known: little, so that it is tried
_PRIOR = 0.3                 # weight of that, in steps
_MOST, _KEPT = 20.0, 0.98    # weight of what was measured, at most, and what is left of it with each step of other rows: so it is tried again
_LONGEST = 3.0               # a step that takes so many times what was thought counts as no longer: something else happened in it


class Pace:
    """Seconds of a step by the number of its rows, as measured of late."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}                 # by the number of the place in _ROWS
        self._weights: dict[int, float] = {}

    @property
    def known(self) -> bool:
        """Whether anything was measured: then what steps take is in seconds."""
        return bool(self._seconds)

    def note(self, rows: int, seconds: float) -> None:
        """Count a step."""
        kind = bisect_left(_ROWS, rows)
        if self._seconds:
            seconds = min(seconds, _LONGEST * self._thought(kind))
        seconds = max(seconds, 1e-9)                         # a clock may stand still
        for other in self._weights:
            self._weights[other] *= _KEPT
        n = self._weights.get(kind, 0.0)
        self._seconds[kind] = (n * self._seconds.get(kind, 0.0) + seconds) / (n + 1)
        self._weights[kind] = min(n + 1, _MOST)

    def _thought(self, kind: int) -> float:
        """Return what a step takes: as measured, and the less of that the longer ago, between those of fewer and more rows, or by _SLOPE."""
        known = [k for k, n in self._weights.items() if n > _PRIOR and k != kind] or [next(iter(self._weights))]
        below, above = max((k for k in known if k < kind), default=None), min((k for k in known if k > kind), default=None)
        near = above if below is None else below
        if below is not None and above is not None:
            share = (_rows(kind) - _rows(below)) / (_rows(above) - _rows(below))
            prior = (1 - share) * self._seconds[below] + share * self._seconds[above]
        elif near is not None:
            prior = self._seconds[near] * _shape(_rows(kind)) / _shape(_rows(near))
        else:                                                # nothing else is known
            prior = self._seconds[kind]
        n = self._weights.get(kind, 0.0)
        return (n * self._seconds.get(kind, 0.0) + _PRIOR * prior) / (n + _PRIOR)

    def costs(self, first: int, last: int) -> list[float]:
        """Return what steps of first .. last rows take, in any unit."""
        if not self._seconds:
            return [_shape(rows) for rows in range(first, last + 1)]
        kinds = range(max(0, bisect_left(_ROWS, first) - 1), bisect_left(_ROWS, last) + 1)
        return np.interp(np.arange(first, last + 1), [_rows(k) for k in kinds], [self._thought(k) for k in kinds]).tolist()


def _rows(kind: int) -> int:
    return _ROWS[kind] if kind < len(_ROWS) else 2 * _ROWS[-1]


def _shape(rows: float) -> float:
    return 1 + _SLOPE * (rows - 1)
