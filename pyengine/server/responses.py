"""OpenAI's Responses (platform.openai.com/docs/api-reference/responses): items in, items and typed events out.

What a response said is kept for `previous_response_id`, and its items for references to them, in memory, the newest `Kept.most` of them:
unless "store" is false, and until the server ends.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pyengine.chat.reply.deltas import Delta, ToolCall
from pyengine.engine.loop import Handle
from pyengine.errors import PyEngineError, RequestError, shown
from pyengine.files.gguf import quoted
from pyengine.server import replies
from pyengine.server.chat import chosen, EFFORTS
from pyengine.server.fields import FieldError, Fields
from pyengine.server.models import Models, Served
from pyengine.server.openai import failed, logprobs_of, MOST_LOGPROBS
from pyengine.server.streams import event, Script, SSE, Stream

_NOT_HERE = {"background": "answers are not computed in the background", "conversation": "give previous_response_id, or the whole input",
             "prompt": "there are no stored prompts"}
_NAMES = {"template_options": "chat_template_kwargs", "format": "text.format.schema", "think": "reasoning.effort", "give false": "give none"}
_LOGPROBS = "message.output_text.logprobs"   # of "include"


@dataclass(frozen=True)
class Turn:
    """A response that is kept: the conversation that it ended, its answer included; what was its own input; itself."""

    messages: list[Any]
    input: list[Any]
    response: dict[str, Any]

    @cached_property
    def nbytes(self) -> int:
        """The bytes that it takes, about."""
        return len(json.dumps(self.messages)) + len(json.dumps(self.input))


class Kept:
    """Conversations by the response that ended them: the newest ones, within a number and a size."""

    most, most_bytes = 1024, 64 << 20

    def __init__(self) -> None:
        self._held: OrderedDict[str, Turn] = OrderedDict()
        self._items: dict[str, dict[str, Any]] = {}          # of their outputs, by id
        self._nbytes = 0

    def put(self, name: str, turn: Turn) -> None:
        """Keep a turn; the oldest ones go for it."""
        if turn.nbytes > self.most_bytes:
            return
        self._held[name] = turn
        self._nbytes += turn.nbytes
        self._items.update({item["id"]: item for item in turn.response["output"]})
        while len(self._held) > self.most or self._nbytes > self.most_bytes:
            self.drop(next(iter(self._held)))

    def get(self, name: str) -> Turn:
        """Return a turn. Raises: replies.Missing."""
        if name not in self._held:
            raise replies.Missing(f"there is no response {quoted(name)}: it was never made, was not to be stored, or has gone for newer ones")
        return self._held[name]

    def item(self, name: str) -> dict[str, Any]:
        """Return an item of an output. Raises: replies.Missing."""
        if name not in self._items:
            raise replies.Missing(f"there is no item {quoted(name)}: its response was never made, was not to be stored, or has gone for newer ones")
        return self._items[name]

    def drop(self, name: str) -> None:
        """Forget a turn. Raises: replies.Missing."""
        turn = self.get(name)
        del self._held[name]
        self._nbytes -= turn.nbytes
        for item in turn.response["output"]:
            self._items.pop(item["id"], None)


def routes(models: Models) -> list[Route]:
    """Return the routes below /v1/responses."""
    kept = Kept()

    async def create(request: Request) -> Response:
        fields = await replies.read(request)
        served = await replies.using(request, models, fields.text("model", None))
        fields.refuse(_NOT_HERE)
        made = _Reply(served, fields, _conversation(fields, kept), kept)
        client, wanted = replies.client_of(request), _wanted(fields)
        handle = await replies.submit(lambda: served.submit(client, messages=made.asked, **wanted), _NAMES)
        if fields.flag("stream"):
            return Stream(_Events(made, handle), [handle], SSE)
        await replies.finished(request, [handle])
        return JSONResponse(made.whole(handle))

    async def counted(request: Request) -> Response:
        fields = await replies.read(request)
        served = await replies.using(request, models, fields.text("model", None))
        messages, tools = _told(fields, _conversation(fields, kept)), _tools(fields)[0]
        n = await replies.apart(lambda: served.count(messages, tools or None))
        return JSONResponse({"object": "response.input_tokens", "input_tokens": n})

    async def one(request: Request) -> Response:
        if request.query_params.get("stream") == "true":
            raise FieldError("stream", "a response that has ended is not streamed again")
        return JSONResponse(kept.get(request.path_params["name"]).response)

    async def items(request: Request) -> Response:
        return JSONResponse(_page(kept.get(request.path_params["name"]).input, request))

    async def cancel(request: Request) -> Response:
        kept.get(request.path_params["name"])
        raise RequestError("only responses that are computed in the background can be cancelled; close the connection of another one")

    async def drop(request: Request) -> Response:
        name = request.path_params["name"]
        kept.drop(name)
        return JSONResponse({"id": name, "object": "response", "deleted": True})

    def route(method: str, path: str, endpoint: Any) -> Route:
        return Route("/v1/responses" + path, replies.guarded(endpoint, failed), methods=[method])

    return [route("POST", "", create), route("POST", "/input_tokens", counted), route("GET", "/{name}", one), route("DELETE", "/{name}", drop),
            route("GET", "/{name}/input_items", items), route("POST", "/{name}/cancel", cancel)]


# -- what is asked --------------------------------------------------------------------------------------------------------


def _conversation(fields: Fields, kept: Kept) -> list[Any]:
    """Return the messages of the response before and of this request."""
    earlier = fields.text("previous_response_id", None)
    return [*(kept.get(earlier).messages if earlier else ()), *_messages(_input(fields), kept)]


def _told(fields: Fields, messages: list[Any]) -> list[Any]:
    """Return a conversation with what the request says before it."""
    told = fields.text("instructions", None)
    return [*([{"role": "system", "content": told}] if told else []), *messages]


def _input(fields: Fields) -> list[Any]:
    """Return the input as a list of items."""
    given = fields.values.get("input")
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    items = fields.items("input")
    if not items:
        raise FieldError("input", "is empty")
    return list(items)


def _page(items: list[Any], request: Request) -> dict[str, Any]:
    """Return a page of items of an input, the newest first unless it is asked otherwise."""
    query = request.query_params
    named = [{"id": f"item_{i}", "type": "message", **item, **_parts_of(item)} if isinstance(item, dict) else item for i, item in enumerate(items)]
    ordered = named if query.get("order") == "asc" else named[::-1]
    after = next((i + 1 for i, item in enumerate(ordered) if item["id"] == query.get("after")), 0)
    most = int(query.get("limit", "20")) if query.get("limit", "20").isdecimal() else 0
    if not 1 <= most <= 100:
        raise FieldError("limit", "must be a whole number from 1 to 100")
    page = ordered[after:after + most]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return {"object": "list", "data": page, "has_more": len(ordered) > after + most, **ends}


def _parts_of(item: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a message as parts, where it is a text."""
    text = item.get("content")
    return {"content": [{"type": "output_text" if item.get("role") == "assistant" else "input_text", "text": text}]} if isinstance(text, str) else {}


