"""Files that appear under their name when they are whole. Whatever happens before, what was there stays, and nothing else is left."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

MOST_LINKS = 40                      # as the system follows
_OPEN = ("/proc", "/dev/fd")         # names there are what a process has open, though they look like links to files


def target_of(path: str | Path) -> Path:
    """Return where a file of this name is put: where its links end, so that a link stays one.

    Raises: OSError for a directory, for a folder that is not there, and for a pipe, a device, and what a process has open (/dev/stdout),
    which are not to be replaced.
    """
    if _is_written_into(path):
        raise OSError(errno.EINVAL, "is a pipe or a device, which no file can take the place of", os.fspath(path))
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not target.parent.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
    return target


def _is_written_into(path: str | Path) -> bool:
    """Say whether a name means a pipe, a device, or what a process has open."""
    at = os.path.abspath(path)
    for _ in range(MOST_LINKS):
        folder = os.path.realpath(os.path.dirname(at))
        at = os.path.join(folder, os.path.basename(at))
        if any(at.startswith(f"{name}/") for name in _OPEN):
            return True
        if not os.path.islink(at):
            break
        at = os.path.join(folder, os.readlink(at))
    try:
        mode = os.stat(at).st_mode
    except FileNotFoundError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _open_into(path: str, flags: int) -> int:
    """Open a pipe or device for writing; a pipe that nobody reads would be waited for."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_NONBLOCK", 0))
    os.set_blocking(fd, True)
    return fd


@contextmanager
def written(path: str | Path, private: bool = False, lasting: bool = False) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name, and the place of what was there, at the end of the block.

    A pipe, a device, or what the process has open, /dev/stdout say, is written into. An interrupt that comes when the file has its name
    leaves it there; it is raised all the same.

    private: for its owner's eyes, if it is new; lasting: the name is taken when the bytes are on the disk.
    Raises: OSError; ValueError for a NUL in the path.
    """
    if _is_written_into(path):
        with open(path, "ab", opener=_open_into) as file:
            yield file
        return
    target = target_of(path)
    partial = target.with_name(f".{target.name[:60]}.{os.urandom(4).hex()}")
    file = os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600 if private else 0o666), "wb")
    try:
        with file:
            with suppress(OSError):
                os.chmod(partial, stat.S_IMODE(os.stat(target).st_mode))       # as the one that it replaces
            yield file
            file.flush()
            if lasting:
                os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:                                                      # Ctrl-C too
        with suppress(FileNotFoundError):                                      # it has its name
            os.unlink(partial)
        raise
