"""From what a user gives to segments: texts and pictures, prompts in parts, conversations in the model's own chat format."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TYPE_CHECKING

import numpy as np

from pyengine.engine.language import Language
from pyengine.arguments import iterates
from pyengine.errors import ImageError, RequestError, shown
from pyengine.programs.rows import MediaSegment, Segment, TokenSegment
from pyengine.records import NamedTuple
from pyengine.text.marks import GUARD
from pyengine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pyengine.chat.regions import Naming
    from pyengine.chat.reply.tools import Tool
    from pyengine.engine.encoded import EncodedMedia, MediaInfo, Part
    from pyengine.engine.sources import Sources
    from pyengine.engine.wishes import Wishes
    from pyengine.media.image import Image
    from pyengine.media.messages import Medium
    from pyengine.media.policy import MediaPolicy
    from pyengine.media.video import Video
    from pyengine.models.architecture import Encoder

class Prompt(NamedTuple):
    """Segments and what became of their pictures. Of a conversation the tools that may be called, None of a plain text; and whether thinking
    is open at its end. naming: how the answer names regions of the picture, where a task asks for them."""

    segments: list[Segment]
    media: list[MediaInfo]
    tools: Sequence[Tool] | None = None
    opened: bool = False
    naming: Naming | None = None


class Prompts:
    """What makes prompts for one model.

    n_ids     ids that a prompt may have: rows of the embedding
    language  its tokenizer and chat template; media: its encoder, or None
    policy    which files a request may name; None: that of a program that writes its messages itself
    left_out  whether it has an encoder of pictures that it was loaded without
    sources   the encoder that prompts go to, of an encoder-decoder
    """

    def __init__(self, name: str, n_ids: int, language: Language, media: EncodedMedia | None, policy: MediaPolicy | None = None, left_out: bool = False,
                 sources: Sources | None = None):
        self.name, self.n_ids, self.language, self.media, self.policy, self.left_out = name, n_ids, language, media, policy, left_out
        self.sources = sources

    def under(self, policy: MediaPolicy) -> Prompts:
        """Return the same with another policy. Raises: RequestError for what is none."""
        from pyengine.media.policy import MediaPolicy

        if not isinstance(policy, MediaPolicy):
            raise RequestError(f"media_policy is a MediaPolicy, not {type(policy).__name__}")
        return Prompts(self.name, self.n_ids, self.language, self.media, policy, self.left_out, self.sources)

    @property
    def tokenizer(self) -> Tokenizer:
        """Built when it is first needed."""
        return self.language.tokenizer

    def _tokens(self, ids: Sequence[int]) -> TokenSegment:
        return TokenSegment(tuple(token_ids(ids, self.n_ids)))

    def encoded(self, source: Any, kind: str = "") -> tuple[tuple[Part, ...], MediaInfo]:
        """Return what stands in the prompt for a picture or video; see `media_of` for the arguments."""
        from pyengine.media.messages import Medium                   # here and below: a first text is answered sooner

        return self._encoded(Medium(source, "", kind))

    def _encoded(self, medium: Medium, pictures: int = 1, text: str = "") -> tuple[tuple[Part, ...], MediaInfo]:
        """Do the same for one that a request with so many pictures and this text names; its errors begin with its place there."""
        self._need_encoder()
        try:
            if pictures > 1 and not self.media.encoder.several:
                raise RequestError(f"{self.name} takes one picture a prompt, and {pictures} were given; ask of each by itself")
            judge = partial(self.media.judge, pictures=pictures, text=text)
            return self.media.get(media_of(medium.source, medium.kind, self.policy, medium.url, medium.options, judge), pictures, text)
        except RequestError as e:
            if not medium.field:
                raise
            raise type(e)(f"{medium.field}: {e}") from e

    def attention(self, source: Any) -> dict[str, np.ndarray]:
        """Return the maps of attention over a picture, or over that of a list of one and texts; see `media_of` for the argument."""
        self._need_encoder()
        texts = [p for p in source if isinstance(p, str)] if isinstance(source, (list, tuple)) else []
        if texts:
            others = [p for p in source if not isinstance(p, str)]
            if len(others) != 1:
                raise RequestError(f"attention: one picture and texts, got {len(others)} pictures")
            source = others[0]
        return self.media.attention(media_of(source, "", self.policy, judge=self.media.judge), "".join(texts))

    def _need_encoder(self) -> None:
        if self.media is None and self.left_out:
            raise RequestError(f"{self.name} was loaded with images=0, without its media encoder, so it takes no pictures")
        if self.media is None:
            raise RequestError(f"{self.name} has no media encoder, so it takes no pictures; where it is in a file of its own, "
                               "load with mmproj=")

    def _segments(self, parts: Sequence[Part], guarded: bool = False) -> list[Segment]:
        """Turn texts into tokens, neighbouring texts as one; nothing is added. guarded: by `_literal`."""
        out: list[Segment] = []
        for p in merged(parts):
            if isinstance(p, MediaSegment):
                out.append(p)
            else:
                out.append(self._tokens([p] if isinstance(p, int) else self.tokenizer.tokenize(p, add_special=False, mend=guarded)))
        return out

    def prompt(self, prompt: str | Sequence[Any], images: Sequence[Any] = ()) -> Prompt:
        """Make the segments of a prompt: what it is made of, or what stands for it in a decoder whose encoder reads it."""
        found = self.made_of(prompt, images)
        return found._replace(segments=self.asked(found.segments))

    def asked(self, segments: list[Segment]) -> list[Segment]:
        """Return what stands in the decoder's sequence for a prompt."""
        return segments if self.sources is None else [self.sources.segment(segments)]

    def following(self, source: str | Sequence[Any], ids: Any) -> list[Segment]:
        """Make the segments of a decoder's ids, the first of which begins its sequence, behind what its encoder reads. Raises: RequestError."""
        if self.sources is None:
            raise RequestError(f"source=: {self.name} has no encoder that reads a text; its prompt is all that there is")
        ids = token_ids(ids, self.n_ids)
        if not ids:
            raise RequestError(f"there are no ids: the decoder's begin with {self.sources.encoder.start}, the token that it starts with")
        return [self.sources.segment(self.made_of(source).segments, ids[0]), *([self._tokens(ids[1:])] if ids[1:] else [])]

    def made_of(self, prompt: str | Sequence[Any], images: Sequence[Any] = ()) -> Prompt:
        """Make what a prompt is made of: a text (special tokens are added where the model wants them) with pictures, or parts (nothing is
        added)."""
        if isinstance(prompt, str) and isinstance(images, (list, tuple)) and not images:
            return self.text(prompt, [])
        from pyengine.media.messages import as_list, Medium

        if isinstance(prompt, str):
            return self.text(prompt, [Medium(s, f"images[{i}]") for i, s in enumerate(as_list(images, "images"))])
        if isinstance(prompt, (bytes, bytearray, memoryview, Mapping)) or not iterates(prompt):
            raise RequestError(f"a prompt is a text or a list of parts, not {type(prompt).__name__}")
        if len(as_list(images, "images")):
            raise RequestError("images= goes with a text; in a prompt in parts the pictures are parts")
        segments: list[Segment] = []
        infos: list[MediaInfo] = []
        prompt = list(prompt)
        pictures = sum(not isinstance(part, (str, int, np.integer)) and not is_video(part) for part in prompt)
        words = "".join(part for part in prompt if isinstance(part, str))
        for n, part in enumerate(prompt):
            if isinstance(part, str):
                segments += self._segments([part])
            elif isinstance(part, (int, np.integer)) and not isinstance(part, bool):
                segments += [self._tokens([int(part)])]
            elif part is None or isinstance(part, (bool, float, complex, np.generic, Mapping)):
                raise RequestError(f"prompt[{n}]: a part of a prompt is {type(part).__name__}; ints, strings, pictures and lists "
                                   "of frames are parts")
            else:
                parts, info = self._encoded(Medium(part, f"prompt[{n}]"), pictures, words)
                segments += self._segments(parts)
                infos.append(info)
        return Prompt(segments, infos)

    def markers(self) -> dict[str, str]:
        """Return what a template writes for a picture and for a video; a letter that no text has where the vocabulary lacks those tokens."""
        ids = self.media.encoder.markers if self.media else {}
        return {kind: b"".join(map(self.tokenizer.piece, i)).decode("utf-8", "replace") or _PLACE for kind, i in ids.items()}

    def text(self, text: str, media: Sequence[Medium], guarded: bool = False) -> Prompt:
        """Lay out a text with as many markers as media, or with none: then the media come first. BOS as for any text."""
        text, naming = tasked(text, self.media.encoder) if self.media and self.media.encoder.tasks else (text, None)
        if not media:
            ids = self.tokenizer.tokenize(text, mend=guarded)
            return Prompt([self._tokens(ids[1:] if self.tokenizer.bos_id is not None and ids[:2] == [self.tokenizer.bos_id] * 2 else ids)], [])
        self._need_encoder()
        pictures = sum(not is_video(medium.source, medium.kind) for medium in media)
        markers = [m for m in self.markers().values() if m]
        leads = self.media.encoder.leads
        pieces = re.split("|".join(map(re.escape, markers)), text) if markers else [text]
        words = "".join(pieces)
        if len(pieces) == 1 or leads and len(pieces) == len(media) + 1:
            pieces = [""] * len(media) + [words]
        found = [self._encoded(medium, pictures, words.replace(GUARD, "")) for medium in media]
        if len(pieces) != len(found) + 1:
            raise RequestError(f"the prompt has {len(pieces) - 1} places for pictures ({', '.join(map(repr, markers))}), but {len(found)} were given")
        parts: list[Part] = [pieces[0]]
        for (own, _), piece in zip(found, pieces[1:]):
            parts += [*own, piece]
        segments = self._segments([p for p in parts if p != ""], guarded)
        special = self.tokenizer.tokenize("")
        lead = special[:1] if self.tokenizer.add_bos else []
        at = sum(isinstance(s, MediaSegment) for s in segments) if leads else 0
        first = next((s.ids[:1] for s in segments[at : at + 1] if isinstance(s, TokenSegment)), ())
        if lead and list(first) != lead and lead[0] not in (p for own, _ in found for p in own):      # some pictures bring BOS behind their rows
            segments.insert(at, self._tokens(lead))
        if special[len(lead):]:
            segments.append(self._tokens(special[len(lead):]))
        return Prompt(segments, [info for _, info in found], naming=naming)

    def chat(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None,
             options: Mapping[str, Any] | None = None, wishes: Wishes | None = None) -> Prompt:
        """Lay out a conversation in the model's own chat format, ready for the answer; options: variables of the template."""
        from pyengine.chat.checks import check_messages, check_tools
        from pyengine.chat.reply.tools import read_tools
        from pyengine.engine.wishes import Wishes
        from pyengine.media.messages import split

        wishes, style = wishes or Wishes(), self.language.style
        tools = _told(tools)
        check_tools(tools)
        known = [] if tools is None else read_tools(tools)
        wishes.check_choice(known)
        if wishes.tool_choice == "none":
            known = []
        seen, media = split(messages)
        if self.policy is not None:
            self.policy.check_number(media)
        check_messages(seen, self.language.template.source)
        seen, told = style.prepare([self._literal(m) for m in self.language.begun(seen)], read_tools(self._literal(tools)) if known else None)
        variables = {**style.variables(wishes.think), **template_options(options)}
        shown = self._literal(tools) if told else None       # as the user wrote them
        text = self._rendered(partial(self.language.template.render, tools=shown, variables=variables), seen, media)
        if wishes.think is False:
            text += style.unthought(text)
        made = self.text(text, media, guarded=True)
        return made._replace(segments=self.asked(made.segments), tools=known, opened=style.opened(text))

    def _rendered(self, render: Callable[..., str], seen: Sequence[Any], media: Sequence[Medium]) -> str:
        """Render a conversation with a marker for each picture."""
        if not media:
            return render(seen)
        self._need_encoder()
        if self.media.encoder.leads:                         # pictures have no place in the text
            return render([_spoken(m) for m in seen])
        markers = self.markers()
        bare = {kind for kind, marker in markers.items() if marker == _PLACE and {*markers.values()} != {_PLACE}}
        text = render([_placed(m, bare) for m in seen], media_marker=markers.get("image"))
        if sum(text.count(m) for m in markers.values()) != len(media):         # a template that knows of no pictures
            flat = [m if isinstance(m.get("content"), str) else {**m, "content": _flattened(m.get("content") or (), markers)} for m in seen]
            text = render(flat)
            if all(markers.get(m.kind) for m in media) and not any(m in text for m in markers.values() if m):
                raise RequestError(f"{media[0].field}: the model's chat template leaves out what a message of this role shows; "
                                   "give pictures in a user's message")
        return text

    def _literal(self, value: Any) -> Any:
        """Return messages or tools with the texts of control tokens broken up, so that what a user writes stays text: `text` mends them."""
        if isinstance(value, str):
            return self.tokenizer.guarded(value)
        if isinstance(value, Mapping):
            return {self._literal(k): self._literal(v) for k, v in value.items()}
        return [self._literal(v) for v in value] if isinstance(value, (list, tuple)) else value


