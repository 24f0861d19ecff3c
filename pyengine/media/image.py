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
    CMYK, LAB, palette, grey, 1 bit ...     Pillow's `convert`; colour profiles are not applied, as there
    several pictures in one file            the first

A file is judged by its header: its size, and the bytes that decoding it takes, are bounded before anything is decoded.
What says nothing about pixels (texts, profiles, malformed EXIF) never makes a picture unreadable.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, IO

import PIL.Image
import numpy as np

from pyengine.errors import ImageError, PyEngineError, RequestError
from pyengine.media.avif import is_avif, is_heif, still_avif
from pyengine.media.chunks import bare_png
from pyengine.media.sources import opened
from pyengine.media.views import MAX_DECODING

try:
    from PIL.AvifImagePlugin import SUPPORTED as _AVIF
except ImportError:                          # before Pillow 11.3
    _AVIF = False

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if _AVIF else []))
MAX_PIXELS = 2 * (1 << 30) // 4 // 3        # where Pillow, and so transformers, refuses
MAX_SIDE = 1 << 18                           # Pillow's resizing keeps up to 32 bytes for each pixel of a side
MAX_FILE_BYTES = 1 << 30

# Bytes a pixel that decoders take beside Pillow's own picture: peak resident memory of 6000 x 6000 pixels, Pillow 13.0, rounded up.
_DECODERS = {"WEBP": 14, "AVIF": 8, "HEIF": 12, "TIFF": 5}
_PROGRESSIVE = 8                             # a JPEG in passes keeps all coefficients: 2 bytes, up to 4 channels
_CODED = 6                                   # an AVIF's frame as its codec gives it: 3 channels of 16 bits
MAX_PASSES = 256                             # of such a JPEG, each over the whole picture; 10 are usual
_STRIP = 1 << 22                             # pixels that are converted at once


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
        try:
            pixels = np.array(self.pixels, order="C")        # a copy, so that nobody else can write to it
        except Exception as error:                           # lists of unequal lengths, or what a stranger's __array__ raises
            raise ImageError(f"pixels are uint8 [height, width, 3], which this {type(self.pixels).__name__} is not: {error}") from None
        self._set(pixels, self.options)

    @classmethod
    def _of(cls, pixels: np.ndarray, options: Mapping[str, Any]) -> Image:
        """Make a picture of pixels that nobody else has: they are not copied."""
        image = cls.__new__(cls)
        image._set(pixels, options)
        return image

    def _set(self, pixels: np.ndarray, options: Mapping[str, Any]) -> None:
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
            raise ImageError(f"pixels are uint8 [height, width, 3], not {pixels.dtype} {list(pixels.shape)}")
        pixels.flags.writeable = False
        object.__setattr__(self, "pixels", pixels)
        object.__setattr__(self, "options", checked_options(options))

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


class PixelsWanted(Exception):
    """Somebody asks a Sketch for its pixels."""


class Sketch(Image):
    """A picture of which only size (width, height) and options are known: it tells whether a processor takes such a picture.

    decoding   bytes that reading its file takes for a moment
    """

    decoding: int

    def __init__(self, size: tuple[int, int], options: Mapping[str, Any], decoding: int = 0):
        object.__setattr__(self, "_size", size)
        object.__setattr__(self, "decoding", decoding)
        object.__setattr__(self, "options", checked_options(options))

    @property
    def size(self) -> tuple[int, int]:
        return self._size                                    # type: ignore[attr-defined, no-any-return]

    @property
    def pixels(self) -> np.ndarray:                          # type: ignore[override]
        raise PixelsWanted


Judge = Callable[[Image], None]                              # raises what a model's processor raises for such a picture


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
    return read_image(source, options)


