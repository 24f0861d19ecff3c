"""Calls in threads of their own, for what takes too long for the event loop: templates, pictures, files.

A call costs the event loop a third of what anyio's threads cost it (10 microseconds beside 32, one core of a server of 2026).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextvars import Context, copy_context
from queue import SimpleQueue
from typing import Any, TypeVar

from pyengine.server.rounds import Turn

MOST_THREADS = 40

T = TypeVar("T")
_Call = tuple[asyncio.AbstractEventLoop, Turn, Context, Callable[[], Any]]


class _Threads:
    """Threads that are begun as they are needed, and stay."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[_Call] = SimpleQueue()
        self._lock = threading.Lock()
        self._n = self._n_free = 0

    def call(self, call: _Call) -> None:
        """Let a thread make a call: one that is free, or a new one."""
        with self._lock:
            begin = self._n_free <= 0 and self._n < MOST_THREADS
            self._n += begin
            self._n_free -= not begin                        # below 0: calls that wait
        if begin:
            threading.Thread(target=self._work, args=(call,), name="pyengine apart", daemon=True).start()
        else:
            self._calls.put(call)

    def _work(self, call: _Call) -> None:
        while True:
            loop, turn, context, function = call
            given, error = None, None
            try:
                given = context.run(function)
            except BaseException as raised:
                error = raised
            with self._lock:
                self._n_free += 1
            try:
                loop.call_soon_threadsafe(turn.settle, given, error)
            except RuntimeError:                             # the event loop is closed
                pass
            del call, turn, context, function, given, error           # what a call held is not held until the next one
            call = self._calls.get()


_threads = _Threads()


async def apart(call: Callable[[], T]) -> T:
    """Call a function in a thread, in the caller's context. Raises what it raises."""
    loop = asyncio.get_running_loop()
    turn = Turn(loop=loop)
    _threads.call((loop, turn, copy_context(), call))
    given: T = await turn
    return given