_PLACE = "\ufdd1"                    # a noncharacter (Unicode 16, 23.7)
_OWN = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")     # what a template gets anyway


def tasked(text: str, encoder: Encoder) -> tuple[str, Naming | None]:
    """Return what a text asks that has a task's name in it, or the text; and how the answer names regions, if it does. Places in a text that
    was guarded are tokens again.

    Raises: RequestError for a text beside a task that takes none.
    """
    name = next((name for name in encoder.tasks if name in text), None)
    if name is None:
        return text, None
    sentence, way = encoder.tasks[name]
    given = text.replace(name, "").strip()
    if given and "{input}" not in sentence:
        raise RequestError(f"the task {name} takes no text; give its name alone, not {shown(text)}")
    asked = sentence.replace("{input}", re.sub(f"<{GUARD}(loc_[0-9]+>)", r"<\1", given))
    if not way:
        return asked, None
    from pyengine.chat.regions import Naming

    return asked, Naming(way, frozenset(encoder.ignored))


def template_options(options: Any) -> dict[str, Any]:
    """Check variables for a chat template. Raises: RequestError for what is no mapping of names, and for names that it has anyway."""
    if options is None:
        return {}
    if not isinstance(options, Mapping) or any(not isinstance(name, str) for name in options):
        raise RequestError(f"template_options must be a mapping of names, got {shown(options)}")
    for name in options:
        if name in _OWN:
            raise RequestError(f"template_options: {name!r} is not set here")
    return dict(options)


