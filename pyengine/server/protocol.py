"""Connections: HTTP/1.1 read by httptools (Node's parser), with bounds for those that ask nothing, ask slowly, take nothing, or are half closed.

uvicorn runs the event loop and calls this; its own protocols have no bounds on the time of a request or the size of its head, and cost several
times as much. A client that has closed its sending side still gets its answer. Whether it has gone for good is seen only by writing to it, so
it is sent "102 Processing" while it waits (RFC 9110, 15.2: a client takes any number of 1xx).
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from typing import Any
from urllib.parse import unquote

import httptools

from pyengine.server.exchange import Exchange, Headers
from pyengine.server.rounds import delays, Due

MOST_CONNECTIONS = 512
HEADER_BYTES = 32 << 10              # of a request's address and headers, and of all else that is no body
MOST_AHEAD = 32                      # requests that came before the one ahead of them was answered
REQUEST_SECONDS = 10.0               # until a request's headers are whole, from the connection or the last answer on
LINGER_SECONDS = 1.0                 # in which what still comes of an answered request is read, so that its client sees the answer
PROBE_SECONDS = 0.25                 # between two looks after a client whose sending side is closed
TAKE_SECONDS = 60.0                  # in which a client must take something of what waits for it
_REASONS = {400: "Bad Request", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}


def _refusal(status: int, message: str) -> bytes:
    kind = "server_error" if status == 503 else "invalid_request_error"
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}}).encode()
    return b"HTTP/1.1 %d %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (
        status, _REASONS[status].encode(), len(body), body)


class Protocol(asyncio.Protocol):
    """One connection. uvicorn gives the arguments, and looks at its state's `connections`, `tasks`, `default_headers` and `total_requests`."""

    transport: Any

    def __init__(self, config: Any, server_state: Any, app_state: dict[str, Any], _loop: asyncio.AbstractEventLoop | None = None):
        self.loop = _loop or asyncio.get_running_loop()
        self.delays = delays(self.loop)
        self._app, self._state, self._app_state = config.loaded_app, server_state, app_state
        self._parser = httptools.HttpRequestParser(self)
        self._current: Exchange | None = None                # which is answered, or was last
        self._last: Exchange | None = None                   # whose body comes, or came last
        self._ahead: deque[Exchange] = deque()               # that wait for those before them
        self._framing: bytes | None = None                   # headers that say where the body ends which the parser leaves to another protocol
        self._n_head = 0                                     # bytes that came since a part of a body, or the end of a request
        self._reading, self._ended, self._broken = True, False, False          # ended: the client sends nothing more; broken: what it sends is not read
        self.paused = False                                  # the client is behind
        self._writable: asyncio.Event | None = None          # while it is
        self._request_timer: Due | None = None
        self._probe_timer: asyncio.TimerHandle | None = None
        self._take_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:       # type: ignore[override]
        """Begin, unless there are too many."""
        self.transport = transport
        self._state.connections.add(self)
        secure = transport.get_extra_info("ssl_object") is not None
        server, client = (transport.get_extra_info(name) for name in ("sockname", "peername"))
        self._about = {"scheme": "https" if secure else "http", **{name: (str(at[0]), int(at[1])) if isinstance(at, tuple) else None
                                                                   for name, at in (("server", server), ("client", client))}}
        if len(self._state.connections) > MOST_CONNECTIONS:
            self._refuse(503, "there are too many connections; try again later")
        else:
            self._watch(REQUEST_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._state.connections.discard(self)
        for timer in (self._request_timer, self._probe_timer, self._take_timer):
            if timer is not None:
                timer.cancel()
        if self._writable is not None:
            self._writable.set()
        self._ahead.clear()
        self._broken = True
        if self._current is not None and not self._current.complete:
            self._current.lost()

    def shutdown(self) -> None:
        """End with the answer that is on its way, as the server ends."""
        if self._current is not None and self._busy:
            self._current.keep_alive = False
        else:
            self.transport.close()

    # -- what comes -------------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Read what has come."""
        while data and not self._broken:
            self._n_head += len(data)
            try:
                self._parser.feed_data(data)
                data = b""
            except httptools.HttpParserUpgrade as offer:     # of another protocol, which is declined (RFC 9110, 7.8)
                self._parser = httptools.HttpRequestParser(self)
                again = b"" if self._framing is None else b"POST / HTTP/1.1\r\n%b\r\n\r\n" % self._framing
                data = again + data[offer.args[0]:]
            except httptools.HttpParserError:
                return self._refuse(400, "this is no HTTP/1.1 request")
            if self._n_head > HEADER_BYTES:
                self._refuse(431, f"a request's address and headers may have {HEADER_BYTES} bytes")

    # -- what the parser says: what it reads behind the head of a request with an offer is read once more, by `_framing` --------

    def on_message_begin(self) -> None:
        """Begin a request."""
        if self._framing is None:
            self._target, self._headers, self._in_head = b"", list[tuple[bytes, bytes]](), True

    def on_url(self, part: bytes) -> None:
        """Take a part of the address."""
        self._target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; those behind a body are dropped."""
        if self._in_head and self._framing is None:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Answer a request whose head is there, or let it wait for those before it. Raises: ValueError for one that is refused."""
        if self._framing is not None:
            self._framing, self._in_head = None, False
            return
        version, self._in_head, self._n_head = self._parser.get_http_version(), False, 0
        if version not in ("1.0", "1.1") or len(self._ahead) >= MOST_AHEAD:
            raise ValueError
        path, _, query = self._target.partition(b"?")
        text = path.decode("ascii")
        scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": version, **self._about, "root_path": "",
                 "method": self._parser.get_method().decode("ascii"), "path": unquote(text) if "%" in text else text, "raw_path": path,
                 "query_string": query, "headers": self._headers, "state": self._app_state.copy()}
        continues = any(name == b"expect" and value.lower() == b"100-continue" for name, value in self._headers)
        if self._parser.should_upgrade():
            self._framing = b"\r\n".join(b"%b: %b" % header for header in self._headers if header[0] in (b"content-length", b"transfer-encoding")) or None
        self._last = Exchange(self, scope, version == "1.1" and self._parser.should_keep_alive(), continues)
        if self._busy:
            self._ahead.append(self._last)
            self.read_on(False)
        else:
            self._start(self._last)

    def on_body(self, part: bytes) -> None:
        """Take a part of a request's body."""
        self._n_head = 0
        self._last.take(part)                                # type: ignore[union-attr]

    def on_message_complete(self) -> None:
        """Note the end of a request."""
        self._n_head = 0
        if self._framing is None:
            self._last.end_of_request()                      # type: ignore[union-attr]

    def _refuse(self, status: int, message: str) -> None:
        """Read no more. What was asked properly is answered before the connection ends; in the middle of a request there is nothing to wait for."""
        self._broken = True
        last = self._last
        if self._busy and last is not None and (last.whole or last is not self._current):
            if not last.whole:
                self._ahead.pop()
            return self.read_on(False)
        if last is None or last.whole or not last.begun:
            self.transport.write(_refusal(status, message))
        self.transport.close()

    # -- one exchange after the other -------------------------------------------------------------------------------------

    @property
    def _busy(self) -> bool:
        return self._current is not None and not self._current.complete

    def _start(self, exchange: Exchange) -> None:
        self._current = exchange
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None
        exchange.task = self.loop.create_task(exchange.run(self._app))
        self._state.tasks.add(exchange.task)

    def over(self, task: asyncio.Task[None] | None) -> None:
        """Let go of the task of an exchange."""
        self._state.tasks.discard(task)

    def answered(self) -> None:
        """Wait for the next request, or go on with one that is here already."""
        self._state.total_requests += 1
        current = self._current
        if self.transport.is_closing() or current is None:
            return
        if not current.keep_alive or not self._ahead and (self._ended or self._broken):
            self.transport.close()
        elif self._ahead:
            self._start(self._ahead.popleft())
            if not self._ahead and not self._broken:
                self.read_on(True)
        else:
            self.read_on(True)
            self._watch(REQUEST_SECONDS if current.whole else LINGER_SECONDS)

    def _watch(self, seconds: float) -> None:
        self._request_timer = self.delays.later(seconds, self._silent)

    def _silent(self) -> None:
        self._request_timer = None
        if not self._busy:
            self.transport.close()

    # -- what an exchange asks for ----------------------------------------------------------------------------------------

    @property
    def every(self) -> Headers:
        """Headers of every answer."""
        return self._state.default_headers

    async def drained(self) -> None:
        """Wait until it is not, or has gone."""
        if self._writable is not None:
            await self._writable.wait()

    def read_on(self, more: bool) -> None:
        """Go on reading from the client, unless there are requests ahead or none will be read; or do not."""
        more = more and not self._ahead and not self._broken
        if more is not self._reading and not self.transport.is_closing():
            self._reading = more
            (self.transport.resume_reading if more else self.transport.pause_reading)()

    # -- clients that send nothing more -----------------------------------------------------------------------------------

    def eof_received(self) -> bool:                          # type: ignore[override]
        """Keep the connection for an answer that is on its way; True: it stays open."""
        self._ended = True
        last = self._last
        if not self._busy or last is None or not last.whole or last.scope["http_version"] != "1.1" or self._about["scheme"] == "https":
            return False
        if self._probe_timer is None:
            self._probe()
        return True

    def _probe(self) -> None:
        """Write to a client that waits for the beginning of its answer: if it has gone, the next write finds the connection lost."""
        self._probe_timer = None
        current = self._current
        if self.transport.is_closing() or current is None or current.begun or current.complete:
            return
        self.transport.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        self._probe_timer = self.loop.call_later(PROBE_SECONDS, self._probe)

    # -- clients that take nothing ----------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """Let what writes wait, and look whether the client takes anything."""
        self.paused, self._writable = True, asyncio.Event()
        if self._take_timer is None:
            self._take_timer = self.loop.call_later(TAKE_SECONDS, self._taken, self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Let what writes go on."""
        if self._writable is not None:
            self._writable.set()
            self.paused, self._writable = False, None
        if self._current is not None:
            self._current.resumed()
        if self._take_timer is not None:
            self._take_timer.cancel()
            self._take_timer = None

    def _taken(self, before: int) -> None:
        self._take_timer = None
        left = self.transport.get_write_buffer_size()
        if left >= before:
            self.transport.abort()
        elif not self.transport.is_closing():
            self._take_timer = self.loop.call_later(TAKE_SECONDS, self._taken, left)
