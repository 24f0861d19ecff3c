"""OpenAI's Responses (platform.openai.com/docs/api-reference/responses): items in, items and typed events out.

What a response said is kept for `previous_response_id` in memory, the newest `Kept.most` of them: unless "store" is false, and until
the server ends.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pyengine.chat.reply.deltas import Delta, ToolCall
from pyengine.engine.loop import Handle
from pyengine.errors import PyEngineError
from pyengine.server import replies
from pyengine.server.chat import EFFORTS
from pyengine.server.fields import FieldError, Fields
from pyengine.server.models import Models, Served
from pyengine.server.openai import failed

_NOT_HERE = {"background": "answers are not computed in the background", "conversation": "give previous_response_id, or the whole input",
             "prompt": "there are no stored prompts", "max_tool_calls": "there are no tools that the server runs"}
_SETTINGS = {name: name for name in (*replies.SAMPLING, "think")}


class Kept:
    """Conversations by the response that ended them: the newest ones, within a number and a size."""

    most, most_bytes = 1024, 64 << 20

    def __init__(self) -> None:
        self._held: OrderedDict[str, tuple[list[Any], dict[str, Any], int]] = OrderedDict()
        self._nbytes = 0

    def put(self, name: str, messages: list[Any], response: dict[str, Any]) -> None:
        """Keep a conversation, its last answer included; the oldest ones go for it."""
        nbytes = len(json.dumps(messages))
        if nbytes > self.most_bytes:
            return
        self._held[name] = messages, response, nbytes
        self._nbytes += nbytes
        while len(self._held) > self.most or self._nbytes > self.most_bytes:
            self._nbytes -= self._held.popitem(last=False)[1][2]

    def get(self, name: str) -> tuple[list[Any], dict[str, Any]]:
        """Return a conversation and the response. Raises: replies.Missing."""
        if name not in self._held:
            raise replies.Missing(f"there is no response {name!r}: it was never made, was not to be stored, or has gone for newer ones")
        return self._held[name][:2]

    def drop(self, name: str) -> None:
        """Forget one. Raises: replies.Missing."""
        self.get(name)
        self._nbytes -= self._held.pop(name)[2]


def routes(models: Models) -> list[Route]:
    """Return the routes below /v1/responses."""
    kept = Kept()

    async def create(request: Request) -> Response:
        fields = await replies.read(request)
        served = await replies.using(request, models, fields.text("model", None))
        fields.refuse(_NOT_HERE)
        earlier = fields.text("previous_response_id", None)
        messages = [*(kept.get(earlier)[0] if earlier else ()), *_messages(fields)]
        made = _Reply(served, fields, messages, kept)
        client, wanted = replies.client_of(request), _wanted(fields)
        handle = await replies.submit(lambda: served.submit(client, messages=made.asked, **wanted))
        if fields.flag("stream"):
            return replies.streaming(made.events(handle), [handle], "text/event-stream")
        await replies.finished(request, [handle])
        return JSONResponse(made.whole(handle))

    async def one(request: Request) -> Response:
        return JSONResponse(kept.get(request.path_params["name"])[1])

    async def drop(request: Request) -> Response:
        name = request.path_params["name"]
        kept.drop(name)
        return JSONResponse({"id": name, "object": "response", "deleted": True})

    return [Route("/v1/responses", replies.guarded(create, failed), methods=["POST"]),
            Route("/v1/responses/{name}", replies.guarded(one, failed), methods=["GET"]),
            Route("/v1/responses/{name}", replies.guarded(drop, failed), methods=["DELETE"])]


# -- what is asked --------------------------------------------------------------------------------------------------------


def _messages(fields: Fields) -> list[Any]:
    """Return the input as messages of a conversation."""
    given = fields.values.get("input")
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    items = fields.items("input")
    if not items:
        raise FieldError("input", "is empty")
    out: list[Any] = []
    for i, item in enumerate(items):
        own = Fields(item if isinstance(item, dict) else {}, f"input[{i}].")
        kind = own.text("type", "message")
        if kind == "message":
            out.append({"role": own.text("role"), "content": own.values.get("content")})
        elif kind == "function_call":
            _assistant(out).setdefault("tool_calls", []).append(ToolCall(own.text("call_id"), own.text("name"), own.text("arguments")).as_dict())
        elif kind == "function_call_output":
            out.append({"role": "tool", "tool_call_id": own.text("call_id"), "content": own.values.get("output")})
        elif kind == "reasoning":
            parts = own.items("content", None) or own.items("summary", [])
            out.append({"role": "assistant", "content": "", "reasoning_content": "".join(p.get("text", "") for p in parts if isinstance(p, dict))})
        else:
            raise FieldError(f"input[{i}].type", f"{kind!r} is not taken; there are message, function_call, function_call_output and reasoning")
    return _joined(out)


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
    if fields.text("truncation", "disabled") != "disabled":
        raise FieldError("truncation", "nothing is left out of a conversation here: only disabled is taken")
    choice = fields.values.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") != "function":
        raise FieldError("tool_choice.type", f"only function is taken, got {choice.get('type')!r}")
    tools = []
    for i, tool in enumerate(fields.items("tools", [])):
        own = Fields(tool if isinstance(tool, dict) else {}, f"tools[{i}].")
        if own.text("type") != "function":
            raise FieldError(f"tools[{i}].type", f"{own.text('type')!r} is run by OpenAI's servers; only functions are taken")
        tools.append({"type": "function", "function": {"name": own.text("name"), "description": own.text("description", ""),
                                                       "parameters": own.object("parameters", {})}})
    effort = Fields(fields.object("reasoning", {}), "reasoning.").text("effort", None)
    if effort is not None and effort not in EFFORTS:
        raise FieldError("reasoning.effort", f"must be one of {', '.join(EFFORTS)}, got {effort!r}")
    given = fields.given(_SETTINGS)
    if effort is not None:
        given.setdefault("think", EFFORTS[effort])
    return {**given, **_form(fields), "max_tokens": fields.whole("max_output_tokens", None, 1), "tools": tools or None,
            **({} if choice is None else {"tool_choice": choice}), "parallel_tool_calls": fields.flag("parallel_tool_calls", True),
            "template_options": fields.object("chat_template_kwargs", None)}


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
    """One response on its way."""

    def __init__(self, served: Served, fields: Fields, messages: list[Any], kept: Kept):
        self._messages, self._kept, self._store = messages, kept, fields.flag("store", True)
        told = fields.text("instructions", None)
        self.asked = [*([{"role": "system", "content": told}] if told else []), *messages]
        values = fields.values
        self._head = {
            "id": "resp_" + secrets.token_hex(16), "object": "response", "created_at": int(time.time()), "error": None, "instructions": told,
            "max_output_tokens": values.get("max_output_tokens"), "model": served.name, "parallel_tool_calls": values.get("parallel_tool_calls", True),
            "previous_response_id": values.get("previous_response_id"), "reasoning": {"effort": None, "summary": None, **fields.object("reasoning", {})},
            "store": self._store, "temperature": values.get("temperature"), "text": values.get("text") or {"format": {"type": "text"}},
            "tool_choice": values.get("tool_choice") or "auto", "tools": values.get("tools") or [], "top_p": values.get("top_p"),
            "truncation": "disabled", "user": values.get("user"), "metadata": values.get("metadata") or {}}
        self._names = {kind: f"{kind}_" + secrets.token_hex(16) for kind in ("rs", "msg")}
        self._number = -1

    def whole(self, handle: Handle) -> dict[str, Any]:
        """Return the response once the answer has ended, and keep it."""
        answer, r = handle.result(0), handle.report
        cut = r.finish == "length"
        response = {**self._head, "status": "incomplete" if cut else "completed", "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
                    "output": [*([self._thought(answer.thinking)] if answer.thinking else []),
                               *([self._message(str(answer))] if answer or not answer.tool_calls else []),
                               *(_call(c, "incomplete" if cut and c is answer.tool_calls[-1] else "completed") for c in answer.tool_calls)],
                    "usage": {"input_tokens": r.n_prompt, "input_tokens_details": {"cached_tokens": r.n_cached}, "output_tokens": len(r.tokens),
                              "output_tokens_details": {"reasoning_tokens": r.n_thinking}, "total_tokens": r.n_prompt + len(r.tokens)}}
        if self._store:
            self._kept.put(self._head["id"], [*self._messages, answer.message], response)
        return response

    def _thought(self, text: str, status: str = "completed") -> dict[str, Any]:
        content = [{"type": "reasoning_text", "text": text}] if text else []
        return {"id": self._names["rs"], "type": "reasoning", "summary": [], "content": content, "status": status}

    def _message(self, text: str, status: str = "completed") -> dict[str, Any]:
        content = [_text(text)] if status == "completed" else []
        return {"id": self._names["msg"], "type": "message", "status": status, "role": "assistant", "content": content}

    def _event(self, kind: str, **values: Any) -> str:
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps({'type': kind, 'sequence_number': self._number, **values}, ensure_ascii=False)}\n\n"

    async def events(self, handle: Handle) -> AsyncIterator[str]:
        """Write the events of a stream."""
        begun = {**self._head, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        index, last, said = -1, ("", 0), ""
        try:
            async for delta in handle.deltas():
                kind = "call" if delta.kind == "arguments" else delta.kind
                if (kind, delta.index) != last:
                    for event in self._ended(index, last, said, handle):
                        yield event
                    index, last, said = index + 1, (kind, delta.index), ""
                    for event in self._opened(index, kind, delta, handle):
                        yield event
                if delta.kind != "call":
                    said += delta.text
                    yield self._more(index, delta, handle)
            if index < 0:                                    # an answer without a text is an empty one
                index, last = 0, ("text", 0)
                for event in self._opened(0, "text", Delta("text", ""), handle):
                    yield event
            for event in self._ended(index, last, said, handle):
                yield event
            response = self.whole(handle)
            yield self._event(f"response.{response['status']}", response=response)
        except PyEngineError as error:
            said = failed(error, replies.status_of(error))["error"]
            yield self._event("response.failed", response={**begun, "status": "failed", "error": {"code": "server_error", "message": said["message"]}})

    def _opened(self, index: int, kind: str, delta: Delta, handle: Handle) -> Iterator[str]:
        """Begin an item of the output."""
        item = (self._thought("", "in_progress") if kind == "thinking" else self._message("", "in_progress") if kind == "text"
                else {**_call(handle.report.calls[delta.index], "in_progress"), "arguments": ""})
        yield self._event("response.output_item.added", output_index=index, item=item)
        if kind == "text":
            yield self._event("response.content_part.added", item_id=item["id"], output_index=index, content_index=0, part=_text(""))

    def _more(self, index: int, delta: Delta, handle: Handle) -> str:
        if delta.kind == "arguments":
            return self._event("response.function_call_arguments.delta", item_id=_item_id(handle.report.calls[delta.index]), output_index=index, delta=delta.text)
        name, kind, more = ("msg", "output_text", {"logprobs": []}) if delta.kind == "text" else ("rs", "reasoning_text", {})
        return self._event(f"response.{kind}.delta", item_id=self._names[name], output_index=index, content_index=0, delta=delta.text, **more)

    def _ended(self, index: int, last: tuple[str, int], said: str, handle: Handle) -> Iterator[str]:
        """End an item of the output, if there is one."""
        kind, number = last
        if kind == "text":
            at: dict[str, Any] = {"item_id": self._names["msg"], "output_index": index, "content_index": 0}
            yield self._event("response.output_text.done", **at, text=said, logprobs=[])
            yield self._event("response.content_part.done", **at, part=_text(said))
            item = self._message(said)
        elif kind == "thinking":
            yield self._event("response.reasoning_text.done", item_id=self._names["rs"], output_index=index, content_index=0, text=said)
            item = self._thought(said)
        elif kind == "call":
            item = _call(handle.report.calls[number])
            yield self._event("response.function_call_arguments.done", item_id=item["id"], output_index=index, name=item["name"],
                              arguments=item["arguments"])
        else:
            return
        yield self._event("response.output_item.done", output_index=index, item=item)


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _item_id(call: ToolCall) -> str:
    return "fc_" + call.id


def _call(call: ToolCall, status: str = "completed") -> dict[str, Any]:
    return {"id": _item_id(call), "type": "function_call", "call_id": call.id, "name": call.name, "arguments": call.arguments, "status": status}
