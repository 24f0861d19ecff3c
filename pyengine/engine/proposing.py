"""The contract of what drafts beside the text itself, for all requests of a step together: another model (`engine.draft_model`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from pyengine.engine.drafts import Draft
from pyengine.engine.request import Job
from pyengine.records import NamedTuple


class Asked(NamedTuple):
    """A request that drafts are wanted for: `most` tokens, none behind one of `ends`. beaten: what is drafted already makes so many tokens."""

    job: Job
    most: int
    ends: Collection[int]
    beaten: float


class Terms(NamedTuple):
    """A step without the drafts of a source: it makes n tokens, and takes costs[k] with k more rows, in seconds if they are `timed`."""

    n: int
    costs: Sequence[float]
    timed: bool


class Source(Protocol):
    """What drafts for requests side by side. Whatever it proposes, answers have the same bits: it decides how fast they come.

    A request's text so far is its `rows`, then `report.tokens`, the last of which no step has computed yet.
    """

    def propose(self, asked: Sequence[Asked], terms: Terms) -> list[Draft]:
        """Return a draft for each, an empty one where none pays."""

    def leave(self, job: Job) -> None:
        """Let go of a request that has ended, known or not."""

    def reset(self) -> None:
        """Forget what is kept for requests that may come."""

    def resident(self) -> int:
        """Return how many bytes of it are in main memory."""