def _messages(items: list[Any], kept: Kept) -> list[Any]:
    """Return items as messages of a conversation; a reference is what it names."""
    out: list[Any] = []
    for i, item in enumerate(items):
        own = Fields(item if isinstance(item, dict) else {}, f"input[{i}].")
        kind = own.text("type", "message" if "role" in own.values or "id" not in own.values else "item_reference")
        if kind == "item_reference":
            own = Fields(kept.item(own.text("id")), f"input[{i}].")
            kind = own.text("type")
        if kind == "message":
            out.append({"role": own.text("role"), "content": own.values.get("content")})
        elif kind == "function_call":
            _assistant(out).setdefault("tool_calls", []).append(ToolCall(own.text("call_id"), own.text("name"), _object(own.text("arguments"))).as_dict())
        elif kind == "function_call_output":
            out.append({"role": "tool", "tool_call_id": own.text("call_id"), "content": own.values.get("output")})
        elif kind == "reasoning":
            parts = own.items("content", None) or own.items("summary", [])
            out.append({"role": "assistant", "content": "", "reasoning_content": "".join(p.get("text", "") for p in parts if isinstance(p, dict))})
        else:
            raise FieldError(f"input[{i}].type", f"{shown(kind)} is not taken; there are message, function_call, function_call_output, reasoning "
                             "and item_reference")
    return _joined(out)


