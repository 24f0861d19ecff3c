"""The budget of one rendering of a chat template: what bytes and steps cost, and `Outside` for what does not fit it.

A unit is a byte that is made, a character counting as the 4 bytes it may take, or what takes as long. Nothing is paid
back, so what is spent bounds both the time and what is alive, however it is spread over variables.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from types import GeneratorType
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import Undefined
from markupsafe import Markup

from pyengine.chat import dialect

WORK = 64 << 20                                    # units that a rendering may spend in this process
MAX_SECONDS_HERE = 1.0                             # real templates take milliseconds
MAX_NESTING = 60                                   # of lists and mappings that are printed or compared
MAX_BITS = 1024                                    # of an integer
MAX_CHAIN = 20                                     # of iterators that draw on each other

CHARACTER = 4                                      # bytes that it may take
ENTRY = 64                                         # units of one entry of a list or mapping
STEP = 64                                          # units of any operation

SCALARS = frozenset({str, int, float, bool, type(None)})
NUMBERS = frozenset({int, float, bool})
LISTS = frozenset({list, tuple})
VIEWS = frozenset({type({}.keys()), type({}.values()), type({}.items())})


class Outside(BaseException):
    """This cannot be bounded here. No Exception, so that nothing in jinja2 takes it for an error of the template."""



class Budget:
    """What one rendering may still use."""

    def __init__(self, deadline: float):
        self.deadline = min(deadline, time.monotonic() + MAX_SECONDS_HERE)
        self.left = WORK
        self.steps = 0
        self.depth = 0                             # of calls
        self.chains: WeakKeyDictionary[Any, int] = WeakKeyDictionary()        # how many iterators each draws on

    def spend(self, units: int) -> None:
        self.left -= units + STEP
        self.steps += 1
        if self.left < 0 or not self.steps & 15 and time.monotonic() > self.deadline:
            raise Outside

    def afford(self, units: int) -> None:
        """Check that what is about to be made fits, where what it really takes is known, and spent, afterwards."""
        if units > self.left:
            raise Outside


current_budget: ContextVar[Budget] = ContextVar("current_budget")


def measured(value: Any, per_character: int = CHARACTER, per_entry: int = ENTRY, per_level: int = 0) -> int:
    """Units of a value with all that it holds, shared parts each time they would be visited: for printing and comparing."""
    kind = type(value)
    if kind is str or kind is Markup:
        return per_character * len(value)
    total, waiting, limit = 0, [(value, 0)], current_budget.get().left
    while waiting:
        item, depth = waiting.pop()
        kind = type(item)
        if kind is str or kind is Markup:
            total += per_character * len(item) + per_entry + depth * per_level
            continue
        total += per_entry + depth * per_level
        if kind in LISTS or kind in VIEWS:
            parts: Iterable[Any] = item
        elif kind is dict:
            parts = (part for pair in item.items() for part in pair)
        elif kind is dialect.Namespace:
            parts = item._Namespace__attrs.items()
        elif kind is int:
            total += checked_integer(item).bit_length()
            continue
        elif kind in SCALARS or kind is range or isinstance(item, Undefined):
            continue
        else:                                      # a function, a generator ...
            raise Outside
        if depth > MAX_NESTING or total + per_entry * _length(item) > limit:
            raise Outside
        waiting += [(part, depth + 1) for part in parts]
    return total


def _length(value: Any) -> int:
    return 2 * len(value) if type(value) is dict else 0 if type(value) is dialect.Namespace else len(value)


def checked_integer(value: int) -> int:
    if value.bit_length() > MAX_BITS:
        raise Outside
    return value


def ticking(items: Iterable[Any]) -> Iterator[Any]:
    """Give the items one by one, each paid for."""
    spend = current_budget.get().spend
    for item in items:
        spend(ENTRY)
        yield item


def listed(items: Any) -> Any:
    return [*ticking(items)] if isinstance(items, GeneratorType) or type(items) not in LISTS else items


def only(kinds: frozenset[type], *values: Any) -> None:
    for value in values:
        if type(value) not in kinds:
            raise Outside
