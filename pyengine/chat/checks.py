"""What of a conversation no template can show: refused with the path of the field, before anything is rendered."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyengine.arguments import near_name
from pyengine.errors import RequestError, shown

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "model")
INSTEAD = ("tool_calls", "function_call", "reasoning_content", "thinking", "reasoning")      # what an assistant may say without a content
MAX_NESTING = 200                                  # of lists and mappings in messages and tools


def check_messages(messages: Sequence[Mapping[str, Any]], template: str) -> None:
    """Refuse an empty conversation, a role that neither people nor this template use, a turn without content, malformed tool calls.

    messages: their contents are texts or lists of parts already. template: its source; a role that it names in quotes is its own.
    """
    if not messages:
        raise RequestError("messages: there is none; a conversation has one at least")
    known = set(ROLES)
    for i, message in enumerate(messages):
        role, at = message["role"], f"messages[{i}]"
        if role not in known and not re.search(rf"""(["']){re.escape(role)}\1""", template):
            raise RequestError(f"{at}.role: {shown(role)} is no role{near_name(role, ROLES[:5])}")
        known.add(role)
        instead = INSTEAD if role in ("assistant", "model") else ()
        if message.get("content") is None and role in ROLES and not any(message.get(key) for key in instead):
            or_ = ", or tool_calls" if instead else ""
            raise RequestError(f"{at}.content: a message of the role {role!r} needs one, a text or a list of parts{or_}")
        for key in ("name", "tool_call_id"):
            if not isinstance(message.get(key), (str, type(None))):
                raise RequestError(f"{at}.{key}: a text, not {shown(message[key])}")
        calls = message.get("tool_calls")
        if calls is not None:
            _check_list(calls, f"{at}.tool_calls", "tool calls")
        for key, value in message.items():
            _check_plain(value, _below(at, key), {})


def check_tools(tools: Any) -> None:
    """Refuse tools that are no list of mappings of plain values, as JSON has them."""
    if tools is not None:
        _check_list(tools, "tools", "tools")
        _check_plain(tools, "tools", {})


def _check_list(values: Any, at: str, what: str) -> None:
    if not isinstance(values, (list, tuple)):
        raise RequestError(f"{at}: a list of {what}, not {type(values).__name__}")
    for j, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise RequestError(f"{at}[{j}]: a mapping, as JSON has them, not {type(value).__name__}")


def _check_plain(value: Any, at: str, seen: dict[int, Any], depth: int = 0) -> None:
    """Refuse what a template would show as the name of its type. Shared parts are looked at once."""
    if value is None or isinstance(value, (str, int, float, np.generic)) or id(value) in seen:
        return
    seen[id(value)] = value
    if depth > MAX_NESTING:
        raise RequestError(f"{at[:100]}...: nested deeper than {MAX_NESTING} lists and mappings")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_plain(inner, _below(at, key), seen, depth + 1)
    elif isinstance(value, (list, tuple)):
        for j, inner in enumerate(value):
            _check_plain(inner, f"{at}[{j}]", seen, depth + 1)
    else:
        raise RequestError(f"{at}: texts, numbers, lists and mappings are taken, as JSON has them, not {type(value).__name__}")


def _below(at: str, key: object) -> str:
    return f"{at}.{key}" if isinstance(key, str) else f"{at}[{shown(key)}]"
