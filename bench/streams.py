"""A client of HTTP servers that stream chat completions: many at once, some that leave, some that read slowly."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Reply:
    """What came of one request: content, seconds to its first piece, pieces, how it ended ("" if this client left); tokens, of one that was left
    as many as there were pieces."""

    text: str = ""
    first: float = 0.0
    pieces: int = 0
    finish: str = ""
    tokens: int = 0
    error: str = ""
    times: list[float] = field(default_factory=list, repr=False)


class Client:
    """One asker, who keeps its connection as clients do (RFC 9112, 9.3), unless it leaves in the middle of an answer."""

    def __init__(self, port: int):
        self.port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return the connection, a new one where there is none or the server has closed it."""
        if self._streams is None or self._streams[0].at_eof():
            self.close()
            self._streams = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
        return self._streams

    async def send(self, request: bytes) -> tuple[asyncio.StreamReader, bytes]:
        """Send a request; returns what its answer is read from, and the answer's first line. A kept connection that the server closes instead
        of answering is replaced once (RFC 9112, 9.3.1)."""
        for kept in (self._streams is not None, False):
            reader, writer = await self.connected()
            try:
                writer.write(request)
                await writer.drain()
                first = await reader.readline()
            except ConnectionError:
                first = b""
            if first or not kept:
                break
            self.close()
        if not first:
            raise ConnectionResetError("closed without an answer")
        return reader, first

    def close(self) -> None:
        """Drop the connection."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def ask(client: Client, body: dict[str, Any], leave_after: int | None = None, pause: float = 0.0) -> Reply:
    """Ask for a streamed chat completion at this machine. leave_after: pieces after which the connection is dropped; pause: seconds before
    each read, of a kilobyte at most."""
    reply, began = Reply(), time.perf_counter()
    whole = False
    try:
        data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:{client.port}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        reader, first = await client.send(head.encode() + data)
        status = int(first.split()[1])
        while (await reader.readline()).strip():             # headers
            pass
        if status != 200:
            reply.error = (await reader.read(4096)).decode("utf-8", "replace")
            return reply
        async for value in _events(reader, pause):
            if value.get("error"):
                reply.error = str(value["error"])
                return reply
            if value.get("usage"):
                reply.tokens = value["usage"]["completion_tokens"]
            for choice in value.get("choices", ()):
                piece = choice.get("delta", {}).get("content")
                if piece:
                    reply.first = reply.first or time.perf_counter() - began
                    reply.text += piece
                    reply.pieces += 1
                reply.finish = choice.get("finish_reason") or reply.finish
            if leave_after is not None and reply.pieces >= leave_after:
                reply.finish, reply.tokens = "", reply.pieces
                return reply
        whole = True
    finally:
        if not whole:
            client.close()
    return reply


async def _events(reader: asyncio.StreamReader, pause: float) -> Any:
    """Yield the values of server-sent events until the last chunk has come; sizes of chunks are lines that begin with no "data:"."""
    rest, done = b"", False
    while True:
        if pause:
            await asyncio.sleep(pause)
        block = await reader.read(1024 if pause else 1 << 16)
        if not block:
            return
        *lines, rest = (rest + block).split(b"\n")
        for i, line in enumerate(lines):
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield json.loads(line[6:])
            done |= line.strip() == b"data: [DONE]"
            if done and line == b"0\r":                       # the chunk of no bytes; an empty line follows
                await reader.readexactly(2 - len(b"\n".join([*lines[i + 1 :], rest])))
                return