def read_image(source: object, options: Mapping[str, Any], judge: Judge | None = None) -> Image:
    """Open a picture as `open_image` does; before anything is decoded, `judge` is asked about the picture that the file's header
    promises."""
    if isinstance(source, Image):
        return Image._of(source.pixels, {**source.options, **options}) if options else source
    if isinstance(source, PIL.Image.Image):
        with faults_of("picture"):
            check_size(source.width, source.height, "picture")
            return Image._of(rgb_of_pillow(source, "picture"), options)
    if isinstance(source, np.ndarray):
        return Image._of(rgb_of_array(np.asarray(source), "picture"), options)
    with opened(source, "picture") as (file, name):
        return Image._of(decoded(file, name, options, judge), options)


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(options, Mapping):
        raise RequestError(f"options are a mapping of names to values, not {type(options).__name__}")
    for name, value in options.items():
        if not isinstance(value, (bool, int, float, str, type(None))):
            raise RequestError(f"option {name!r} is a number, a text, True or False, not {type(value).__name__}")
    return dict(options)


# -------------------------------------------------------------------------------------------- files

@contextmanager
def faults_of(name: str) -> Iterator[None]:
    """Give what Pillow raises as ImageError."""
    try:
        yield
    except PyEngineError:
        raise
    except PIL.UnidentifiedImageError as e:
        raise ImageError(f"{name}: not an image format that is read here, or its header is damaged; read are "
                         f"{', '.join(FORMATS)}, and HEIC with the package pillow-heif") from e
    except PIL.Image.DecompressionBombError as e:
        raise ImageError(f"{name}: {e} Make the picture smaller, or cut it, first") from e
    except MemoryError as e:
        raise ImageError(f"{name}: there is not enough memory to decode it; make the picture smaller first") from e
    except Exception as e:                                   # Pillow's plugins raise whatever their parsing trips over
        raise ImageError(f"{name}: cannot be decoded: {e or type(e).__name__}; the file may be cut or damaged") from e


def decoded(file: IO[bytes], name: str, options: Mapping[str, Any], judge: Judge | None) -> np.ndarray:
    """Return pixels of a file: uint8 [h, w, 3], upright."""
    if file.seek(0, io.SEEK_END) > MAX_FILE_BYTES:
        raise ImageError(f"{name}: the file has more than {MAX_FILE_BYTES} bytes; make the picture smaller first")
    with faults_of(name):
        image, coded = opened_picture(file, name)
        with image:
            name = f"{name} ({image.format})"
            check_size(image.width, image.height, name)      # known from the header; nothing is decoded yet
            needed = check_decoding(image, coded, file, name)
            turn = 1 if image.format == "TIFF" else orientation(image)       # TIFF's reader turns by itself
            if judge is not None:
                judge(Sketch(image.size[::-1] if turn > 4 else image.size, options, needed))
            image.load()
            return rgb_of_pillow(image, name, turn)


def opened_picture(file: IO[bytes], name: str) -> tuple[PIL.Image.Image, int]:
    """Return a picture whose header was read, and the pixels of its codec's frames where they may be more than the header says."""
    if is_avif(file):
        plain, coded = still_avif(file, exif=True)
        try:
            return PIL.Image.open(plain, formats=FORMATS), coded
        except Exception:                                    # its reader trips over EXIF; the picture may be whole
            return PIL.Image.open(still_avif(file, exif=False)[0], formats=FORMATS), coded
    if is_heif(file):
        try:
            import pillow_heif
        except ImportError as e:
            raise ImageError(f"{name}: this is HEIC, which the package pillow-heif reads: `pip install pillow-heif`, "
                             "or save it as JPEG or PNG") from e
        file.seek(0)
        return pillow_heif.HeifImageFile(file), 0
    return PIL.Image.open(bare_png(file), formats=FORMATS), 0


def orientation(image: PIL.Image.Image) -> int:
    """Return how a file is turned (1 to 8), by its EXIF or XMP, as Pillow's `exif_transpose` reads it; 1 where that is
    malformed."""
    try:
        exif = PIL.Image.Image.getexif(image)                # PNG's own would decode the picture first
        turn = exif.get(0x0112, 1)
        return turn if type(turn) is int and 1 <= turn <= 8 else 1
    except Exception:                                        # its parsing raises SyntaxError, struct.error, ValueError ...
        return 1


