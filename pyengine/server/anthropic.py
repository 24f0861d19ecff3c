"""Anthropic's interface: messages and their count of tokens (docs.anthropic.com/en/api/messages): tools, thinking, structured output.

Blocks of a reply come in the order in which the model writes them: thinking, text, calls of tools. Thinking has an empty signature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pyengine.chat.reply.deltas import Delta
from pyengine.engine.answer import Answer
from pyengine.engine.loop import Handle
from pyengine.errors import PyEngineError
from pyengine.server import replies
from pyengine.server.fields import FieldError, Fields
from pyengine.server.models import Models, Served
from pyengine.server.streams import event, Script, SSE, Stream

_NOT_HERE = {"mcp_servers": "no servers of tools are asked from here; give the tools themselves", "container": "nothing is run here"}
_NAMES = {"format": "output_config.format.schema", "think": "thinking", "give false": "give the type disabled", "stop": "stop_sequences"}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
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
        handle = await replies.submit(lambda: served.submit(client, **wanted), _NAMES)
        if fields.flag("stream"):
            return Stream(_Events(handle, served, wanted["stop"]), [handle], SSE)
        await replies.finished(request, [handle])
        answer = handle.result(0)
        return JSONResponse({**_head(served), "content": _blocks(answer), **_end(handle, wanted["stop"]), "usage": _usage(handle)})

    async def count(request: Request) -> Response:
        fields = await replies.read(request)
        messages, tools = _messages(fields), _tools(fields)
        fields.refuse(_NOT_HERE)
        served = await replies.using(request, models, fields.text("model", None))
        return JSONResponse({"input_tokens": await replies.apart(lambda: served.count(messages, tools))})

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
    return [*([{"role": "system", "content": system}] if system else []), *(turn for i, m in enumerate(messages) for turn in _turns(m, f"messages[{i}]"))]


def _turns(message: Any, at: str) -> list[Any]:
    """Return a message in OpenAI's form: results of tools are messages of their own, before the rest of it."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return [message]
    rest, results, calls, thoughts = [], [], [], []
    for j, block in enumerate(message["content"]):
        fields = Fields(block if isinstance(block, dict) else {}, f"{at}.content[{j}].")
        kind = fields.values.get("type")
        if kind == "tool_use":
            calls.append({"id": fields.text("id"), "type": "function", "function": {"name": fields.text("name"), "arguments": fields.object("input")}})
        elif kind == "tool_result":
            said = fields.values.get("content")
            said = "" if said is None else said
            results.append({"role": "tool", "tool_call_id": fields.text("tool_use_id"), "content": said if said or not fields.flag("is_error") else "error"})
        elif kind == "thinking":
            thoughts.append(fields.text("thinking"))
        elif kind == "document":
            rest.append({"type": "text", "text": _document(fields)})
        elif kind != "redacted_thinking":
            rest.append(block)
    own: dict[str, Any] = {**message, "content": rest}
    if thoughts:
        own["reasoning_content"] = "\n".join(thoughts)
    if calls:
        own["tool_calls"] = calls
    return [*results, *([own] if rest or calls or thoughts else [])]


def _document(fields: Fields) -> str:
    """Return a document that is a text, below its title and what is said about it."""
    source = Fields(fields.object("source"), f"{fields.within}source.")
    if source.text("type") != "text":
        raise FieldError(f"{fields.within}source.type", "of documents only those of the type text are taken; give a PDF's pages as pictures")
    return "\n\n".join(t for t in (fields.text("title", ""), fields.text("context", ""), source.text("data")) if t)


def _tools(fields: Fields) -> list[dict[str, Any]] | None:
    """Return the tools in OpenAI's form."""
    made = []
    for i, tool in enumerate(fields.items("tools", [])):
        own = Fields(tool if isinstance(tool, dict) else {}, f"tools[{i}].")
        if own.text("type", "custom") != "custom":
            raise FieldError(f"tools[{i}].type", f"{own.text('type')!r} is run by Anthropic's servers or clients; only custom tools are taken")
        made.append({"type": "function", "function": {"name": own.text("name"), "description": own.text("description", ""),
                                                      "parameters": own.object("input_schema")}})
    return made or None


def _choice(fields: Fields) -> dict[str, Any]:
    """Return the choice among the tools, as `Model.chat` takes it."""
    if fields.values.get("tool_choice") is None:
        return {}
    choice = Fields(fields.object("tool_choice"), "tool_choice.")
    kind = choice.text("type")
    if kind != "tool" and kind not in _CHOICES:
        raise FieldError("tool_choice.type", f"must be one of {', '.join(_CHOICES)} or tool, got {kind!r}")
    return {"tool_choice": choice.text("name") if kind == "tool" else _CHOICES[kind],
            "parallel_tool_calls": not choice.flag("disable_parallel_tool_use")}


def _think(fields: Fields, config: Fields) -> Any:
    """Return what a request says of thinking, as `Model.chat` takes it."""
    thinking = Fields(fields.object("thinking", {}), "thinking.")
    kind = thinking.text("type", None)
    if kind not in (None, "enabled", "disabled", "adaptive"):
        raise FieldError("thinking.type", f"must be enabled, disabled or adaptive, got {kind!r}")
    if kind in (None, "disabled"):
        return None if kind is None else False
    effort = config.choice("effort", _EFFORTS, True)
    return thinking.whole("budget_tokens", None, 1) or effort


