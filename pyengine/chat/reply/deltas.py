"""What a reply consists of: deltas as they come, tool calls when they are whole, and the contract of those who read replies."""

from __future__ import annotations

import json
import string
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from pyengine.records import dataclass, NamedTuple

_LETTERS = string.ascii_letters + string.digits


class Delta(NamedTuple):
    """A piece of a reply: `text`, `thinking`, a `call` (the function's name, complete), or more of its `arguments`."""

    kind: str
    text: str
    index: int = 0                      # of `call` and `arguments`: which call of the reply, from 0; they come one after the other


@dataclass(frozen=True)
class ToolCall:
    """A call that the model made; `arguments` is the JSON text of an object."""

    id: str
    name: str
    arguments: str

    def values(self) -> Any:
        """Return the arguments as an object; of a call that was cut off, none."""
        try:
            return json.loads(self.arguments)
        except ValueError:
            return {}

    def as_dict(self) -> dict[str, Any]:
        """Give the call in OpenAI's form."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def new_call_id() -> str:
    """Make the id of a call: nine random letters and digits, which is what Mistral's templates demand."""
    import secrets                                           # most answers call nothing

    return "".join(secrets.choice(_LETTERS) for _ in range(9))


def joined(deltas: Iterable[Delta]) -> list[Delta]:
    """Join neighbours of the same kind and call; empty ones fall away, but for the arguments' and texts' order nothing changes."""
    groups: list[tuple[str, int, list[str]]] = []
    for kind, text, index in deltas:
        if not text:
            continue
        if groups and kind != "call" and groups[-1][:2] == (kind, index):
            groups[-1][2].append(text)
        else:
            groups.append((kind, index, [text]))
    return [Delta(kind, "".join(texts), index) for kind, index, texts in groups]


class Reader(ABC):
    """A reader of one reply.

    `state` is "start" (nothing but blanks yet, or headers), "thinking", "text" or "call"; in state "call", `begun` is the offset of the first
    character of the call's opening mark in all the text that was pushed, and `bare` says whether it is one that opens calls only where a
    text could begin.
    """

    state: str = "start"
    begun: int = 0
    bare: bool = False

    @abstractmethod
    def push(self, text: str) -> list[Delta]:
        """Read on: give what can be told."""

    @abstractmethod
    def flush(self) -> list[Delta]:
        """End the reply: give what was held back."""