def check_decoding(image: PIL.Image.Image, coded: int, file: IO[bytes], name: str) -> int:
    """Return the bytes that decoding a picture takes. Raises: ImageError where that is too much."""
    own = 1 if image.mode in ("1", "L", "P") else 2 if image.mode.startswith("I;16") else 4
    progressive = bool(image.info.get("progressive"))
    each = own + 3 + _DECODERS.get(str(image.format), 0) + (_PROGRESSIVE if progressive else 0)
    needed = image.width * image.height * each + coded * _CODED
    if image.format == "TIFF":
        tile = [image.tag_v2.get(tag, 0) for tag in (322, 323)]              # type: ignore[attr-defined]
        if not all(isinstance(n, int) for n in tile):
            raise ImageError(f"{name}: the size of its tiles is {tile}")
        needed += tile[0] * tile[1] * 8                      # of samples up to 16 bits, 4 of them
    if needed > MAX_DECODING:
        raise ImageError(f"{name}: decoding {image.width} x {image.height} pixels takes {needed >> 20} MiB, more than "
                         f"{MAX_DECODING >> 20}; make the picture smaller, or cut it, first")
    if progressive and passes(file) > MAX_PASSES:
        raise ImageError(f"{name}: a JPEG in more than {MAX_PASSES} passes; save it anew")
    return needed


def passes(file: IO[bytes]) -> int:
    """Return the scans of a JPEG, at most: markers SOS, which entropy-coded data cannot contain."""
    file.seek(0)
    n, last = 0, b""
    while block := file.read(1 << 20):
        n += (last + block).count(b"\xff\xda")
        last = block[-1:] if block[-1:] == b"\xff" else b""
    return n


# -------------------------------------------------------------------------------------------- pixels

def check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name}: it has no pixels ({width} x {height})")
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"{name}: {width} x {height} pixels: a side has {MAX_SIDE} at most; cut the picture first")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name}: {width} x {height} pixels are more than {MAX_PIXELS}; "
                         "make the picture smaller, or cut it, first")


def rgb_of_pillow(image: PIL.Image.Image, name: str, turn: int = 1) -> np.ndarray:
    """Return pixels of a Pillow image, turned as EXIF's `turn` says, in strips: nothing else as large as the picture is made."""
    width, height = image.size
    out = np.empty((width, height, 3) if turn > 4 else (height, width, 3), np.uint8)
    lying = unturned(out, turn)
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        strip = image if rows >= height else image.crop((0, top, width, min(top + rows, height)))
        lying[top:top + rows] = rgb_of_strip(strip, name)
    return out


def unturned(upright: np.ndarray, turn: int) -> np.ndarray:
    """Return the view of an upright picture that runs as the pixels of its file do (EXIF 3.0, 4.6.5.1.6: where row 0 and column
    0 are)."""
    x = upright.swapaxes(0, 1) if turn > 4 else upright
    return x[::-1 if turn in (3, 4, 6, 7) else 1, ::-1 if turn in (2, 3, 7, 8) else 1]


