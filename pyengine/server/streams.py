"""Streams: pieces of answers are written as they come, by a function that the event loop calls once a step of the model.

No task wakes up for a token: a step of 16 answers is one wake-up of the event loop, which asks each stream's `Script` for its text and
hands it to the connection. Where the server is not ours (tests), texts are sent by ASGI's own messages.
"""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pyengine.chat.reply.deltas import Delta
from pyengine.engine.loop import Handle
from pyengine.errors import PyEngineError
from pyengine.server.exchange import STREAM
from pyengine.server.rounds import Turn

SSE, NDJSON = "text/event-stream; charset=utf-8", "application/x-ndjson"


def _encoder() -> Callable[[Any], str]:
    """Return the function that writes JSON. `json` makes its C function anew for each value, which takes longer than most of ours: here it is made once."""
    plain, make = json.JSONEncoder(ensure_ascii=False), getattr(json.encoder, "c_make_encoder", None)
    if make is None:                                         # a Python without it
        return plain.encode
    write = make(None, plain.default, json.encoder.encode_basestring, None, plain.key_separator, plain.item_separator, False, False, True)

    def encode(value: Any) -> str:
        return "".join(write(value, 0))

    return encode


encoded = _encoder()
quoted = json.encoder.encode_basestring                      # the same of a text alone


def event(value: Mapping[str, Any], kind: str = "") -> str:
    """Return a server-sent event (html.spec.whatwg.org, 9.2.6) with a JSON value."""
    return f"event: {kind}\ndata: {encoded(value)}\n\n" if kind else f"data: {encoded(value)}\n\n"


class Script(ABC):
    """How an interface writes a stream of one or several answers."""

    def begin(self) -> str:
        """Return what stands before all pieces."""
        return ""

    @abstractmethod
    def piece(self, i: int, delta: Delta) -> str:
        """Return what a piece of answer i is written as."""

    def text(self, i: int, text: str) -> str:
        """Return what a piece of the content of answer i is written as, which most pieces are."""
        return self.piece(i, Delta("text", text))

    @abstractmethod
    def end(self) -> str:
        """Return what follows once all answers have ended."""

    @abstractmethod
    def fail(self, error: PyEngineError) -> str:
        """Return what follows when an error has ended an answer."""


class Stream(Response):
    """A reply that grows with its answers. When its client leaves, they are cancelled."""

    def __init__(self, script: Script, handles: Sequence[Handle], media_type: str):
        self.status_code, self.media_type, self.background = 200, media_type, None
        self.raw_headers = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"), (b"content-type", media_type.encode())]
        self._script, self._handles, self._running = script, handles, list(enumerate(handles))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it."""
        self._ended = Turn(loop=asyncio.get_running_loop())                    # whether all was written, or the client has left
        self._out = scope.get("extensions", {}).get(STREAM) or _Messages(receive, send)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            self._out.stream(self._pump)
            self._out.on_left(self._leave)
            self._out.write(self._script.begin().encode())
            if any([handle.watch(self._pump) for handle in self._handles]):    # all are watched
                self._pump()
            whole = await self._ended                        # raises what nobody expected
            if whole and isinstance(self._out, _Messages):
                await self._out.sent()
        finally:
            self._ended.cancel()
            self._out.on_left(None)
            if isinstance(self._out, _Messages):
                self._out.close()
            for handle in self._handles:
                handle.cancel()

    def _leave(self) -> None:
        self._ended.settle(False)

    def _pump(self) -> None:
        """Write what is there, unless the client is behind: it stays in the handles then."""
        if self._ended.done() or not self._out.writable:
            return
        texts: list[str] = []
        try:
            ended = self._read(texts)
        except PyEngineError as error:
            texts.append(self._script.fail(error))
            ended = True
        except Exception as error:
            self._ended.settle(error=error)
            return
        if ended:
            self._out.end("".join(texts).encode())
            self._ended.settle(True)
        elif texts:
            self._out.write("".join(texts).encode())

    def _read(self, texts: list[str]) -> bool:
        """Add what is new, and say whether it was the last; raise what ended an answer."""
        script = self._script
        for i, handle in self._running[:]:
            new, ended = handle.take()
            texts += [script.text(i, p) if isinstance(p, str) else script.piece(i, p) for p in new]
            if ended:
                self._running.remove((i, handle))
                if handle.error is not None:
                    raise handle.error
        if not self._running:
            texts.append(self._script.end())
        return not self._running


class _Messages:
    """The same of a server that is not ours, by ASGI's messages: a task sends what is written, another one waits until the client leaves."""

    writable = True

    def __init__(self, receive: Receive, send: Send):
        self._receive, self._send = receive, send
        self._queue: asyncio.Queue[tuple[bytes, bool]] = asyncio.Queue()
        self._task = asyncio.ensure_future(self._work())
        self._waits: asyncio.Future[None] | None = None

    def stream(self, drained: Callable[[], None]) -> None:
        """Begin."""

    def on_left(self, call: Callable[[], None] | None) -> None:
        """Call a function when the client leaves; None: no more."""
        if call is not None:
            self._waits = asyncio.ensure_future(_left(self._receive, call))
        elif self._waits is not None:
            self._waits.cancel()

    def write(self, data: bytes) -> None:
        """Queue a part of the body."""
        if data:
            self._queue.put_nowait((data, True))

    def end(self, data: bytes) -> None:
        """Queue the last part of the body."""
        self._queue.put_nowait((data, False))

    async def _work(self) -> None:
        more = True
        while more:
            data, more = await self._queue.get()
            await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def sent(self) -> None:
        """Wait until all is sent."""
        await self._task

    def close(self) -> None:
        """Send no more."""
        self._task.cancel()


async def _left(receive: Receive, call: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    call()


@contextmanager
def leaving(request: Request, call: Callable[[], None]) -> Iterator[None]:
    """Call a function if the client leaves within the block; all of its request has been read."""
    exchange = request.scope.get("extensions", {}).get(STREAM)
    if exchange is not None:
        exchange.on_left(call)
        try:
            yield
        finally:
            exchange.on_left(None)
        return
    waits = asyncio.ensure_future(_left(request.receive, call))
    try:
        yield
    finally:
        waits.cancel()
