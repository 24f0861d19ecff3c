"""OpenAI's chat completions (platform.openai.com/docs/api-reference/chat): tools, thinking, structured output, pictures, choices.

Beside OpenAI's fields: `think` (true, false, a number of tokens, or "low", "medium", "high"), llama.cpp's `grammar` and `json_schema`,
`regex`, `chat_template_kwargs`; and in answers DeepSeek's `reasoning_content`, and `boxes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pyengine.chat.reply.deltas import Delta
from pyengine.engine.loop import Handle
from pyengine.errors import shown
from pyengine.server import replies
from pyengine.server.fields import FieldError, Fields
from pyengine.server.models import Models
from pyengine.server.openai import failed, Interface, MOST_LOGPROBS
from pyengine.server.streams import quoted

_NAMES = {"template_options": "chat_template_kwargs", "format": "response_format.json_schema.schema", "think": "reasoning_effort",
          replies.OFF: "give none"}
EFFORTS = {"none": False, "minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}


def routes(models: Models) -> list[Route]:
    """Return the route of chat completions."""
    async def chat(request: Request) -> Response:
        return await _Chat(models).reply(request)

    return [Route("/v1/chat/completions", replies.guarded(chat, failed), methods=["POST"])]


def think_of(fields: Fields) -> Any:
    """Return what a request says of thinking, as `Model.chat` takes it; None if it says nothing."""
    if not fields.any_of("reasoning_effort", "think"):
        return None
    effort, think = fields.choice("reasoning_effort", EFFORTS, None), fields.values.get("think")
    return effort if think is None else think


def form_of(fields: Fields) -> dict[str, Any]:
    """Return the form that the content must have, as `Model.chat` takes it."""
    if not fields.any_of("response_format", "json_schema", "grammar", "regex"):
        return {}
    asked = Fields(fields.object("response_format", {}), "response_format.")
    kind = asked.text("type", "text")
    given: dict[str, Any] = {}
    if kind == "json_schema":
        given["format"] = _schema(Fields(asked.object("json_schema"), "response_format.json_schema."), "schema")
    elif kind == "json_object":                              # with a schema in llama.cpp's form
        given["format"] = asked.values.get("schema") or "json"
    elif kind != "text":
        raise FieldError("response_format.type", f"must be text, json_object or json_schema, got {kind!r}")
    if fields.values.get("json_schema") is not None:
        given["format"] = fields.values["json_schema"]
    return {**given, **fields.given({"grammar": "grammar", "regex": "regex"})}


def _schema(fields: Fields, name: str) -> Any:
    return fields.object(name) if isinstance(fields.values.get(name), dict) or name not in fields.values else fields.flag(name)


def tools_of(fields: Fields) -> dict[str, Any]:
    """Return the tools of a request and the choice among them, as `Model.chat` takes them."""
    if not fields.any_of("tools", "tool_choice", "parallel_tool_calls"):
        return {}
    tools = fields.items("tools", None)
    tools, choice = chosen(fields, tools or [], "tool_choice.allowed_tools.")
    return {"tools": tools or None, **({} if choice is None else {"tool_choice": choice}),
            "parallel_tool_calls": fields.flag("parallel_tool_calls", True)}


def chosen(fields: Fields, tools: Sequence[Any], within: str) -> tuple[list[Any], Any]:
    """Return the tools, those that may be called where the choice names some, and the choice. within: where it names them."""
    choice = fields.values.get("tool_choice")
    kind = choice.get("type") if isinstance(choice, dict) else "function"
    if kind == "allowed_tools":
        asked = Fields(choice if within == "tool_choice." else Fields(choice, "tool_choice.").object("allowed_tools"), within)
        allowed = [(t.get("function") or t).get("name") if isinstance(t, dict) else None for t in asked.items("tools")]
        known = {name_of(t): t for t in tools}
        for i, name in enumerate(allowed):
            if name not in known:
                raise FieldError(f"{within}tools[{i}]", f"{shown(name)} is no tool of this request")
        return [known[name] for name in allowed], asked.text("mode")
    if kind != "function":
        raise FieldError("tool_choice.type", f"only function and allowed_tools are taken, got {shown(kind)}")
    return list(tools), choice


def name_of(tool: Any) -> Any:
    """Return the name of a tool in OpenAI's form, where it has one."""
    function = tool.get("function") if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