def rgb_of_strip(image: PIL.Image.Image, name: str) -> np.ndarray:
    if image.mode[0] == "I" or image.mode == "F":            # `convert` would clip what is above 255
        pixels, key = np.asarray(image), image.info.get("transparency")
        if isinstance(key, int):                             # PNG's tRNS: this grey is transparent
            pixels = np.where(pixels == key, np.uint16(0xffff), pixels)
        return rgb_of_array(pixels, f"{name}, mode {image.mode}")
    if image.mode == "La":                                   # which Pillow turns into nothing else
        image = image.convert("LA")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def rgb_of_array(x: np.ndarray, name: str) -> np.ndarray:
    """Return an array [h, w] or [h, w, 1 | 3 | 4] as uint8 [h, w, 3], a new one; a fourth channel is alpha, over white."""
    shape = list(x.shape)
    x = x[..., None] if x.ndim == 2 else x
    if x.ndim != 3 or x.shape[2] not in (1, 3, 4):
        hint = "; move the channels last: np.moveaxis(x, 0, -1)" if x.ndim == 3 and x.shape[0] in (1, 3, 4) else ""
        raise ImageError(f"{name}: an array is [height, width] or [height, width, 1, 3 or 4], not {shape}{hint}")
    check_size(x.shape[1], x.shape[0], name)
    if x.dtype.kind == "f" and not (x.min() >= 0 and x.max() <= 1):          # NaN fails too
        raise ImageError(f"{name}: floats are 0 to 1, these are {x.min():g} to {x.max():g}; scale them first")
    words = x.dtype.kind == "u" and x.dtype.itemsize == 2
    if x.dtype.kind not in "fbiu" or x.dtype.kind in "iu" and not words and not (x.min() >= 0 and x.max() <= 255):
        raise ImageError(f"{name}: values are uint8, uint16, bool, integers 0 to 255 or floats 0 to 1; "
                         f"these are {x.dtype}: scale them first")
    out = np.empty((*x.shape[:2], 3), np.uint8)
    rows = max(1, _STRIP // x.shape[1])
    for top in range(0, len(x), rows):
        out[top:top + rows] = rgb_of_values(x[top:top + rows])
    return out


def rgb_of_values(x: np.ndarray) -> np.ndarray:
    """Return values in their range [h, w, 1 | 3 | 4] -> uint8 [h, w, 1 | 3]."""
    if x.dtype.kind == "f":
        if x.shape[2] == 4:
            x = (x[..., 3:] * x[..., :3] + (1 - x[..., 3:])).astype(x.dtype)
        x = (x.astype(np.float64) * 255).astype(np.float32).astype(np.uint8)
    elif x.dtype.kind == "b":
        x = x.astype(np.uint8) * np.uint8(255)
    elif x.dtype.itemsize == 2 and x.dtype.kind == "u":
        x = (x >> 8).astype(np.uint8)
    else:
        x = x.astype(np.uint8)
    if x.shape[2] == 4:
        alpha = x[..., 3:] / 255
        x = np.round(alpha * x[..., :3] + (1 - alpha) * 255).astype(np.uint8)
    return x


def resize(pixels: np.ndarray, height: int, width: int, resample: int) -> np.ndarray:
    """Resize uint8 [h, w, 3] to [height, width, 3] with Pillow's filter of that number (2 bilinear, 3 bicubic).

    Bit for bit what transformers' PilBackend.resize gives: Pillow widens the filter when it shrinks, rounds to 8 bits
    between its horizontal and its vertical pass, and takes no shortcut (`reducing_gap` is None there).
    Raises: RequestError for a size or a filter that there cannot be.
    """
    check_resize(height, width, resample)
    image = PIL.Image.fromarray(pixels)
    return np.array(image.resize((width, height), resample=PIL.Image.Resampling(resample)))


def resize_floats(pixels: np.ndarray, height: int, width: int, resample: int) -> np.ndarray:
    """Do the same with float32 [h, w, 3], which is not rounded: torch's antialiased `interpolate`, as far as float32 is exact."""
    check_resize(height, width, resample)
    channels = [PIL.Image.fromarray(np.ascontiguousarray(pixels[..., i])) for i in range(3)]
    return np.stack([np.asarray(c.resize((width, height), resample=PIL.Image.Resampling(resample))) for c in channels], axis=2)


def check_resize(height: int, width: int, resample: int) -> None:
    """Raise RequestError for a size or a filter that there cannot be."""
    if not 1 <= height <= MAX_SIDE or not 1 <= width <= MAX_SIDE or height * width > MAX_PIXELS or resample not in range(6):
        raise RequestError(f"resize to {width} x {height} with filter {resample}: sides are 1 to {MAX_SIDE} and "
                           f"{MAX_PIXELS} pixels together at most, filters 0 to 5")
