"""Videos: frames in order, from files and lists."""

from __future__ import annotations

import hashlib
import math
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import PIL.ImageOps
import numpy as np

from pyengine.errors import ImageError, RequestError
from pyengine.media.image import check_size, checked_options, Image, MAX_PIXELS, open_image, opened

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
        """(container, its first video stream, name), read from the start."""
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
                    codec.thread_type = "AUTO"
                    codec.options = {"max_pixels": str(MAX_PIXELS)}
                    yield container, stream, name
            except ImageError:
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
        if isinstance(frames, (str, bytes, os.PathLike, Image, PIL.Image.Image)):
            raise ImageError("Video takes a list of frames; open_video opens a file")
        if fps is not None and not 0 < fps < math.inf:
            raise RequestError(f"fps={fps!r}: frames per second is a number above 0, or None")
        self.options: Mapping[str, Any] = checked_options(options)
        self.fps = float(fps) if fps is not None else None
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
    if isinstance(source, Video):
        return Video(source.frames, source.fps if fps is None else fps, **{**source.options, **options})
    if isinstance(source, (list, tuple, np.ndarray)):
        return Video(source, fps, **options)
    frames = FileFrames(source)
    return Video(frames, frames.fps if fps is None else fps, **options)


def opened_frames(sources: Iterable[object]) -> tuple[Image, ...]:
    frames: list[Image] = []
    for number, source in enumerate(sources):
        try:
            frames.append(open_image(source))
        except ImageError as e:
            raise ImageError(f"frame {number} of the video: {e}") from e
        check_frame(number, frames[-1], frames[0].size)
    if not frames:
        raise ImageError("a video needs at least one frame")
    return tuple(frames)


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
