"""One request and its answer as an ASGI application has them, over a connection of `protocol`; and the bytes that they are."""

from __future__ import annotations

import asyncio
import http
import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol as Contract

from pyengine.server.rounds import Delays, Due

STREAM = "pyengine.stream"           # name of the extension of ASGI by which a reply finds its exchange
HEAD_SECONDS = 0.5                   # that the head of an answer waits for the first part of its body, to be sent together with it
UNREAD_BYTES = 64 << 10              # of a body that nobody has taken yet, until no more is read
_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}
_BARE = (204, 304)                   # statuses of answers without a body
_log = logging.getLogger("uvicorn.error")

Headers = Iterable[tuple[bytes, bytes]]


class Wire(Contract):
    """What an exchange asks of its connection."""

    loop: asyncio.AbstractEventLoop
    delays: Delays
    transport: Any
    paused: bool                     # the client is behind

    @property
    def every(self) -> Headers:
        """Headers of every answer."""

    async def drained(self) -> None:
        """Wait until it is not, or has gone."""

    def read_on(self, more: bool) -> None:
        """Go on reading from the client, or do not."""

    def answered(self) -> None:
        """Go on to what comes after this exchange."""

    def over(self, task: asyncio.Task[None] | None) -> None:
        """Let go of the task of an exchange."""


