"""The application: routes of all interfaces behind one guard, and the server that runs it."""

from __future__ import annotations

import errno
import hmac
import ipaddress
import os
import re
import socket
from collections.abc import Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pyengine.errors import RequestError
from pyengine.server import anthropic, chat, completions, embeddings, listing, llamacpp, ollama, openai, page, replies, rerank, responses
from pyengine.server.allowed import Allowed, set_allowed
from pyengine.server.metrics import Metrics, set_metrics
from pyengine.server.models import Models, Served

HEADER_BYTES = 32 << 10
KEEP_ALIVE_SECONDS = 10              # of connections that ask nothing
_NAMES = ("X-Request-Id", "Request-Id")                      # headers with a reply's own name: OpenAI's, Anthropic's
_HEADERS = re.compile(r"[\w-]+(, ?[\w-]+)*")                 # names of headers, as a preflight asks for them


def application(served: Models | Sequence[Served], api_keys: Sequence[str] = (), hosts: Sequence[str] = (), origins: Sequence[str] = (),
                allowed: Allowed = Allowed()) -> ASGIApp:
    """Make the server's application for these models; those of a list stay loaded.

    api_keys  one of them must come with each request, as "Authorization: Bearer KEY"; none: everybody may ask
    hosts     names that this server goes by besides "localhost" and addresses: the others are refused (DNS rebinding)
    origins   web pages that may ask besides this server's own, as "https://example.com"
    allowed   what requests may ask for beside answers
    """
    models = served if isinstance(served, Models) else Models(served)

    async def nothing(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        said = f"{request.method} {request.url.path}: " + ("there is no such address here" if status == 404 else "not by this method")
        return _refusal(request, status, said)

    counts = Metrics(models)
    routes = [*listing.routes(models), *chat.routes(models), *completions.routes(models), *responses.routes(models), *embeddings.routes(models), *rerank.routes(models),
              *anthropic.routes(models), *ollama.routes(models), *llamacpp.routes(models), counts.route(), *page.routes(models)]
    return _Guard(Starlette(routes=routes, exception_handlers={404: nothing, 405: nothing}), api_keys, hosts, origins, allowed, counts)


class _Guard:
    """What each request passes first: its Host, its Origin, its key. Answers preflights of allowed origins."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], hosts: Sequence[str], origins: Sequence[str],
                 allowed: Allowed, counts: Metrics):
        self.app, self.allowed, self.counts, self.keys = app, allowed, counts, [k.encode() for k in api_keys]
        self.hosts = {"localhost", *(h.lower() for h in hosts)}
        self.origins = {o.rstrip("/").lower() for o in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        set_allowed(self.allowed)
        set_metrics(self.counts)
        request = Request(scope)
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        name = replies.fresh("req_")
        named = {header: name for header in _NAMES}
        refused = self._refused(request, host, origin)
        if refused is not None:
            refused.headers.update(named)
            self.counts.count("refused", refused.status_code)
            await refused(scope, receive, send)
            return
        foreign = origin is not None and origin.lower() in self.origins
        if foreign and request.method == "OPTIONS":
            await Response(status_code=204, headers=_cors(request))(scope, receive, send)
            return

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.counts.count(getattr(scope.get("route"), "path", "other"), message["status"])
                given = {**named, **(_cors(request) if foreign else {})}
                message["headers"] = [*message["headers"], *((k.lower().encode(), v.encode()) for k, v in given.items())]
            await send(message)

        await self.app(scope, receive, sent)

    def _refused(self, request: Request, host: str, origin: str | None) -> Response | None:
        """Return the refusal of a request, or None if it may pass."""
        if sum(len(name) + len(value) for name, value in request.scope["headers"]) + len(request.url.path) > HEADER_BYTES:
            return _refusal(request, 431, f"a request's address and headers may have {HEADER_BYTES} bytes")
        if not self._is_ours(host):
            return _refusal(request, 403, f"Host {host!r} is not this server's; allow it with --allow-host")
        if origin is not None and origin.lower() not in self.origins and origin.lower().partition("://")[2] != host.lower():
            return _refusal(request, 403, f"pages of {origin!r} may not ask this server; allow them with --allow-origin")
        if self.keys and request.url.path != "/health" and request.method != "OPTIONS" and not page.is_open(request.method, request.url.path):
            kind, _, key = request.headers.get("authorization", "").partition(" ")
            given = (key if kind.lower() == "bearer" else request.headers.get("x-api-key", "")).strip().encode()
            if not any([hmac.compare_digest(given, known) for known in self.keys]):              # all are compared
                return _refusal(request, 401, "an API key is needed: Authorization: Bearer KEY")
        return None

    def _is_ours(self, host: str) -> bool:
        """Say whether a Host header names this server: an address does, as no foreign page can make a name of its own be one."""
        name = host.lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.rpartition(":")[0] if ":" in name else name
        try:
            ipaddress.ip_address(name)
            return True
        except ValueError:
            return name in self.hosts


def _cors(request: Request) -> dict[str, str]:
    """Return what lets a page of an allowed origin ask: with any headers, as clients in browsers add their own."""
    asked = request.headers.get("access-control-request-headers", "")
    allowed_headers = asked if _HEADERS.fullmatch(asked) else "Authorization, Content-Type, X-API-Key"
    return {"Access-Control-Allow-Origin": request.headers["origin"], "Vary": "Origin", "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
            "Access-Control-Allow-Headers": allowed_headers, "Access-Control-Expose-Headers": ", ".join(_NAMES), "Access-Control-Max-Age": "600"}


def _refusal(request: Request, status: int, message: str) -> Response:
    """Return an error in the form of the interface that the address belongs to."""
    path = request.url.path
    interface = ollama if path.startswith("/api/") else anthropic if path.startswith("/v1/messages") or "anthropic-version" in request.headers else openai
    return JSONResponse(interface.failed(RequestError(message), status), status)


def listen(host: str, port: int) -> socket.socket:
    """Take an address, so that nobody else has it once the models are loaded; port 0 takes any. Raises: RequestError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        taken = socket.socket(family)
        if os.name == "posix":
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        return taken
    except OSError as error:
        what = f"port {port} is in use; give another one with --port" if error.errno == errno.EADDRINUSE else error.strerror or error
        raise RequestError(f"cannot serve at {host}:{port}: {what}") from None


def server(app: ASGIApp, certificate: str | None = None, key: str | None = None) -> Any:
    """Make the server of an application, a `uvicorn.Server`; with a certificate and its key (PEM files) it speaks TLS.

    uvicorn takes uvloop where it is installed: a streamed token costs a fifth less processor time than with asyncio's own event loop.
    """
    import uvicorn

    from pyengine.server.protocol import Protocol

    return uvicorn.Server(uvicorn.Config(app, log_level="error", h11_max_incomplete_event_size=HEADER_BYTES, server_header=False, lifespan="off", ws="none",
                                         timeout_keep_alive=KEEP_ALIVE_SECONDS, ssl_certfile=certificate, ssl_keyfile=key, http=Protocol))


def serve(app: ASGIApp, taken: socket.socket, certificate: str | None = None, key: str | None = None) -> None:
    """Run the server at an address that `listen` took until it is interrupted; with a certificate and its key (PEM files) by TLS."""
    server(app, certificate, key).run(sockets=[taken])
