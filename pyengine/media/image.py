"""Pictures and videos as pixels: reading them from wherever they come, and Pillow's resizing.

Pixels are those that transformers' Pillow processors start from, value for value, so that a model sees what it was
trained on (transformers 5.23: image_transforms.convert_to_rgb and to_pil_image, image_utils.load_image):

    transparency    laid over white, as `convert_to_rgb` does. differs: given a file's name, `load_image` drops alpha
                    before that, which brings up colours that nobody was to see; here every source gets white.
    orientation     EXIF's is applied to files, bytes and data URLs, as `load_image` does; a Pillow image is taken as
                    it is, as the processors do.
    16 bits         the upper byte, which is how Pillow reads 16-bit RGB. differs: its `convert` clips 16-bit grey at
                    255, so that almost every pixel turns white.
    floats          0 to 1, times 255, rounded towards zero, as `to_pil_image` does
    CMYK, LAB, palette, grey, 1 bit ...     Pillow's `convert`
    several pictures in one file            the first
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, IO
from urllib.parse import unquote_to_bytes

import PIL.ImageOps
import numpy as np

from pyengine.errors import ImageError, RequestError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 2 * (1 << 30) // 4 // 3        # where Pillow, and so transformers, refuses; up to 20 bytes each to decode
MAX_FILE_BYTES = 1 << 31                    # MAX_PIXELS uncompressed, four channels of 16 bits, are 1.4e9


@dataclass(frozen=True, eq=False)
class Image:
    """A picture, and the settings of the model's processor for it.

    pixels   uint8 [h, w, 3], read-only
    options  by name; the model's processor refuses those that it does not have (Gemma 3: pan_and_scan=True)
    Raises: ImageError when pixels have another shape or type; RequestError for an option that is no plain value.
    """

    pixels: np.ndarray
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pixels = np.array(self.pixels, order="C")            # a copy, so that nobody else can write to it
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
            raise ImageError(f"pixels are uint8 [height, width, 3], not {pixels.dtype} {list(pixels.shape)}")
        pixels.flags.writeable = False
        object.__setattr__(self, "pixels", pixels)
        object.__setattr__(self, "options", checked_options(self.options))

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.pixels.shape[1], self.pixels.shape[0]

    @cached_property
    def digest(self) -> bytes:
        """sha256 of shape, pixels and options: what a model makes of two pictures of one digest is the same."""
        sha = hashlib.sha256(repr((self.pixels.shape, sorted(self.options.items()))).encode())
        sha.update(self.pixels)
        return sha.digest()

    def __repr__(self) -> str:
        return f"Image({self.size[0]}x{self.size[1]}{''.join(f', {k}={v!r}' for k, v in self.options.items())})"


def known_options(options: Mapping[str, Any], *names: str) -> None:
    """Refuse options that a model's processor does not have. Raises: RequestError naming those that it has."""
    for name in options:
        if name not in names:
            raise RequestError(f"option {name!r}: this model's processor has {', '.join(names) or 'none'}")


def open_image(source: object, /, **options: Any) -> Image:
    """Read a picture.

    source   a path, the bytes of a file, a data URL (base64), a Pillow image, an Image, or an array [h, w] or
             [h, w, 1 | 3 | 4] of uint8, uint16 (0 to 65535), bool, other integers (0 to 255) or floats (0 to 1)
    options  settings of the model's processor for this picture
    Raises: ImageError naming the source when it is missing, damaged, too large, or of an unknown kind.
    """
    if isinstance(source, Image):
        return Image(source.pixels, {**source.options, **options}) if options else source
    if isinstance(source, PIL.Image.Image):
        return Image(decoded(source, "picture"), options)
    if isinstance(source, np.ndarray):
        return Image(rgb_of_array(source, "picture"), options)
    with opened(source, "picture") as (file, name):
        return Image(decoded(file, name), options)


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in options.items():
        if not isinstance(value, (bool, int, float, str, type(None))):
            raise RequestError(f"option {name!r} is a number, a text, True or False, not {type(value).__name__}")
    return dict(options)


# -------------------------------------------------------------------------------------------- sources

