"""Connections without sockets: however a stream of requests is cut, or damaged, the answers are those of the whole, and nothing is raised."""

from __future__ import annotations

import asyncio
import logging
import random
from types import SimpleNamespace
from typing import Any

import pytest

from pyengine.server import protocol

CHUNKED = b"POST /b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nTrailer: z\r\n\r\n"
OFFER = b"POST /c?q=1 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 4\r\n\r\nbody"
REQUESTS = b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello" + CHUNKED + OFFER + b"\r\nHEAD /d%20e HTTP/1.1\r\nHost: x\r\n\r\n" + CHUNKED
LAST = b"GET /last HTTP/1.0\r\n\r\n"


class Transport:
    """What a connection writes to: all of it is kept."""

    def __init__(self) -> None:
        self.written, self.closing, self.reading = b"", False, True

    def write(self, data: bytes) -> None:
        assert not self.closing
        self.written += data

    def close(self) -> None:
        self.closing = True

    abort = close

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        assert self.reading
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.reading
        self.reading = True

    def get_extra_info(self, name: str) -> Any:
        return ("127.0.0.1", 1) if name.endswith("name") else None

    def get_write_buffer_size(self) -> int:
        return 0


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Say what was asked; an address that ends with "early" is answered before its body has come, one with "stream" in parts."""
    body, more = b"", not scope["path"].endswith("early")
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message["more_body"]
    said = f"<{scope['method']} {scope['path']} {scope['query_string'].decode()} ".encode() + body + b">"
    await send({"type": "http.response.start", "status": 200, "headers": [] if "stream" in scope["path"] else [(b"content-length", b"%d" % len(said))]})
    for i in range(0, len(said) if "stream" in scope["path"] else 0, 5):
        await send({"type": "http.response.body", "body": said[i : i + 5], "more_body": True})
    await send({"type": "http.response.body", "body": b"" if "stream" in scope["path"] else said})


async def converse(parts: list[bytes], app: Any = echo, ends: bool = False) -> Transport:
    """Send parts to a connection, as long as it reads, and let it answer."""
    state = SimpleNamespace(connections=set(), tasks=set(), default_headers=[], total_requests=0)
    connection, transport = protocol.Protocol(SimpleNamespace(loaded_app=app), state, {}), Transport()
    connection.connection_made(transport)
    waiting = list(parts)
    for _ in range(40 + 4 * len(parts)):
        if waiting and transport.reading and not transport.closing:
            connection.data_received(waiting.pop(0))
        await asyncio.sleep(0)
    if ends and transport.reading and not transport.closing and not connection.eof_received():
        transport.close()
    for _ in range(10):
        await asyncio.sleep(0)
    connection.connection_lost(None)
    await asyncio.gather(*state.tasks)
    assert not state.connections and not state.tasks
    return transport


def cut(data: bytes, rng: random.Random, n: int) -> list[bytes]:
    places = sorted(rng.randrange(len(data) + 1) for _ in range(n))
    return [part for part in (data[a:b] for a, b in zip([0, *places], [*places, len(data)])) if part]


def test_any_cut_gives_the_same_answers() -> None:
    stream = REQUESTS + REQUESTS.replace(b" /a ", b" /stream ") + LAST
    want = asyncio.run(converse([stream])).written
    assert [part.partition(b">")[0] for part in want.replace(b"\r\n", b"").split(b"<")[1:]][:3] == [b"POST /a  hello", b"POST /b  abcde", b"POST /c q=1 body"]
    assert want.count(b"HTTP/1.1 200 OK") == 11 and want.endswith(b"connection: close\r\n\r\n<GET /last  >")
    rng = random.Random(0)
    for parts in ([stream[i : i + 1] for i in range(len(stream))], *(cut(stream, rng, rng.choice((1, 2, 5, 20))) for _ in range(200))):
        assert asyncio.run(converse(parts)).written == want


def test_a_body_that_is_not_read_does_not_reach_the_next_request() -> None:
    stream = REQUESTS.replace(b" /a ", b" /early ").replace(b" /b ", b" /x/early ") + LAST
    want = asyncio.run(converse([stream])).written
    for i in range(len(stream)):
        got = asyncio.run(converse([stream[:i], stream[i:]])).written
        assert got == want


def test_a_body_behind_an_offer_is_framed_as_any_other() -> None:
    for wrong in (b"Content-Length: 4\r\nTransfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Content-Length: 4\r\nContent-Length: 5"):
        for i in range(0, 130, 7):
            data = OFFER.replace(b"Content-Length: 4", wrong) + LAST
            assert asyncio.run(converse([data[:i], data[i:]])).written.startswith(b"HTTP/1.1 400 Bad Request")


@pytest.mark.parametrize("seed", range(4))
def test_damaged_streams_raise_nothing(seed: int, caplog) -> None:
    rng = random.Random(seed)
    heads = (b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 400 Bad Request\r\n", b"HTTP/1.1 431 Request Header Fields Too Large\r\n", b"HTTP/1.1 100 Continue\r\n", b"HTTP/1.1 102 Processing\r\n")
    with caplog.at_level(logging.ERROR):
        for _ in range(200):
            data = bytearray(REQUESTS * 3)
            at = rng.randrange(len(data))
            kind, n = rng.randrange(5), rng.choice((1, 2, 8, 60))
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                del data[at : at + n]
            elif kind == 2:
                data[at:at] = bytes(rng.randrange(256) for _ in range(n))
            elif kind == 3:
                data[at:at] = rng.choice((b"\r\n", b"\r", b"\0", b"Expect: 100-continue\r\n", b"Content-Length: 3\r\n", b"CONNECT a:1 HTTP/1.1\r\n\r\n", b"0\r\n\r\n", b"GET * HTTP/2.0\r\n"))
            else:
                data[at:at] = data[rng.randrange(len(data)) :][: rng.randrange(200)]
            found = asyncio.run(converse(cut(bytes(data), rng, rng.choice((0, 1, 9))), ends=rng.random() < 0.3)).written
            assert not found or found.startswith(heads), found[:100]
    assert "Traceback" not in caplog.text and not [r for r in caplog.records if r.exc_info]