def _object(arguments: str) -> str:
    """Return a call's arguments as templates take them: of a call that was cut off, what there is of them as a text in an object."""
    try:
        return arguments if isinstance(json.loads(arguments or "{}"), dict) else json.dumps({"written": arguments})
    except (ValueError, RecursionError):
        return json.dumps({"written": arguments})


def _sent_back(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message of the model as it can be part of a later prompt."""
    calls = [{**c, "function": {**c["function"], "arguments": _object(c["function"]["arguments"])}} for c in message.get("tool_calls", ())]
    return {**message, **({"tool_calls": calls} if calls else {})}


def _assistant(out: list[Any]) -> dict[str, Any]:
    """Return the last message if the model said it, or else a new one."""
    if not out or out[-1]["role"] != "assistant":
        out.append({"role": "assistant", "content": ""})
    return out[-1]


def _joined(messages: list[Any]) -> list[Any]:
    """Join what the model said in one turn: its thinking, then its text and calls."""
    out: list[Any] = []
    for message in messages:
        last = out[-1] if out else {}
        if message["role"] == "assistant" and set(last) == {"role", "content", "reasoning_content"} and last["content"] == "":
            out[-1] = {**last, **message}
        else:
            out.append(message)
    return out


def _wanted(fields: Fields) -> dict[str, Any]:
    """Return the settings of a request as `Served.submit` takes them."""
    if fields.text("truncation", "disabled") not in ("auto", "disabled"):
        raise FieldError("truncation", "must be auto or disabled")
    tools, choice = _tools(fields)
    effort = Fields(fields.object("reasoning", {}), "reasoning.").choice("effort", EFFORTS, None)
    given = {**replies.sampling(fields), **fields.given({"think": "think"})}
    if effort is not None:
        given.setdefault("think", effort)
    return {**given, **_form(fields), "max_tokens": fields.whole("max_output_tokens", None, 1), "tools": tools or None,
            **({} if choice is None else {"tool_choice": choice}), "parallel_tool_calls": fields.flag("parallel_tool_calls", True),
            "template_options": fields.object("chat_template_kwargs", None), "logprobs": fields.whole("top_logprobs", 0, 0, MOST_LOGPROBS)}


def _tools(fields: Fields) -> tuple[list[Any], Any]:
    """Return the tools in the form of chat completions, and the choice among them."""
    tools = []
    for i, tool in enumerate(fields.items("tools", [])):
        own = Fields(tool if isinstance(tool, dict) else {}, f"tools[{i}].")
        if own.text("type") != "function":
            raise FieldError(f"tools[{i}].type", f"{own.text('type')!r} is run by OpenAI's servers; only functions are taken")
        tools.append({"type": "function", "function": {"name": own.text("name"), "description": own.text("description", ""),
                                                       "parameters": own.object("parameters", {})}})
    return chosen(fields, tools, "tool_choice.")


def _form(fields: Fields) -> dict[str, Any]:
    """Return the form of the content, as `Model.chat` takes it."""
    form = Fields(Fields(fields.object("text", {}), "text.").object("format", {}), "text.format.")
    kind = form.text("type", "text")
    if kind == "json_schema":
        return {"format": form.object("schema")}
    if kind not in ("text", "json_object"):
        raise FieldError("text.format.type", f"must be text, json_object or json_schema, got {kind!r}")
    return {"format": "json"} if kind == "json_object" else {}


# -- what is answered -----------------------------------------------------------------------------------------------------


class _Reply:
    """One response on its way. head: its fields; names: ids of its items; scored: whether log-probabilities were asked for."""

    def __init__(self, served: Served, fields: Fields, messages: list[Any], kept: Kept):
        self._messages, self._kept, self._store = messages, kept, fields.flag("store", True)
        self.asked, self._input = _told(fields, messages), _input(fields)
        self._served, self.scored = served, _LOGPROBS in fields.items("include", [])
        values, told = fields.values, fields.text("instructions", None)
        self.head = {
            "id": "resp_" + secrets.token_hex(16), "object": "response", "created_at": int(time.time()), "error": None, "instructions": told,
            "max_output_tokens": values.get("max_output_tokens"), "model": served.name, "parallel_tool_calls": values.get("parallel_tool_calls", True),
            "previous_response_id": values.get("previous_response_id"), "reasoning": {"effort": None, "summary": None, **fields.object("reasoning", {})},
            "store": self._store, "temperature": values.get("temperature"), "text": values.get("text") or {"format": {"type": "text"}},
            "tool_choice": values.get("tool_choice") or "auto", "tools": values.get("tools") or [], "top_p": values.get("top_p"),
            "truncation": values.get("truncation") or "disabled", "top_logprobs": values.get("top_logprobs") or 0, "user": values.get("user"), "metadata": values.get("metadata") or {}}
        self.names = {kind: f"{kind}_" + secrets.token_hex(16) for kind in ("rs", "msg")}

    def whole(self, handle: Handle) -> dict[str, Any]:
        """Return the response once the answer has ended, and keep it."""
        answer, r = handle.result(0), handle.report
        cut = r.finish == "length"
        response = {**self.head, "status": "incomplete" if cut else "completed", "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
                    "output": [*([self.thought(answer.thinking)] if answer.thinking else []),
                               *([self.message(str(answer), self.logprobs(answer.sampled))] if answer or not answer.tool_calls else []),
                               *(_call(c, "incomplete" if cut and c is answer.tool_calls[-1] else "completed") for c in answer.tool_calls)],
                    "usage": {"input_tokens": r.n_prompt, "input_tokens_details": {"cached_tokens": r.n_cached, "cache_write_tokens": 0}, "output_tokens": len(r.tokens),
                              "output_tokens_details": {"reasoning_tokens": r.n_thinking}, "total_tokens": r.n_prompt + len(r.tokens)}}
        if self._store:
            self._kept.put(self.head["id"], Turn([*self._messages, _sent_back(answer.message)], self._input, response))
        return response

    def thought(self, text: str, status: str = "completed") -> dict[str, Any]:
        """Return an item of thinking."""
        content = [{"type": "reasoning_text", "text": text}] if text else []
        return {"id": self.names["rs"], "type": "reasoning", "summary": [], "content": content, "status": status}

    def logprobs(self, sampled: Sequence[Any]) -> list[dict[str, Any]]:
        """Return log-probabilities of tokens, where they were asked for."""
        return logprobs_of(self._served, sampled) if self.scored else []

    def message(self, text: str, logprobs: list[dict[str, Any]], status: str = "completed") -> dict[str, Any]:
        """Return an item of text."""
        content = [_text(text, logprobs)] if status == "completed" else []
        return {"id": self.names["msg"], "type": "message", "status": status, "role": "assistant", "content": content}


class _Events(Script):
    """How a stream is written: an item of the output for each run of pieces of one kind."""

    def __init__(self, reply: _Reply, handle: Handle):
        self._reply, self._handle = reply, handle
        self._untold = replies.Untold(handle, reply.scored)
        self._number = -1                                    # of the last event
        self._index, self._last, self._said = -1, ("", 0), list[str]()         # the item that is open, what it is of, and its text

    def _event(self, kind: str, **values: Any) -> str:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **values}, kind)

    def begin(self) -> str:
        """Return the response without its output."""
        self._begun = {**self._reply.head, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
        return self._event("response.created", response=self._begun) + self._event("response.in_progress", response=self._begun)

    def piece(self, i: int, delta: Delta) -> str:
        """Return a piece of an item; one of another kind ends the item before."""
        kind = "call" if delta.kind == "arguments" else delta.kind
        opened = "" if (kind, delta.index) == self._last else self._open(kind, delta.index)
        if delta.kind == "call":
            return opened
        self._said.append(delta.text)
        return opened + self._more(delta)

    def _open(self, kind: str, number: int) -> str:
        """End an item and begin one."""
        ended, reply = self._ended(), self._reply
        self._index, self._last, self._said = self._index + 1, (kind, number), []
        item = (reply.thought("", "in_progress") if kind == "thinking" else reply.message("", [], "in_progress") if kind == "text"
                else {**_call(self._handle.report.calls[number], "in_progress"), "arguments": ""})
        opened = ended + self._event("response.output_item.added", output_index=self._index, item=item)
        if kind != "text":
            return opened
        return opened + self._event("response.content_part.added", item_id=item["id"], output_index=self._index, content_index=0, part=_text("", []))

    def _more(self, delta: Delta) -> str:
        if delta.kind == "arguments":
            return self._event("response.function_call_arguments.delta", item_id=_item_id(self._handle.report.calls[delta.index]), output_index=self._index,
                               delta=delta.text)
        thinks = delta.kind == "thinking"
        more = {} if thinks else {"logprobs": self._reply.logprobs(self._untold.take())}
        return self._event(f"response.{'reasoning_text' if thinks else 'output_text'}.delta", item_id=self._reply.names["rs" if thinks else "msg"],
                           output_index=self._index, content_index=0, delta=delta.text, **more)

    def _ended(self) -> str:
        """End an item of the output, if there is one."""
        (kind, number), said, reply = self._last, "".join(self._said), self._reply
        if kind == "text":
            at: dict[str, Any] = {"item_id": reply.names["msg"], "output_index": self._index, "content_index": 0}
            scores = reply.logprobs(self._handle.report.sampled)
            item = reply.message(said, scores)
            done = self._event("response.output_text.done", **at, text=said, logprobs=scores)
            done += self._event("response.content_part.done", **at, part=_text(said, scores))
        elif kind == "thinking":
            item = reply.thought(said)
            done = self._event("response.reasoning_text.done", item_id=item["id"], output_index=self._index, content_index=0, text=said)
        elif kind == "call":
            item = _call(self._handle.report.calls[number])
            done = self._event("response.function_call_arguments.done", item_id=item["id"], output_index=self._index, name=item["name"],
                               arguments=item["arguments"])
        else:
            return ""
        return done + self._event("response.output_item.done", output_index=self._index, item=item)

    def end(self) -> str:
        """Return the whole response; an answer without a text is an empty one."""
        opened = self._open("text", 0) if self._index < 0 else ""
        ended = opened + self._ended()
        response = self._reply.whole(self._handle)
        return ended + self._event(f"response.{response['status']}", response=response)

    def fail(self, error: PyEngineError) -> str:
        """Return the response as it failed."""
        said = failed(error, replies.status_of(error))["error"]
        return self._event("response.failed", response={**self._begun, "status": "failed", "error": {"code": "server_error", "message": said["message"]}})


def _text(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _item_id(call: ToolCall) -> str:
    return "fc_" + call.id


def _call(call: ToolCall, status: str = "completed") -> dict[str, Any]:
    return {"id": _item_id(call), "type": "function_call", "call_id": call.id, "name": call.name, "arguments": call.arguments, "status": status}
