"""Which files of this computer the messages of a conversation may show."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TYPE_CHECKING

from pyengine.errors import ImageError, RequestError
from pyengine.media.sources import decoded_base64, is_base64, LONGEST_PATH, path_of

if TYPE_CHECKING:
    from pyengine.media.messages import Medium

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?://|(?<=file:)/)", re.IGNORECASE)     # one letter: a drive of Windows


@dataclass(frozen=True)
class MediaPolicy:
    """What a message may name. Data URLs, base64, bytes, arrays and opened pictures are always taken.

    paths    files by their paths: a text in the place of a picture ("image", "path", "images"), or a Path
    urls     files by addresses: "file://...", and a path in the place of an address ("image_url", "url")
    folders  only files below these folders, with symbolic links followed; None: any file
    fetch    what gives the bytes of a picture at an http or https address; None: the network is not asked
    most     pictures, and frames that are given one by one, that one conversation may have; None: any number

    The default is for a program that writes its messages itself. A server, whose messages are other people's, takes
    MediaPolicy(paths=False), or names folders. A refusal never tells whether a file is there.
    Raises: RequestError for settings of other types.
    """

    paths: bool = True
    urls: bool = False
    folders: tuple[str | os.PathLike[str], ...] | None = None
    fetch: Callable[[str], bytes] | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.paths, bool) or not isinstance(self.urls, bool):
            raise RequestError("MediaPolicy: paths and urls are True or False")
        if self.folders is not None:
            if isinstance(self.folders, (str, os.PathLike)):
                raise RequestError(f"MediaPolicy: folders is a list of folders, as in folders=[{str(self.folders)!r}]")
            object.__setattr__(self, "folders", tuple(os.path.realpath(path_of(folder, "folder")) for folder in self.folders))

    def admit(self, source: Any, kind: str, url: bool = False) -> Any:
        """Give what may be read in place of a source that a message names: its bytes, a path, or the source as it is.

        kind  "picture" or "video", for messages; url: it stands in the place of an address
        Raises: ImageError for what this policy does not allow.
        """
        if isinstance(source, (list, tuple)):                # frames; a list in the list is refused when it is opened
            return [frame if isinstance(frame, (list, tuple)) else self.admit(frame, "picture", url) for frame in source]
        if isinstance(source, str):
            text = str.__str__(source)
            if text[:5].lower() == "data:":
                return text
            scheme = _SCHEME.match(text)
            if scheme and scheme[1].lower() in ("http", "https") and kind == "picture" and self.fetch is not None:
                return self.fetch(text)
            if scheme and scheme[1].lower() != "file":
                raise ImageError(f"{text[:100]!r}: pyengine fetches nothing: download the {kind}, then give its bytes or a data URL")
            if not scheme and is_base64(text):
                return decoded_base64(text, f"{kind} {text[:24]!r}...")
            if len(text) > LONGEST_PATH:
                raise ImageError(f"{kind} {text[:24]!r}...: this is neither a data URL, nor base64 of a format that is read here, nor a path")
            return self._file(path_of_url(text, kind) if scheme else text, kind, bool(scheme) or url, text)
        return self._file(path_of(source, kind), kind, False, str(source)) if isinstance(source, os.PathLike) else source

    def check_number(self, media: Sequence[Medium]) -> None:
        """Check how many pictures and frames there are, before any is read. Raises: RequestError for more than are allowed."""
        n = sum(len(m.source) if isinstance(m.source, (list, tuple)) else 1 for m in media)
        if self.most is not None and n > self.most:
            raise RequestError(f"messages: {n} pictures and frames, where {self.most} are taken at once")

    def _file(self, path: str, kind: str, url: bool, shown: str) -> Path:
        name = f"{kind} {shown[:200]!r}"
        if not (self.urls if url else self.paths):
            how = "by its address" if url else "by its path"
            raise ImageError(f"{name}: no file is opened {how} here; give its bytes as a data URL or as base64"
                             + (", or in Python {'type': 'image', 'path': ...}" if url and self.paths else ""))
        if self.folders is None:
            return Path(path)
        try:
            real = os.path.realpath(path)
            inside = any(real.startswith(os.path.join(str(folder), "")) for folder in self.folders) and os.path.isfile(real)
        except (OSError, ValueError):                        # a name that no file can have
            inside = False
        if not inside:
            raise ImageError(f"{name}: in the folders that may be read here there is no such file")
        return Path(real)


def path_of_url(url: str, kind: str) -> str:
    """Return the path in a file:// URL. Raises: ImageError for a file on another machine, and a malformed URL."""
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    try:
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise ImageError(f"{kind} {url[:200]!r}: the file is on {parts.netloc[:100]}; copy it here first")
        return url2pathname(parts.path)
    except ValueError as e:
        raise ImageError(f"{kind} {url[:200]!r}: this is no address of a file: {e}") from e
