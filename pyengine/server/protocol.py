"""Connections that ask nothing, ask slowly, take nothing, or are half closed: uvicorn's HTTP/1.1 with bounds of its own, and quick streams.

uvicorn bounds the time of a connection between two requests only, and closes one whose client will send nothing more although it
still waits for its answer. Whether a client has gone for good is seen only by writing to it, so one that has closed its sending
side is sent "102 Processing" while it waits (RFC 9110, 15.2: a client takes any number of 1xx).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pyengine.server.streams import STREAM

MOST_CONNECTIONS = 512
REQUEST_SECONDS = 10.0               # until a request's headers are whole, from the connection or the last answer on
LINGER_SECONDS = 1.0                 # in which what still comes of an answered request is read, so that its client sees the answer
PROBE_SECONDS = 0.25                 # between two looks after a client whose sending side is closed
TAKE_SECONDS = 60.0                  # in which a client must take something of what waits for it
_FULL = (b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
         b'{"error":{"message":"there are too many connections; try again later","type":"server_error","param":null,"code":null}}')


class Protocol(H11Protocol):
    """One connection."""

    _request_timer: asyncio.TimerHandle | None = None
    _probe_timer: asyncio.TimerHandle | None = None
    _take_timer: asyncio.TimerHandle | None = None
    _drained: Callable[[], None] | None = None

    def connection_made(self, transport: Any) -> None:       # type: ignore[override]
        """Begin, unless there are too many."""
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.write(_FULL)
            transport.close()
            return
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        for timer in (self._request_timer, self._probe_timer, self._take_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    # -- streams ----------------------------------------------------------------------------------------------------------

    def stream(self, drained: Callable[[], None]) -> None:
        """Begin a body that is written by `write`, after its headers were sent. drained: called when the client takes data again."""
        self._drained = drained

    @property
    def writable(self) -> bool:
        """Whether the client takes data."""
        return not self.flow.write_paused and not self.transport.is_closing()

    def write(self, data: bytes) -> None:
        """Write a chunk of the body of a stream (RFC 9112, 7.1), at once and without a task; what ends the body is sent as usual."""
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    # -- requests that do not come ----------------------------------------------------------------------------------------

    def handle_events(self) -> None:
        """Read what has come; a request that is whole is no longer waited for."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and self.cycle.scope["http_version"] == "1.1":
            self.cycle.scope["extensions"] = {STREAM: self}
        if self._request_timer is not None and self._busy:
            self._request_timer.cancel()
            self._request_timer = None

    def on_response_complete(self) -> None:
        """Wait for the next request, or go on with one that is here already."""
        self._drained = None
        super().on_response_complete()
        if not self._busy and not self.transport.is_closing():
            self._watch(LINGER_SECONDS if self.cycle.more_body else None)

    @property
    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self, seconds: float | None = None) -> None:
        if self._request_timer is None:
            self._request_timer = self.loop.call_later(REQUEST_SECONDS if seconds is None else seconds, self._silent)

    def _silent(self) -> None:
        self._request_timer = None
        if not self._busy:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; within an answer, or after one whose request is still coming, there is nothing to say."""
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:
            self.transport.close()

    # -- clients that send nothing more -----------------------------------------------------------------------------------

    def eof_received(self) -> bool:                          # type: ignore[override]
        """Keep the connection for an answer that is on its way; True: it stays open."""
        cycle = self.cycle
        if not self._busy or cycle.more_body or cycle.scope["http_version"] != "1.1" or self.transport.get_extra_info("ssl_object") is not None:
            return False
        cycle.keep_alive = False
        if self._probe_timer is None:
            self._probe()
        return True

    def _probe(self) -> None:
        """Write to a client that waits for the beginning of its answer: if it has gone, the next write finds the connection lost."""
        self._probe_timer = None
        if self.transport.is_closing() or self.cycle.response_started or self.conn.our_state is not h11.SEND_RESPONSE:
            return
        self.transport.write(self.conn.send(h11.InformationalResponse(status_code=102, headers=[])) or b"")
        self._probe_timer = self.loop.call_later(PROBE_SECONDS, self._probe)

    # -- clients that take nothing ----------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """Let what writes wait, and look whether the client takes anything."""
        super().pause_writing()
        if self._take_timer is None:
            self._take_timer = self.loop.call_later(TAKE_SECONDS, self._taken, self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Let what writes go on."""
        super().resume_writing()
        if self._drained is not None:
            self._drained()
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
