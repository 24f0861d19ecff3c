"""A file whose bytes are read where the system maps them, and that other programs may cut or write over meanwhile.

What must outlive that is copied: a file's start, with `read_on`. Everything else is a view of the mapping, and whoever read it asks
`MappedFile.check` afterwards: bytes that are gone read as zeros (csrc/host/watch.c), so they are no reason for a process to end. A file
that is replaced by another of its name, as most programs replace files, stays as it was for those that have it open.
"""

from __future__ import annotations

import mmap
import os
import stat
import weakref
from contextlib import suppress
from pathlib import Path

from pyengine.errors import InvalidModelError, ModelNotFoundError
from pyengine.native import ffi, lib

STEP = 1 << 18                       # bytes of a file's start that are read at once
MOST_START = 1 << 27                 # and at most: a vocabulary of a million tokens has some 50 MB


def _plain(path: str, flags: int) -> int:
    """Open what is no pipe or device, which could wait for ever. Raises: InvalidModelError."""
    fd = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise InvalidModelError(f"{path}: is {'a directory' if stat.S_ISDIR(mode) else 'not a regular file'}, not a GGUF file")
    return fd


class MappedFile:
    """One file that is open and mapped: its `path`, its `size` in bytes when it was opened, and its bytes, `buffer`.

    Raises: ModelNotFoundError, InvalidModelError for what cannot be opened or has fewer than `least` bytes.
    """

    def __init__(self, path: Path, least: int):
        self.path = path
        try:
            self._file = open(path, "rb", buffering=0, opener=_plain)
            weakref.finalize(self, self._file.close)
            self._state = self._now()
            self.size = self._state[0]
            if self.size < least:
                what = "cut off, or no GGUF file" if self.size else "empty"
                raise InvalidModelError(f"{path}: the file is {what}; download it again; header: takes {least} bytes, "
                                        f"the file ends at byte {self.size}")
            self.buffer = mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_READ)
        except (FileNotFoundError, NotADirectoryError):
            raise ModelNotFoundError(f"{path}: no such file") from None
        except IsADirectoryError:
            raise InvalidModelError(f"{path}: is a directory, not a GGUF file") from None
        except (OSError, ValueError) as error:            # ValueError: a NUL in the path, or a file that was cut just now
            raise InvalidModelError(f"{path}: cannot be opened: {getattr(error, 'strerror', None) or error}") from None
        with ffi.from_buffer(self.buffer) as start:
            self._watch = lib.pe_watch(start, self.size)
        self._unwatch = weakref.finalize(self.buffer, lib.pe_watch_end, self._watch)     # arrays keep the mapping alive
        self._unwatch.atexit = False

    def _now(self) -> tuple[int, int]:
        """Return size and time of the last writing."""
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def check(self) -> None:
        """Raise InvalidModelError if bytes are lost, or the file was written to since it was opened: what was read may be wrong."""
        if lib.pe_watch_lost(self._watch):
            raise InvalidModelError(f"{self.path}: was cut, or could not be read, after it was opened; load it again when it is whole")
        if not self._file.closed and (now := self._now()) != self._state:
            what = f"has {now[0]} bytes instead of {self._state[0]}" if now[0] != self._state[0] else "was written to"
            raise InvalidModelError(f"{self.path}: {what} since it was opened; load it again when it is whole")

    def start(self) -> mmap.mmap:
        """Return room for a copy of the file's start, which `read_on` fills. It takes memory as far as it is filled."""
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        room = mmap.mmap(-1, min(self.size, MOST_START), **private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):                          # a system without them
                room.madvise(mmap.MADV_HUGEPAGE)             # a quarter of the time: most of it goes into getting pages
        return room

    def read_on(self, start: mmap.mmap, at: int, to: int) -> int:
        """Read the file's bytes from `at` on into its `start`, up to `to` or some more; returns where. Raises: InvalidModelError."""
        end = min(len(start), max(to, at + STEP))
        if end < to or end == at:
            raise InvalidModelError(f"{self.path}: its keys and list of tensors take more than {MOST_START >> 20} MiB")
        self._file.seek(at)
        with memoryview(start) as whole:
            while at < end:
                with whole[at:end] as rest:
                    n = self._file.readinto(rest)
                if not n:
                    raise InvalidModelError(f"{self.path}: ended at byte {at} while it was read, of {self.size}")
                at += n
        return at

    def close(self) -> None:
        """End reading. Arrays over the bytes stay valid: the mapping goes with the last of them."""
        try:
            self.buffer.close()
            self._unwatch()
        except BufferError:                # arrays over it are alive
            pass
        self._file.close()
