"""Pictures and videos: the pixels of transformers' Pillow code from every kind of source, and errors for all that is broken."""

from __future__ import annotations

import base64
import builtins
import io
import struct
import warnings
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyengine as pe
from pyengine.media import image as image_module
from pyengine.errors import ImageError, RequestError
from pyengine.media.image import Image, open_image, resize
from pyengine.media.video import open_video, Video

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)
SAVED = {"PNG": {}, "JPEG": {"quality": 90}, "WEBP": {"lossless": True}, "GIF": {}, "BMP": {}, "TIFF": {"compression": "tiff_lzw"}}


def encoded(picture: PIL.Image.Image, kind: str, **how: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **how)
    return file.getvalue()


def picture_of(mode: str) -> PIL.Image.Image:
    """Random content in a Pillow mode; alpha and palette included."""
    rgba = PIL.Image.fromarray(RNG.integers(0, 256, (11, 9, 4), dtype=np.uint8), "RGBA")
    if mode == "P":
        return rgba.convert("RGB").quantize(7)
    if mode == "PA":
        return rgba.convert("RGB").quantize(7).convert("PA")
    if mode == "LAB":
        return PIL.Image.frombytes("LAB", (9, 11), RNG.bytes(3 * 99))
    return rgba.convert(mode) if "A" in mode else rgba.convert("RGB").convert(mode)


# ------------------------------------------------------------------------------------- against transformers

MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]


@pytest.mark.parametrize("mode", MODES)
def test_pillow_images_become_the_pixels_of_transformers(mode: str) -> None:
    transforms = pytest.importorskip("transformers.image_transforms")
    picture = picture_of(mode)
    assert picture.mode == mode
    np.testing.assert_array_equal(open_image(picture).pixels, transforms.convert_to_rgb(picture, return_numpy=True))


def test_transparent_palettes_and_colour_keys_as_in_transformers() -> None:
    transforms = pytest.importorskip("transformers.image_transforms")
    palette = picture_of("P")
    sources = [encoded(palette, "PNG", transparency=3), encoded(palette, "GIF", transparency=2),
               encoded(palette, "PNG", transparency=bytes([255, 0, 128, 9])),
               encoded(PIL.Image.fromarray(PIXELS), "PNG", transparency=tuple(map(int, PIXELS[3, 4])))]
    for content in sources:
        expected = transforms.convert_to_rgb(PIL.Image.open(io.BytesIO(content)), return_numpy=True)
        assert (expected == 255).all(axis=2).any()                       # something transparent became white
        np.testing.assert_array_equal(open_image(content).pixels, expected)


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_as_transformers_loads_them(kind: str, orientation: int, tmp_path: Path) -> None:
    utils = pytest.importorskip("transformers.image_utils")
    how = dict(SAVED[kind])
    if kind not in ("GIF", "BMP"):                                       # these two have no EXIF
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        how["exif"] = exif
    content = encoded(PIL.Image.fromarray(PIXELS), kind, **how)
    path = tmp_path / "picture"
    path.write_bytes(content)
    expected = np.array(utils.load_image(str(path)))
    if kind not in ("GIF", "BMP"):
        assert expected.shape == ((13, 17, 3) if orientation < 5 else (17, 13, 3))
    url = f"data:image/{kind.lower()};base64," + base64.b64encode(content).decode()
    for source in (path, str(path), content, bytearray(content), memoryview(content), url):
        np.testing.assert_array_equal(open_image(source).pixels, expected)


