"""A conversation's messages as the notes of a session file: texts as they are, pictures by their files and digests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyengine.cli.answer import media_of, Messages
from pyengine.cli.pictures import open_picture
from pyengine.errors import ImageError, RequestError, SessionError

FORMAT = "pyengine-run talk 1"


@dataclass(frozen=True)
class Talk:
    """What a chat is besides its settings; raw and system as there. `model`: the name of the one that it is with."""

    turns: Messages
    system: str | None
    raw: bool
    model: str = ""


def pack(talk: Talk) -> bytes:
    """Write a conversation. Raises: RequestError for a picture that has no file to be found in again."""
    for part in media_of(talk.turns):
        if part["path"] is None:
            raise RequestError(f"{part['name']}: a picture without a file of its own could not be shown again; save it as a file first")
    turns = [{**turn, "content": turn["content"] if isinstance(turn["content"], str) else [_packed(part) for part in turn["content"]]}
             for turn in talk.turns]
    return json.dumps({"format": FORMAT, "model": talk.model, "raw": talk.raw, "system": talk.system,
                       "turns": turns}).encode()


def _packed(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return part
    media = part[part["type"]]
    options = {**media.options, "fps": media.fps} if part["type"] == "video" else dict(media.options)
    return {"type": part["type"], "path": part["path"], "options": options, "digest": media.digest.hex()}


def unpack(path: Path, notes: bytes) -> Talk:
    """Read a conversation that `pack` wrote, and its pictures from their files.

    Raises: SessionError for notes that are none of these; RequestError naming a picture that is gone or has changed.
    """
    if not notes:
        raise SessionError(f"{path}: holds a conversation's cache without its messages: only Model.restore reads it")
    try:
        found = json.loads(notes)
        if found["format"] != FORMAT:
            raise ValueError(found["format"])
        turns = [{"role": _one_of(turn["role"], "user", "assistant", "tool"), "content": _content(turn["content"]), **_besides(turn)}
                 for turn in found["turns"]]
        talk = Talk(turns, None if found["system"] is None else _text(found["system"]), _one_of(found["raw"], True, False),
                    _text(found.get("model", "")))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SessionError(f"{path}: its messages are not written as `/save` writes them") from None
    for part in media_of(turns):
        _open(path, part)
    return talk


def is_saved(path: Path) -> bool:
    """Say whether a file is a saved conversation, by its first bytes."""
    from pyengine.cache.sessions import MAGIC, SUM

    try:
        if not path.is_file():                           # a pipe could wait for ever
            return False
        with open(path, "rb") as file:
            return file.read(SUM + len(MAGIC)).endswith(MAGIC)
    except OSError:
        return False


def _besides(turn: dict[str, Any]) -> dict[str, Any]:
    """Return what a turn has beside its content: thinking, calls of tools, whose result it is."""
    found: dict[str, Any] = {key: _text(turn[key]) for key in ("reasoning_content", "tool_call_id", "name") if key in turn}
    if "tool_calls" in turn:
        found["tool_calls"] = [{"id": _text(call["id"]), "type": "function", "function": {
            key: _text(call["function"][key]) for key in ("name", "arguments")}} for call in turn["tool_calls"]]
    return found


def _content(content: Any) -> Any:
    return content if isinstance(content, str) else list(_parts(content))


def _parts(content: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for part in content:
        if _one_of(part["type"], "text", "image", "video") == "text":
            yield {"type": "text", "text": _text(part["text"])}
        else:
            options = dict(part["options"])
            if not all(value is None or isinstance(value, (bool, int, float)) for value in options.values()):
                raise TypeError
            yield {"type": part["type"], "path": _text(part["path"]), "options": options, "digest": bytes.fromhex(part["digest"])}


def _open(path: Path, part: dict[str, Any]) -> None:
    """Put the picture of a part in its place. Raises: RequestError."""
    options, digest = part.pop("options"), part.pop("digest")
    try:
        opened = open_picture(part["path"], options, part["type"])
    except ImageError as error:
        raise RequestError(f"{path}: the conversation shows {part['path']}, which cannot be shown again: {error}") from None
    if opened.media.digest != digest:
        raise RequestError(f"{path}: the conversation shows {part['path']}, which has another content now; put the old one back")
    part |= opened.part()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _one_of(value: Any, *known: Any) -> Any:
    if not any(type(value) is type(k) and value == k for k in known):
        raise ValueError
    return value
