"""Ollama's interface: chat, generate, tags, show, ps, version (the API page of its documentation). Answers are lines of JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import pyengine
from pyengine.chat.reply.deltas import Delta, ToolCall
from pyengine.engine.loop import Handle
from pyengine.engine.residents import keep_alive_of
from pyengine.errors import PyEngineError, RequestError
from pyengine.server import replies
from pyengine.server.fields import FieldError, Fields
from pyengine.server.infill import laid_out
from pyengine.server.models import Models, Offer, Served
from pyengine.server.openai import logprobs_of, MOST_LOGPROBS
from pyengine.server.pulls import Pulls
from pyengine.server.streams import encoded, NDJSON, Script, Stream

_NOT_HERE = {"template": "the model's own template is used", "context": "give the conversation as messages, to /api/chat"}
_FOR_EVER = 2**63 / 1e9               # seconds: as Ollama tells of models that stay (the longest time of Go)
_MANAGED = {"push": "/api/push: nothing is sent from here to a registry", "create": "/api/create: models are made by other programs, as GGUF files",
            "copy": "/api/copy: a model goes by the names of its file; give it another name where it is stored",
            "delete": "/api/delete: no request may delete a file of this machine; delete it with the program that stored it",
            "blobs": "/api/blobs: no request may store a file on this machine"}
_NAMES = {name: f"options.{name}" for name in (*replies.SAMPLING, "stop")} | {"adapters": "options.lora"}    # of the library's arguments
_WITHOUT_EFFECT = {"tfs_z": 1.0}


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
        messages = fields.items("messages", [])
        if not messages:
            return await _empty(request, fields, models, {"message": {"role": "assistant", "content": ""}})
        return await _answer(request, fields, models, {"messages": messages, "tools": fields.items("tools", None) or None}, _Chat())

    async def generate(request: Request) -> Response:
        fields = await replies.read(request)
        if not fields.text("prompt", "") and not fields.text("suffix", "") and not fields.items("images", []):
            return await _empty(request, fields, models, {"response": ""})
        return await _answer(request, fields, models, None, _Generate())

    async def tags(request: Request) -> Response:
        await replies.apart(models.look)
        return JSONResponse({"models": await replies.apart(lambda: [_listed(s) for s in models.all])})

    async def running(request: Request) -> Response:
        held = [{**_listed(s), "expires_at": replies.moment(time.time() + min(r.expires, _FOR_EVER)), "size_vram": 0, "size": s.model.plan.total,
                 "context_length": s.model.n_ctx} for s, r in models.running()]
        return JSONResponse({"models": held})

    async def show(request: Request) -> Response:
        fields = await replies.read(request)
        name, verbose = fields.text("model", None) or fields.text("name", None), fields.flag("verbose")
        return JSONResponse(await replies.apart(lambda: _shown(models.find(name), verbose)))

    async def version(request: Request) -> Response:
        return JSONResponse({"version": pyengine.__version__})

    async def refused(request: Request) -> Response:
        raise RequestError(_MANAGED[request.url.path.split("/")[2]])

    return [post("/api/chat", chat), post("/api/generate", generate), post("/api/show", show), get("/api/tags", tags), get("/api/ps", running),
            get("/api/version", version), post("/api/pull", Pulls().reply),
            *(Route(path, replies.guarded(refused, failed), methods=["POST", "DELETE", "HEAD"])
              for path in (*(f"/api/{name}" for name in _MANAGED), "/api/blobs/{digest}"))]


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


def _shown(served: Offer | Served, verbose: bool) -> dict[str, Any]:
    """Return what a model's file says; its vocabulary only when that is wanted."""
    meta = served.file.metadata
    keys = {k: meta[k] for k in meta if verbose or not k.startswith("tokenizer.")}
    return {"details": served.kind, "model_info": {k: v for k, v in keys.items() if isinstance(v, (str, int, float, bool))},
            "template": str(meta.get("tokenizer.chat_template", "")), "capabilities": served.capabilities,
            "modified_at": replies.moment(served.modified), "license": str(meta.get("general.license", ""))}


def _listed(served: Offer | Served) -> dict[str, Any]:
    return {"name": served.name, "model": served.name, "modified_at": replies.moment(served.modified), "size": served.nbytes, "digest": served.digest, "details": served.kind}


def keep_alive(fields: Fields) -> float | None:
    """Return the seconds that a model shall stay after this request; None where the request does not say."""
    value = fields.values.get("keep_alive")
    return None if value is None or value == "" else keep_alive_of(value)


async def _empty(request: Request, fields: Fields, models: Models, empty: dict[str, Any]) -> Response:
    """Answer a request without a prompt, by which clients load a model, or unload it with keep_alive 0."""
    name, keep = fields.text("model", None), keep_alive(fields)
    if keep == 0:
        served = await replies.apart(lambda: models.stop(name))
    else:
        served = await replies.using(request, models, name, keep)
    return JSONResponse({**_head(served), **empty, "done": True, "done_reason": "unload" if keep == 0 else "load"})


def _settings(fields: Fields, served: Served) -> dict[str, Any]:
    """Return the settings of an answer from "options"."""
    fields.refuse(_NOT_HERE)
    options = Fields(fields.object("options", {}))
    wanted = replies.sampling(options)
    for name, nothing in _WITHOUT_EFFECT.items():
        if options.values.get(name, nothing) != nothing:
            raise FieldError(f"options.{name}", "the sampler has no such step")
    if isinstance(wanted.get("seed"), int) and wanted["seed"] < 0:
        del wanted["seed"]                                   # -1: another one each time
    n = options.whole("num_predict", -1, -2)
    wanted["max_tokens"] = None if n < 0 else n
    wanted["stop"] = options.stops()
    top = fields.whole("top_logprobs", 0, 0, MOST_LOGPROBS)
    if top and not fields.flag("logprobs"):
        raise FieldError("top_logprobs", "needs logprobs: true")
    wanted["logprobs"] = top
    if fields.values.get("format") not in (None, ""):
        wanted["format"] = fields.values["format"]
    check_context(options, served)
    return wanted


