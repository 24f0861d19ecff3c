"""Ollama's interface: chat, generate, tags, show, ps, version (the API page of its documentation). Answers are lines of JSON."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from datetime import datetime, timezone
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import pyengine
from pyengine.engine.loop import Handle
from pyengine.errors import PyEngineError, RequestError
from pyengine.server import replies
from pyengine.server.fields import FieldError, Fields
from pyengine.server.infill import laid_out
from pyengine.server.models import Models, Served
from pyengine.server.pulls import Pulls

_NOT_HERE = {"format": "structured output is not supported yet", "think": "thinking cannot be set yet", "tools": "tools are not supported yet",
             "template": "the model's own template is used",
             "context": "give the conversation as messages, to /api/chat"}
_MANAGED = {"push": "/api/push: nothing is sent from here to a registry", "create": "/api/create: models are made by other programs, as GGUF files",
            "copy": "/api/copy: a model goes by the names of its file; give it another name where it is stored",
            "delete": "/api/delete: no request may delete a file of this machine; delete it with the program that stored it",
            "blobs": "/api/blobs: no request may store a file on this machine"}
_WITHOUT_EFFECT = {"mirostat": 0, "tfs_z": 1.0}


def failed(error: BaseException, status: int) -> dict[str, Any]:
    """Return an error in Ollama's form."""
    return {"error": str(error)}


def routes(models: Models) -> list[Route]:
    """Return the routes below /api."""
    def post(path: str, endpoint: Any) -> Route:
        return Route(path, replies.guarded(endpoint, failed), methods=["POST"])

    def get(path: str, endpoint: Any) -> Route:
        return Route(path, replies.guarded(endpoint, failed))

    async def chat(request: Request) -> Response:
        fields = await replies.read(request)
        served = models.get(fields.text("model", None))
        messages = fields.items("messages", [])
        if not messages:
            return _loaded(served, {"message": {"role": "assistant", "content": ""}})
        return await _answer(request, fields, served, {"messages": messages}, lambda piece: {"message": {"role": "assistant", "content": piece}})

    async def generate(request: Request) -> Response:
        fields = await replies.read(request)
        served = models.get(fields.text("model", None))
        if not fields.text("prompt", "") and not fields.text("suffix", "") and not fields.items("images", []):
            return _loaded(served, {"response": ""})
        return await _answer(request, fields, served, _prompt(fields, served), lambda piece: {"response": piece})

    async def tags(request: Request) -> Response:
        return JSONResponse({"models": [_listed(s) for s in models.all]})

    async def running(request: Request) -> Response:
        held = [{**_listed(s), "expires_at": "0001-01-01T00:00:00Z", "size_vram": 0, "size": s.model.plan.total,
                 "context_length": s.model.n_ctx} for s in models.all]
        return JSONResponse({"models": held})

    async def show(request: Request) -> Response:
        fields = await replies.read(request)
        served = models.get(fields.text("model", None) or fields.text("name", None))
        return JSONResponse(_shown(served, fields.flag("verbose")))

    async def version(request: Request) -> Response:
        return JSONResponse({"version": pyengine.__version__})

    async def refused(request: Request) -> Response:
        if "embed" in request.url.path:
            raise RequestError("embeddings are not supported yet")
        raise RequestError(_MANAGED[request.url.path.split("/")[2]])

    return [post("/api/chat", chat), post("/api/generate", generate), post("/api/show", show), get("/api/tags", tags), get("/api/ps", running),
            get("/api/version", version), post("/api/pull", Pulls().reply),
            *(Route(path, replies.guarded(refused, failed), methods=["POST", "DELETE", "HEAD"])
              for path in (*(f"/api/{name}" for name in (*_MANAGED, "embed", "embeddings")), "/api/blobs/{digest}"))]


def _prompt(fields: Fields, served: Served) -> dict[str, Any]:
    """Return what /api/generate asks: a plain prompt, one in the model's format, or what stands before a suffix."""
    suffix = fields.text("suffix", "")
    if suffix:
        if fields.items("images", []) or fields.text("system", ""):
            raise FieldError("suffix", "goes with a prompt alone, without pictures and system")
        return {"prompt": laid_out(served.model.tokenizer, fields.text("prompt", ""), suffix, "suffix")}
    prompt, images = fields.text("prompt", ""), fields.items("images", [])
    if fields.flag("raw"):
        if images:
            raise FieldError("images", "pictures go with a prompt in the model's format; leave raw out")
        return {"prompt": prompt}
    system = fields.text("system", "")
    user = {"role": "user", "content": prompt, **({"images": images} if images else {})}
    return {"messages": [*([{"role": "system", "content": system}] if system else []), user]}