def test_a_pillow_image_is_not_turned() -> None:
    """Processors of transformers take it as it is; only files are turned."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    content = encoded(PIL.Image.fromarray(PIXELS), "PNG", exif=exif)
    np.testing.assert_array_equal(open_image(PIL.Image.open(io.BytesIO(content))).pixels, PIXELS)
    np.testing.assert_array_equal(open_image(content).pixels, np.rot90(PIXELS, -1))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", "float64"])
def test_arrays_as_transformers_takes_them(channels: int, dtype: str) -> None:
    transforms = pytest.importorskip("transformers.image_transforms")
    x = RNG.integers(0, 256, (6, 7, channels), dtype=np.uint8).astype(dtype)
    if dtype.startswith("float"):
        x = RNG.random((6, 7, channels)).astype(dtype)
    rgb = transforms.convert_to_rgb(x, return_numpy=True, input_data_format="channels_last")
    expected = np.array(transforms.to_pil_image(rgb, input_data_format="channels_last"))
    np.testing.assert_array_equal(open_image(x).pixels, expected)


@pytest.mark.parametrize("size", [(1, 1), (13, 17), (400, 3), (31, 257)])
@pytest.mark.parametrize("to", [(1, 1), (13, 17), (28, 56), (224, 224), (7, 300)])
@pytest.mark.parametrize("resample", range(6))
def test_resize_is_that_of_transformers(size: tuple[int, int], to: tuple[int, int], resample: int) -> None:
    backends = pytest.importorskip("transformers.image_processing_backends")
    utils = pytest.importorskip("transformers.image_utils")
    pixels = np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8)
    theirs = backends.PilBackend().resize(pixels.transpose(2, 0, 1), utils.SizeDict(height=to[0], width=to[1]), resample)
    np.testing.assert_array_equal(resize(pixels, *to, resample), theirs.transpose(1, 2, 0))


# ------------------------------------------------------------------------------------- what differs, by hand

def test_sixteen_bits_keep_the_upper_byte() -> None:
    grey = np.array([[0, 255, 256, 0x1234, 0x8000, 0xffff]], np.uint16)
    expected = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    picture = PIL.Image.fromarray(grey)
    for source in (grey, grey[..., None], grey.astype(">u2"), picture, encoded(picture, "PNG"), encoded(picture, "TIFF")):
        np.testing.assert_array_equal(open_image(source).pixels, expected)
    np.testing.assert_array_equal(open_image(encoded(picture, "PNG", transparency=0x1234)).pixels[0, 3], [255] * 3)
    colour = np.array([[[0x0100, 0xff00, 0x00ff, 0xffff], [0x1234, 0, 0, 0]]], np.uint16)      # [1, 2, 4]
    np.testing.assert_array_equal(open_image(colour).pixels, [[[1, 255, 0], [255, 255, 255]]])
    np.testing.assert_array_equal(open_image(colour[..., :3]).pixels, [[[1, 255, 0], [0x12, 0, 0]]])


def test_pillow_reads_sixteen_bit_colour_in_the_same_way() -> None:
    rows = struct.pack(">B6H", 0, 0x12ff, 0x8000, 0xffff, 0x00ff, 0x0100, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", struct.pack(">2I5B", 2, 1, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        png += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    np.testing.assert_array_equal(open_image(png).pixels, [[[0x12, 0x80, 0xff], [0, 1, 0]]])


def test_a_picture_of_floats_follows_arrays() -> None:
    x = np.array([[0, .5, 1]], np.float32)
    np.testing.assert_array_equal(open_image(PIL.Image.fromarray(x)).pixels[..., 0], [[0, 127, 255]])
    whole = np.array([[0, 200]], np.int32)
    np.testing.assert_array_equal(open_image(PIL.Image.fromarray(whole)).pixels[..., 1], whole)
    with pytest.raises(ImageError, match="mode I.*scale"):
        open_image(PIL.Image.fromarray(np.array([[0, 256]], np.int32)))


def test_every_level_survives_floats() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for dtype in (np.float32, np.float64):
        np.testing.assert_array_equal(open_image(levels.astype(dtype) / dtype(255)).pixels[..., 2], levels)


def test_bool_is_black_and_white() -> None:
    np.testing.assert_array_equal(open_image(np.array([[True, False]])).pixels, [[[255] * 3, [0] * 3]])


def test_first_picture_of_several() -> None:
    frames = [PIL.Image.new("RGB", (5, 4), c) for c in ("red", "blue")]
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        np.testing.assert_array_equal(open_image(content).pixels, np.array(frames[0]))


def test_cmyk_jpeg() -> None:
    picture = PIL.Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert np.abs(open_image(encoded(picture, "JPEG")).pixels.astype(int) - [0, 255, 255]).max() <= 2


# ------------------------------------------------------------------------------------- the value

def test_an_image_is_frozen_and_its_own() -> None:
    x = PIXELS.copy()
    image = open_image(x)
    x[:] = 0
    np.testing.assert_array_equal(image.pixels, PIXELS)
    with pytest.raises(ValueError, match="read-only"):
        image.pixels[0, 0, 0] = 1
    assert image.size == (17, 13) and open_image(image) is image


def test_digest_is_of_shape_pixels_and_options() -> None:
    other = PIXELS.copy()
    other[-1, -1, -1] ^= 1
    images = [open_image(PIXELS), open_image(other), open_image(PIXELS.reshape(17, 13, 3)),
              open_image(PIXELS, pan_and_scan=True), open_image(PIXELS, pan_and_scan=False),
              open_image(PIXELS, pan_and_scan=True, max_pixels=9)]
    assert len({i.digest for i in images}) == len(images)
    assert open_image(PIL.Image.fromarray(PIXELS)).digest == images[0].digest
    assert open_image(images[3], max_pixels=9).digest == images[5].digest
    assert Image(PIXELS, {"max_pixels": 9, "pan_and_scan": True}).digest == images[5].digest


def test_wrong_values() -> None:
    with pytest.raises(RequestError, match="option 'x'"):
        open_image(PIXELS, x=[1])
    with pytest.raises(ImageError, match="uint8"):
        Image(PIXELS[..., 0])
    with pytest.raises(ImageError, match=r"moveaxis"):
        open_image(np.zeros((3, 8, 8), np.uint8))
    for x in (np.full((2, 2), 1.5), np.array([[0, np.nan]]), np.array([[-.1]])):
        with pytest.raises(ImageError, match="0 to 1"):
            open_image(x)
    for x in (np.array([[256]]), np.array([[-1]]), np.zeros((2, 2), complex), np.array([["a"]])):
        with pytest.raises(ImageError, match="scale them first"):
            open_image(x)
    for x in (np.zeros((0, 3, 3), np.uint8), np.zeros((2, 2, 2), np.uint8), np.zeros(3, np.uint8), np.zeros((1, 2, 3, 3)),
              PIL.Image.new("RGB", (0, 5)), 7, None, [PIXELS]):
        with pytest.raises(ImageError):
            open_image(x)
    for bad in ((0, 4, 2), (4, 0, 2), (4, 4, 6), (1 << 20, 1 << 20, 2)):
        with pytest.raises(RequestError, match="resize"):
            resize(PIXELS, *bad)


# ------------------------------------------------------------------------------------- what is broken

def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    cases = [(tmp_path / "gone.png", "gone.png: there is no such file"), (str(tmp_path), "not a file"), ("\0", "no such file"),
             (tmp_path / "empty.png", "empty.png: the file is empty"), (tmp_path / "text.png", "text.png: not an image format"),
             (b"", "it is empty"), ("https://example.com/a.png", "example.com/a.png: pyengine fetches nothing"),
             ("data:image/png,xx", "must read data:"), ("data:image/png;base64,@@", "not base64"), ("data:;base64,", "empty")]
    for source, message in cases:
        with pytest.raises(ImageError, match=message):
            open_image(source)


def test_size_is_checked_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(PIL.Image.fromarray(PIXELS), "PNG")
    monkeypatch.setattr(image_module, "MAX_PIXELS", 13 * 17)
    open_image(content)
    monkeypatch.setattr(image_module, "MAX_PIXELS", 13 * 17 - 1)
    monkeypatch.setattr(PIL.Image.Image, "load", lambda self: pytest.fail("decoded"))
    for source in (content, PIXELS, PIL.Image.open(io.BytesIO(content))):
        with pytest.raises(ImageError, match="17 x 13 pixels are more than 220; make the picture smaller"):
            open_image(source)


@pytest.mark.parametrize("limit", [None, 1 << 26])
def test_bombs(limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused whatever the user has set Pillow's own limit to, which stays as it was."""
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
    png = bytearray(encoded(PIL.Image.new("1", (8, 8)), "PNG"))
    png[16:24] = struct.pack(">2I", 60_000, 60_000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    still = encoded(PIL.Image.new("RGB", (16, 16)), "WEBP")[12:]
    frame = bytes(6) + bytes([15, 0, 0, 15, 0, 0, 1, 0, 0, 0]) + still
    webp = b"WEBPVP8X" + struct.pack("<I", 10) + bytes([2, 0, 0, 0, 0x1f, 0x4e, 0, 0x1f, 0x4e, 0]) \
        + b"ANIM" + struct.pack("<I", 6) + bytes(6) + b"ANMF" + struct.pack("<I", len(frame)) + frame
    gif = bytearray(encoded(PIL.Image.new("L", (8, 8)), "GIF"))
    gif[6:10] = b"\xff\xff\xff\xff"
    for content in (bytes(png), b"RIFF" + struct.pack("<I", len(webp)) + webp, bytes(gif)):
        with pytest.raises(ImageError, match="smaller, or cut it"):
            open_image(content)
    assert PIL.Image.MAX_IMAGE_PIXELS == limit


WRITERS = [*SAVED.items(), ("JPEG", {"progressive": True}), ("TIFF", {"compression": "tiff_adobe_deflate"}), ("TIFF", {})]
MODES_OF = {"JPEG": ("RGB", "L", "CMYK"), "TIFF": ("RGB", "L", "P", "RGBA", "CMYK")}
SMALL = {f"{kind}-{mode}-{i}": encoded(PIL.Image.fromarray(PIXELS).convert(mode), kind, **how)
         for i, (kind, how) in enumerate(WRITERS) for mode in MODES_OF.get(kind, ("RGB", "L", "P", "RGBA"))}


@pytest.mark.parametrize("name", SMALL)
def test_cut_files_are_errors_or_pictures(name: str) -> None:
    content = SMALL[name]
    failed = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in range(0, len(content), max(1, len(content) // 60)):
            try:
                assert open_image(content[:n]).pixels.dtype == np.uint8
            except ImageError:
                failed += 1
    assert failed > 20, "most cuts must be noticed"
    assert open_image(content).size == (17, 13)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(sorted(SMALL)), st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=8),
       st.integers(0, 1 << 16), st.binary(max_size=6))
def test_changed_files_are_errors_or_pictures(name: str, changes: list[tuple[int, int]], at: int, inserted: bytes) -> None:
    content = bytearray(SMALL[name])
    for where, byte in changes:
        content[where % len(content)] = byte
    at %= len(content)
    content[at:at] = inserted
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(image_module, "MAX_PIXELS", 1 << 22)               # keeps the test light
        try:
            image = open_image(bytes(content))
        except ImageError:
            return
    assert image.pixels.ndim == 3


# ------------------------------------------------------------------------------------- video

def frames_of(n: int, height: int = 32, width: int = 48) -> list[np.ndarray]:
    """Frames that tell their number: flat grey 20 i, red on the left."""
    frames = [np.full((height, width, 3), 20 * i, np.uint8) for i in range(n)]
    for frame in frames:
        frame[:, :width // 3] = (255, 0, 0)
    return frames


def video_file(path: Path, codec: str, pix_fmt: str, frames: list[np.ndarray], rate: Fraction = Fraction(5)) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    return path


def test_a_list_of_frames() -> None:
    frames = frames_of(5)
    second, third = (PIL.Image.fromarray(f) for f in frames[1:3])
    video = pe.Video([frames[0], second, encoded(third, "PNG"), *frames[3:]], fps=2.0)
    assert (len(video), video.fps, video.size, video.duration) == (5, 2.0, (48, 32), 2.5)
    for read, i in zip(video.read([0, 2, 2, 4]), [0, 2, 2, 4], strict=True):
        np.testing.assert_array_equal(read.pixels, frames[i])
    same = open_video(np.stack(frames), fps=2)
    assert same.digest == video.digest
    others = [open_video(frames), open_video(frames, fps=3), open_video(frames[:4], fps=2), open_video(same, fps=4),
              open_video(frames, fps=2, max_pixels=8), open_video(frames[::-1], fps=2)]
    assert len({v.digest for v in [same, *others]}) == 7
    assert Video(frames).duration is None


def test_wrong_frames() -> None:
    frames = frames_of(3)
    with pytest.raises(ImageError, match="at least one frame"):
        Video([])
    with pytest.raises(ImageError, match="frame 1 of the video: gone.png"):
        Video([frames[0], "gone.png"])
    with pytest.raises(ImageError, match="frame 2 of the video is 9 x 9, the first frame is 48 x 32"):
        Video([*frames[:2], np.zeros((9, 9), np.uint8)])
    with pytest.raises(ImageError, match="open_video opens a file"):
        Video("film.mp4")
    for fps in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(RequestError, match="fps"):
            Video(frames, fps=fps)
    for indices in ([3], [-1], [1, 0]):
        with pytest.raises(RequestError, match="frames"):
            list(Video(frames).read(indices))


@pytest.mark.parametrize("name, codec, pix_fmt", [("a.mkv", "ffv1", "bgr0"), ("a.avi", "ffv1", "bgr0")])
def test_frames_of_a_lossless_file(name: str, codec: str, pix_fmt: str, tmp_path: Path) -> None:
    frames = frames_of(12)
    path = video_file(tmp_path / name, codec, pix_fmt, frames, Fraction(5, 2))
    for source in (path, str(path), path.read_bytes()):
        video = open_video(source)
        assert (len(video), video.fps, video.size, video.duration) == (12, 2.5, (48, 32), 4.8)
        for read, i in zip(video.read([1, 5, 5, 11]), [1, 5, 5, 11], strict=True):
            np.testing.assert_array_equal(read.pixels, frames[i])
        np.testing.assert_array_equal(video.frames[-2].pixels, frames[10])
        assert [f.pixels[0, -1, 0] for f in video.frames] == [20 * i for i in range(12)]
        assert list(video.read([])) == []
    assert open_video(path).digest == open_video(path.read_bytes()).digest != open_video(path, fps=1).digest
    assert open_video(path, fps=1).duration == 12


@pytest.mark.parametrize("name, codec", [("a.mp4", "mpeg4"), ("a.ts", "mpeg2video"), ("b.mp4", "libx264")])
def test_frames_are_those_of_transformers(name: str, codec: str, tmp_path: Path) -> None:
    """B-frames too (libx264): the order is that of display."""
    utils = pytest.importorskip("transformers.video_utils")
    av = pytest.importorskip("av")
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    path = video_file(tmp_path / name, codec, "yuv420p", frames_of(12), Fraction(25))
    wanted = [0, 3, 7, 11]
    theirs, metadata = utils.read_video_pyav(str(path), lambda metadata, **_: wanted)
    ours = open_video(path)
    np.testing.assert_array_equal(np.stack([f.pixels for f in ours.read(wanted)]), theirs)
    assert ours.fps == metadata.fps and len(ours) == (metadata.total_num_frames or 12)     # .ts states no number


def test_sideways_films_are_turned(tmp_path: Path) -> None:
    content = bytearray(video_file(tmp_path / "a.mp4", "mpeg4", "yuv420p", frames_of(2)).read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40                             # ISO 14496-12, TrackHeaderBox version 0
    clockwise = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)
    content[matrix:matrix + 36] = clockwise
    video = open_video(bytes(content))
    assert video.size == (32, 48)
    pixels = video.frames[1].pixels                                      # red was left, so now it is on top
    assert pixels[:12, :, 0].min() > 200 and pixels[20:, :, 0].max() < 60


def test_a_playlist_reads_no_other_file(tmp_path: Path) -> None:
    other = video_file(tmp_path / "a.ts", "mpeg2video", "yuv420p", frames_of(3), Fraction(25))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{other.as_uri()}\n#EXT-X-ENDLIST\n".encode()
    with pytest.raises(ImageError, match="cannot be decoded as video"):
        open_video(playlist)


def test_broken_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = video_file(tmp_path / "a.mkv", "ffv1", "bgr0", frames_of(8)).read_bytes()
    with pytest.raises(ImageError, match="no such file"):
        open_video(tmp_path / "gone.mp4")
    with pytest.raises(ImageError, match="cannot be decoded as video"):
        open_video(b"no video at all" * 9)
    rng = np.random.default_rng(1)
    for n in range(1, len(content), len(content) // 25):
        changed = bytearray(content)
        changed[n] ^= int(rng.integers(1, 256))
        for damaged in (content[:n], bytes(changed)):
            try:
                video = open_video(damaged)
                assert all(frame.size == video.size for frame in video.read(range(len(video))))
            except ImageError:
                pass
    monkeypatch.setattr(image_module, "MAX_PIXELS", 48 * 32 - 1)
    with pytest.raises(ImageError):
        open_video(content)


def test_without_pyav_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    importer = builtins.__import__

    def without_av(name: str, *args: object, **kwargs: object) -> object:
        if name == "av":
            raise ImportError("No module named 'av'")
        return importer(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(ImageError, match="pip install av.*pe.Video"):
        open_video("film.mp4")
