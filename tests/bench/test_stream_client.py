"""The benchmark's HTTP client beside servers that end kept connections."""

from __future__ import annotations

import asyncio

import pytest
from bench.streams import ask, Client

PIECE = b'data: {"choices": [{"delta": {"content": "yes"}, "finish_reason": null}]}\n\n'
LAST = b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}\n\ndata: [DONE]\n\n'


def answer() -> bytes:
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (PIECE, LAST))
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


async def served(n_answers: int, n_asked: int) -> tuple[list[str], int]:
    """Ask a server that answers so often on a connection, and reads one request more; returns texts and the number of connections."""
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for i in range(n_answers + 1):
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0]))
            if i < n_answers:
                writer.write(answer())
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        client = Client(server.sockets[0].getsockname()[1])
        texts = [(await ask(client, {"messages": []})).text for _ in range(n_asked)]
        client.close()
    return texts, connections


def test_a_kept_connection_that_is_closed_instead_of_an_answer_is_replaced() -> None:
    assert asyncio.run(served(2, 5)) == (["yes"] * 5, 3)


def test_a_new_connection_that_is_closed_is_an_error() -> None:
    with pytest.raises(ConnectionResetError):
        asyncio.run(served(0, 1))