def check_context(options: Fields, served: Served) -> None:
    """Refuse a context that is larger than the one that the model was loaded with. Raises: FieldError."""
    n_ctx = options.whole("num_ctx", None)
    model = served.model
    if n_ctx is None or n_ctx <= model.n_ctx:
        return
    why = f"the model was loaded with a context of {model.n_ctx}; serve it with --ctx {n_ctx}"
    if not model.writes and n_ctx > model.plan.n_ctx_train:
        why = f"the model reads texts of at most {model.plan.n_ctx_train} tokens" if model.n_ctx else "the model reads pictures only, and has no context"
    raise FieldError("options.num_ctx", why)


class _Chat:
    """How /api/chat writes an answer and its pieces."""

    def write(self, text: str, thinking: str = "", calls: Sequence[ToolCall] = ()) -> dict[str, Any]:
        """Return a part of an answer in Ollama's form."""
        made = [{"id": c.id, "function": {"index": i, "name": c.name, "arguments": c.values()}} for i, c in enumerate(calls)]
        return {"message": {"role": "assistant", "content": text, **({"thinking": thinking} if thinking else {}), **({"tool_calls": made} if made else {})}}


class _Generate:
    """How /api/generate does."""

    def write(self, text: str, thinking: str = "", calls: Sequence[ToolCall] = ()) -> dict[str, Any]:
        """Return a part of an answer in Ollama's form."""
        return {"response": text, **({"thinking": thinking} if thinking else {})}


async def _answer(request: Request, fields: Fields, models: Models, prompt: dict[str, Any] | None, form: _Chat | _Generate) -> Response:
    """Run one request, streamed unless told otherwise. prompt: None is that of /api/generate."""
    began = time.perf_counter()
    served = await replies.using(request, models, fields.text("model", None), keep_alive(fields))
    wanted, loading = {**_settings(fields, served), **(_prompt(fields, served) if prompt is None else prompt)}, replies.waited(request)
    if "messages" in wanted:
        wanted["think"] = fields.values.get("think")
    elif fields.values.get("think"):
        raise FieldError("think", "a raw prompt is continued as it is; leave raw out")
    stream, client = fields.flag("stream", True), replies.client_of(request)
    handle = await replies.submit(lambda: served.submit(client, **wanted), _NAMES)
    scores = _Scores(handle, served, fields.flag("logprobs"))
    if stream:
        return Stream(_Lines(handle, served, form, scores, lambda: _end(handle, began, loading)), [handle], NDJSON)
    await replies.finished(request, [handle])
    answer = handle.result(0)
    said = form.write(str(answer), answer.thinking, answer.tool_calls)
    return JSONResponse({**_head(served), **said, **scores.new(), **_end(handle, began, loading)})


class _Scores:
    """Log-probabilities of an answer's tokens, where they are wanted."""

    def __init__(self, handle: Handle, served: Served, wanted: bool):
        self._untold, self._served = replies.Untold(handle, wanted), served

    def new(self) -> dict[str, Any]:
        """Return those of the tokens that none were told of."""
        sampled = self._untold.take()
        return {"logprobs": logprobs_of(self._served, sampled)} if sampled else {}


class _Lines(Script):
    """How a stream is written: a line for each piece, and for each call when it is whole."""

    def __init__(self, handle: Handle, served: Served, form: _Chat | _Generate, scores: _Scores, ending: Callable[[], dict[str, Any]]):
        self._handle, self._served, self._form, self._scores, self._ending = handle, served, form, scores, ending
        self._n_calls = 0                                    # that were told

    def _line(self, part: dict[str, Any], **more: Any) -> str:
        return encoded({**_head(self._served), **part, **more}) + "\n"

    def piece(self, i: int, delta: Delta) -> str:
        """Return a line: a call is whole when the next one begins."""
        if delta.kind in ("text", "thinking"):
            said = (delta.text,) if delta.kind == "text" else ("", delta.text)
            return self._line(self._form.write(*said), **self._scores.new(), done=False)
        whole = self._handle.report.calls[self._n_calls:delta.index] if delta.kind == "call" else ()
        self._n_calls += len(whole)
        return self._line(self._form.write("", calls=whole), **self._scores.new(), done=False) if whole else ""

    def end(self) -> str:
        """Return the last call and how the answer ended."""
        rest = self._handle.report.calls[self._n_calls:]
        line = self._line(self._form.write("", calls=rest), done=False) if rest else ""
        return line + self._line(self._form.write(""), **self._scores.new(), **self._ending())

    def fail(self, error: PyEngineError) -> str:
        """Return the error as a line."""
        return encoded(failed(error, 500)) + "\n"


def _head(served: Offer | Served) -> dict[str, Any]:
    return {"model": served.name, "created_at": replies.moment(time.time())}


def _end(handle: Handle, began: float, loading: float) -> dict[str, Any]:
    """Return how an answer ended, with times in nanoseconds. began: by the clock; loading: seconds until the model was there."""
    r = handle.report
    return {"done": True, "done_reason": "stop" if r.finish == "tool_calls" else r.finish, "total_duration": int((time.perf_counter() - began) * 1e9), "load_duration": int(loading * 1e9),
            "prompt_eval_count": r.n_prompt, "prompt_eval_duration": int(r.prompt_seconds * 1e9), "eval_count": len(r.tokens),
            "eval_duration": int(r.seconds * 1e9)}
