"""What the deltas of a reply come to."""

from __future__ import annotations

from collections.abc import Iterable

from pyengine.chat.reply.deltas import Delta, new_call_id, ToolCall


def calls_of(deltas: Iterable[Delta]) -> list[ToolCall]:
    """Gather the calls of a whole reply, with new ids."""
    names: dict[int, str] = {}
    texts: dict[int, list[str]] = {}
    for kind, text, index in deltas:
        if kind == "call":
            names[index], texts[index] = text, []
        elif kind == "arguments":
            texts[index].append(text)
    return [ToolCall(new_call_id(), name, "".join(texts[index])) for index, name in names.items()]
