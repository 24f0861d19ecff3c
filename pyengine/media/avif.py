"""AVIF and HEIC files before they are decoded: what a file is, and how many pixels its codec will make of it.

An AVIF states its size twice: in its container, and in the AV1 stream. The decoder believes the stream, whose size the
container's says nothing about: two kilobytes that say 64 x 64 may hold 16384 x 16384.

Sources: AVIF 1.1 (aomediacodec.github.io/av1-avif); boxes: ISO 14496-12, 4.2 and 8.11; streams: AV1 Bitstream & Decoding
Process Specification, 5.3 and 5.5.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import IO

from pyengine.errors import ImageError

MAX_ITEMS = 4096                    # pictures in a file: tiles, alpha, thumbnails
MAX_UNITS = 1 << 16                 # of their streams, all together
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def is_avif(file: IO[bytes]) -> bool:
    """Say whether a file says that it is AVIF."""
    file.seek(0)
    head = file.read(64)
    brands = head[8:max(16, min(64, int.from_bytes(head[:4], "big")))]
    return head[4:8] == b"ftyp" and any(brands[i:i + 4] in (b"avif", b"avis") for i in range(0, len(brands), 4))


def is_heif(file: IO[bytes]) -> bool:
    """Say whether a file says that it is HEIC, which phones make, or another HEIF."""
    file.seek(0)
    head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF


def still_avif(file: IO[bytes], exif: bool) -> tuple[IO[bytes], int]:
    """Return an AVIF's still picture, and the pixels that its streams decode to; of an animation the picture that stands for it.

    exif  False: its EXIF gets another name, by which no reader looks for it
    Raises: ImageError when the file is malformed.
    """
    file.seek(0)
    content = bytearray(file.read())
    try:
        content[8:12] = b"avif"                              # of an animation: readers take its still picture then
        pixels = _coded_pixels(content)
        if not exif:
            for at, end in _boxes(content, 0, len(content), b"meta"):
                content[at:end] = content[at:end].replace(b"Exif", b"none")
    except IndexError as e:
        raise ImageError("its boxes are cut or damaged") from e
    return io.BytesIO(content), pixels


class _Bits:
    """Big-endian numbers out of bytes. Raises: IndexError at their end."""

    def __init__(self, content: bytes | bytearray, at: int = 0, end: int | None = None):
        self._content, self._at, self._end = content, 8 * at, 8 * (len(content) if end is None else end)

    def take(self, n: int) -> int:
        start, self._at = self._at, self._at + n
        if self._at > self._end:
            raise IndexError("cut")
        first, last = start // 8, -(-self._at // 8)
        return int.from_bytes(self._content[first:last], "big") >> (8 * last - self._at) & ((1 << n) - 1)

    def text(self, n: int) -> bytes:
        return self.take(8 * n).to_bytes(n, "big")


def _boxes(content: bytes | bytearray, at: int, end: int, kind: bytes) -> Iterator[tuple[int, int]]:
    """Return (start, end) of the content of each box of a kind."""
    while at + 8 <= end:
        bits = _Bits(content, at, end)
        size, found, head = bits.take(32), bits.text(4), 8
        if size == 1:
            size, head = bits.take(64), 16
        size = size or end - at
        if size < head or at + size > end:
            return
        if found == kind:
            yield at + head, at + size
        at += size


def _coded_pixels(content: bytearray) -> int:
    """Return the pixels of all AV1 streams that the items of a file hold."""
    pixels = n_items = n_units = 0
    for start, end in list(_boxes(content, 0, len(content), b"meta"))[:1]:
        start += 4                                           # version and flags
        streams = _items(content, start, end)
        data = next(_boxes(content, start, end, b"idat"), (0, 0))
        for number, extents in _places(content, start, end, data):
            if number in streams:
                n_items += 1
                item = b"".join(content[a:b] for a, b in extents) if len(extents) > 1 else memoryview(content)[slice(*extents[0])]
                area, units = _largest(item, MAX_UNITS - n_units)
                pixels, n_units = pixels + area, n_units + units
    if not pixels:
        raise ImageError("it holds no still picture")
    return pixels


def _items(content: bytearray, start: int, end: int) -> set[int]:
    """Return numbers of the items that are AV1 streams (ItemInfoEntry, versions 2 and 3)."""
    found: set[int] = set()
    for at, stop in _boxes(content, start, end, b"iinf"):
        wide = content[at] > 0
        for begin, finish in _boxes(content, at + (8 if wide else 6), stop, b"infe"):
            bits = _Bits(content, begin, finish)
            version, _ = bits.take(8), bits.take(24)
            number, _ = bits.take(32 if version > 2 else 16), bits.take(16)
            if bits.text(4) == b"av01":
                found.add(number)
    return found


def _places(content: bytearray, start: int, end: int, data: tuple[int, int]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Return (number, [(start, end) ...]) of each item (ItemLocationBox)."""
    for at, stop in _boxes(content, start, end, b"iloc"):
        bits = _Bits(content, at, stop)
        version, _ = bits.take(8), bits.take(24)
        offset, length, base, index = (8 * bits.take(4) for _ in range(4))
        n = bits.take(32 if version > 1 else 16)
        if n > MAX_ITEMS:
            raise ImageError(f"it holds {n} items, more than {MAX_ITEMS}")
        for _ in range(n):
            number = bits.take(32 if version > 1 else 16)
            method = bits.take(16) & 15 if version else 0
            bits.take(16)
            origin = bits.take(base)
            low, high = (data if method == 1 else (0, len(content)))
            extents = []
            for _ in range(bits.take(16)):
                bits.take(index if version else 0)
                first = low + origin + bits.take(offset)
                last = first + (bits.take(length) or high - first)
                if method > 1 or last > high:
                    raise ImageError("its items lie outside of it")
                extents.append((first, last))
            if sum(last - first for first, last in extents) > len(content):
                raise ImageError("its items hold more than the file")
            if extents:
                yield number, extents


