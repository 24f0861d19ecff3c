"""One file: fetched beside its place, gone on with after an interruption, moved into its place when its digest is right.

Bytes lie in `<name>.incomplete` until then. A connection that fails is made again, from the byte where it ended; it is given up
after RETRIES attempts that brought less than a megabyte, and what is there is kept for the next call.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NamedTuple

from pyengine.errors import DownloadError
from pyengine.pull import web

RETRIES = 5
PAUSE_SECONDS = 1.0                  # before the first one; doubled each time
WORTH_BYTES = 1 << 20                # an attempt that brought as many was worth it
RANGE_BYTES = 4 << 30                # of one request: servers refuse answers of many gigabytes, and addresses they sign expire
STALL_SECONDS, STALL_BYTES = 60, 1 << 16         # less than this in that time is no connection

Progress = Callable[[int], None]     # told the bytes of the file that are there


class RemoteFile(NamedTuple):
    """A file on a server, what it must be, and where it goes."""

    name: str                        # for messages
    url: str
    size: int
    digest: str                      # "sha256:" and 64 hex digits, or "git:" and the 40 of a blob's SHA-1
    path: Path                       # its place
    headers: Mapping[str, str] = MappingProxyType({})

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.path.name + ".incomplete")

    @property
    def is_whole(self) -> bool:
        """Whether it is in its place. Its content was checked by who put it there."""
        return self.path.is_file() and self.path.stat().st_size == self.size

    @property
    def n_there(self) -> int:
        """Bytes that need not be fetched."""
        return self.size if self.is_whole else min(self.partial.stat().st_size, self.size) if self.partial.is_file() else 0


class _Hash:
    """The digest of a file's bytes so far."""

    def __init__(self, file: RemoteFile):
        self.kind = file.digest.partition(":")[0]
        self._hash = hashlib.sha256() if self.kind == "sha256" else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)

    def feed(self, piece: bytes) -> None:
        self._hash.update(piece)

    @property
    def digest(self) -> str:
        return f"{self.kind}:{self._hash.hexdigest()}"


def fetch(file: RemoteFile, progress: Progress = lambda n: None) -> None:
    """Bring a file to its place, unless it is there.

    Raises: DownloadError where the server refuses, sends something else, or the connection stays broken; where another process is
    fetching the same file; where the disk is full. What came is kept for the next call, but for what is wrong.
    """
    if not file.is_whole:
        with _alone(file):
            if not file.is_whole:                            # the other process is done
                _complete(file, progress)
    progress(file.size)


def fetch_beginning(file: RemoteFile, n_bytes: int) -> bytes:
    """Return the first bytes of a file, at most `n_bytes`; they are kept, as the beginning of it. Raises as `fetch`."""
    end = min(n_bytes, file.size)
    if file.is_whole:
        with open(file.path, "rb") as f:
            return f.read(end)
    with _alone(file), _opened(file) as f:
        _append(file, f, end, None, lambda n: None)
        f.seek(0)
        return f.read(end)


def _complete(file: RemoteFile, progress: Progress) -> None:
    """Fetch what is missing, compare the digest, move the file into its place."""
    resumed = file.n_there > 0
    found = _Hash(file)
    with _opened(file) as f:
        f.seek(0)
        while piece := f.read(web.PIECE_BYTES):
            found.feed(piece)
        found = _append(file, f, file.size, found, progress)
        f.flush()
        os.fsync(f.fileno())
    if found.digest != file.digest:
        file.partial.unlink(missing_ok=True)
        if resumed:                                          # what was there may have been of something else
            return _complete(file, progress)
        raise DownloadError(f"{file.name}: what was sent has the digest {found.digest}, not {file.digest}: it is deleted")
    try:
        os.replace(file.partial, file.path)
    except OSError as error:
        raise DownloadError(f"{file.path}: {error.strerror}") from None


