"""The pictures and videos of a conversation, in the forms in which people give them.

    OpenAI      {"type": "image_url", "image_url": {"url": .., "detail": ..}}, {"type": "input_image", "image_url": ..}
    Anthropic   {"type": "image", "source": {"type": "base64", "media_type": .., "data": ..}} or {"type": "url", "url": ..}
    MCP         {"type": "image", "data": base64, "mimeType": ..}
    Hugging Face, mlx-vlm, Qwen    {"type": "image", "image" | "url" | "path" | "base64": .., option of the processor: ..},
                {"type": "video", "video": a file or a list of frames}
    Ollama      a message's key "images": paths, bytes or base64; one, or a list
    pyengine    a picture as it is (Pillow, NumPy, bytes, Path, Image, Video) as a part, or a list of frames

What is not seen is refused, with the path of the field: a sound, a document, a picture under a key that nobody reads.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pyengine.arguments import iterates
from pyengine.errors import RequestError
from pyengine.media.sources import BUFFERS
from pyengine.records import dataclass

TEXTS = ("text", "input_text", "output_text")
PICTURES = ("image", "image_url", "input_image")
VIDEOS = ("video", "video_url", "input_video")

_SOURCES = ("image", "image_url", "video", "video_url", "url", "path", "source", "data", "base64")
_ADDRESSES = ("image_url", "video_url", "url")
_NOTES = ("type", "name", "detail", "cache_control", "media_type", "mime_type", "mimeType")       # nothing that is to be seen
_TEXT_NOTES = ("type", "text", "id", "cache_control", "annotations", "logprobs", "citations")
_DETAILS = ("auto", "low", "high", "original")                # OpenAI's; here the model's processor decides
_UNSEEN = ("image", "image_url", "image_urls", "picture", "pictures", "video", "videos", "audio", "audios", "file", "files",
           "document", "documents", "attachments", "experimental_attachments")   # keys of messages that would be left out


@dataclass(frozen=True)
class Medium:
    """A picture or video that a request names.

    field    its place in the request, for messages
    kind     "image" or "video"; "": a list of frames is a video, everything else a picture
    url      it stands where addresses stand
    options  of the model's processor
    """

    source: Any
    field: str = ""
    kind: str = ""
    url: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def split(messages: Any) -> tuple[list[dict[str, Any]], list[Medium]]:
    """Return messages as a template sees them ({"type": "image"} without the data), and their media in order.

    Raises: RequestError with the path of the field for what has another form, and for what would not be seen.
    """
    if isinstance(messages, (str, Mapping, *BUFFERS)) or not iterates(messages):
        raise RequestError(f"messages: a list of messages, not {_name(messages)}")
    shown: list[dict[str, Any]] = []
    media: list[Medium] = []
    for i, message in enumerate(messages):
        at = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise RequestError(f"{at}: a message must be a mapping with a role, not {_name(message)}")
        if not isinstance(message.get("role"), str):
            raise RequestError(f"{at}.role: a message must be a mapping with a role, a text, not {_name(message.get('role'))}")
        for key in _UNSEEN:
            if _holds(message.get(key)):
                raise RequestError(f"{at}.{key}: it would not be seen: give pictures and videos as parts of the content, or pictures as 'images'")
        parts = [_medium_of(p, f"{at}.images[{j}]") for j, p in enumerate(as_list(message.get("images"), f"{at}.images"))]
        content = _content(message.get("content"), f"{at}.content")
        if parts and not isinstance(content, list):           # Ollama's form: pictures first
            content = [content] if content else []
        if isinstance(content, list):
            parts += content
            media += [p for p in parts if isinstance(p, Medium)]
            content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": p.kind} for p in parts]
        shown.append({**{k: v for k, v in message.items() if k != "images"}, "content": content})
    return shown, media


def as_list(sources: Any, at: str) -> Sequence[Any]:
    """Return one picture, or a list of them, as a list. Raises: RequestError for what holds none."""
    if sources is None:
        return []
    if isinstance(sources, (Sequence, Iterator)) and not isinstance(sources, (str, range, *BUFFERS)):
        return list(sources)
    if isinstance(sources, (bool, int, float, complex, Mapping, set, frozenset, range)) or type(sources) is object:
        raise RequestError(f"{at}: a list of pictures, not {_name(sources)}")
    return [sources]


def _content(content: Any, at: str) -> str | None | list[str | Medium]:
    if content is None:
        return None
    if isinstance(content, str):
        return str.__str__(content)
    if not isinstance(content, (list, tuple)):
        raise RequestError(f"{at}: content must be a string or a list of parts, not {_name(content)}")
    return [_part(part, f"{at}[{j}]") for j, part in enumerate(content)]


def _part(part: Any, at: str) -> str | Medium:
    """Return one part of a content: a text, or what is to be seen."""
    if isinstance(part, str):
        return str.__str__(part)
    if not isinstance(part, Mapping):
        return _medium_of(part, at)
    kind = part.get("type")
    if not isinstance(kind, str):
        raise RequestError(f"{at}.type: a part has a type, 'text', 'image' or 'video', not {_name(kind)}")
    if kind in TEXTS:
        return _text(part, at)
    if kind not in PICTURES + VIDEOS:
        raise RequestError(f"{at}.type: a part of type {kind[:40]!r} is not taken: parts are texts ({', '.join(TEXTS)}), "
                           f"pictures ({', '.join(PICTURES)}) and videos ({', '.join(VIDEOS)})")
    return _of_mapping(part, "video" if kind in VIDEOS else "image", at)


def _text(part: Mapping[str, Any], at: str) -> str:
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{at}.text: a text, not {_name(part.get('text'))}")
    for key, value in part.items():
        if key not in _TEXT_NOTES and value is not None:
            raise RequestError(f"{at}.{key}: a part of type {part['type']!r} has only a text; this would be left out")
    return str.__str__(part["text"])


def _medium_of(source: Any, at: str) -> Medium:
    """Return a picture or video that is given as it is, or as a part."""
    if isinstance(source, Mapping):
        found = _part(source, at)
        if isinstance(found, Medium):
            return found
        raise RequestError(f"{at}: a picture, not a text")
    if source is None or isinstance(source, (bool, int, float, complex, set, frozenset)):
        raise RequestError(f"{at}: a picture or a video, not {_name(source)}")
    moving = isinstance(source, (list, tuple)) or type(source).__name__ == "Video"       # named: Pillow takes 20 ms to import
    return Medium(source, at, "video" if moving else "image")


def _of_mapping(part: Mapping[str, Any], kind: str, at: str) -> Medium:
    """Return a part of an image's or a video's type."""
    given = [key for key in _SOURCES if part.get(key) is not None]
    if len(given) > 1 and given[-1] == "path" and not isinstance(part[given[0]], (str, Mapping)):
        given = given[:-1]                                    # where an opened picture came from
    if not given:
        raise RequestError(f"{at}: a part of type {part['type']!r} holds no {'video' if kind == 'video' else 'picture'}")
    if len(given) > 1:
        raise RequestError(f"{at}: it names several sources, {' and '.join(given)}; give one")
    key, = given
    if key.startswith("video") != (kind == "video") and key.startswith(("video", "image")):
        raise RequestError(f"{at}.{key}: this does not belong in a part of type {part['type']!r}")
    options = {}
    for name, value in part.items():
        if name == "detail":
            _detail(value, f"{at}.detail")
        elif name not in _NOTES and name not in _SOURCES and value is not None:
            if not isinstance(name, str) or not isinstance(value, (bool, int, float, str)) or name == "file_id":
                raise RequestError(f"{at}.{name}: not known in a part of type {part['type']!r}")
            options[name] = value
    source, url, place = part[key], key in _ADDRESSES, f"{at}.{key}"
    if isinstance(source, Mapping):
        source, url, place = _nested(source, key, place)
    if key == "base64" and not isinstance(source, (str, *BUFFERS)):
        raise RequestError(f"{place}: base64 is a text, not {_name(source)}")
    if key in ("base64", "data") and isinstance(source, str):
        source = _inline(source)
    wrong = (Mapping, bool, int, float, complex, set, frozenset, type(None), *(() if kind == "video" else (list, tuple)))
    if isinstance(source, wrong):
        raise RequestError(f"{place}: a {'video' if kind == 'video' else 'picture'}, not {_name(source)}")
    return Medium(source, place, kind, url and not isinstance(source, os.PathLike), options)


def _nested(source: Mapping[str, Any], key: str, at: str) -> tuple[Any, bool, str]:
    """Return (source, whether it is an address, its place) of {"url": ..} and of Anthropic's {"type": "base64", "data": ..}."""
    if key == "source":
        kind = source.get("type")
        if kind not in ("base64", "url"):
            raise RequestError(f"{at}.type: a source is of type 'base64' or 'url', not {_name(kind) if not isinstance(kind, str) else repr(kind[:40])}")
        name, known = ("data", ("type", "data", "media_type")) if kind == "base64" else ("url", ("type", "url"))
    else:
        name, known = "url", ("url", "detail", "format")
    for other, value in source.items():
        if other not in known and value is not None:
            raise RequestError(f"{at}.{other}: not known here; {', '.join(known)} are")
    _detail(source.get("detail"), f"{at}.detail")
    value = source.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{at}.{name}: a text, not {_name(value)}")
    return (_inline(value), False, f"{at}.data") if name == "data" else (str.__str__(value), True, f"{at}.url")


def _inline(text: str) -> str:
    """Make a data URL of base64, so that it is never taken for a path."""
    return text if text[:5].lower() == "data:" else "data:;base64," + text


def _detail(value: Any, at: str) -> None:
    if value is not None and not (isinstance(value, str) and value in _DETAILS):
        raise RequestError(f"{at}: one of {', '.join(_DETAILS)}")


def _holds(value: Any) -> bool:
    return value is not None and not (isinstance(value, (str, list, tuple, Mapping)) and not value)


def _name(value: Any) -> str:
    return "None" if value is None else type(value).__name__
