"""Fewer rounds of the event loop: what goes on within the call that it waited for, and timers that most often are not needed.

Before each round the event loop gives Python's lock away, and waits for it if a model's thread takes it: beside a busy model that costs
more than what most rounds are for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Any
from weakref import WeakKeyDictionary


class Turn(asyncio.Future[Any]):
    """What one task waits for. It goes on within `settle`, not in a later round, unless another task has called that."""

    _waits: tuple[Callable[..., object], Context | None] | None = None

    def add_done_callback(self, fn: Callable[..., object], /, *, context: Context | None = None) -> None:
        """Take note of the task."""
        self._waits = fn, context

    def settle(self, value: Any = None, error: BaseException | None = None) -> None:
        """Set the result, or the error, unless there is one, or nobody waits any more."""
        if self.done():
            return
        if error is None:
            self.set_result(value)
        else:
            self.set_exception(error)
        self._go_on(asyncio.current_task() is None)

    def cancel(self, msg: Any = None) -> bool:
        """End it for a task that is cancelled."""
        done = super().cancel(msg)
        if done:
            self._go_on(False)
        return done

    def _go_on(self, at_once: bool) -> None:
        if self._waits is None:
            return
        (call, context), self._waits = self._waits, None
        if at_once and context is not None:
            context.run(call, self)
        else:
            self.get_loop().call_soon(call, self, context=context)


class Due:
    """A call that is due at a time of the event loop's clock, until it is taken back."""

    __slots__ = ("at", "call")

    def __init__(self, at: float, call: Callable[[], None]):
        self.at = at
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Take it back."""
        self.call = None

    def make(self) -> None:
        """Make it, unless it was taken back."""
        if self.call is not None:
            self.call()


class Delays:
    """Timers most of which are taken back: all of as many seconds share one of the event loop, and taking one back does not touch that."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._queues: dict[float, deque[Due]] = {}           # by seconds, the first one first; what is not empty has a timer

    def later(self, seconds: float, call: Callable[[], None]) -> Due:
        """Queue a function to be called after so many seconds."""
        due = Due(self._loop.time() + seconds, call)
        queue = self._queues.setdefault(seconds, deque())
        queue.append(due)
        if len(queue) == 1:
            self._loop.call_at(due.at, self._make, seconds)
        return due

    def _make(self, seconds: float) -> None:
        queue, now = self._queues[seconds], self._loop.time()
        while queue and (queue[0].call is None or queue[0].at <= now):
            due = queue.popleft()
            if due.call is not None:
                self._loop.call_soon(due.make)               # by itself: an error of one is not that of the others
        if queue:
            self._loop.call_at(queue[0].at, self._make, seconds)


_delays: WeakKeyDictionary[asyncio.AbstractEventLoop, Delays] = WeakKeyDictionary()


def delays(loop: asyncio.AbstractEventLoop) -> Delays:
    """Return the delays of an event loop."""
    found = _delays.get(loop)
    if found is None:
        found = _delays[loop] = Delays(loop)
    return found
