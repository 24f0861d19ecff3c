"""Where pictures and videos come from: paths, bytes, data URLs and base64, as files that can be read."""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from pyengine.errors import ImageError

BUFFERS = (bytes, bytearray, memoryview)
LONGEST_PATH = 4096                          # PATH_MAX of Linux; a longer text is meant as something else

# How pictures and videos begin, so that base64 is told from a path. An MP4, AVIF or HEIC has "ftyp" behind its length.
_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"\x1aE\xdf\xa3")


@contextmanager
def opened(source: object, kind: str) -> Iterator[tuple[IO[bytes], str]]:
    """Give the file behind a path, bytes or a data URL, and what to call it in messages. Raises: ImageError."""
    if isinstance(source, BUFFERS):
        content = content_of(source, kind)
        name = f"{kind} of {len(content)} bytes"
    elif isinstance(source, str) and source[:5].lower() == "data:":
        content, name = data_url(source), "data URL"
    elif isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
        raise ImageError(f"{source[:100]}: pyengine fetches nothing: download the {kind}, then give its path or bytes")
    elif isinstance(source, (str, os.PathLike)):
        path = path_of(source, kind)
        with opened_path(path, path[:200], kind) as file:
            yield file, path[:200]
        return
    else:
        raise ImageError(f"a {kind} is a path, bytes or a data URL (a picture also a Pillow image or a NumPy array), "
                         f"not {type(source).__name__}")
    if not content:
        raise ImageError(f"{name}: it is empty")
    yield io.BytesIO(content), name


def content_of(source: bytes | bytearray | memoryview, kind: str) -> bytes:
    """Return the bytes of a buffer. Raises: ImageError for a memoryview that was released."""
    try:
        return bytes(source)
    except ValueError as e:
        raise ImageError(f"{kind}: {e}") from e


def path_of(source: str | os.PathLike[str], kind: str) -> str:
    """Return a path as text. Raises: ImageError for a path-like object that has none."""
    try:
        return os.fsdecode(source)
    except Exception as e:                                   # __fspath__ is somebody's code
        raise ImageError(f"a {kind} given as {type(source).__name__}: it names no path: {e or type(e).__name__}") from e


def opened_path(path: str, name: str, kind: str) -> IO[bytes]:
    if not os.path.isfile(path):                             # of a pipe or device, a read may never end
        problem = "this is not a file" if os.path.exists(path) else "there is no such file"
        raise ImageError(f"{name}: {problem}; give the path of a {kind}")
    try:
        if os.path.getsize(path) == 0:
            raise ImageError(f"{name}: the file is empty")
        return open(path, "rb")
    except OSError as e:
        raise ImageError(f"{name}: cannot be read: {e.strerror}") from e


def data_url(url: str) -> bytes:
    """Return the content of "data:<type>;base64,<content>" (RFC 2397)."""
    head, comma, content = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ImageError(f"data URL {url[:40]!r}...: it must read data:image/<type>;base64,<content>")
    return decoded_base64(content, f"data URL {url[:40]!r}...")


def decoded_base64(text: str, name: str) -> bytes:
    """Return the content of base64; spaces, line breaks and missing padding are allowed, as browsers do (WHATWG's
    forgiving-base64).

    Raises: ImageError.
    """
    from urllib.parse import unquote_to_bytes

    try:
        content = b"".join(unquote_to_bytes(text).split())
        return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
    except (binascii.Error, ValueError) as e:
        raise ImageError(f"{name}: its content is not base64: {e}") from e


def is_base64(text: str) -> bool:
    """Say whether a text is the base64 of a picture or video, by the way in which those begin: a path it is not."""
    try:
        start = base64.b64decode(text[:64].encode("ascii").translate(None, b" \t\r\n")[:32], validate=True)
    except (binascii.Error, ValueError):
        return False
    return start.startswith(_STARTS) or start[4:8] == b"ftyp" or (start[:2] == b"BM" and start[6:10] == bytes(4))