def _shown(served: Served, verbose: bool) -> dict[str, Any]:
    """Return what a model's file says; its vocabulary only when that is wanted."""
    meta = served.model.file.metadata
    keys = {k: meta[k] for k in meta if verbose or not k.startswith("tokenizer.")}
    return {"details": served.kind, "model_info": {k: v for k, v in keys.items() if isinstance(v, (str, int, float, bool))},
            "template": str(meta.get("tokenizer.chat_template", "")), "capabilities": served.capabilities,
            "modified_at": _time(served.loaded), "license": str(meta.get("general.license", ""))}


def _listed(served: Served) -> dict[str, Any]:
    return {"name": served.name, "model": served.name, "modified_at": _time(served.loaded), "size": served.nbytes, "digest": "", "details": served.kind}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace("+00:00", "Z")


def _loaded(served: Served, empty: dict[str, Any]) -> Response:
    """Answer a request without a prompt, by which clients load a model: it is loaded."""
    return JSONResponse({"model": served.name, "created_at": _time(time.time()), **empty, "done": True, "done_reason": "load"})


def _settings(fields: Fields, served: Served) -> dict[str, Any]:
    """Return the settings of an answer from "options"."""
    fields.refuse(_NOT_HERE)
    options = Fields(fields.object("options", {}))
    wanted: dict[str, Any] = options.given(replies.SAMPLING)
    for name, nothing in _WITHOUT_EFFECT.items():
        if options.values.get(name, nothing) != nothing:
            raise FieldError(f"options.{name}", "the sampler has no such step")
    if isinstance(wanted.get("seed"), int) and wanted["seed"] < 0:
        del wanted["seed"]                                   # -1: another one each time
    n = options.whole("num_predict", -1, -2)
    wanted["max_tokens"] = None if n < 0 else n
    wanted["stop"] = options.stops()
    n_ctx = options.whole("num_ctx", None)
    if n_ctx is not None and n_ctx > served.model.n_ctx:
        raise FieldError("options.num_ctx", f"the model was loaded with a context of {served.model.n_ctx}; serve it with --ctx {n_ctx}")
    return wanted


async def _answer(request: Request, fields: Fields, served: Served, prompt: dict[str, Any], wrap: Any) -> Response:
    """Run one request, streamed unless told otherwise."""
    wanted, began = {**_settings(fields, served), **prompt}, time.perf_counter()
    stream, client = fields.flag("stream", True), replies.client_of(request)
    handle = await replies.submit(lambda: served.submit(client, **wanted))
    if stream:
        return replies.streaming(_lines(handle, served, wrap, began), [handle], "application/x-ndjson")
    await replies.finished(request, [handle])
    return JSONResponse({**_head(served), **wrap(str(handle.result(0))), **_end(handle, began)})


async def _lines(handle: Handle, served: Served, wrap: Any, began: float) -> AsyncIterator[str]:
    try:
        async for piece in handle:
            yield json.dumps({**_head(served), **wrap(piece), "done": False}, ensure_ascii=False) + "\n"
        yield json.dumps({**_head(served), **wrap(""), **_end(handle, began)}) + "\n"
    except PyEngineError as error:
        yield json.dumps(failed(error, 500)) + "\n"


def _head(served: Served) -> dict[str, Any]:
    return {"model": served.name, "created_at": _time(time.time())}


def _end(handle: Handle, began: float) -> dict[str, Any]:
    """Return how an answer ended, with times in nanoseconds."""
    r = handle.report
    return {"done": True, "done_reason": r.finish, "total_duration": int((time.perf_counter() - began) * 1e9), "load_duration": 0,
            "prompt_eval_count": r.n_prompt, "prompt_eval_duration": int(r.prompt_seconds * 1e9), "eval_count": len(r.tokens),
            "eval_duration": int(r.seconds * 1e9)}
