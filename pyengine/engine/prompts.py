"""From what a user gives to segments: texts and pictures, prompts in parts, conversations in the model's own chat format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, TYPE_CHECKING

import numpy as np

from pyengine.engine.encoded import EncodedMedia, MediaInfo, Part
from pyengine.engine.language import Language
from pyengine.errors import RequestError, shown
from pyengine.programs.rows import MediaSegment, Segment, TokenSegment
from pyengine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pyengine.media.image import Image
    from pyengine.media.video import Video

Prompt = tuple[list[Segment], list[MediaInfo]]


class Prompts:
    """Makes prompts for one model.

    n_ids     ids that a prompt may have: rows of the embedding
    language  its tokenizer and chat template; media: its encoder, or None
    """

    def __init__(self, name: str, n_ids: int, language: Language, media: EncodedMedia | None):
        self.name, self.n_ids, self.language, self.media = name, n_ids, language, media

    @property
    def tokenizer(self) -> Tokenizer:
        """Built when it is first needed."""
        return self.language.tokenizer

    def _tokens(self, ids: Sequence[int]) -> TokenSegment:
        return TokenSegment(tuple(token_ids(ids, self.n_ids)))

    def encoded(self, source: Any, kind: str = "") -> tuple[tuple[Part, ...], MediaInfo]:
        """What stands in the prompt for a picture or video; see `media_of` for the arguments."""
        self._need_encoder()
        return self.media.get(media_of(source, kind))

    def _need_encoder(self) -> None:
        if self.media is None:
            raise RequestError(f"{self.name} has no media encoder, so it takes no pictures; where it is in a file of its own, "
                               "load with mmproj=")

    def _segments(self, parts: Sequence[Part]) -> list[Segment]:
        """Texts become tokens, neighbouring texts as one; nothing is added."""
        out: list[Segment] = []
        for p in merged(parts):
            if isinstance(p, MediaSegment):
                out.append(p)
            else:
                out.append(self._tokens([p] if isinstance(p, int) else self.tokenizer.tokenize(p, add_special=False)))
        return out

    def prompt(self, prompt: str | Sequence[Any], images: Sequence[Any] = ()) -> Prompt:
        """Segments of a prompt: a text (BOS is added where the model wants it) with pictures, or parts (nothing is added)."""
        for name, value in (("prompt", prompt), ("images", images)):
            if not isinstance(value, Iterable) or isinstance(value, (bytes, dict)) or name == "images" and isinstance(value, str):
                raise RequestError(f"{name} must be a {'text or a list of parts' if name == 'prompt' else 'list of pictures'}, got {shown(value)}")
        if isinstance(prompt, str):
            return self.text(prompt, [("", i) for i in images])
        if images:
            raise RequestError("images= goes with a text; in a prompt in parts the pictures are parts")
        segments: list[Segment] = []
        infos: list[MediaInfo] = []
        for part in prompt:
            if isinstance(part, str):
                segments += self._segments([part])
            elif isinstance(part, (int, np.integer)) and not isinstance(part, bool):
                segments += [self._tokens([int(part)])]
            elif part is None or isinstance(part, (bool, float, dict)):
                raise RequestError(f"a part of a prompt is {type(part).__name__}; ints, strings, pictures and lists of frames are parts")
            else:
                parts, info = self.encoded(part)
                segments += self._segments(parts)
                infos.append(info)
        return segments, infos

    def markers(self) -> dict[str, str]:
        """What a template writes for a picture and for a video; empty where the vocabulary lacks those tokens."""
        ids = self.media.encoder.markers if self.media else {}
        return {kind: b"".join(map(self.tokenizer.piece, i)).decode("utf-8", "replace") for kind, i in ids.items()}

    def text(self, text: str, media: Sequence[tuple[str, Any]]) -> Prompt:
        """A text with as many markers as media (kind, source), or with none: then the media come first. BOS as for any text."""
        if not media:
            ids = self.tokenizer.tokenize(text)
            return [self._tokens(ids[1:] if self.tokenizer.bos_id is not None and ids[:2] == [self.tokenizer.bos_id] * 2 else ids)], []
        found = [self.encoded(source, kind) for kind, source in media]
        markers = [m for m in self.markers().values() if m]
        pieces = re.split("|".join(map(re.escape, markers)), text) if markers else [text]
        if len(pieces) == 1:
            pieces = [""] * len(found) + [text]
        if len(pieces) != len(found) + 1:
            raise RequestError(f"the prompt has {len(pieces) - 1} places for pictures ({', '.join(map(repr, markers))}), but {len(found)} were given")
        parts: list[Part] = [pieces[0]]
        for (own, _), piece in zip(found, pieces[1:]):
            parts += [*own, piece]
        segments = self._segments([p for p in parts if p != ""])
        special = self.tokenizer.tokenize("")
        lead = special[:1] if self.tokenizer.add_bos else []
        first = segments[0].ids[:1] if isinstance(segments[0], TokenSegment) else ()
        if lead and list(first) != lead:
            segments.insert(0, self._tokens(lead))
        if special[len(lead):]:
            segments.append(self._tokens(special[len(lead):]))
        return segments, [info for _, info in found]

    def chat(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> Prompt:
        """A conversation in the model's own chat format, ready for the answer."""
        shown, media = _without_media(self.language.begun(messages))
        if not media:
            return self.text(self.language.template.render(shown, tools=tools, add_generation_prompt=True), [])
        self._need_encoder()
        markers = self.markers()
        text = self.language.template.render(shown, tools=tools, add_generation_prompt=True, media_marker=markers.get("image"))
        if sum(text.count(m) for m in markers.values()) != len(media):         # a template that knows of no pictures
            flat = [m if isinstance(m.get("content"), str) else {**m, "content": _flattened(m.get("content") or (), markers)} for m in shown]
            text = self.language.template.render(flat, tools=tools, add_generation_prompt=True)
        return self.text(text, media)


