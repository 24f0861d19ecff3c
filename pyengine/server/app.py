"""The application: routes of all interfaces behind one guard, and the server that runs it."""

from __future__ import annotations

import errno
import hmac
import ipaddress
import os
import re
import socket
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from pyengine.errors import RequestError
from pyengine.server import anthropic, chat, completions, embeddings, listing, llamacpp, ollama, openai, page, replies, rerank, responses
from pyengine.server.allowed import Allowed, set_allowed
from pyengine.server.exchange import Headers
from pyengine.server.metrics import Metrics, set_metrics
from pyengine.server.models import Models, Served
from pyengine.server.protocol import HEADER_BYTES, Protocol

_NAMES = (b"x-request-id", b"request-id")                    # headers with a reply's own name: OpenAI's, Anthropic's
_FORWARDED = (b"x-forwarded-for", b"x-forwarded-proto")      # with which a proxy says for whom it asks
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
        path = request.url.path
        near = f"; there is /v1{path}" if any(route.path == f"/v1{path}" for route in routes) else ""          # an address was given without it
        said = f"{request.method} {path}: " + (f"there is no such address here{near}" if status == 404 else "not by this method")
        return _refusal(request.scope, status, said)

    counts = Metrics(models)
    routes = [*listing.routes(models), *chat.routes(models), *completions.routes(models), *responses.routes(models), *embeddings.routes(models), *rerank.routes(models),
              *anthropic.routes(models), *ollama.routes(models), *llamacpp.routes(models), counts.route(), *page.routes(models)]
    app = Starlette(routes=routes, exception_handlers={404: nothing, 405: nothing})
    return _Guard(app, api_keys, hosts, origins, allowed, counts, _direct(routes))


def _direct(routes: Sequence[Route]) -> dict[tuple[str, str], Route]:
    """Return the routes whose address is one text by method and address: their requests pass none of Starlette's layers."""
    return {(method, route.path): route for route in reversed(routes) if "{" not in route.path for method in route.methods or ()}


