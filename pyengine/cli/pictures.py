"""Pictures and videos at the command line: opening them, finding them in what is typed, what became of them, boxes."""

from __future__ import annotations

import io
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pyengine.cli.screen import note
from pyengine.errors import ImageError, RequestError
from pyengine.files.writing import written
from pyengine.records import dataclass

Options = Mapping[str, Any]

# Endings that a name of a picture has; with the last ones people try files that are not read everywhere, and are told so.
_ENDING = re.compile(r"[^/\\]\.(?:png|jpe?g|webp|gif|bmp|tiff?|heic|heif|avif|jp2|ppm|svg)$", re.IGNORECASE)
_START = re.compile(r"(?<![^\s(\[])(?<!\\\s)[^\s(\[]")  # where a word begins, or what stands in brackets
_QUOTED = re.compile(r"""(?:'[^'\n]*'|"[^"\n]*"|\\.|[^\s'"\\])+""")     # a word of a shell
_QUOTES = re.compile(r"""'([^']*)'|"([^"]*)"|\\(.)""")
LONGEST = 1024                                         # characters of a path, so that long messages take linear time
_PLAIN = re.compile(r"\S+")
_CLOSING = ".,;:!?)]}'\""                              # what may follow a path in a sentence
_ARGUMENTS = ("self", "source", "frames")              # of open_image, open_video and Video: no processor's options
SHRUNK = 4                                             # a picture that loses more of its area than this is warned about


@dataclass(frozen=True)
class Picture:
    """A picture or video as its user named it.

    media   a pyengine.Image or a pyengine.Video
    path    of its file; None for a data URL
    kind    "image" or "video"
    """

    name: str
    media: Any
    path: Path | None = None
    kind: str = "image"

    def part(self) -> dict[str, Any]:
        """Return this as a part of a message's content."""
        path = None if self.path is None else str(self.path.absolute())
        return {"type": self.kind, self.kind: self.media, "name": self.name, "path": path}

    def __str__(self) -> str:
        width, height = self.media.size
        frames = f", {len(self.media)} frames" if self.kind == "video" else ""
        return f"{self.kind} {self.name} ({width}x{height}{frames})"


def open_picture(source: str, options: Options, kind: str = "image") -> Picture:
    """Open a path ("~" is the home folder), a file:// URL or a data URL; kind "video" opens it as one.

    Raises: ImageError naming it.
    """
    from pyengine.media.image import open_image
    from pyengine.media.video import open_video

    read = open_video if kind == "video" else open_image
    if source[:5].lower() == "data:":
        return Picture("data URL", read(source, **options), None, kind)
    path = local_path(source)
    return Picture(path.name, read(path, **options), path, kind)


def is_named(path: str) -> bool:
    """Say whether a path ends as names of pictures do."""
    return bool(_ENDING.search(path))


def local_path(text: str) -> Path:
    """Return the path that a user means. Raises: ImageError for an address in a network, and a malformed one."""
    if text[:7].lower() == "file://":
        from pyengine.media.policy import path_of_url

        return Path(path_of_url(text, "file"))
    if re.match(r"https?://", text, re.IGNORECASE):
        raise ImageError(f"{text[:200]}: nothing is fetched from the network; download it, then give its path")
    return Path(os.path.expanduser(text))


def separate(files: Sequence[str]) -> list[str]:
    """Return the files that an option names, also those that stand in one list with commas between them."""
    found: list[str] = []
    for file in files:
        names = file.split(",")
        found += names if len(names) > 1 and not _is_file(file) and all(map(_is_file, names)) else [file]
    return found


def parse_options(arguments: Sequence[str], option: str) -> dict[str, Any]:
    """Read name=value; a value is a number, true or false. Raises: RequestError naming `option`."""
    found: dict[str, Any] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not name.isidentifier():
            raise RequestError(f"{option} {argument}: it reads name=value, as in max_pixels=1000000")
        if name in _ARGUMENTS:
            raise RequestError(f"{option} {argument}: processors have no such option")
        found[name] = _value(value, f"{option} {argument}")
    return found


def _value(text: str, what: str) -> bool | int | float:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    raise RequestError(f"{what}: the value is a number, true or false")


# ---------------------------------------------------------------------------------------------- typed or dropped