@contextmanager
def opened(source: object, kind: str) -> Iterator[tuple[IO[bytes], str]]:
    """The file behind a path, bytes or a data URL, and what to call it in messages."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        content = bytes(source)
        name = f"{kind} of {len(content)} bytes"
    elif isinstance(source, str) and source[:5].lower() == "data:":
        content, name = data_url(source), "data URL"
    elif isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
        raise ImageError(f"{source[:100]}: pyengine fetches nothing: download the {kind}, then give its path or bytes")
    elif isinstance(source, (str, os.PathLike)):
        name = str(source)[:200]
        with opened_path(source, name, kind) as file:
            yield file, name
        return
    else:
        raise ImageError(f"a {kind} is a path, bytes or a data URL (a picture also a Pillow image or a NumPy array), "
                         f"not {type(source).__name__}")
    if not content:
        raise ImageError(f"{name}: it is empty")
    yield io.BytesIO(content), name


def opened_path(path: str | os.PathLike[str], name: str, kind: str) -> IO[bytes]:
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
    """The content of "data:<type>;base64,<content>" (RFC 2397)."""
    head, comma, content = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ImageError(f"data URL {url[:40]!r}...: it must read data:image/<type>;base64,<content>")
    try:
        return base64.b64decode(b"".join(unquote_to_bytes(content).split()), validate=True)
    except (binascii.Error, ValueError) as e:
        raise ImageError(f"data URL {url[:40]!r}...: its content is not base64: {e}") from e


# -------------------------------------------------------------------------------------------- pixels

def decoded(source: IO[bytes] | PIL.Image.Image, name: str) -> np.ndarray:
    """Pixels of a file or of a Pillow image: uint8 [h, w, 3]."""
    try:
        if isinstance(source, PIL.Image.Image):
            check_size(source.width, source.height, name)
            return rgb_of_pillow(source, name)
        if source.seek(0, io.SEEK_END) > MAX_FILE_BYTES:
            raise ImageError(f"{name}: the file has more than {MAX_FILE_BYTES} bytes; make the picture smaller first")
        with PIL.Image.open(source, formats=FORMATS) as image:
            name = f"{name} ({image.format})"
            check_size(image.width, image.height, name)      # known from the header; nothing is decoded yet
            PIL.ImageOps.exif_transpose(image, in_place=True)
            return rgb_of_pillow(image, name)
    except ImageError:
        raise
    except PIL.UnidentifiedImageError as e:
        raise ImageError(f"{name}: it is no picture, or its header is damaged; known are {', '.join(FORMATS)}") from e
    except PIL.Image.DecompressionBombError as e:
        raise ImageError(f"{name}: {e} Make the picture smaller, or cut it, first") from e
    except Exception as e:                                   # Pillow's plugins raise whatever their parsing trips over
        raise ImageError(f"{name}: cannot be decoded: {e or type(e).__name__}; the file may be cut or damaged") from e


def check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name}: it has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name}: {width} x {height} pixels are more than {MAX_PIXELS}; "
                         "make the picture smaller, or cut it, first")


def rgb_of_pillow(image: PIL.Image.Image, name: str) -> np.ndarray:
    if image.mode[0] == "I" or image.mode == "F":            # `convert` would clip what is above 255
        pixels, key = np.asarray(image), image.info.get("transparency")
        if isinstance(key, int):                             # PNG's tRNS: this grey is transparent
            pixels = np.where(pixels == key, np.uint16(0xffff), pixels)
        return rgb_of_array(pixels, f"{name}, mode {image.mode}")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def rgb_of_array(x: np.ndarray, name: str) -> np.ndarray:
    """An array [h, w] or [h, w, 1 | 3 | 4] as uint8 [h, w, 3]; a fourth channel is alpha, over white."""
    shape = list(x.shape)
    x = x[..., None] if x.ndim == 2 else x
    if x.ndim != 3 or x.shape[2] not in (1, 3, 4):
        hint = "; move the channels last: np.moveaxis(x, 0, -1)" if x.ndim == 3 and x.shape[0] in (1, 3, 4) else ""
        raise ImageError(f"{name}: an array is [height, width] or [height, width, 1, 3 or 4], not {shape}{hint}")
    check_size(x.shape[1], x.shape[0], name)
    if x.dtype.kind == "f":
        if not (x.min() >= 0 and x.max() <= 1):              # NaN fails too
            raise ImageError(f"{name}: floats are 0 to 1, these are {x.min():g} to {x.max():g}; scale them first")
        if x.shape[2] == 4:
            x = (x[..., 3:] * x[..., :3] + (1 - x[..., 3:])).astype(x.dtype)
        x = (x.astype(np.float64) * 255).astype(np.float32).astype(np.uint8)
    elif x.dtype.kind == "b":
        x = x.astype(np.uint8) * np.uint8(255)
    elif x.dtype.kind == "u" and x.dtype.itemsize == 2:
        x = (x >> 8).astype(np.uint8)
    elif x.dtype.kind in "iu" and x.min() >= 0 and x.max() <= 255:
        x = x.astype(np.uint8)
    else:
        raise ImageError(f"{name}: values are uint8, uint16, bool, integers 0 to 255 or floats 0 to 1; "
                         f"these are {x.dtype}: scale them first")
    if x.shape[2] == 4:
        alpha = x[..., 3:] / 255
        x = np.round(alpha * x[..., :3] + (1 - alpha) * 255).astype(np.uint8)
    return np.broadcast_to(x, (*x.shape[:2], 3))


def resize(pixels: np.ndarray, height: int, width: int, resample: int) -> np.ndarray:
    """Resize uint8 [h, w, 3] to [height, width, 3] with Pillow's filter of that number (2 bilinear, 3 bicubic).

    Bit for bit what transformers' PilBackend.resize gives: Pillow widens the filter when it shrinks, rounds to 8 bits
    between its horizontal and its vertical pass, and takes no shortcut (`reducing_gap` is None there).
    Raises: RequestError for a size or a filter that there cannot be.
    """
    if height < 1 or width < 1 or height * width > MAX_PIXELS or resample not in range(6):
        raise RequestError(f"resize to {width} x {height} with filter {resample}: sizes are 1 or more and together "
                           f"{MAX_PIXELS} pixels at most, filters 0 to 5")
    image = PIL.Image.fromarray(pixels)
    return np.array(image.resize((width, height), resample=PIL.Image.Resampling(resample)))