def _append(file: RemoteFile, f: BinaryIO, end: int, found: _Hash | None, progress: Progress) -> _Hash | None:
    """Add bytes up to `end` to those that are there. Returns the digest's state: a new one where the server began again."""
    failures, best = 0, f.seek(0, os.SEEK_END)
    while (have := f.tell()) < end:
        until = min(end, have + RANGE_BYTES)
        try:
            with web.answer(file.url, {**file.headers, "Range": f"bytes={have}-{until - 1}"}) as response:
                if _starts_at(file, response, have) == 0 and have:
                    f.seek(0)
                    f.truncate()
                    found = found and _Hash(file)
                for piece in _pieces(response, end - f.tell()):
                    _write(file, f, piece)
                    if found is not None:
                        found.feed(piece)
                    progress(f.tell())
                if f.tell() == file.size and response.status == 200 and response.read1(1):
                    raise DownloadError(f"{file.name}: the server sends more than the {file.size} bytes of it")
            reason = "the connection ended early"
        except web.Refused as error:
            if error.status == 416:                          # what is there is longer than what the server has
                f.seek(0)
                f.truncate()
                found = found and _Hash(file)
            elif error.status < 500 and error.status not in (408, 429):
                raise
            reason = str(error)
        except web.Broken as error:
            reason = str(error)
        if (have := f.tell()) >= until:
            failures, best = 0, have
            continue
        failures, best = (0, have) if have >= best + WORTH_BYTES else (failures + 1, best)
        if failures > RETRIES:
            raise DownloadError(f"{file.name}: {reason}; {have} of {file.size} bytes are there, and the same command goes on from them")
        time.sleep(PAUSE_SECONDS * 2 ** max(0, failures - 1))
    return found


def _starts_at(file: RemoteFile, response: HTTPResponse, have: int) -> int:
    """Return the byte at which an answer starts, `have` or 0. Raises: DownloadError if it is of another size or place."""
    total = response.headers.get("Content-Length")
    start = 0
    if response.status == 206:
        place = re.fullmatch(r"bytes (\d{1,20})-\d{1,20}/(\d{1,20}|\*)", response.headers.get("Content-Range") or "")
        if place is None or int(place[1]) != have:
            raise DownloadError(f"{file.name}: the server sends other bytes than those asked for, from {have} on")
        start, total = have, place[2].replace("*", "") or None
    if total is not None and total != str(file.size):
        raise DownloadError(f"{file.name}: the server has {total[:20]} bytes of it, where {file.size} were announced")
    return start


def _pieces(response: HTTPResponse, n_bytes: int) -> Iterator[bytes]:
    """Yield an answer's bytes, at most `n_bytes`. Raises: Broken where they come too slowly to be a connection."""
    since, n_since = time.monotonic(), 0
    while n_bytes and (piece := response.read1(min(n_bytes, web.PIECE_BYTES))):
        yield piece
        n_bytes -= len(piece)
        n_since += len(piece)
        if (now := time.monotonic()) - since > STALL_SECONDS:
            if n_since < STALL_BYTES:
                raise web.Broken(f"only {n_since} bytes came in {STALL_SECONDS} seconds")
            since, n_since = now, 0


def _write(file: RemoteFile, f: BinaryIO, piece: bytes) -> None:
    rest = memoryview(piece)
    try:
        while rest:
            rest = rest[f.write(rest):]
    except OSError as error:                                 # else it would pass for an error of the connection
        raise DownloadError(f"{file.partial}: {error.strerror}") from None


@contextmanager
def _opened(file: RemoteFile) -> Iterator[BinaryIO]:
    """Open what is there of a file, to read and to append; what is too long is of something else, and is dropped."""
    try:
        f = open(file.partial, "a+b", buffering=0)
    except OSError as error:
        raise DownloadError(f"{file.partial}: {error.strerror}") from None
    with f:
        if f.seek(0, os.SEEK_END) > file.size:
            f.truncate(0)
        yield f


@contextmanager
def _alone(file: RemoteFile) -> Iterator[None]:
    """Keep other processes from fetching the same file. Raises: DownloadError if one is doing so."""
    from filelock import FileLock, Timeout

    path = file.partial.with_name(file.partial.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path, timeout=0):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    except Timeout:
        raise DownloadError(f"{file.name}: another process is fetching it now ({path} is locked)") from None
    except OSError as error:
        raise DownloadError(f"{error.filename or path}: {error.strerror}") from None