def find_pictures(text: str, options: Options) -> tuple[list[str | Picture], list[str]]:
    """Cut a message at the paths of pictures in it; returns the parts, and what is wrong with those that stay text.

    A path may be quoted or escaped as for a shell, begin with ~, or be a file:// URL: so terminals write a file that is
    dropped on them. A path without a picture stays text; it is wrong where its ending is one of pictures.
    """
    parts: list[str | Picture] = []
    wrong: list[str] = []
    done = 0
    for start in _START.finditer(text):
        at = start.start()
        if at < done:
            continue
        for end, path in _candidates(text, at):
            try:
                parts += [text[done:at], open_picture(path, options)]
            except ImageError as error:
                if not _ENDING.search(path):
                    continue
                wrong.append(str(error))
                parts.append(text[done:end])
            done = end
            break
    parts.append(text[done:])
    return [p for p in parts if not isinstance(p, str) or p], wrong


def read_words(words: Sequence[str], options: Options) -> tuple[list[str | Picture], list[str]]:
    """Read the words of a command line as one message, joined by spaces; returns as `find_pictures`.

    A word that is the path of a picture is one as it is, spaces and all: the shell has taken its quotes away.
    """
    parts: list[str | Picture] = []
    wrong: list[str] = []
    for word in words:
        if parts:
            parts.append(" ")
        if _ENDING.search(word) and _is_file(word):
            word = shlex.quote(word)
        found, said = find_pictures(word, options)
        parts += found
        wrong += said
    return parts, wrong


def mentioned(text: str) -> list[str]:
    """Return the paths of pictures that stand in a text and are there, none of them opened; three at most."""
    found: dict[str, None] = {}
    done = 0
    for start in _START.finditer(text):
        if start.start() >= done and len(found) < 3:
            for end, path in _candidates(text, start.start()):
                if _ENDING.search(path) and _is_file(path):
                    found[path] = None
                done = end
                break
    return list(found)


def _candidates(text: str, at: int) -> Iterator[tuple[int, str]]:
    """Yield (end, path) of what may be a path at a place: files, then the name of a picture that is not there."""
    found: list[tuple[int, str]] = []
    quoted, plain = (form.match(text, at, at + LONGEST) for form in (_QUOTED, _PLAIN))
    for match in (quoted, plain):
        if match:
            bare = match[0].rstrip(_CLOSING)
            found += [(match.end(), match[0]), (at + len(bare), bare)]
    if quoted:
        bare = quoted[0].rstrip(".,;:!?)]}")
        found += [(at + len(word), unquoted) for word in (quoted[0], bare) if (unquoted := _unquoted(word)) != word]
    found = [(end, path) for end, path in dict.fromkeys(found) if _ENDING.search(path) or "/" in path or "\\" in path]
    yield from ((end, path) for end, path in found if _is_file(path))
    yield from [(end, path) for end, path in reversed(found) if _ENDING.search(path)][:1]


def _unquoted(word: str) -> str:
    return _QUOTES.sub(lambda match: "".join(match.groups("")), word)


def _is_file(path: str) -> bool:
    try:
        return os.path.isfile(local_path(path))
    except (ImageError, ValueError):                   # another machine's; a malformed URL
        return False


def named_pictures(text: str, options: Options, kind: str) -> list[Picture]:
    """Open the files that a command names: one path as it is, or several, quoted or escaped where they have spaces.

    Raises: RequestError, ImageError.
    """
    if text[:5].lower() == "data:" or _is_file(text):
        return [open_picture(text, options, kind)]
    try:
        paths = [path.strip("'\"") for path in shlex.split(text, posix=os.name != "nt")]
    except ValueError as error:
        raise RequestError(f"{text}: {error}") from None
    if len(paths) > 1 and not all(map(_is_file, paths)):
        paths = [text]                                 # more likely one name with spaces that is not there
    return [open_picture(path, options, kind) for path in paths]


# ---------------------------------------------------------------------------------------------- what became of them

def need_encoder(model: Any) -> None:
    """Check that a model takes pictures. Raises: RequestError."""
    if model.media is None:
        raise RequestError(f"{Path(model.file.path).name} has no image encoder, so it takes no pictures; "
                           "if its encoder is in a file of its own, give that with --mmproj")


def report_line(name: str, info: Any) -> str:
    """Say what became of one picture or video, for --verbose."""
    seconds = ("cached" if info.cached else
               f"processed in {info.process_seconds:.3f} s, encoded in {info.encode_seconds:.3f} s")
    views = f"{info.views} view{'s' * (info.views != 1)}"
    return (f"{info.kind} {name}: {_size(info.size)} seen as {_size(info.processed)}, {views}, {info.n_tokens} tokens, "
            f"{seconds}")