def _form(fields: Fields, config: Fields) -> dict[str, Any]:
    """Return the form of the content, as `Model.chat` takes it."""
    name, asked = next(((n, f) for n, f in (("output_config.format.", config.object("format", None)), ("output_format.", fields.object("output_format", None))) if f),
                       ("", None))
    if asked is None:
        return {}
    form = Fields(asked, name)
    if form.text("type") != "json_schema":
        raise FieldError(f"{name}type", "only json_schema is taken")
    return {"format": form.object("schema")}


def _wanted(fields: Fields) -> dict[str, Any]:
    """Return a request as `Served.submit` takes it."""
    fields.refuse(_NOT_HERE)
    config = Fields(fields.object("output_config", {}), "output_config.")
    return {"messages": _messages(fields), "max_tokens": fields.whole("max_tokens"), "stop": fields.stops("stop_sequences"),
            "tools": _tools(fields), **_choice(fields), "think": _think(fields, config), **_form(fields, config), **replies.sampling(fields)}


def _blocks(answer: Answer) -> list[dict[str, Any]]:
    """Return an answer as blocks."""
    thought = [{"type": "thinking", "thinking": answer.thinking, "signature": ""}] if answer.thinking else []
    calls = [{"type": "tool_use", "id": c.id, "name": c.name, "input": c.values()} for c in answer.tool_calls]
    return [*thought, *([{"type": "text", "text": str(answer)}] if answer or not calls else []), *calls]


def _head(served: Served) -> dict[str, Any]:
    return {"id": replies.fresh("msg_"), "type": "message", "role": "assistant", "model": served.name}


def _usage(handle: Handle) -> dict[str, int]:
    """Return tokens by Anthropic's names: those of the prompt that were found in the cache are counted apart."""
    r = handle.report
    return {"input_tokens": r.n_prompt - r.n_cached, "cache_read_input_tokens": r.n_cached, "cache_creation_input_tokens": 0,
            "output_tokens": len(r.tokens)}


def _end(handle: Handle, stops: Sequence[str] | None) -> dict[str, Any]:
    """Return why an answer ended; a stop text that the model's own files name is its own end."""
    r = handle.report
    asked = r.stopped_by if r.stopped_by in (stops or ()) else None
    reason = {"length": "max_tokens", "tool_calls": "tool_use"}.get(r.finish, "stop_sequence" if asked else "end_turn")
    return {"stop_reason": reason, "stop_sequence": asked}


class _Events(Script):
    """How a stream is written: a block for each run of pieces of one kind. What the prompt took is told at its end, when it is known."""

    def __init__(self, handle: Handle, served: Served, stops: Sequence[str] | None):
        self._handle, self._served, self._stops = handle, served, stops
        self._index, self._last = -1, ("", 0)                # the block that is open; what it is of

    def begin(self) -> str:
        """Return the message's head."""
        empty = {"input_tokens": 0, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 0, "output_tokens": 0}
        return _event("message_start", message={**_head(self._served), "content": [], "stop_reason": None, "stop_sequence": None, "usage": empty})

    def piece(self, i: int, delta: Delta) -> str:
        """Return a piece of a block; one of another kind ends the block before."""
        kind, opened = "call" if delta.kind == "arguments" else delta.kind, ""
        if (kind, delta.index) != self._last:
            opened = self._open(kind, delta.index, _begun(delta, self._handle))
        if delta.kind == "call":
            return opened
        name, field = _DELTAS[delta.kind]
        return opened + _event("content_block_delta", index=self._index, delta={"type": name, field: delta.text})

    def _open(self, kind: str, index: int, block: dict[str, Any]) -> str:
        closed = self._closed()
        self._index, self._last = self._index + 1, (kind, index)
        return closed + _event("content_block_start", index=self._index, content_block=block)

    def _closed(self) -> str:
        """Return the events that end a block, if there is one."""
        signed = {"type": "signature_delta", "signature": ""}
        before = _event("content_block_delta", index=self._index, delta=signed) if self._last[0] == "thinking" else ""
        return "" if self._index < 0 else before + _event("content_block_stop", index=self._index)

    def end(self) -> str:
        """Return how the answer ended; one without a text is an empty text."""
        opened = self._open("text", 0, {"type": "text", "text": ""}) if self._index < 0 else ""
        return opened + self._closed() + _event("message_delta", delta=_end(self._handle, self._stops), usage=_usage(self._handle)) + _event("message_stop")

    def fail(self, error: PyEngineError) -> str:
        """Return an error."""
        return event(failed(error, replies.status_of(error)), "error")


_DELTAS = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking"), "arguments": ("input_json_delta", "partial_json")}


def _begun(delta: Delta, handle: Handle) -> dict[str, Any]:
    """Return the block that a delta begins, empty."""
    if delta.kind == "call":
        call = handle.report.calls[delta.index]
        return {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
    return {"type": "text", "text": ""} if delta.kind == "text" else {"type": "thinking", "thinking": "", "signature": ""}


def _event(kind: str, **values: Any) -> str:
    return event({"type": kind, **values}, kind)
