"""The web page at "/": its files with strict headers, and what it asks beside the chat: the models with their plans, and plans of others.

The files lie in page_files, written by hand, and are served as they are. They load without a key; everything that they ask needs one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from pyengine.errors import ModelNotFoundError, nearest, PyEngineError
from pyengine.files.gguf import quoted
from pyengine.memory.plan import MemoryPlan, PURPOSES
from pyengine.server import openai, replies
from pyengine.server.fields import FieldError
from pyengine.server.models import Models, Offer, Served
from pyengine.text.sampling import SamplingParams

FOLDER = Path(__file__).with_name("page_files")
INDEX = "index.html"
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
         ".svg": "image/svg+xml", ".webmanifest": "application/manifest+json"}
MOST_CTX = 1 << 24                   # that a plan is asked for

# Nothing but this server is asked, no script or style stands in the page, and no text can become HTML: Chromium's trusted types refuse it.
# https://www.w3.org/TR/CSP3/, https://www.w3.org/TR/trusted-types/
POLICY = "; ".join(("default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "img-src 'self' data: blob:",
                    "media-src 'self' blob:", "manifest-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
                    "require-trusted-types-for 'script'", "trusted-types 'none'"))
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer",
           "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
           "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()"}


@dataclass(frozen=True)
class PageFile:
    """A file of the page, as it is sent."""

    content: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> PageFile:
        """Read it."""
        content = path.read_bytes()
        return cls(content, TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:24]}"')

    def reply(self, request: Request, **headers: str) -> Response:
        """Send it, or say that the client has it already (RFC 9110, 13.1.2)."""
        every = {**HEADERS, "ETag": self.etag, "Cache-Control": "no-cache", **headers}        # kept, and asked about each time
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self.etag in known or "*" in known:
            return Response(status_code=304, headers=every)
        return Response(self.content, media_type=self.media_type, headers=every)


@cache
def files() -> dict[str, PageFile]:
    """Return the page's files by their addresses."""
    found = {path.name: PageFile.read(path) for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES}
    return {"/": found.pop(INDEX), **{f"/page/{name}": file for name, file in found.items()}}


def is_open(method: str, path: str) -> bool:
    """Say whether a request is for a file of the page, which loads without a key."""
    return method in ("GET", "HEAD") and path in files()


def routes(models: Models) -> list[Route]:
    """Return the routes of the page and of what it asks."""
    async def index(request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            return files()["/"].reply(request, Vary="Accept")
        return PlainTextResponse("pyengine is running. OpenAI: /v1, Ollama: /api, Anthropic: /v1/messages; a browser gets a page here\n",
                                 headers={"Vary": "Accept"})

    async def file(request: Request) -> Response:
        return files()[request.url.path].reply(request)

    async def listed(request: Request) -> Response:
        return JSONResponse({"models": [_shown(s) for s, _ in models.running() if "completion" in s.capabilities], "others": await replies.apart(lambda: _others(models)),
                             "body_bytes": replies.BODY_BYTES, "loads": models.loads})

    async def planned(request: Request) -> Response:
        query = request.query_params
        ctx, seq = _whole(query.get("ctx"), "ctx", MOST_CTX), _whole(query.get("seq"), "seq", 1 << 10)
        return JSONResponse(await replies.apart(lambda: _plan(models, query.get("model"), ctx, seq)))

    ours = [Route(path, file) for path in files() if path != "/"]
    return [Route("/", index), *ours, Route("/pyengine/models", replies.guarded(listed, openai.failed)),
            Route("/pyengine/plan", replies.guarded(planned, openai.failed))]


def _whole(text: str | None, name: str, most: int) -> int | None:
    """Return a number of an address. Raises: FieldError."""
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 1 <= int(text) <= most:
        raise FieldError(name, f"must be a whole number from 1 to {most}, got {text[:40]!r}")
    return int(text)


def _shown(served: Served) -> dict[str, Any]:
    """Describe a loaded model: what its answers are made with unless a request says otherwise, and its memory."""
    model = served.model
    defaults = {**asdict(SamplingParams()), **model.sampling_defaults}
    sampling = {name: defaults[name] for name in replies.SAMPLING if name in defaults}
    return {"name": served.name, "loaded": True, "context": model.n_ctx, "n_seq": model.n_seq, "pictures": model.media is not None,
            "capabilities": served.capabilities, "nbytes": served.nbytes, "kind": served.kind, "sampling": sampling,
            "stop": list(model.stop_defaults), "system": model.system_default, "plan": describe(model.plan)}


def describe(plan: MemoryPlan) -> dict[str, Any]:
    """Return a plan as the page draws it: bytes by purpose on each device, and what is left there."""
    devices = [{"device": d, "available": plan.available[d], "free": max(0, plan.available[d] - plan.on(d)), "total": plan.on(d),
                "purposes": {p: n for p in PURPOSES if (n := plan.of(p, d))}} for d in plan.devices]
    return {"model": plan.model, "context": plan.n_ctx, "n_seq": plan.n_seq, "trained": plan.n_ctx_train, "max_context": plan.max_ctx,
            "picture_tokens": plan.picture, "total": plan.total, "fits": plan.fits, "verdict": plan.verdict(), "devices": devices,
            "notes": list(plan.notes), "alternatives": [a.options() for a in plan.alternatives]}


# -- models that are not loaded ---------------------------------------------------------------------------------------------


def _others(models: Models) -> list[dict[str, Any]]:
    """List the models of this machine that are not loaded: names and sizes, no paths."""
    from pyengine.files.stores import list_models

    if models.loads:
        models.look()
        there = {s.name for s, _ in models.running()}
        return [{"name": m.name, "loaded": False, "nbytes": m.nbytes, "source": "", "pictures": "vision" in can} for m in models.all
                if m.name not in there and (not (can := _can(m)) or "completion" in can)]
    there = {n.casefold() for s in models.all for n in s.names}
    return [{"name": m.name, "loaded": False, "nbytes": m.nbytes, "source": m.source, "pictures": m.mmproj is not None} for m in list_models()
            if not {m.name.casefold(), *map(str.casefold, m.aliases)} & there]


def _can(model: Offer | Served) -> list[str]:
    """Return what can be asked of a model; of one whose file is damaged nothing."""
    try:
        return model.capabilities
    except PyEngineError:
        return []


def _plan(models: Models, name: str | None, ctx: int | None, seq: int | None) -> dict[str, Any]:
    """Plan a model of this machine, which need not be loaded, by a name that it is listed under: a path is none.

    Raises: FieldError, ModelNotFoundError, and as `pyengine.plan`.
    """
    from pyengine.files.stores import list_models
    from pyengine.memory.fit import plan

    if not name:
        raise FieldError("model", "is missing")
    known = list_models()
    found = next((m for m in known if name.casefold() in _names((m.name, *m.aliases))), None)
    served = next((s for s, _ in models.running() if name.casefold() in _names(s.names)), None)
    if found is None and served is None:
        raise ModelNotFoundError(f"there is no model {quoted(name)} on this machine{nearest(name, [m.name for m in known])}")
    if served is not None and ctx in (None, served.model.n_ctx) and seq in (None, served.model.n_seq):
        return describe(served.model.plan)
    path, mmproj = (found.path, found.mmproj) if found is not None else (served.model.file.path, None)     # type: ignore[union-attr]
    seq = seq or next((s.model.n_seq for s, _ in models.running()), 1)
    return describe(plan(path, n_ctx=ctx, n_seq=seq, mmproj=mmproj, nearest=True))


def _names(names: Iterable[str]) -> set[str]:
    return {n.casefold() for n in names}
