"""Anthropic's interface: messages and their count of tokens (docs.anthropic.com/en/api/messages)."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pyengine.engine.loop import Handle
from pyengine.errors import PyEngineError
from pyengine.server import replies
from pyengine.server.fields import FieldError, Fields
from pyengine.server.models import Models, Served

_SETTINGS = {name: name for name in ("temperature", "top_p", "top_k")}
_NOT_HERE = {"tools": "tools are not supported yet", "mcp_servers": "there are no tools yet", "container": "nothing is run here"}
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large", 500: "api_error",
          503: "overloaded_error"}


def failed(error: BaseException, status: int) -> dict[str, Any]:
    """Return an error in Anthropic's form."""
    return {"type": "error", "error": {"type": _KINDS.get(status, "invalid_request_error"), "message": str(error)}}


def routes(models: Models) -> list[Route]:
    """Return the routes below /v1/messages."""
    async def create(request: Request) -> Response:
        fields = await replies.read(request)
        served = await replies.using(request, models, fields.text("model", None))
        wanted, client = _wanted(fields), replies.client_of(request)
        handle = await replies.submit(lambda: served.submit(client, **wanted))
        if fields.flag("stream"):
            return replies.streaming(_events(handle, served, wanted["stop"]), [handle], "text/event-stream")
        await replies.finished(request, [handle])
        text = str(handle.result(0))
        return JSONResponse({**_head(served), "content": [{"type": "text", "text": text}], **_end(handle, wanted["stop"]), "usage": _usage(handle)})

    async def count(request: Request) -> Response:
        fields = await replies.read(request)
        messages = _messages(fields)
        fields.refuse(_NOT_HERE)
        served = await replies.using(request, models, fields.text("model", None))
        return JSONResponse({"input_tokens": await replies.apart(lambda: served.count(messages))})

    return [Route("/v1/messages", replies.guarded(create, failed), methods=["POST"]),
            Route("/v1/messages/count_tokens", replies.guarded(count, failed), methods=["POST"])]


def _messages(fields: Fields) -> list[Any]:
    """Return the conversation, which "system" stands before: a text, or a list of them."""
    messages = fields.items("messages")
    if not messages:
        raise FieldError("messages", "is empty")
    system = fields.values.get("system")
    if isinstance(system, list) and all(isinstance(s, dict) and s.get("type") == "text" and isinstance(s.get("text"), str) for s in system):
        system = "\n\n".join(s["text"] for s in system)
    if system is not None and not isinstance(system, str):
        raise FieldError("system", "must be a text, or a list of parts of the type text")
    return [*([{"role": "system", "content": system}] if system else []), *messages]


def _wanted(fields: Fields) -> dict[str, Any]:
    """Return a request as `Served.submit` takes it."""
    fields.refuse(_NOT_HERE)
    if Fields(fields.object("thinking", {})).text("type", "disabled") != "disabled":
        raise FieldError("thinking", "thinking cannot be set yet")
    Fields(fields.object("output_config", {})).refuse({"format": "output_config.format: structured output is not supported yet"})
    return {"messages": _messages(fields), "max_tokens": fields.whole("max_tokens", low=1), "stop": fields.stops("stop_sequences"),
            **fields.given(_SETTINGS)}


def _head(served: Served) -> dict[str, Any]:
    return {"id": "msg_" + secrets.token_hex(12), "type": "message", "role": "assistant", "model": served.name}


def _usage(handle: Handle) -> dict[str, int]:
    """Return tokens by Anthropic's names: those of the prompt that were found in the cache are counted apart."""
    r = handle.report
    return {"input_tokens": r.n_prompt - r.n_cached, "cache_read_input_tokens": r.n_cached, "cache_creation_input_tokens": 0,
            "output_tokens": len(r.tokens)}


def _end(handle: Handle, stops: Sequence[str] | None) -> dict[str, Any]:
    """Return why an answer ended; a stop text that the model's own files name is its own end."""
    r = handle.report
    asked = r.stopped_by if r.stopped_by in (stops or ()) else None
    return {"stop_reason": "max_tokens" if r.finish == "length" else "stop_sequence" if asked else "end_turn", "stop_sequence": asked}


async def _events(handle: Handle, served: Served, stops: Sequence[str] | None) -> AsyncIterator[str]:
    """Write the events of a stream. What the prompt took is told at its end, when it is known."""
    empty = {"input_tokens": 0, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 0, "output_tokens": 0}
    try:
        yield _event("message_start", message={**_head(served), "content": [], "stop_reason": None, "stop_sequence": None, "usage": empty})
        yield _event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        async for piece in handle:
            yield _event("content_block_delta", index=0, delta={"type": "text_delta", "text": piece})
        yield _event("content_block_stop", index=0)
        yield _event("message_delta", delta=_end(handle, stops), usage=_usage(handle))
        yield _event("message_stop")
    except PyEngineError as error:
        yield f"event: error\ndata: {json.dumps(failed(error, replies.status_of(error)))}\n\n"


def _event(kind: str, **values: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **values}, ensure_ascii=False)}\n\n"
