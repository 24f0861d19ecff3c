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


def counted(value: Any) -> tuple[int, int, int]:
    """Count characters, entries, and the sum of all entries' depths of a value: shared parts each time they would be printed or
    compared."""
    kind = type(value)
    if kind is str or kind is Markup:
        return len(value), 0, 0
    characters, entries, levels, depth = 0, 0, 0, 0
    most, level = current_budget.get().left // ENTRY, [value]
    while level:
        entries += len(level)
        levels += depth * len(level)
        if entries > most or depth > MAX_NESTING:
            raise Outside
        below: list[Any] = []
        for item in level:
            kind = type(item)
            if kind is str or kind is Markup:
                characters += len(item)
            elif kind is dict or kind in LISTS or kind in VIEWS:
                if len(below) + 2 * len(item) > most:
                    raise Outside
                below += item
                if kind is dict:
                    below += item.values()
            elif kind is int:
                characters += checked_integer(item).bit_length() // 3 + 2
            elif kind is dialect.Namespace:
                below.append(item._Namespace__attrs)
            elif kind not in SCALARS and kind is not range and not isinstance(item, Undefined):      # a function, a generator ...
                raise Outside
        level, depth = below, depth + 1
    return characters, entries, levels


def measured(value: Any, per_character: int = CHARACTER, per_entry: int = ENTRY) -> int:
    """Return units of a value with all that it holds."""
    characters, entries, _ = counted(value)
    return per_character * characters + per_entry * entries


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
