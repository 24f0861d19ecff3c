"""What all policies of compression have in common: how much is kept, which statistics of attention they read, and what they are called.

Axes: h key/value heads, n tokens of a conversation, b cells that are kept of each head (the budget), e size of a head, c statistics.
A policy is a value: it can be compared, hashed, and its repr evaluates to it. It holds nothing of a conversation.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np

from pyengine.arguments import number, whole
from pyengine.cache.compression import merging
from pyengine.errors import RequestError, shown

Channel = tuple[str, str]                                    # rows whose attention counts, and what of it is summed
ALL, LAST, TEXT, MEDIA, AFTER = "all last text media after".split()            # names of rows
WHEN = ("prompt", "always")


class Compression:
    """A rule that keeps some cells of each head of a layer's cache, and may merge the others into them.

    ratio   share of the tokens whose cells are kept, above 0 to 1; or else
    budget  how many cells are kept; without both, a ratio of 0.2
    recent  the last tokens, which are always kept: a number of them (an int), or a share of the budget (a float)
    merge   what happens to evicted cells: `pyengine.cache.compression.merging` has the rules. "none" drops them
    when    "prompt": once, after a prompt has been read. "always": the budget holds while the prompt is read and the answer grows

    word      the policy's name on command lines and in requests
    observed  the statistics that it selects by: `channels`
    contents  whether it reads keys and values to select
    window    the last rows, which observe; None: as many as the channel names
    uneven    whether layers keep different numbers of cells
    """

    word: ClassVar[str]
    observed: ClassVar[tuple[Channel, ...]] = ()
    contents: ClassVar[bool] = False
    uneven: bool = False
    window: int | None = None
    ratio: float | None
    budget: int | None
    recent: int | float | None
    merging: str
    when: str

    def _common(self, ratio: Any, budget: Any, recent: Any, merge: Any, when: Any) -> None:
        """Keep what all policies are given. Raises: RequestError."""
        if ratio is not None and budget is not None:
            raise RequestError(f"{type(self).__name__}: ratio or budget is given, not both: got {shown(ratio)} and {shown(budget)}")
        if budget is None:
            ratio = number("ratio", 0.2 if ratio is None else ratio, 0, 1)
            if not ratio:
                raise RequestError("ratio must be above 0: at least one cell of each head is kept")
        if when == "always" and budget is None:
            raise RequestError("when='always' needs a budget: a share of a conversation that grows is no bound of it")
        self._set(ratio=ratio, budget=None if budget is None else whole("budget", budget, 1),
                  recent=None if recent is None else share_or_count("recent", recent),
                  merging=one_of("merge", merge, merging.RULES), when=one_of("when", when, WHEN))

    def _set(self, **values: Any) -> None:
        self.__dict__.update(values)

    # -- how much -----------------------------------------------------------------------------------------------------

    def budget_of(self, n: int) -> int:
        """Return how many of n cells are kept of each head: the budget, or the ratio of n rounded down; at least 1, at most n.

        A ratio is taken as it is written: 0.29 of 100 is 29, though the float nearest to 0.29 is less.
        """
        kept = self.budget if self.budget is not None else part(self.ratio, n)
        return min(n, max(1, kept))

    def cells_of(self, budget: int | None, n: int) -> int:
        """Return the cells to keep of n: the budget that is asked for, at most n, or else the policy's. Raises: RequestError."""
        return self.budget_of(n) if budget is None else min(n, whole("budget", budget, 1))

    def recents_of(self, budget: int) -> int:
        """Return how many of the cells that are kept are those of the last tokens: a share of them is rounded down, to 1 or more."""
        if isinstance(self.recent, int):
            return min(self.recent, budget)
        return max(1, part(self.recent, budget)) if self.recent else 0

    def budgets(self, statistics: Sequence[np.ndarray], is_text: np.ndarray | Sequence[np.ndarray], group: int = 1,
                budget: int | None = None) -> list[int]:
        """Return the cells that each head of each layer keeps, from each layer's statistics [h, n, c]: here the same of all.

        is_text: bool [n], or where layers hold different tokens [h, n] of each
        group: query heads that share a key/value head, whose attention the statistics have summed
        budget: cells in the mean of all layers, instead of `budget_of(n)`
        """
        return [self.mean_of(statistics, budget)] * len(statistics)

    def mean_of(self, statistics: Sequence[np.ndarray], budget: int | None) -> int:
        """Return the cells of a layer in the mean of all, from statistics [h, n, c] of each."""
        return self.cells_of(budget, max(s.shape[1] for s in statistics)) if len(statistics) else 0

    # -- what is observed ---------------------------------------------------------------------------------------------

    @property
    def channels(self) -> tuple[Channel, ...]:
        """The statistics of attention that it reads: (rows, kind) of each.

        rows  whose attention counts: "all"; "last", an observation window; "text"; "media", tokens of pictures; "after", behind the last
              picture
        kind  what is summed over them for each key: "sum" the probability p, "square" p^2, "large" 1 where p is at least 0.01 of the
              row's largest, "entropy" -p ln p
        """
        return (*self.observed, (TEXT, "sum")) if self.merging == "attention" else self.observed

    def weights(self, is_text: np.ndarray, n: int | None = None) -> np.ndarray:
        """Return how much each row counts in each channel, float32 [n, c]: 1 or 0. is_text: bool [n], of a prompt's tokens."""
        text = read_text(is_text, n)
        out = np.zeros((len(text), len(self.channels)), np.float32)
        for c, (rows, _) in enumerate(self.channels):
            out[:, c] = self._rows(rows, text)
        return out

    def _rows(self, rows: str, text: np.ndarray) -> np.ndarray:
        """Return which rows one of the names of `channels` means, bool [n]."""
        index = np.arange(len(text))
        if rows == LAST:
            return index >= len(text) - self.window          # type: ignore[operator]  of policies that name such rows
        if rows == AFTER:
            media = np.flatnonzero(~text)
            return index >= min(media[-1] + 1 if len(media) else 0, len(text) - 1)
        return {ALL: np.ones_like(text), TEXT: text, MEDIA: ~text}[rows]

    # -- which, and what becomes of the others ------------------------------------------------------------------------

    def select(self, sums: np.ndarray, is_text: np.ndarray, *, budget: int | None = None) -> np.ndarray:
        """Return the positions that are kept of each head, ascending, int64 [h, b]. Of equal scores the lowest position is kept.

        sums     [h, n]: for each key the sum of its probabilities, over the rows of the first channel and the heads of a group
        is_text  bool [n]: of tokens that no picture made; or [h, n], where heads hold different tokens because they forgot before
        budget   cells, instead of `budget_of(n)`
        """
        raise NotImplementedError

    def choose(self, statistics: np.ndarray, is_text: np.ndarray, budget: int | None = None, *, counts: np.ndarray | None = None,
               keys: np.ndarray | None = None, values: np.ndarray | None = None) -> np.ndarray:
        """Return what `select` does, from all statistics [h, n, c] in the order of `channels`.

        counts        [n] or [h, n]: how many probabilities are in each key's sums; those of a causal prompt where they are not given
        keys, values  [h, n, e], which policies with `contents` read
        """
        return self.select(self._first(statistics), is_text, budget=budget)

    def _first(self, statistics: np.ndarray) -> np.ndarray:
        """Return the first channel [h, n]; zeros where a policy observes nothing."""
        return statistics[..., 0] if statistics.shape[-1] else np.zeros(statistics.shape[:2], np.float32)

    def merge(self, kept: np.ndarray, keys: np.ndarray, values: np.ndarray, *, sums: np.ndarray | None = None,
              n_threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Return the keys and values [h, b, e] of what is kept, with what is evicted merged into them by the policy's rule.

        kept  int64 [h, b], ascending; keys and values [h, n, e], computed in float64 and returned in their own dtypes
        sums  [h, n]: text's attention to each key, which the rule "attention" weighs with (`shares`)
        """
        return merging.merged(self.merging, kept, keys, values, sums, n_threads)

    def shares(self, statistics: np.ndarray) -> np.ndarray | None:
        """Return the sums that `merge` weighs with, [h, n] of statistics [h, n, c], or None where its rule needs none."""
        return statistics[..., len(self.observed)] if self.merging == "attention" else None

    # -- a value ------------------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> dict[str, Any]:
        """What it was made with, by the names of arguments: ratio or budget, and what is not as by default."""
        given = inspect.signature(type(self).__init__).parameters
        values = {name: self.merging if name == "merge" else getattr(self, name) for name in given if name != "self"}
        return {name: v for name, v in values.items()
                if v is not None and (name == "ratio" or (v, type(v)) != (given[name].default, type(given[name].default)))}

    @property
    def text(self) -> str:
        """What `compression_of` reads: look-m:ratio=0.2,merge=averaged."""
        return f"{self.word}:" + ",".join(f"{name}={value}" for name, value in self.parameters.items())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.parameters.items())})"

    def _key(self) -> tuple[Any, ...]:
        """Return all that it holds, with types: 1 is a token, and 1.0 is everything."""
        return (type(self), *((name, type(v), v) for name, v in sorted(self.__dict__.items())))

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Compression) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} cannot be changed: make another one")

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)


# -- arguments ------------------------------------------------------------------------------------------------------------


def one_of(name: str, value: Any, known: Sequence[str]) -> str:
    """Return a word that is among the known ones. Raises: RequestError."""
    if not isinstance(value, str) or value not in known:
        raise RequestError(f"{name} must be one of {', '.join(known)}, got {shown(value)}")
    return value


def share_or_count(name: str, value: Any) -> int | float:
    """Return a number of tokens (an int) or a share in 0..1 (a float). Raises: RequestError."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return whole(name, value)
    if isinstance(value, (float, np.floating)) and 0 <= value <= 1:
        return float(value)
    raise RequestError(f"{name} must be a number of tokens (an int) or a share in 0..1 (a float), got {shown(value)}")


def part(share: Any, n: int) -> int:
    """Return a share of n, rounded down; the share is taken as it is written, not as the binary fraction next to it."""
    return int(Fraction(repr(float(share))) * n)


# -- arrays ---------------------------------------------------------------------------------------------------------------


def read_text(is_text: np.ndarray, n: int | None = None, heads: int | None = None) -> np.ndarray:
    """Return is_text as bool [n], or [heads, n] where that many hold tokens of their own. Raises: RequestError."""
    text = np.asarray(is_text)
    fits = text.ndim == 1 or text.ndim == 2 and len(text) == heads
    if not fits or text.dtype != np.bool_ and not np.isin(text, (0, 1)).all() or n is not None and text.shape[-1] != n:
        raise RequestError(f"is_text must be bool [{'n' if n is None else n}], got {text.dtype} {list(text.shape)}")
    return text.astype(np.bool_)


def read_sums(sums: np.ndarray, is_text: np.ndarray, name: str = "sums") -> tuple[np.ndarray, np.ndarray]:
    """Return sums as float64 [h, n], where NaN is the least of all numbers, and is_text as bool [h, n]. Raises: RequestError."""
    scores = np.asarray(sums, np.float64)
    if scores.ndim != 2:
        raise RequestError(f"{name} must be [heads, n], got {list(scores.shape)}")
    text = np.broadcast_to(read_text(is_text, scores.shape[1], len(scores)), scores.shape)
    return np.where(np.isnan(scores), -np.inf, scores), text


def largest(scores: np.ndarray, k: int) -> np.ndarray:
    """Return a mask [h, n] of the k largest of each row [h, n]; of equals the first."""
    n = scores.shape[1]
    if k <= 0 or k >= n:
        return np.full(scores.shape, k > 0)
    least = np.partition(scores, n - k, axis=1)[:, n - k, None]                # [h, 1]
    above, equal = scores > least, scores == least
    return above | equal & (np.cumsum(equal, axis=1) <= k - above.sum(axis=1, keepdims=True))


def positions(mask: np.ndarray) -> np.ndarray:
    """Return where a mask [h, n] is true, ascending, int64 [h, b]: as many in each row."""
    return np.nonzero(mask)[1].reshape(len(mask), -1).astype(np.int64)


def best_and_recent(scores: np.ndarray, budget: int, recent: int) -> np.ndarray:
    """Return the positions [h, budget] of the last `recent` tokens, and of the largest scores [h, n] among those before."""
    before = scores.shape[1] - recent
    mask = np.ones(scores.shape, np.bool_)
    mask[:, :before] = largest(scores[:, :before], budget - recent)
    return positions(mask)
