"""Pictures that browsers read and that others make to do harm: ancillary damage, odd formats, bombs, and what memory they take."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

import pyengine as pe
from pyengine.errors import ImageError, PyEngineError, RequestError
from pyengine.media import image as image_module
from pyengine.media import video as video_module
from pyengine.media.chunks import bare_png, Spliced
from pyengine.media.image import FORMATS, open_image, read_image, Sketch
from pyengine.media.video import open_video, read_video, Video

RNG = np.random.default_rng(3)
PIXELS = RNG.integers(0, 256, (21, 34, 3), dtype=np.uint8)
avif = pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow reads no AVIF")


def saved(kind: str, pixels: np.ndarray = PIXELS, **how: Any) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, kind, **how)
    return file.getvalue()


def chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def png_with(*chunks: bytes, at: str = "front", whole: bytes | None = None) -> bytes:
    whole = whole or saved("PNG")
    return whole[:33] + b"".join(chunks) + whole[33:] if at == "front" else whole[:-12] + b"".join(chunks) + whole[-12:]


def png(width: int, height: int, depth: int, colour: int, row: bytes | None = None) -> bytes:
    """A PNG of one row again and again."""
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush() if row else b""
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
            + chunk(b"IDAT", data) + chunk(b"IEND", b""))


EXIF_6 = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"


# ------------------------------------------------------------------------------------- what browsers read

MALFORMED = {"no TIFF header": b"XXXX\0\0\0\x08", "six bytes": b"MM\0*\0\0", "nothing": b"", "an offset beyond": b"II*\0\xff\xff\xff\xff",
             "a count beyond": b"MM\0*\0\0\0\x08\xff\xff\x01\x12", "no number": EXIF_6.replace(b"\0\x03\0\0\0\x01\0\x06", b"\0\x02\0\0\0\x04abc\0"),
             "nine": EXIF_6.replace(b"\0\x01\0\x06", b"\0\x01\0\x09"), "a loop": b"MM\0*\0\0\0\x08\0\x01\x87\x69\0\x04\0\0\0\x01\0\0\0\x08\0\0\0\x08"}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", pytest.param("AVIF", marks=avif)])
@pytest.mark.parametrize("exif", MALFORMED)
def test_malformed_exif_leaves_the_picture_as_it_lies(kind: str, exif: str) -> None:
    if kind == "PNG":
        content = png_with(chunk(b"eXIf", MALFORMED[exif]))
    elif kind == "AVIF":
        tags = PIL.Image.Exif()
        tags[0x010f] = "somebody who makes cameras"
        plain, old = saved("AVIF", exif=tags), tags.tobytes()[6:]
        content = plain.replace(old, MALFORMED[exif].ljust(len(old), b"\0"))
        assert content != plain
    else:
        prefix = b"Exif\0\0" if kind == "JPEG" else b""
        content = saved(kind, exif=prefix + (MALFORMED[exif] or b"?"), **({"lossless": True} if kind == "WEBP" else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = open_image(content)
    assert picture.size == (34, 21)
    if kind in ("PNG", "WEBP"):
        np.testing.assert_array_equal(picture.pixels, PIXELS)


@pytest.mark.parametrize("at", ["front", "back"])
def test_exif_and_xmp_turn_a_png_wherever_they_stand(at: str) -> None:
    raw = b"\nexif\n%8d\n%s\n" % (len(EXIF_6), EXIF_6.hex().encode())
    xmp = b'<x:xmpmeta tiff:Orientation="6"/>'
    for content in (chunk(b"eXIf", EXIF_6), chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)),
                    chunk(b"tEXt", b"Raw profile type exif\0" + raw), chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
                    chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp))):
        np.testing.assert_array_equal(open_image(png_with(content, at=at)).pixels, np.rot90(PIXELS, -1))


LONG = zlib.compress(b"a" * 2_000_000)
ANCILLARY = {
    "zTXt": chunk(b"zTXt", b"workflow\0\0" + LONG), "iTXt": chunk(b"iTXt", b"workflow\0\1\0\0\0" + LONG),
    "tEXt": chunk(b"tEXt", b"workflow\0" + b"a" * 2_000_000), "iCCP": chunk(b"iCCP", b"profile\0\0" + LONG),
    "a long XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG), "a long EXIF": chunk(b"zTXt", b"Raw profile type exif\0\0" + LONG),
    "no zlib": chunk(b"zTXt", b"Raw profile type exif\0\0no zlib"), "no hex": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  4\nzzzz\n"),
    "a method": chunk(b"zTXt", b"Raw profile type exif\0\7" + LONG), "a short iTXt": chunk(b"iTXt", b"XML:com.adobe.xmp\0"),
    "an XMP without end": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG[:-9]),
    "a wrong checksum": chunk(b"tEXt", b"a\0b", 1), "a wrong checksum of EXIF": chunk(b"eXIf", EXIF_6, 1),
    "a short gAMA": chunk(b"gAMA", b"1"), "a short pHYs": chunk(b"pHYs", b"1"), "a short cHRM": chunk(b"cHRM", b"1"), "an empty sRGB": chunk(b"sRGB", b""),
    "tRNS of another length": chunk(b"tRNS", b"1"), "an unknown one": chunk(b"abCd", b"x" * 99), "two sRGB": chunk(b"sRGB", b"\0") * 2,
    "an animation that is none": chunk(b"acTL", b"\0\0\0\0\0\0\0\0"), "a short acTL": chunk(b"acTL", b"1"), "fcTL": chunk(b"fcTL", b"12"),
    "many": chunk(b"teXt", b"") * 20_000,
}


@pytest.mark.parametrize("at", ["front", "back"])
@pytest.mark.parametrize("name", ANCILLARY)
def test_what_says_nothing_about_pixels_costs_no_picture(name: str, at: str) -> None:
    np.testing.assert_array_equal(open_image(png_with(ANCILLARY[name], at=at)).pixels, PIXELS)


def test_other_chunks_between_the_data() -> None:
    whole = saved("PNG")
    start = whole.index(b"IDAT") + 4
    data = whole[start:start + int.from_bytes(whole[start - 8:start - 4], "big")]
    parts = b"".join(chunk(b"IDAT", data[i:i + 1]) + chunk(b"prVt", b"") for i in range(len(data)))
    np.testing.assert_array_equal(open_image(whole[:33] + parts + whole[-12:]).pixels, PIXELS)


def test_a_spliced_file_reads_as_its_pieces() -> None:
    content = bytes(range(100))
    pieces = [(0, 8), (50, 20), (10, 0), (20, 5), (90, 10)]
    file, expected = Spliced(io.BytesIO(content), pieces), b"".join(content[a:a + n] for a, n in pieces)
    assert file.read() == expected and file.read(4) == b""
    for n in (0, 7, 8, 27, 42, 43, 99):
        file.seek(n)
        assert b"".join(iter(lambda: file.read(9), b"")) == expected[n:]
    assert file.seek(-3, io.SEEK_END) == 40 and file.seek(1, io.SEEK_CUR) == 41 and file.tell() == 41


def test_files_that_are_no_png_are_themselves() -> None:
    for content in (b"", b"\x89PN", saved("JPEG")):
        assert bare_png(io.BytesIO(content)).read() == content


@avif
@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif_as_transformers_loads_it(orientation: int) -> None:
    from PIL import ImageOps

    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    for how in ({}, {"subsampling": "4:4:4", "quality": 100}):
        content = saved("AVIF", exif=exif, **how)
        expected = ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(content))).convert("RGB")
        np.testing.assert_array_equal(open_image(content).pixels, np.asarray(expected))
    rgba = np.dstack([PIXELS, RNG.integers(0, 256, PIXELS.shape[:2], dtype=np.uint8)])
    assert open_image(saved("AVIF", rgba)).size == (34, 21)


@avif
def test_an_animated_avif_shows_its_still_picture() -> None:
    file = io.BytesIO()
    frames = [PIL.Image.new("RGB", (16, 24), c) for c in ("red", "blue", "green")]
    frames[0].save(file, "AVIF", save_all=True, append_images=frames[1:])
    pixels = open_image(file.getvalue()).pixels.astype(int)
    assert pixels.shape == (24, 16, 3) and np.abs(pixels - [255, 0, 0]).max() < 9


def test_heic_says_what_reads_it(tmp_path: Path) -> None:
    head = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
    if "pillow_heif" in sys.modules or __import__("importlib.util").util.find_spec("pillow_heif"):
        with pytest.raises(ImageError, match="damaged"):
            open_image(head)
        pillow_heif = pytest.importorskip("pillow_heif")
        file = io.BytesIO()
        pillow_heif.from_pillow(PIL.Image.fromarray(PIXELS)).save(file, quality=-1, chroma=444, matrix_coefficients=0)
        assert open_image(file.getvalue()).size == (34, 21)
    else:
        with pytest.raises(ImageError, match="pip install pillow-heif"):
            open_image(head)


def test_profiles_and_colours() -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind in ("PNG", "WEBP", "TIFF"):
        content = saved(kind, icc_profile=profile, **({"lossless": True} if kind == "WEBP" else {}))
        np.testing.assert_array_equal(open_image(content).pixels, PIXELS)
    for kind in ("PNG", "WEBP", "TIFF", "JPEG"):                          # a profile that is none
        assert open_image(saved(kind, icc_profile=b"no profile" * 9)).size == (34, 21)


def test_what_is_no_picture_is_named_so() -> None:
    for content in (b"%PDF-1.7 ...", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"no picture", b"RIFF\0\0\0\0WAVEfmt "):
        with pytest.raises(ImageError, match=r"not an image format that is read here, .* PNG, JPEG, WEBP"):
            open_image(content)


# ------------------------------------------------------------------------------------- strips

MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I", "F", "La", "RGBa"]


@pytest.mark.parametrize("mode", MODES)
def test_strips_do_not_change_pixels(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rgba = PIL.Image.fromarray(RNG.integers(0, 256, (37, 19, 4), dtype=np.uint8), "RGBA")
    if mode == "LAB":
        picture = PIL.Image.frombytes("LAB", (19, 37), RNG.bytes(3 * 19 * 37))
    elif mode == "F":
        picture = PIL.Image.fromarray(RNG.random((37, 19)).astype(np.float32))
    elif mode == "I;16":
        picture = PIL.Image.fromarray(RNG.integers(0, 1 << 16, (37, 19), dtype=np.uint16))
    elif mode in ("P", "PA"):
        picture = rgba.convert("RGB").quantize(7)
        picture.info["transparency"] = 3
        picture = picture.convert(mode)
    elif mode == "La":
        picture = rgba.convert("LA").convert("La")
    else:
        picture = (rgba if "A" in mode or "a" in mode else rgba.convert("RGB")).convert(mode)
    arrays = [np.asarray(rgba), RNG.random((37, 19, 4)), RNG.integers(0, 1 << 16, (37, 19), dtype=np.uint16), np.asarray(rgba)[::-1, ::-2]]
    files = [saved("PNG", np.asarray(rgba)), saved("JPEG", np.asarray(rgba.convert("RGB")))]
    whole = [open_image(x).pixels for x in (picture, *arrays, *files)]
    monkeypatch.setattr(image_module, "_STRIP", 19 * 5)
    for x, expected in zip((picture, *arrays, *files), whole, strict=True):
        np.testing.assert_array_equal(open_image(x).pixels, expected)


# ------------------------------------------------------------------------------------- bombs

def in_child(work: Callable[[], object], gib: float = 6.0, seconds: int = 60) -> tuple[str, int]:
    """("ok" or the error's type and text, peak MiB above the start) of work in a child that has so much address space."""
    read, write = os.pipe()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if not (child := os.fork()):
        os.close(read)
        signal.alarm(seconds)
        n = int(gib * (1 << 30))
        resource.setrlimit(resource.RLIMIT_AS, (n, n))
        warnings.simplefilter("ignore")
        try:
            work()
            said = "ok"
        except BaseException as e:
            said = f"{'' if isinstance(e, PyEngineError) else 'foreign '}{type(e).__name__}: {e}"[:300]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        os.write(write, json.dumps([said, max(0, peak - before) >> 10]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        found = pipe.read()
    assert os.waitpid(child, 0)[1] == 0, "the child died or hung"
    said, peak = json.loads(found)
    return said, peak


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are in KiB, and limits hold, on Linux")


def tiff(width: int, height: int, *entries: tuple[int, int, int], content: bytes = b"") -> bytes:
    tags = {256: (4, width), 257: (4, height), 258: (3, 8), 259: (3, 8), 262: (3, 1), 277: (3, 1)}
    tags |= {tag: (kind, value) for tag, kind, value in entries}
    size = 8 + 2 + 12 * len(tags) + 4
    tags = {tag: (kind, size if value == -1 else value) for tag, (kind, value) in tags.items()}
    body = b"".join(struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", value) for tag, (kind, value) in sorted(tags.items()))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + body + bytes(4) + content


def packed_zeros(n: int) -> bytes:
    packer, block = zlib.compressobj(9), bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(n >> 20)) + packer.flush()


def bombs() -> Iterator[tuple[str, bytes, int]]:
    """(name, file, MiB that refusing or reading it may take)"""
    yield "1 bit grey", png(13_000, 13_000, 1, 0, bytes(1 + 13_000 // 8)), 760
    yield "RGBA", png(13_000, 13_000, 8, 6, bytes(1 + 13_000 * 4)), 64
    yield "16 bits", png(13_000, 13_000, 16, 6), 64
    yield "2^31 wide", png(0x7fffffff, 1, 8, 0), 64
    yield "10^8 x 1", png(100_000_000, 1, 8, 0, bytes(100_000_001)), 64
    yield "1 x 10^8", png(1, 100_000_000, 8, 0), 64
    yield "60,000 x 60,000", png(60_000, 60_000, 8, 2), 64
    for kind, head in ((b"zTXt", b"Raw profile type exif\0\0"), (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0"), (b"iCCP", b"profile\0\0"),
                       (b"zTXt", b"comment\0\0")):
        yield f"{kind.decode()} {head[:9]!r}", png_with(*[chunk(kind, head + packed_zeros(1 << 28))] * 9), 64
    yield "a tile of 2 GB", tiff(8, 8, (322, 4, 46_336), (323, 4, 46_336), (324, 4, -1), (325, 4, 2_000_000), content=packed_zeros(1 << 31)), 64
    yield "a strip of many rows", tiff(8, 8, (278, 4, 0xffffffff), (273, 4, -1), (279, 4, 99), content=packed_zeros(1 << 20)), 64
    yield "many samples", tiff(9000, 9000, (277, 3, 60_000), (273, 4, -1), (279, 4, 99), content=packed_zeros(1 << 20)), 64
    yield "BMP", b"BM" + bytes(8) + struct.pack("<IIiiHHIIiiII", 54, 40, 0x7ffffff, 0x7ffffff, 1, 24, 0, 0, 0, 0, 0, 0), 64
    gif = bytearray(saved("GIF"))
    yield "GIF", bytes(gif[:6] + b"\xff\xff\xff\xff" + gif[10:]), 64
    inner = gif.index(b",", 13 + 3 * 256 if gif[10] & 7 == 7 else 13)
    yield "a GIF's frame", bytes(gif[:inner + 5] + b"\xff\xff\xff\xff" + gif[inner + 9:]), 64
    still = saved("WEBP")[12:]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes([0, 0, 0, 0]) + (16_000).to_bytes(3, "little") * 2 + still
    yield "WebP", b"RIFF" + struct.pack("<I", len(body)) + body, 64


BOMBS = list(bombs()) if sys.platform.startswith("linux") else []


@linux
@pytest.mark.parametrize("name, content, mib", BOMBS, ids=[b[0] for b in BOMBS])
def test_bombs_take_little(name: str, content: bytes, mib: int) -> None:
    said, peak = in_child(lambda: open_image(content))
    assert not said.startswith("foreign"), said
    assert peak <= mib, (name, said, peak)


@linux
@avif
def test_an_avif_whose_stream_is_larger_than_it_says() -> None:
    content = saved("AVIF", np.zeros((6000, 6000, 3), np.uint8), speed=10, quality=10)
    at = content.index(b"ispe") + 8
    lying = content[:at] + struct.pack(">II", 64, 64) + content[at + 8:]
    seen: list[int] = []
    original = image_module.check_decoding
    try:
        image_module.check_decoding = lambda image, coded, file, name: seen.append(coded) or original(image, coded, file, name)
        open_image(lying)
    except ImageError:
        pass
    finally:
        image_module.check_decoding = original
    assert 36_000_000 <= seen[0] < 37_000_000                              # the stream's size is known before it is decoded
    limit = image_module.MAX_DECODING
    try:
        image_module.MAX_DECODING = 1 << 26
        said, peak = in_child(lambda: open_image(lying))
    finally:
        image_module.MAX_DECODING = limit
    assert said.startswith("ImageError") and "more than 64" in said and peak < 32, (said, peak)


@avif
def test_cut_and_changed_avifs_are_errors_or_pictures() -> None:
    content = saved("AVIF")
    rng, failed = np.random.default_rng(0), 0
    for n in range(0, len(content), max(1, len(content) // 150)):
        changed = bytearray(content)
        changed[n] ^= int(rng.integers(1, 256))
        for damaged in (content[:n], bytes(changed), content[:n] + b"\0\0\0\x08meta" + content[n:]):
            try:
                assert open_image(damaged).pixels.ndim == 3
            except ImageError:
                failed += 1
    assert failed > 150


def test_a_jpeg_in_too_many_passes() -> None:
    content = saved("JPEG", progressive=True)
    at = content.index(b"\xff\xda")
    again = content[at:-2]
    with pytest.raises(ImageError, match="more than 256 passes"):
        open_image(content[:at] + again * 60 + b"\xff\xd9")
    assert open_image(content).size == (34, 21)


@linux
def test_too_little_memory_is_said() -> None:
    big = png(9000, 9000, 8, 2, bytes(1 + 27_000))
    base = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE") / (1 << 30)
    said, _ = in_child(lambda: open_image(big), gib=base + 0.2)
    assert said.startswith("ImageError") and "not enough memory" in said, said


def test_resizing_keeps_its_sides() -> None:
    with pytest.raises(RequestError, match="sides are 1 to"):
        image_module.resize(PIXELS, 1, image_module.MAX_SIDE + 1, 2)
    with pytest.raises(ImageError, match="a side has"):
        open_image(np.zeros((1, image_module.MAX_SIDE + 1), np.uint8))


# ------------------------------------------------------------------------------------- the header's size comes first

def test_the_judge_is_asked_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, int], dict[str, Any]]] = []

    def refuse(sketch: Any) -> None:
        assert isinstance(sketch, Sketch)
        with pytest.raises(image_module.PixelsWanted):
            sketch.pixels
        seen.append((sketch.size, dict(sketch.options)))
        raise RequestError("too large for this model")

    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    turned = png_with(chunk(b"eXIf", EXIF_6), at="back")
    exif = PIL.Image.Exif()
    exif[0x0112] = 8
    for content, size in ((saved("PNG"), (34, 21)), (turned, (21, 34)), (saved("TIFF", exif=exif), (21, 34)), (saved("JPEG", exif=exif), (21, 34))):
        with pytest.raises(RequestError, match="too large for this model"):
            read_image(content, {"max_pixels": 9}, refuse)
        assert seen.pop() == (size, {"max_pixels": 9})


def test_frames_of_a_list_are_judged_by_their_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = saved("PNG"), png(3000, 3000, 8, 0, bytes(3001))
    sizes: list[tuple[int, tuple[int, int], float | None]] = []

    def judge(video: Video) -> None:
        sizes.append((len(video), video.size, video.fps))

    assert len(read_video([small] * 3, 2, {}, judge)) == 3 and sizes == [(3, (34, 21), 2.0)]
    with monkeypatch.context() as patch:
        patch.setattr(video_module, "MAX_FRAMES_BYTES", 3 * 34 * 21 * 3 - 1)
        with pytest.raises(ImageError, match="3 frames of 34 x 21"):
            open_video([small] * 3)
    with pytest.raises(ImageError, match="frame 1 of the video is 3000 x 3000"):
        monkeypatch.setattr(image_module, "rgb_of_pillow", _once(image_module.rgb_of_pillow))
        open_video([small, large])


def _once(function: Callable[..., Any]) -> Callable[..., Any]:
    calls: list[int] = []

    def wrapped(*args: Any) -> Any:
        calls.append(1)
        assert len(calls) == 1, "a second frame was decoded"
        return function(*args)

    return wrapped


def test_frames_of_a_film_have_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "bgr0"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8), "rgb24")))
        container.mux(stream.encode())
    assert open_video(path).size == (48, 32)
    monkeypatch.setattr(video_module, "MAX_FRAME_PIXELS", 32 * 48 - 1)
    with pytest.raises(ImageError, match="frames of 48 x 32 pixels"):
        open_video(path)


# ------------------------------------------------------------------------------------- arrays and odd values

def test_odd_arrays() -> None:
    x = np.arange(6 * 7 * 3, dtype=np.uint8).reshape(6, 7, 3)
    for view in (x[::-1], x[:, ::-1], x[:, :, ::-1], x[::2, ::3], np.asfortranarray(x), np.broadcast_to(x[:1], x.shape), x.view(np.ndarray)):
        np.testing.assert_array_equal(open_image(view).pixels, view)
    np.testing.assert_array_equal(open_image(np.ma.masked_array(x)).pixels, x)
    for bad in (np.full((2, 2), np.nan), np.full((2, 2, 4), np.inf), np.array([[1 << 63]], np.uint64), np.array([[-(1 << 63)]]),
                np.zeros((0, 0)), np.zeros((5, 0, 3)), np.zeros(()), np.zeros((2, 2), object), np.zeros((2, 2), "M8[s]"),
                np.zeros((2, 2), [("a", "u1")]), np.zeros((2, 2, 3), "U1"), np.zeros((1,) * 9), np.full((2, 2), -0.1, np.float16)):
        with pytest.raises(ImageError):
            open_image(bad)


class Bad(os.PathLike):
    def __init__(self, value: Any):
        self.value = value

    def __fspath__(self) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def test_odd_sources(tmp_path: Path) -> None:
    content = saved("PNG")
    path = tmp_path / "a.png"
    path.write_bytes(content)
    view = memoryview(content)
    strided = memoryview(b"".join(bytes([b, 0]) for b in content))[::2]
    for good in (view, strided, view.cast("B"), Bad(str(path)), Bad(os.fsencode(path)), type("Text", (str,), {})(path), bytearray(content)):
        assert open_image(good).size == (34, 21)
    view.release()
    for bad in (view, Bad(7), Bad(None), Bad(ValueError("no")), Bad("\0"), "\udfff", "x" * 5000, object(), type, print, float("nan"), True,
                {"url": 1}, {1}, range(3), (i for i in "ab"), "data:", "data:;base64,\udfff", "data:;base64,é"):
        for opened in (open_image, open_video):
            with pytest.raises(RequestError):
                opened(bad)


@pytest.mark.parametrize("fps", ["2", True, float("nan"), -1, 0, object(), [1], 1j, b"1"])
def test_rates_that_are_none(fps: Any) -> None:
    with pytest.raises(RequestError, match="frames per second"):
        pe.Video([PIXELS], fps=fps)