class _Guard:
    """What each request passes first: its Host, its Origin, its key. Answers preflights of allowed origins."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], hosts: Sequence[str], origins: Sequence[str],
                 allowed: Allowed, counts: Metrics, direct: Mapping[tuple[str, str], Route]):
        from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

        self.app, self.allowed, self.counts, self.keys, self.direct = app, allowed, counts, [k.encode() for k in api_keys], direct
        self.hosts = {"localhost", *(h.lower() for h in hosts)}
        self.origins = {o.rstrip("/").lower() for o in origins}
        self.forwarded = ProxyHeadersMiddleware(_nothing, os.environ.get("FORWARDED_ALLOW_IPS", "127.0.0.1"))     # whose word is taken, as uvicorn has it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        set_allowed(self.allowed)
        set_metrics(self.counts)
        names = {name for name, _ in scope["headers"]}
        if not names.isdisjoint(_FORWARDED):
            await self.forwarded(scope, receive, send)       # says in `scope` who asks
        origin = replies.header(scope, b"origin") if b"origin" in names else None
        refused = self._refused(scope, origin)
        foreign = refused is None and origin is not None and origin.lower() in self.origins
        if foreign and scope["method"] == "OPTIONS":
            await Response(status_code=204, headers=_cors(scope))(scope, receive, send)
            return
        more = [(header, name) for name in [replies.fresh("req_").encode()] for header in _NAMES]
        if foreign:
            more += [(k.lower().encode(), v.encode()) for k, v in _cors(scope).items()]
        route = self.direct.get((scope["method"], scope["path"]))
        held = replies.leases(scope)
        try:
            if refused is not None:
                await self._answer("refused", refused, more, (scope, receive, send))
            elif route is not None:
                await self._answer(route.path, await route.endpoint(Request(scope, receive, send)), more, (scope, receive, send))
            else:
                await self.app(scope, receive, self._counted(scope, send, more))
        finally:
            for hold in held:
                hold.release()

    async def _answer(self, endpoint: str, response: Any, more: Headers, asked: tuple[Scope, Receive, Send]) -> None:
        """Send a reply with more headers, and count it. response: one of Starlette's."""
        response.raw_headers += more
        self.counts.count(endpoint, response.status_code)
        await response(*asked)

    def _counted(self, scope: Scope, send: Send, more: Headers) -> Send:
        """Return a function that sends what Starlette finds the route of, with more headers, and counts it."""
        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.counts.count(getattr(scope.get("route"), "path", "other"), message["status"])
                message["headers"] = [*message["headers"], *more]
            await send(message)

        return sent

    def _refused(self, scope: Scope, origin: str | None) -> Response | None:
        """Return the refusal of a request, or None if it may pass."""
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        host, method, path = hosts[0] if hosts else "", scope["method"], scope["path"]
        if sum(map(len, chain.from_iterable(scope["headers"]))) + len(scope.get("raw_path", path)) > HEADER_BYTES:
            return _refusal(scope, 431, f"a request's address and headers may have {HEADER_BYTES} bytes")
        if len(hosts) != 1 and scope["http_version"] == "1.1":
            return _refusal(scope, 400, "a request of HTTP/1.1 needs one Host")
        if not self._is_ours(host):
            return _refusal(scope, 403, f"Host {host!r} is not this server's; allow it with --allow-host")
        if origin is not None and origin.lower() not in self.origins and origin.lower().partition("://")[2] != host.lower():
            return _refusal(scope, 403, f"pages of {origin!r} may not ask this server; allow them with --allow-origin")
        if self.keys and path != "/health" and method != "OPTIONS" and not page.is_open(method, path):
            kind, _, key = (replies.header(scope, b"authorization") or "").partition(" ")
            given = (key if kind.lower() == "bearer" else replies.header(scope, b"x-api-key") or "").strip().encode()
            if not any([hmac.compare_digest(given, known) for known in self.keys]):              # all are compared
                return _refusal(scope, 401, "an API key is needed: Authorization: Bearer KEY")
        return None

    def _is_ours(self, host: str) -> bool:
        """Say whether a Host header names this server: an address does, as no foreign page can make a name of its own be one."""
        name = host.lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.rpartition(":")[0] if ":" in name else name
        return name in self.hosts or _is_address(name)


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    """Answer nothing."""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return False


def _cors(scope: Scope) -> dict[str, str]:
    """Return what lets a page of an allowed origin ask: with any headers, as clients in browsers add their own."""
    asked = replies.header(scope, b"access-control-request-headers") or ""
    allowed_headers = asked if _HEADERS.fullmatch(asked) else "Authorization, Content-Type, X-API-Key"
    return {"Access-Control-Allow-Origin": replies.header(scope, b"origin") or "", "Vary": "Origin", "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
            "Access-Control-Allow-Headers": allowed_headers, "Access-Control-Expose-Headers": "X-Request-Id, Request-Id", "Access-Control-Max-Age": "600"}


def _refusal(scope: Scope, status: int, message: str) -> Response:
    """Return an error in the form of the interface that the address belongs to."""
    path = scope["path"]
    asks_anthropic = path.startswith("/v1/messages") or replies.header(scope, b"anthropic-version") is not None
    interface = ollama if path.startswith("/api/") else anthropic if asks_anthropic else openai
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

    return uvicorn.Server(uvicorn.Config(app, log_level="error", server_header=False, lifespan="off", ws="none",
                                         ssl_certfile=certificate, ssl_keyfile=key, http=Protocol, proxy_headers=False))


def serve(app: ASGIApp, taken: socket.socket, certificate: str | None = None, key: str | None = None) -> None:
    """Run the server at an address that `listen` took until it is interrupted; with a certificate and its key (PEM files) by TLS."""
    server(app, certificate, key).run(sockets=[taken])