class Exchange:
    """A request that has a head at least. whole: all of its body has come; begun, complete: of the answer, as it was sent; gone: the client has left."""

    def __init__(self, wire: Wire, scope: dict[str, Any], keep_alive: bool, continues: bool):
        self.scope, self.keep_alive = scope, keep_alive
        self.whole = self.begun = self.complete = self.gone = False
        scope["extensions"] = {STREAM: self}
        self._wire, self._continues = wire, continues        # whether the client waits for a "100 Continue"
        self._parts: list[bytes] = []                        # of the body, untaken
        self._unread, self._told = 0, False                  # told: the application knows that all has come
        self._come: asyncio.Future[None] | None = None       # `receive` waits for more
        self._head: bytes | None = None                      # of the answer, made and not sent yet
        self._chunked = self._silent = False                 # the answer's body: in chunks; left out
        self._timer: Due | None = None
        self.task: asyncio.Task[None] | None = None          # that answers
        self._drained: Callable[[], None] | None = None
        self._left: Callable[[], None] | None = None

    # -- what comes -------------------------------------------------------------------------------------------------------

    def take(self, part: bytes) -> None:
        """Take a part of the body; of a request that is answered it is dropped."""
        if not self.complete:
            self._parts.append(part)
            self._unread += len(part)
            if self._unread > UNREAD_BYTES:
                self._wire.read_on(False)
            self._wake()

    def end_of_request(self) -> None:
        """Note that all has come."""
        self.whole = True
        self._wake()

    def lost(self) -> None:
        """Note that the client has gone."""
        self.gone = True
        self._stop_waiting()
        self._wake()
        if self._left is not None:
            self._left()

    def _wake(self) -> None:
        if self._come is not None and not self._come.done():
            self._come.set_result(None)

    def rest(self) -> bytes | None:
        """Take what is left of the body without waiting; None where something has to be waited for, or told: `receive` does."""
        if not self.whole or self._told or self._continues or self.gone:
            return None
        body, self._parts, self._unread, self._told = b"".join(self._parts), [], 0, True
        return body

    async def receive(self) -> dict[str, Any]:
        """Return the next message of ASGI: what has come of the body, or that the client has left or got its answer."""
        if self._continues and not self.begun and not self.gone:
            self._continues = False
            self._wire.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not (self.gone or self.complete) and (self._told or not self._parts and not self.whole):
            self._wire.read_on(True)
            self._come = self._wire.loop.create_future()
            await self._come
        if self.gone or self.complete:
            return {"type": "http.disconnect"}
        body, self._parts, self._unread, self._told = b"".join(self._parts), [], 0, self.whole
        return {"type": "http.request", "body": body, "more_body": not self.whole}

    # -- the answer -------------------------------------------------------------------------------------------------------

    async def send(self, message: Any) -> None:
        """Send a message of ASGI."""
        if self._wire.paused and not self.gone:
            await self._wire.drained()
        if self.gone:
            return
        if message["type"] == "http.response.start" and self._head is None and not self.begun:
            self._head = self._heading(message["status"], message.get("headers", ()))
        elif message["type"] == "http.response.body" and (self._head is not None or self.begun) and not self.complete:
            if message.get("more_body", False):
                self.write(message.get("body", b""))
            else:
                self.end(message.get("body", b""))
        else:
            raise RuntimeError(f"{message['type']} comes at a wrong place")

    def _heading(self, status: int, headers: Headers) -> bytes:
        """Make the head of the answer."""
        lines, sized = [_LINES[status]], status in _BARE
        for name, value in (*self._wire.every, *headers):
            if b"\n" in value or b"\r" in value:
                raise ValueError(f"the header {name!r} of an answer has a line break")
            sized = sized or name == b"content-length"
            lines.append(b"%b: %b\r\n" % (name, value))
        self._silent = self.scope["method"] == "HEAD" or status in _BARE
        if not sized and not self._silent:
            self._chunked = self.scope["http_version"] == "1.1"
            self.keep_alive = self.keep_alive and self._chunked        # else the end of the connection is that of the body
            lines.append(b"transfer-encoding: chunked\r\n" if self._chunked else b"")
        lines.append(b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n")
        return b"".join(lines)

    def stream(self, drained: Callable[[], None]) -> None:
        """Begin a body that is written by `write` and `end`. drained: called when the client takes data again."""
        self._drained = drained
        self._timer = self._wire.delays.later(HEAD_SECONDS, self._open)

    @property
    def writable(self) -> bool:
        """Whether the client takes data."""
        return not self._wire.paused and not self.gone

    def on_left(self, call: Callable[[], None] | None) -> None:
        """Call a function when the client leaves; None: no more."""
        self._left = call
        if call is not None and self.gone:
            call()

    def resumed(self) -> None:
        """Tell who writes that the client takes data again."""
        if self._drained is not None:
            self._drained()

    def write(self, data: bytes) -> None:
        """Write a part of the body, at once and without a task."""
        if data and not self.gone:
            self._put(b"" if self._silent else b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def end(self, data: bytes) -> None:
        """Write the last part of the body (RFC 9112, 7.1)."""
        if self.gone:
            return
        last = (b"%x\r\n%b\r\n" % (len(data), data) if data else b"") + b"0\r\n\r\n" if self._chunked else data
        self._put(b"" if self._silent else last)
        self.complete = True
        self._drained = self._left = None
        self._wake()
        self._wire.answered()

    def _open(self) -> None:
        """Send the head alone: the body takes its time."""
        self._timer = None
        self._put(b"")

    def _put(self, data: bytes) -> None:
        if self._head is not None:
            self.begun, data, self._head = True, self._head + data, None
            self._stop_waiting()
        if data and not self._wire.transport.is_closing():
            self._wire.transport.write(data)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- the application --------------------------------------------------------------------------------------------------

    async def run(self, app: Callable[..., Any]) -> None:
        """Run the application; what it leaves undone, with or without an error, ends the connection, if it can with an answer of 500."""
        try:
            await app(self.scope, self.receive, self.send)
            if not self.complete and not self.gone:
                _log.error("%s %s was not answered to its end", self.scope["method"], self.scope["path"])
        except Exception as error:
            _log.error("%s %s", self.scope["method"], self.scope["path"], exc_info=error)
        finally:
            if not self.complete and not self.gone:
                self.keep_alive = False
                if self.begun:
                    self._wire.transport.close()
                else:
                    self._head = self._heading(500, [(b"content-type", b"text/plain"), (b"content-length", b"21")])
                    self.end(b"Internal Server Error")
            self._wire.over(self.task)
