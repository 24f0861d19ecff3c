"""Streams: pieces of answers are written as they come, by a function that the event loop calls once a step of the model.

No task wakes up for a token: a step of 16 answers is one wake-up of the event loop, which asks each stream's `Script` for its text and
hands it to the connection. Where the server is not ours (tests), texts are sent by ASGI's own messages.
"""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pyengine.chat.reply.deltas import Delta
from pyengine.engine.loop import Handle
from pyengine.errors import PyEngineError

STREAM = "pyengine.stream"           # name of the extension of ASGI by which a stream finds its connection
SSE, NDJSON = "text/event-stream", "application/x-ndjson"

encoded: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False).encode


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
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._script, self._handles, self._running = script, handles, list(enumerate(handles))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it."""
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._out = scope.get("extensions", {}).get(STREAM) or _Messages(send)
        left = asyncio.ensure_future(_left(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            self._out.stream(self._pump)
            self._write(self._script.begin())
            for handle in self._handles:
                handle.watch(self._pump)
            self._pump()
            await asyncio.wait({self._ended, left}, return_when=asyncio.FIRST_COMPLETED)
            if self._ended.done():
                self._ended.result()                         # raises what nobody expected
                if isinstance(self._out, _Messages):
                    await self._out.sent()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            left.cancel()
            self._ended.cancel()
            if isinstance(self._out, _Messages):
                self._out.close()
            for handle in self._handles:
                handle.cancel()

    def _write(self, text: str) -> None:
        if text:
            self._out.write(text.encode())

    def _pump(self) -> None:
        """Write what is there, unless the client is behind: it stays in the handles then."""
        if self._ended.done() or not self._out.writable:
            return
        texts: list[str] = []
        try:
            self._read(texts)
        except PyEngineError as error:
            texts.append(self._script.fail(error))
            self._ended.set_result(None)
        except Exception as error:
            self._ended.set_exception(error)
        self._write("".join(texts))

    def _read(self, texts: list[str]) -> None:
        """Add what is new; raise what ended an answer."""
        for i, handle in self._running[:]:
            ended = handle.done                              # before its last pieces are taken
            texts += [self._script.piece(i, delta) for delta in handle.take()]
            if ended:
                self._running.remove((i, handle))
                if handle.error is not None:
                    raise handle.error
        if not self._running:
            texts.append(self._script.end())
            self._ended.set_result(None)


class _Messages:
    """A connection by ASGI's messages: a task sends what is written."""

    writable = True

    def __init__(self, send: Send):
        self._send = send
        self._queue: asyncio.Queue[bytes] = asyncio.Queue()
        self._task = asyncio.ensure_future(self._work())

    def stream(self, drained: Callable[[], None]) -> None:
        """Begin."""

    def write(self, data: bytes) -> None:
        """Queue a part of the body."""
        self._queue.put_nowait(data)

    async def _work(self) -> None:
        while data := await self._queue.get():
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def sent(self) -> None:
        """Wait until all is sent."""
        self._queue.put_nowait(b"")
        await self._task

    def close(self) -> None:
        """Send no more."""
        self._task.cancel()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
