"""One thread that works on a model for everybody who asks: `Loop`, and what an asker holds, `Handle`.

Requests join and leave between steps. Whoever reads slowly, or not at all, keeps nobody waiting: pieces lie in the handle until they
are taken. The thread begins with the first request and ends when there has been none for a while, so a model that nobody holds any
more is not kept alive by it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any, TYPE_CHECKING

from pyengine.engine.answer import Answer, Reported
from pyengine.engine.request import Job, Report
from pyengine.engine.scheduler import Scheduler
from pyengine.errors import BusyError, RequestError

if TYPE_CHECKING:
    import asyncio

    from pyengine.chat.reply.deltas import Delta

    Calls = list[tuple[asyncio.AbstractEventLoop, Callable[[], None]]]

IDLE_SECONDS = 2.0                   # the thread ends after so long without a request


class Handle(Reported, Iterator[str], AsyncIterator[str]):
    """An answer on its way, computed whether it is read or not.

    for piece in handle, async for piece in handle    pieces of the content as they come; each piece is given once
    for delta in handle.deltas(), async for ..        the same with thinking and calls of tools, each by its kind
    handle.result(timeout), await handle              the whole text, whatever was read before
    handle.cancel()                                   ends within a step; the text so far is the answer, of finish "cancelled"

    May be used by several threads. report: how the answer came about, growing with it.
    """

    def __init__(self, request: Job, loop: Loop, client: str):
        from pyengine.chat.reply.deltas import Delta

        self.report: Report = request.report
        self.client = client
        self._request, self._loop = request, loop
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._delta = Delta
        self._pieces: list[str | Delta] = []                 # all, taken or not
        self._read = 0
        self._ended = False
        self._sleepers: Calls = []                           # called once
        self._watchers: Calls = []                           # called each time
        self._callbacks: list[Callable[[Handle], None]] = []

    @property
    def done(self) -> bool:
        """Whether nothing more comes."""
        return self._ended

    @property
    def error(self) -> BaseException | None:
        """What ended the answer, if an error did."""
        return self._request.error if self._ended else None

    def cancel(self, error: Exception | None = None) -> bool:
        """Stop working on the answer; False if it has ended already. With an error it ends with that."""
        return not self._ended and self._loop.cancel(self, error)

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids of the prompt; -1 for each soft token of a picture."""
        return self._request.rows.ids.tolist()

    def on_done(self, call: Callable[[Handle], None]) -> None:
        """Call a function once the answer has ended, in the thread that ends it; at once if it has."""
        with self._lock:
            if not self._ended:
                self._callbacks.append(call)
                return
        call(self)

    def result(self, timeout: float | None = None) -> Answer:
        """Wait for the end and return the whole text. Raises: TimeoutError after `timeout` seconds, and what ended the answer."""
        with self._changed:
            if not self._ended and not self._changed.wait_for(lambda: self._ended, timeout):
                raise TimeoutError(f"the answer has not ended within {timeout} seconds")
        return self._answer()

    def _answer(self) -> Answer:
        if self._request.error is not None:
            raise self._request.error
        return Answer("".join(p for p in self._pieces if isinstance(p, str)), self.report)

    def deltas(self) -> Deltas:
        """Return the pieces with their kinds, to be gone through by `for` or `async for`."""
        return Deltas(self)

    def watch(self, call: Callable[[], None]) -> bool:
        """Call a function in the running event loop whenever there is something new, and at the end; it uses `take`. Says whether there is
        something already.

        One wake-up serves all handles that are watched or waited for in an event loop.
        """
        import asyncio

        with self._lock:
            if not self._ended:
                self._watchers.append((asyncio.get_running_loop(), call))
            return self._ended or self._read < len(self._pieces)

    def take(self) -> tuple[list[str | Delta], bool]:
        """Take the pieces that are there, without waiting: content as it is, the rest with its kind. Says whether they are the last."""
        with self._lock:
            new, self._read = self._pieces[self._read:], len(self._pieces)
            return new, self._ended

    def _piece(self) -> str | Delta | None:
        """Take the next piece, or None if it is not there yet. Raises: StopIteration at the end, or what ended the answer."""
        if self._read < len(self._pieces):
            self._read += 1
            return self._pieces[self._read - 1]
        if not self._ended:
            return None
        if self._request.error is not None:
            raise self._request.error
        raise StopIteration

    def __next__(self) -> str:
        while not isinstance(piece := self._next(), str):
            pass
        return piece

    async def __anext__(self) -> str:
        while not isinstance(piece := await self._anext(), str):
            pass
        return piece

    def _next(self) -> str | Delta:
        with self._changed:
            while (piece := self._piece()) is None:
                self._changed.wait()
            return piece

    async def _anext(self) -> str | Delta:
        while True:
            with self._lock:
                try:
                    piece = self._piece()
                except StopIteration:
                    raise StopAsyncIteration from None
                slept = self._sleeper() if piece is None else None
            if slept is None:
                return piece                                 # type: ignore[return-value]
            await slept

    def _sleeper(self) -> asyncio.Future[None]:
        """Make a future that ends with the next change; the caller holds `_lock`."""
        import asyncio

        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._sleepers.append((loop, lambda: future.done() or future.set_result(None)))
        return future

    async def _wait(self) -> Answer:
        while True:
            with self._lock:
                if self._ended:
                    break
                slept = self._sleeper()
            await slept
        return self._answer()

    def __await__(self) -> Generator[Any, None, Answer]:
        return self._wait().__await__()

    def _collect(self) -> Calls:
        """Take over what the loop's last step gave; return what is to be called in event loops, for `_wake`."""
        request = self._request
        if not request.pieces and not request.finished:
            return []
        with self._lock:
            if self._ended:
                return []
            finished = request.finished                      # before the pieces: what comes with the end is not left behind
            while request.pieces:
                self._pieces.append(request.pieces.popleft())
            self._ended = finished
            calls, self._sleepers = self._sleepers + self._watchers, []
            if finished:
                self._watchers = []
            callbacks, self._callbacks = (self._callbacks, []) if finished else ([], self._callbacks)
            self._changed.notify_all()
        for call in callbacks:
            call(self)
        return calls

    def __repr__(self) -> str:
        state = f"finish={self.report.finish!r}" if self._ended else "running"
        return f"<Handle: {len(self.report.tokens)} tokens, {state}>"


