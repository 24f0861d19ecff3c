"""Videos: frames in order, from files and lists."""

from __future__ import annotations

import hashlib
import math
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cached_property
from typing import Any

import PIL.Image
import numpy as np

from pyengine.errors import ImageError, PyEngineError, RequestError, shown
from pyengine.media.image import check_size, checked_options, Image, MAX_PIXELS, read_image
from pyengine.media.sources import opened

MAX_RATE = 1e9                       # frames a second
MAX_FRAME_PIXELS = 8192 * 4352               # of AV1's and HEVC's highest levels; decoders keep a score of frames
MAX_FRAMES_BYTES = 1 << 32                   # of the frames of a list that are decoded here: they are kept

# -------------------------------------------------------------------------------------------- video

class FileFrames(Sequence[Image]):
    """Frames of a video file, in the order in which they are shown; decoded when they are read, and not kept.

    fps   frames per second on average, as the file states it, or None
    size  (width, height), upright
    Frames are counted by walking the file's packets: headers may lack the number, or lie.
    """

    def __init__(self, source: object):
        self._source = source
        with self._container() as (container, stream, name):
            self._count = sum(1 for p in container.demux(stream) if p.size and not p.is_discard)
            rate = float(stream.average_rate or 0)
            if not self._count:
                raise ImageError(f"{name}: the video has no frames")
        self.fps = rate if 0 < rate < math.inf else None
        self.size = self[0].size

    @contextmanager
    def _container(self) -> Iterator[tuple[Any, Any, str]]:
        """Return (container, its first video stream, name), read from the start."""
        try:
            import av
        except ImportError as e:
            raise ImageError("video files are read by the package 'av', which is not installed: `pip install av`, "
                             "or give the frames: pe.Video([...], fps=...)") from e
        with opened(self._source, "video") as (file, name):
            try:
                # A playlist may name other files and addresses; nothing but this file is to be read.
                with av.open(file, options={"protocol_whitelist": "none"}) as container:
                    if not container.streams.video:
                        raise ImageError(f"{name}: there is no video in it")
                    stream = container.streams.video[0]
                    codec = stream.codec_context
                    if codec is None:
                        raise ImageError(f"{name}: the installed PyAV has no decoder for this video's codec")
                    check_frame_size(codec.width, codec.height, name)
                    codec.thread_type = "AUTO"
                    codec.options = {"max_pixels": str(min(MAX_PIXELS, MAX_FRAME_PIXELS))}
                    yield container, stream, name
            except PyEngineError:
                raise
            except Exception as e:                           # FFmpeg's errors have many types
                raise ImageError(f"{name}: cannot be decoded as video: {e}; the file may be cut or damaged") from e

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Image:                  # type: ignore[override]
        """Decode one frame. `read` is the way to several: each call here decodes the file from its start."""
        i = operator.index(i)
        if not -len(self) <= i < len(self):
            raise IndexError(f"frame {i} of {len(self)}")
        return next(self.read([i % len(self)]))

    def __iter__(self) -> Iterator[Image]:
        return self.read(range(len(self)))

    def read(self, indices: Iterable[int]) -> Iterator[Image]:
        """Yield the frames of these numbers, which do not fall. Decodes from the start, and so counts exactly."""
        wanted = checked_indices(indices, len(self))
        if not wanted:
            return
        with self._container() as (container, stream, name):
            at = 0
            for number, frame in enumerate(container.decode(stream)):
                if number < wanted[at]:
                    continue
                check_size(frame.width, frame.height, name)
                check_frame_size(frame.width, frame.height, name)
                pixels = frame.to_ndarray(format="rgb24")                                  # [h, w, 3]
                image = Image(np.rot90(pixels, round(frame.rotation / 90)))                # phones film lying
                while at < len(wanted) and wanted[at] == number:
                    yield image
                    at += 1
                if at == len(wanted):
                    return
            raise ImageError(f"{name}: frame {wanted[at]} of {len(self)} cannot be decoded; "
                             "the file may be cut or damaged")

    @cached_property
    def digest(self) -> bytes:
        """sha256 of the file."""
        sha = hashlib.sha256()
        with opened(self._source, "video") as (file, _):
            while block := file.read(1 << 20):
                sha.update(block)
        return sha.digest()