def token_ids(ids: Any, n_ids: int) -> list[int]:
    """Return ids as ints. Raises: RequestError for what is no list of ints, and for an id that has no row in the embedding."""
    if not iterates(ids) or isinstance(ids, (str, bytes)) or isinstance(ids, np.ndarray) and ids.ndim != 1:
        raise RequestError(f"token ids must be a list of ints, got {shown(ids)}")
    out: list[int] = []
    for i in ids.tolist() if isinstance(ids, np.ndarray) else ids:
        if not isinstance(i, (int, np.integer)) or isinstance(i, bool):
            raise RequestError(f"a token id must be an int, got {shown(i)}")
        if not 0 <= i < n_ids:
            raise RequestError(f"token id {shown(i)} is outside the vocabulary of {n_ids}")
        out.append(i)
    return out


def media_of(source: Any, kind: str = "", policy: MediaPolicy | None = None, url: bool = False, options: Mapping[str, Any] | None = None,
             judge: Callable[[Image | Video], None] | None = None) -> Image | Video:
    """Open a picture from anything that `open_image` reads, or base64; a list of frames, a Video, or whatever kind "video"
    names, is a video.

    policy   which files may be opened; url: the source stands where addresses stand
    options  of the model's processor, for this medium
    judge    raises for a picture or video of which only size and options are known, before anything is decoded
    """
    from pyengine.media.image import read_image                   # Pillow takes 20 ms to import
    from pyengine.media.policy import MediaPolicy
    from pyengine.media.video import read_video

    options, policy = dict(options or {}), policy or MediaPolicy()
    if is_video(source, kind):
        fps = options.pop("fps", None)
        if fps is not None and not isinstance(source, (list, tuple)):
            raise ImageError("fps is the rate of a list of frames; of a film, sample_fps says how many frames of a second are taken")
        return read_video(policy.admit(source, "video", url), fps, options, judge)
    return read_image(policy.admit(source, "picture", url), options, judge)


def is_video(source: Any, kind: str = "") -> bool:
    """Say whether `media_of` opens this as a video."""
    from pyengine.media.video import Video                       # Pillow takes 20 ms to import

    return kind == "video" or isinstance(source, (list, tuple, Video))


def _told(tools: Any) -> Any:
    """Return tools with Python functions as their schemas. Raises: RequestError for a function that no schema tells."""
    if not isinstance(tools, (list, tuple)) or not any(map(callable, tools)):
        return tools
    from pyengine.chat.functions import schema_of

    return [schema_of(tool) if callable(tool) else tool for tool in tools]


def _spoken(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message without its pictures."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message
    return {**message, "content": [p for p in content if isinstance(p, str) or p.get("type") == "text"]}


def _placed(message: Mapping[str, Any], kinds: set[str]) -> Mapping[str, Any]:
    """Return a message with media of these kinds as texts of their place: no template shows what has no token."""
    content = message.get("content")
    if not kinds or content is None or isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": _PLACE} if isinstance(p, Mapping) and p.get("type") in kinds else p for p in content]}


def _flattened(parts: Sequence[Any], markers: dict[str, str]) -> str:
    """Return a content as one text, with markers for media: for templates that take strings only."""
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