class Deltas(Iterator["Delta"], AsyncIterator["Delta"]):
    """The pieces of a handle's answer, each with its kind."""

    def __init__(self, handle: Handle):
        self._handle, self._delta = handle, handle._delta

    def __next__(self) -> Delta:
        piece = self._handle._next()
        return self._delta("text", piece) if isinstance(piece, str) else piece

    async def __anext__(self) -> Delta:
        piece = await self._handle._anext()
        return self._delta("text", piece) if isinstance(piece, str) else piece


class _Wakes:
    """What is to be called in event loops. Each wake-up writes to a pipe and waits for Python's lock, so there is one for all that comes until
    it is answered, and each function is called once."""

    def __init__(self) -> None:
        self._lock = threading.RLock()                       # what is collected meanwhile may wake somebody too
        self._calls: dict[asyncio.AbstractEventLoop, dict[Callable[[], None], None]] = {}

    def add(self, calls: Calls) -> None:
        """Queue functions to be called, each in its event loop."""
        asleep = []
        with self._lock:
            for loop, call in calls:
                if loop not in self._calls:
                    self._calls = {there: of_it for there, of_it in self._calls.items() if not there.is_closed()}
                    self._calls[loop] = {}
                    asleep.append(loop)
                self._calls[loop][call] = None
        for loop in asleep:
            try:
                loop.call_soon_threadsafe(self._make, loop)
            except RuntimeError:                             # an event loop that was closed
                with self._lock:
                    self._calls.pop(loop, None)

    def _make(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            calls = self._calls.pop(loop, {})
        for call in calls:
            call()


_wake = _Wakes().add


class Loop:
    """Requests of several clients, served by one thread.

    Clients take turns: the next free place goes to the one that was served longest ago, however many requests another one has
    queued. limit: requests that may wait; more are refused.
    """

    def __init__(self, scheduler: Scheduler, limit: int = 1024):
        self.limit = limit
        self._scheduler = scheduler
        self._state = threading.Condition()
        self._waiting: dict[str, deque[Handle]] = {}         # by client, the one whose turn is next first
        self._running: list[Handle] = []
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, request: Job, client: str = "") -> Handle:
        """Queue a request. Raises: BusyError when the queue is full, RequestError once closed, and what `Scheduler.check` does."""
        self._scheduler.check(request)
        handle = Handle(request, self, client)
        with self._state:
            if self._closed:
                raise RequestError("the model is closed")
            waiting = self.n_waiting
            if waiting >= self.limit:
                raise BusyError(f"{waiting} requests are waiting already, which is the limit; try again later")
            self._waiting.setdefault(client, deque()).append(handle)
            if self._thread is None or not self._thread.is_alive():            # also in a child of fork
                self._thread = threading.Thread(target=self._work, name="pyengine loop", daemon=True)
                self._thread.start()
            self._state.notify()
        return handle

    @property
    def n_waiting(self) -> int:
        """How many requests wait for a place."""
        return sum(map(len, list(self._waiting.values())))

    @property
    def n_running(self) -> int:
        """How many requests are worked on."""
        return len(self._running)

    @property
    def idle(self) -> bool:
        """Whether all that was submitted has ended."""
        with self._state:
            return not self._waiting and all(h.done for h in self._running)

    def cancel(self, handle: Handle, error: Exception | None = None) -> bool:
        """End a request, with an error if one is given; False if it has ended already."""
        request = handle._request
        with self._state:
            if request.finished:
                return False
            request.report.finish, request.error = "cancelled", error
            self._scheduler.cancel(request)
            queue = self._waiting.get(handle.client, ())
            waited = handle in queue
            if waited:
                self._drop(handle.client, handle)
            self._state.notify()
        if waited:
            _wake(handle._collect())
        return True

    def close(self) -> None:
        """End all requests, and take no more; returns when the thread has ended."""
        with self._state:
            self._closed = True
            handles = [h for queue in self._waiting.values() for h in queue] + self._running
        for handle in handles:
            self.cancel(handle)
        with self._state:
            self._state.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _drop(self, client: str, handle: Handle) -> None:
        queue = self._waiting[client]
        queue.remove(handle)
        if not queue:
            del self._waiting[client]

    def _next(self) -> Handle:
        """Take the request whose turn it is; its client's next one comes behind those of the others."""
        client = next(iter(self._waiting))
        queue = self._waiting.pop(client)
        handle = queue.popleft()
        if queue:
            self._waiting[client] = queue
        return handle

    def _work(self) -> None:
        """Run steps while there is anything to do."""
        while True:
            with self._state:
                if not self._waiting and not self._running:
                    if self._closed or not self._state.wait_for(lambda: self._waiting or self._closed, IDLE_SECONDS) or not self._waiting:
                        self._thread = None
                        return
            try:
                with self._scheduler.turn():
                    self._admit()
                    self._scheduler.advance()
            except Exception as error:                       # the requests of the step have ended with it
                if not any(h._request.finished for h in self._running):
                    self._fail(error)
            _wake([call for handle in self._running for call in handle._collect()])
            with self._state:
                self._running = [h for h in self._running if not h._ended]
            self._scheduler.give_way()

    def _admit(self) -> None:
        """Hand requests to the scheduler while it has room; the caller holds the scheduler's lock."""
        with self._state:
            while self._waiting and self._scheduler.has_room:
                handle = self._next()
                self._running.append(handle)
                self._scheduler.submit(handle._request)

    def _fail(self, error: Exception) -> None:
        """End what is being worked on with an error that no request caused, so that nobody waits for ever."""
        for handle in self._running:
            if not handle._request.finished:
                handle._request.error = error
                self._scheduler.cancel(handle._request)