class Video:
    """A video: frames of one size at a steady rate, and the settings of the model's processor for it.

    frames   a list of whatever `open_image` reads (kept in memory), or FileFrames (decoded on demand)
    fps      frames per second of `frames`; None: unknown, and the model's processor takes its default
    options  settings of the model's processor, as for Image
    Raises: ImageError for no frames, one that cannot be read, or unequal sizes; RequestError for a rate that is none.
    """

    def __init__(self, frames: Iterable[object], /, fps: float | None = None, **options: Any):
        if isinstance(frames, (str, bytes, bytearray, memoryview, os.PathLike, Image, PIL.Image.Image)):
            raise ImageError("Video takes a list of frames; open_video opens a file")
        self.options: Mapping[str, Any] = checked_options(options)
        self.fps = checked_rate(fps)
        self.frames: Sequence[Image] = frames if isinstance(frames, FileFrames) else opened_frames(frames)
        self.size: tuple[int, int] = frames.size if isinstance(frames, FileFrames) else self.frames[0].size

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def duration(self) -> float | None:
        """Seconds, if the rate is known."""
        return len(self) / self.fps if self.fps else None

    def read(self, indices: Iterable[int]) -> Iterator[Image]:
        """Yield the frames of these numbers, which do not fall; of a file, one at a time is in memory.

        Raises: RequestError for a number outside the video; ImageError when a frame cannot be decoded or has another
        size than the first.
        """
        wanted = checked_indices(indices, len(self))
        frames = self.frames.read(wanted) if isinstance(self.frames, FileFrames) else (self.frames[i] for i in wanted)
        for number, frame in zip(wanted, frames):
            check_frame(number, frame, self.size)
            yield frame

    @cached_property
    def digest(self) -> bytes:
        """sha256 of the frames, or of the whole file, with rate and options."""
        sha = hashlib.sha256(repr((len(self), self.fps, sorted(self.options.items()))).encode())
        for part in [self.frames] if isinstance(self.frames, FileFrames) else self.frames:
            sha.update(part.digest)
        return sha.digest()

    def __repr__(self) -> str:
        return f"Video({len(self)} frames of {self.size[0]}x{self.size[1]}, fps={self.fps})"


def open_video(source: object, /, fps: float | None = None, **options: Any) -> Video:
    """Open a video: a path, the bytes of a file, a data URL (decoded by PyAV on demand), a list of frames, or a Video.

    fps   frames per second, instead of what the file or the Video states
    Raises: ImageError naming the source, or the package that is missing; as Video for a list.
    """
    return read_video(source, fps, options)


def read_video(source: object, fps: float | None, options: Mapping[str, Any], judge: Callable[[Video], None] | None = None) -> Video:
    """Open a video as `open_video` does; before the frames of a list are decoded, `judge` is asked about the video that they
    promise to be."""
    if isinstance(source, Video):
        return Video(source.frames, source.fps if fps is None else fps, **{**source.options, **options})
    if isinstance(source, (list, tuple, np.ndarray)):
        if judge is None:
            return Video(source, fps, **options)
        return Video(opened_frames(source, lambda sketches: judge(_sketch(sketches, fps, options))), fps, **options)
    frames = FileFrames(source)
    return Video(frames, frames.fps if fps is None else fps, **options)


def _sketch(frames: tuple[Image, ...], fps: float | None, options: Mapping[str, Any]) -> Video:
    """Return a video of which only sizes and options are known."""
    video = Video.__new__(Video)
    video.options, video.fps, video.frames, video.size = checked_options(options), checked_rate(fps), frames, frames[0].size
    return video


def checked_rate(fps: Any) -> float | None:
    """Return a rate as a number. Raises: RequestError for one that is none."""
    if fps is None:
        return None
    if isinstance(fps, (bool, str)) or not isinstance(fps, (int, float, Fraction, np.number)) or not 0 < fps < MAX_RATE:
        raise RequestError(f"fps={shown(fps)}: frames per second is a number above 0, or None")
    return float(fps)


def opened_frames(given: Iterable[object], judge: Callable[[tuple[Image, ...]], None] | None = None) -> tuple[Image, ...]:
    """Return the frames of a list; each is decoded only if its header promises the first one's size."""
    try:
        sources = list(given) if not isinstance(given, range) else None      # which may be longer than memory
    except TypeError:
        sources = None
    if sources is None:
        raise ImageError(f"a video is a list of frames, not {type(given).__name__}")
    frames: list[Image] = []

    def look(sketch: Image) -> None:
        check_frame(len(frames), sketch, frames[0].size if frames else sketch.size)
        n_bytes = 3 * sketch.size[0] * sketch.size[1] * len(sources)
        if n_bytes > MAX_FRAMES_BYTES:
            raise ImageError(f"{len(sources)} frames of {sketch.size[0]} x {sketch.size[1]} take {n_bytes >> 20} MiB, more than "
                             f"{MAX_FRAMES_BYTES >> 20}; make them smaller or fewer first")
        if judge is not None and not frames:
            judge((sketch,) * len(sources))

    for number, source in enumerate(sources):
        try:
            frames.append(read_image(source, {}, look))
        except ImageError as e:
            raise ImageError(str(e) if "of the video" in str(e)[:40] else f"frame {number} of the video: {e}") from e
        check_frame(number, frames[-1], frames[0].size)
    if not frames:
        raise ImageError("a video needs at least one frame")
    return tuple(frames)


def check_frame_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise ImageError(f"{name}: frames of {width} x {height} pixels are more than {MAX_FRAME_PIXELS}; make the video smaller first")


def check_frame(number: int, frame: Image, size: tuple[int, int]) -> None:
    if frame.size != size:
        raise ImageError(f"frame {number} of the video is {frame.size[0]} x {frame.size[1]}, the first frame is "
                         f"{size[0]} x {size[1]}; make all frames one size")


def checked_indices(indices: Iterable[int], n: int) -> list[int]:
    wanted = [operator.index(i) for i in indices]
    if wanted and not 0 <= min(wanted) <= max(wanted) < n:
        raise RequestError(f"frames {min(wanted)} to {max(wanted)} of a video of {n} frames")
    if wanted != sorted(wanted):
        raise RequestError("numbers of frames must not fall: sort them")
    return wanted