def token_ids(ids: Any, n_ids: int) -> list[int]:
    """Ids as ints. Raises: RequestError for what is no list of ints, and for an id that has no row in the embedding."""
    if not isinstance(ids, Iterable) or isinstance(ids, (str, bytes)):
        raise RequestError(f"token ids must be a list of ints, got {shown(ids)}")
    ids = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
    for i in ids:
        if not isinstance(i, (int, np.integer)) or isinstance(i, bool):
            raise RequestError(f"a token id must be an int, got {shown(i)}")
        if not 0 <= i < n_ids:
            raise RequestError(f"token id {shown(i)} is outside the vocabulary of {n_ids}")
    return ids


def media_of(source: Any, kind: str = "") -> Image | Video:
    """A picture from anything that `open_image` reads; a list of frames, a Video, or whatever kind "video" names, is a video."""
    from pyengine.media.image import open_image                   # Pillow takes 20 ms to import
    from pyengine.media.video import open_video, Video

    if isinstance(source, Video):
        return source
    return open_video(source) if kind == "video" or isinstance(source, (list, tuple)) else open_image(source)


def _without_media(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[tuple[str, Any]]]:
    """Messages as a template sees them ({"type": "image"} without the data), and their media in order: (kind, source)."""
    shown: list[dict[str, Any]] = []
    media: list[tuple[str, Any]] = []
    for message in messages:
        if not isinstance(message, dict):
            raise RequestError("a message must be a mapping with a role")
        content, extra = message.get("content"), message.get("images") or ()
        if extra and not isinstance(content, (list, tuple)):                   # Ollama's form: pictures first
            content = [{"type": "text", "text": content}] if content else []
        if isinstance(content, (list, tuple)):
            parts: list[Any] = []
            for part in [*extra, *content]:
                kind, source = _media_part(part)
                parts.append(part if source is None else {"type": kind})
                media += [] if source is None else [(kind, source)]
            content = parts
        shown.append({**{k: v for k, v in message.items() if k != "images"}, "content": content})
    return shown, media


def _media_part(part: Any) -> tuple[str, Any]:
    """(kind, source) of one part of a message's content; (.., None) for what is no picture or video."""
    if isinstance(part, str):
        return "text", None
    if not isinstance(part, dict):
        return "video" if isinstance(part, (list, tuple)) or type(part).__name__ == "Video" else "image", part
    kind = part.get("type")
    if kind not in ("image", "image_url", "input_image", "video", "video_url"):
        return str(kind), None
    source = next((part[k] for k in (kind, "image", "image_url", "video", "url", "path") if part.get(k) is not None), None)
    source = source.get("url") if isinstance(source, dict) else source
    if source is None:
        raise RequestError(f"a part of type {kind!r} holds no {'video' if kind.startswith('video') else 'picture'}")
    return "video" if kind.startswith("video") else "image", source


def _flattened(parts: Sequence[Any], markers: dict[str, str]) -> str:
    """A content as one text, with markers for media: for templates that take strings only."""
    return "\n".join(p if isinstance(p, str) else p.get("text", "") if p.get("type") == "text" else markers.get(str(p.get("type")), "")
                     for p in parts)


def merged(parts: Sequence[Part]) -> list[Part]:
    """Join neighbouring texts, which are tokenized as one."""
    out: list[Part] = []
    for p in parts:
        if isinstance(p, str) and out and isinstance(out[-1], str):
            out[-1] += p
        else:
            out.append(p)
    return out