class _Chat(Interface):
    object, chunk, prefix, limits = "chat.completion", "chat.completion.chunk", "chatcmpl-", ("max_completion_tokens", "max_tokens")
    names = _NAMES
    _most: int | None = None         # until the model ends

    def _prompts(self, fields: Fields) -> list[dict[str, Any]]:
        if any(m != "text" for m in fields.items("modalities", [])):
            raise FieldError("modalities", "only text comes out of the models here")
        messages = fields.items("messages")
        if fields.values.get("json_schema") is not None:
            self.names = {**self.names, "format": "json_schema"}
        elif isinstance(of := fields.values.get("response_format"), dict) and of.get("type") == "json_object":
            self.names = {**self.names, "format": "response_format.schema"}
        if fields.values.get("think") is not None:
            self.names = {ours: theirs for ours, theirs in self.names.items() if ours not in ("think", replies.OFF)}
        if not messages:
            raise FieldError("messages", "is empty")
        return [{"messages": messages, "template_options": fields.object("chat_template_kwargs", None), "think": think_of(fields),
                 **tools_of(fields), **form_of(fields)}]

    def _n_top(self, fields: Fields) -> int:
        self.with_logprobs = fields.flag("logprobs")
        top = fields.whole("top_logprobs", 0, 0, MOST_LOGPROBS)
        if top and not self.with_logprobs:
            raise FieldError("top_logprobs", "needs logprobs: true")
        return top

    def _choice(self, i: int, handle: Handle) -> dict[str, Any]:
        answer = handle.result(0)
        message = {**answer.message, "refusal": None, **self._media(handle)}
        if answer.tool_calls and not answer:
            message["content"] = None
        return {"index": i, "message": message, "logprobs": {"content": self._logprobs(answer.sampled)} if self.with_logprobs else None,
                "finish_reason": answer.finish}

    def _media(self, handle: Handle) -> Mapping[str, Any]:
        """Return boxes and polygons that the answer names, in pixels of the picture that was sent: an addition to OpenAI's form."""
        marks = handle.result(0).marks_in(-1) if handle.report.media else []
        if not marks:
            return {}
        from pyengine.chat.boxes import Polygon                                 # Pillow takes 20 ms to import

        found: dict[str, list[Any]] = {}
        for mark in marks:
            found.setdefault("polygons" if isinstance(mark, Polygon) else "boxes", []).append(vars(mark))
        return found

    def text(self, i: int, text: str) -> str:
        """Return a chunk with a text of choice i, laid out here where there is no more in it."""
        if self.with_logprobs:
            return super().text(i, text)
        role, self.begun[i] = "" if self.begun[i] else '"role": "assistant", ', True
        return f'{self._opening}{{"index": {i}, "delta": {{{role}"content": {quoted(text)}}}, "finish_reason": null, "logprobs": null}}]}}\n\n'

    def _piece(self, i: int, delta: Delta, first: bool) -> dict[str, Any]:
        said = {**({"role": "assistant"} if first else {}), **self._said(i, delta)}
        scores = {"content": self._logprobs(self.untold[i].take())} if self.with_logprobs else None
        return {"index": i, "delta": said, "finish_reason": None, "logprobs": scores}

    def _said(self, i: int, delta: Delta) -> dict[str, Any]:
        if delta.kind == "text":
            return {"content": delta.text}
        if delta.kind == "thinking":
            return {"reasoning_content": delta.text}
        if delta.kind == "arguments":
            return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}
        call = self.handles[i].report.calls[delta.index]
        return {"tool_calls": [{"index": delta.index, "id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}}]}

    def _end(self, i: int, handle: Handle) -> dict[str, Any]:
        left = self.untold[i].take()                         # of tokens that no piece came for
        return {"index": i, "delta": dict(self._media(handle)), "logprobs": {"content": self._logprobs(left)} if left else None,
                "finish_reason": handle.report.finish}
