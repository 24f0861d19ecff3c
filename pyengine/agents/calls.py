"""An answer's text and the calls in it."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


class Call(NamedTuple):
    """A function's name and its arguments, JSON text; name "": the arguments are all that was written, and no call."""

    name: str
    arguments: str


def read_answer(answer: str) -> tuple[str, list[Call]]:
    """Return what an answer says beside its calls, and the calls, in the Hermes form: <tool_call>{"name": .., "arguments": {..}}</tool_call>."""
    return _CALL.sub("", answer).strip(), [_call(text) for text in _CALL.findall(answer)]


def _call(text: str) -> Call:
    try:
        value = json.loads(text)
        if isinstance(value["name"], str) and isinstance(value["arguments"], dict):
            return Call(value["name"], json.dumps(value["arguments"], ensure_ascii=False))
    except (ValueError, TypeError, KeyError, RecursionError):
        pass                                                 # said by the name that is missing
    return Call("", text.strip())
