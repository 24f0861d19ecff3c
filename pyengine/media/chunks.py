"""PNG files without the parts that say nothing about pixels: those may be damaged, or far larger than the picture.

Browsers show such pictures; Pillow refuses them for a text of more than 1 MiB, a colour profile of that size, a checksum.
"""

from __future__ import annotations

import io
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import IO

PNG = b"\x89PNG\r\n\x1a\n"
_NEEDED = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_TURNING = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")       # texts that may tell how a picture is turned
LONGEST_NOTE = 1 << 20                                                # bytes of EXIF or XMP, unpacked: Pillow's own limit


class Spliced(io.RawIOBase):
    """A file read as if it were these pieces of another file, (start, length), one behind the other."""

    def __init__(self, file: IO[bytes], pieces: list[tuple[int, int]]):
        self._file, self._pieces, self._at = file, pieces, 0
        *self._begins, self._size = accumulate((length for _, length in pieces), initial=0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, buffer: memoryview) -> int:               # type: ignore[override]
        if self._at >= self._size:
            return 0
        number = bisect_right(self._begins, self._at) - 1
        (start, length), within = self._pieces[number], self._at - self._begins[number]
        self._file.seek(start + within)
        got = self._file.read(min(length - within, len(buffer)))
        buffer[: len(got)] = got
        self._at += len(got)
        return len(got)


def bare_png(file: IO[bytes]) -> IO[bytes]:
    """Return a PNG with its pixels, palette, transparency and what tells how it is turned; the file itself if it is no PNG.

    What tells how it is turned comes first, so that it is known before anything is decoded. A chunk that runs past the
    file's end, and all behind it, is left as it is: the picture is cut.
    """
    file.seek(0)
    if file.read(8) != PNG:
        file.seek(0)
        return file
    head, notes, body = [(0, 8)], [], []
    colour, seen = 0, set()
    for kind, start, length in _png_chunks(file):
        whole = (start - 8, length + 12)
        if kind == b"IHDR" and not seen:
            file.seek(start)
            header = file.read(min(length, 13))
            colour = header[9] if len(header) == 13 else 0
            head.append(whole)
        elif kind in _NEEDED or not kind or not 0x60 < kind[0] < 0x7b:        # a small first letter: ancillary
            if body and body[-1][0] + body[-1][1] == whole[0]:
                body[-1] = (body[-1][0], body[-1][1] + whole[1])              # data in many chunks is one piece
            else:
                body.append(whole)
        elif kind == b"tRNS" and kind not in seen and _sound(file, kind, start, length, (1, 256) if colour == 3 else None, colour):
            body.append(whole)
        elif kind not in seen and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt") and length <= LONGEST_NOTE:
            if _sound(file, kind, start, length) and (kind == b"eXIf" or _turns(file, kind, start, length)):
                notes.append(whole)
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            seen.add(kind)
    return io.BufferedReader(Spliced(file, head + notes + body))


def _png_chunks(file: IO[bytes]) -> Iterator[tuple[bytes, int, int]]:
    """Return (kind, where its content begins, length) of each chunk; what is cut or malformed is the last one, of kind b""."""
    size, at = file.seek(0, io.SEEK_END), 8
    while at < size:
        file.seek(at)
        head = file.read(8)
        length = int.from_bytes(head[:4], "big")
        if len(head) < 8 or at + 12 + length > size:
            yield b"", at + 8, size - at - 12
            return
        yield head[4:], at + 8, length
        if head[4:] == b"IEND":
            return
        at += 12 + length


def _sound(file: IO[bytes], kind: bytes, start: int, length: int, bounds: tuple[int, int] | None = None, colour: int = -1) -> bool:
    """Say whether a short chunk's checksum is right, and transparency has the length that goes with the colours (PNG 11.3.1.1)."""
    if kind == b"tRNS":
        low, high = bounds or {0: (2, 2), 2: (6, 6)}.get(colour, (1, 0))
        if not low <= length <= high:
            return False
    file.seek(start)
    content = file.read(length)
    return zlib.crc32(content, zlib.crc32(kind)) == int.from_bytes(file.read(4), "big")


def _turns(file: IO[bytes], kind: bytes, start: int, length: int) -> bool:
    """Say whether a text is EXIF or XMP, whole, and short when it is unpacked."""
    file.seek(start)
    content = file.read(length)
    if not content.startswith(_TURNING):
        return False
    packed = content[content.index(b"\0") + 1:]
    if kind == b"iTXt":
        if len(packed) < 2 or packed[:2] == b"\0\0":
            return len(packed) >= 2
        packed = packed[2:].split(b"\0", 2)[-1]
    elif kind == b"zTXt":
        packed = packed[1:]
    else:
        return True
    unpacker = zlib.decompressobj()
    try:
        return len(unpacker.decompress(packed, LONGEST_NOTE + 1)) <= LONGEST_NOTE and unpacker.eof
    except zlib.error:
        return False
