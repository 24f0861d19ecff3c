"""Models fetched by a request (Ollama's /api/pull): in a thread of its own, told about in lines of JSON, ended when the client leaves."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from pyengine.errors import BusyError, PyEngineError, RequestError
from pyengine.server import replies
from pyengine.server.allowed import allowed
from pyengine.server.fields import FieldError, Fields
from pyengine.server.streams import leaving

AT_ONCE = 4
LINE_SECONDS = 0.1                   # between two lines about one file

Tell = Callable[[dict[str, Any]], None]


class _Left(Exception):
    """The client has gone."""


class Pulls:
    """What is being fetched: each model by one request at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[Any] = set()

    async def reply(self, request: Request) -> Response:
        """Fetch the model that a request names. Raises: RequestError where the server does not fetch; DownloadError."""
        fields = await replies.read(request)
        if not allowed().pulls:
            raise RequestError("models are not fetched for requests: it writes to this machine's disk. Start the server with --allow-pull, or use `pyengine-run pull`")
        source = _source(fields)
        left = threading.Event()
        if fields.flag("stream", True):
            return StreamingResponse(self._lines(source, left), media_type="application/x-ndjson")
        try:
            with leaving(request, left.set):
                await replies.apart(lambda: self._pull(source, lambda line: None, left))
        except _Left:
            return Response(status_code=400)
        return JSONResponse({"status": "success"})

    async def _lines(self, source: tuple[str, Any], left: threading.Event) -> AsyncIterator[str]:
        loop, lines = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def tell(line: Any) -> None:
            loop.call_soon_threadsafe(lines.put_nowait, line)

        def work() -> None:
            try:
                self._pull(source, tell, left)
                tell({"status": "success"})
            except _Left:
                pass
            except Exception as error:
                tell({"error": str(error) if isinstance(error, PyEngineError) else "an error of the server"})
            finally:
                if not left.is_set():
                    tell(None)

        threading.Thread(target=work, name="pyengine pull", daemon=True).start()
        try:
            while (line := await lines.get()) is not None:
                yield json.dumps(line) + "\n"
        finally:
            left.set()

    def _pull(self, source: tuple[str, Any], tell: Tell, left: threading.Event) -> None:
        """Fetch a model's files one after the other. Raises: as `pull.offer.fetch`; BusyError; _Left once the client has gone."""
        from pyengine.pull import find
        from pyengine.pull.download import fetch
        from pyengine.pull.offer import check_room

        name, key = source
        with self._lock:
            if key in self._running:
                raise BusyError(f"{name} is being fetched already, for another request")
            if len(self._running) >= AT_ONCE:
                raise BusyError(f"{AT_ONCE} models are being fetched already; try again later")
            self._running.add(key)
        try:
            tell({"status": "pulling manifest"})
            found = find(name)
            for note in found.notes:
                tell({"status": note})
            check_room(found)
            for file in found.files:
                fetch(file, _Progress(file, tell, left))
            tell({"status": "writing manifest"})
            found.settle()
        finally:
            with self._lock:
                self._running.discard(key)


class _Progress:
    """The bytes of one file that are there, told now and then; ends the work when the client has gone."""

    def __init__(self, file: Any, tell: Tell, left: threading.Event):
        self._file, self._tell, self._left, self._told = file, tell, left, 0.0

    def __call__(self, n_bytes: int) -> None:
        if self._left.is_set():
            raise _Left
        now = time.monotonic()
        if n_bytes == self._file.size or now - self._told >= LINE_SECONDS:
            self._told = now
            digest = self._file.digest
            self._tell({"status": f"pulling {digest.partition(':')[2][:12]}", "digest": digest, "total": self._file.size, "completed": n_bytes})


def _source(fields: Fields) -> tuple[str, Any]:
    """Return the name and what it means. Raises: RequestError for what is no such name, FieldError for a registry that strangers may not name."""
    from pyengine.pull.names import HubName, parse, REGISTRY

    name = fields.text("model", None) or fields.text("name")
    if fields.flag("insecure"):
        raise FieldError("insecure", "models are fetched by https only")
    source = parse(name)
    if not isinstance(source, HubName) and source.host != REGISTRY:
        raise FieldError("model", f"requests may fetch from Hugging Face and Ollama's registry, not from {source.host}; use `pyengine-run pull`")
    return name, source
