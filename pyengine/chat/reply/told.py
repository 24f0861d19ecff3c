"""Tools told in words, for templates that cannot show them: a system text with their schemas, and earlier calls and results as texts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pyengine.chat.reply.calls import Calls
from pyengine.chat.reply.tools import Tool
from pyengine.errors import RequestError, shown

Message = dict[str, Any]
_NO_SYSTEM = re.compile(r"[Ss]ystem role (is )?not supported")           # Gemma 1 and 2, and first templates of Mistral

_TEXT = """You can call functions. Here they are, each with the JSON schema of its arguments:

{tools}

To call functions, answer with the calls alone, without any other text, in exactly this form:
{form}
Call a function only where it helps; otherwise answer in words."""


def told_tools(messages: Sequence[Message], tools: Sequence[Tool], calls: Calls, source: str) -> list[Message]:
    """Give the conversation with a text that tells of tools: in its system message, or where the template takes none, in its first."""
    form = calls.write([("name_of_function", {"name_of_argument": "value"})])
    listed = "\n".join(json.dumps(tool.as_dict()["function"], ensure_ascii=False) for tool in tools)
    text = _TEXT.format(tools=listed, form=form)
    first, rest = (messages[0], list(messages[1:])) if messages else ({"role": "system", "content": ""}, [])
    takes = not _NO_SYSTEM.search(source)
    if first.get("role") in ("system", "developer"):
        return [{**first, "content": _added(first.get("content"), text)}, *rest]
    if takes:
        return [{"role": "system", "content": text}, *messages]
    return [{**first, "content": _added(text, first.get("content"))}, *rest]


def told_turns(messages: Sequence[Message], calls: Calls) -> list[Message]:
    """Give a conversation whose calls and results are texts: results stand in the user's turns, of which no two follow each other."""
    given: list[Message] = []
    names: dict[Any, str] = {}
    answering = False
    for message in messages:
        made, role = message.get("tool_calls"), message.get("role")
        if made:
            written = [_written(call, names) for call in made]
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            given.append({**rest, "content": _added(message.get("content"), calls.write(written))})
        elif role == "tool" and not calls.shows_results:
            name = message.get("name") or names.get(message.get("tool_call_id"), "the function")
            told = _added(f"Result of {name}:", message.get("content"), "\n")
            if answering:
                given[-1] = {"role": "user", "content": _added(given[-1]["content"], told)}
            else:
                given.append({"role": "user", "content": told})
        elif role == "user" and answering:
            given[-1] = {**message, "content": _added(given[-1]["content"], message.get("content"))}
        else:
            given.append(message)
        answering = role == "tool" and not calls.shows_results
    return given


def _written(call: Any, names: dict[Any, str]) -> tuple[str, Mapping[str, Any]]:
    """Return a call's name and arguments, and remember whose id it has."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(f"tool_calls: each has a function with a name, not {shown(call)}")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the arguments of a tool call are not JSON: {error}") from None
    if not isinstance(arguments, Mapping):
        raise RequestError(f"the arguments of a tool call are an object, not {shown(arguments)}")
    if isinstance(call.get("id"), str):
        names[call["id"]] = function["name"]
    return function["name"], arguments


def _added(content: Any, more: Any, between: str = "\n\n") -> Any:
    """Return the contents of two messages as one: texts joined, parts in their order."""
    if not content or not more:
        return content or more or ""
    if isinstance(content, str) and isinstance(more, str):
        return content + between + more
    parts = [*_parts(content), *_parts(more)]
    return parts


def _parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