def warn_of_loss(name: str, info: Any) -> None:
    """Say on standard error that a model's processor has shrunk a picture a lot; crops count for what they show."""
    seen = info.views * info.processed[0] * info.processed[1]
    if info.kind == "image" and not info.cached and SHRUNK * seen < info.size[0] * info.size[1]:
        note(f"({name}: the model sees its {_size(info.size)} pixels as {_size(info.processed)}; where small details "
             "matter, cut them out first)")


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def media_json(names: Sequence[str], infos: Sequence[Any]) -> list[dict[str, Any]]:
    """Return what became of pictures and videos, as plain data."""
    return [{"name": name, **asdict(info)} for name, info in zip(names, infos)]


# ---------------------------------------------------------------------------------------------- boxes

def boxes(found: Any) -> list[Any]:
    """Find the boxes, points and polygons of an answer: those of its last picture, or of its last video where there is no picture."""
    kinds = [info.kind for info in found.media]
    return found.marks_in(len(kinds) - 1 - kinds[::-1].index("image")) if "image" in kinds else found.boxes


def boxes_json(found: Any) -> dict[str, Any]:
    """Return the same as plain data: "boxes" and points among them, and "polygons" where there are any."""
    from pyengine.chat.boxes import Polygon

    marks = boxes(found)
    polygons = [asdict(mark) for mark in marks if isinstance(mark, Polygon)]
    return {"boxes": [asdict(mark) for mark in marks if not isinstance(mark, Polygon)], **({"polygons": polygons} if polygons else {})}


def places(found: Any, names: Sequence[str], way: str = "") -> list[str]:
    """Format the boxes, points and polygons of an answer, after what they are measured in, for standard error; `way`: how to see them."""
    marks = boxes(found)
    if not marks:
        return []                                            # of texts alone, for which Pillow is not imported
    from pyengine.chat.boxes import Box, Polygon

    number = marks[0].image
    lines = [f"(in pixels of {names[number]}, {_size(found.media[number].size)}{way and '; '}{way})"]
    for mark in marks:
        if isinstance(mark, Polygon):
            at = "; ".join(" ".join(f"{x:.0f},{y:.0f}" for x, y in part) for part in mark.parts)
        else:
            at = f"{mark.x1:.0f},{mark.y1:.0f} to {mark.x2:.0f},{mark.y2:.0f}" if isinstance(mark, Box) else f"{mark.x:.0f},{mark.y:.0f}"
        lines.append(f"  {mark.label or '(no label)'}: {at}")
    return lines


def check_drawing(out: Path, pictures: Sequence[Picture], name: str = "--draw") -> None:
    """Check, before a model is loaded, that boxes can be drawn to a file. Raises: RequestError with the option's or command's name."""
    from PIL import Image

    from pyengine.media.image import FORMATS

    if not any(picture.kind == "image" for picture in pictures):
        raise RequestError("--draw needs a picture to draw on: --image FILE")
    if Image.registered_extensions().get(out.suffix.lower()) not in FORMATS:
        raise RequestError(f"{name} {out}: the name ends in .png, or as another of {', '.join(FORMATS)} does")
    if out.is_dir() or not out.parent.is_dir():
        raise RequestError(f"{name} {out}: {'this is a folder' if out.is_dir() else 'there is no such folder'}")
    if out.exists() and any(p.path is not None and os.path.samefile(out, p.path) for p in pictures):
        raise RequestError(f"{name} {out}: this is a picture of the question; give the drawing another name")


def draw(found: Any, pictures: Sequence[Picture], out: Path, name: str = "--draw") -> bool:
    """Write the picture that an answer's boxes are on, with them; returns False, and writes nothing, if there are none.

    Raises: RequestError if the file cannot be written.
    """
    from pyengine.chat.boxes import draw as drawn

    marks = boxes(found)
    if not marks:
        note(f"(the answer names no boxes or points: {out} is not written)")
        return False
    picture = pictures[marks[0].image]
    save(drawn(picture.media, marks), out, name)
    note(f"({len(marks)} {'mark' if len(marks) == 1 else 'marks'} on {picture.name}: {out})")
    return True


def save(drawing: Any, out: Path, name: str) -> None:
    """Write a drawing, a Pillow image, in the format of its name. Raises: RequestError with the option's or command's name if it cannot be."""
    from PIL import Image

    content = io.BytesIO()
    drawing.save(content, Image.registered_extensions()[out.suffix.lower()])
    try:
        with written(out) as file:
            file.write(content.getvalue())
    except OSError as error:
        raise RequestError(f"{name} {out}: {error.strerror}") from None