def _largest(stream: bytes | memoryview, budget: int) -> tuple[int, int]:
    """Return the pixels of the largest frame that a stream may hold, and its number of units (OBUs)."""
    at = units = area = 0
    while at < len(stream):
        units += 1
        if units > budget:
            raise ImageError(f"its streams have more than {MAX_UNITS} units")
        head = stream[at]
        at += 2 if head & 4 else 1
        size = len(stream) - at
        if head & 2:
            size = shift = 0
            while True:                                      # leb128
                byte = stream[at]
                at += 1
                size |= (byte & 127) << shift
                shift += 7
                if byte < 128 or shift > 56:
                    break
        if head >> 3 & 15 == 1:
            area = max(area, _frame_size(_Bits(bytes(stream[at:at + min(size, 512)]))))
        at += size
    if not area:
        raise ImageError("one of its pictures is no AV1 stream")
    return area, units


def _frame_size(bits: _Bits) -> int:
    """Return max_frame_width times max_frame_height of a sequence header."""
    bits.take(3 + 1)                                         # seq_profile, still_picture
    if bits.take(1):                                         # reduced_still_picture_header
        bits.take(5)
    else:
        model = delay = 0
        if bits.take(1):                                     # timing_info
            bits.take(32 + 32)
            if bits.take(1):                                 # uvlc
                zeros = 0
                while not bits.take(1):
                    zeros += 1
                bits.take(zeros if zeros < 32 else 0)
            model = bits.take(1)
            if model:                                        # decoder_model_info
                delay = bits.take(5) + 1
                bits.take(32 + 5 + 5)
        shown = bits.take(1)                                 # initial_display_delay_present_flag
        for _ in range(bits.take(5) + 1):                    # operating points
            bits.take(12)
            if bits.take(5) > 7:
                bits.take(1)
            if model and bits.take(1):
                bits.take(2 * delay + 1)
            if shown and bits.take(1):
                bits.take(4)
    width, height = bits.take(4) + 1, bits.take(4) + 1
    return (bits.take(width) + 1) * (bits.take(height) + 1)
