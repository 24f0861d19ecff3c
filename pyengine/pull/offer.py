"""What would be fetched for a model: files that are known by size and digest, before the first byte of them comes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from pyengine.errors import DownloadError, InvalidModelError, UnsupportedModelError
from pyengine.files.gguf import GGUFFile
from pyengine.pull.download import fetch_beginning, RemoteFile
from pyengine.pull.download import fetch as fetch_file

SPARE_BYTES = 64 << 20               # of the disk, that a download leaves free
FOLDER = "pyengine-header-"          # begins the name of the folder that such files lie in
BEGINNINGS = (8 << 20, 32 << 20, 128 << 20)      # bytes of a file that are looked at for its header, until it is all there


class Offer(NamedTuple):
    """A model that can be fetched."""

    name: str                                # by which it will be found
    where: str                               # "Hugging Face" ..., for messages
    model: tuple[RemoteFile, ...]            # its parts, in order
    projector: RemoteFile | None
    others: tuple[RemoteFile, ...]           # its template, its licence ...
    settle: Callable[[], None]               # makes the files one model of that store, once they are all there
    notes: tuple[str, ...] = ()              # what was chosen, where there was a choice

    @property
    def files(self) -> tuple[RemoteFile, ...]:
        """All of them, each content once."""
        every = (*self.others, *([self.projector] if self.projector else []), *self.model)
        return tuple({file.path: file for file in every}.values())

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def is_whole(self) -> bool:
        """Whether all of it is on this machine."""
        return all(file.is_whole for file in self.files)

    @property
    def n_missing(self) -> int:
        """Bytes that are not on this machine yet."""
        return sum(file.size - file.n_there for file in self.files)


def said(nbytes: int) -> str:
    """Return a number of bytes for people: "3.3 GiB"."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def check_room(offer: Offer) -> None:
    """See that the disk has room for what is missing. Raises: DownloadError with both numbers."""
    folder = offer.model[0].path.parent
    while not folder.exists():
        folder = folder.parent
    needed, free = offer.n_missing, shutil.disk_usage(folder).free
    if needed and needed + SPARE_BYTES > free:
        raise DownloadError(f"{offer.name}: {said(needed)} are to be fetched, and {said(free)} are free in {folder}")


def fetch(offer: Offer, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Fetch what is missing, check it, and make it a model of its store.

    progress: called with the bytes that are there, of how many.
    Raises: DownloadError as `download.fetch`, and where the disk has no room. What came stays for the next call.
    """
    check_room(offer)
    there = {file.path: file.n_there for file in offer.files}

    def told(file: RemoteFile, n_bytes: int) -> None:
        there[file.path] = n_bytes
        progress(sum(there.values()), offer.nbytes)

    for file in offer.files:
        fetch_file(file, partial(told, file))
    offer.settle()


@contextmanager
def headers(offer: Offer) -> Iterator[tuple[Path, Path | None]]:
    """Give files that have the model's headers and its size, but no weights, for as long as one is in here: (model, projector).

    Only the files' beginnings are fetched; what comes is kept as the beginning of the download.
    Raises: as `download.fetch_beginning`; InvalidModelError, UnsupportedModelError for what is no GGUF file that can be read.
    """
    with TemporaryDirectory(prefix=FOLDER) as folder:
        files = [(file, Path(folder, file.path.name if not file.name.endswith(".gguf") else Path(file.name).name))
                 for file in (*offer.model, *([offer.projector] if offer.projector else []))]
        firsts = [files[0][1], *(path for file, path in files if file is offer.projector)]
        for n_bytes in BEGINNINGS:
            for file, path in files:
                with open(path, "wb") as f:
                    f.write(fetch_beginning(file, n_bytes))
                    f.truncate(file.size)
            whole = n_bytes == BEGINNINGS[-1] or n_bytes >= max(file.size for file, _ in files)
            try:
                opened = [GGUFFile(path) for path in firsts]
            except (InvalidModelError, UnsupportedModelError):           # what was cut off reads as zeros
                if whole:
                    raise
                continue
            starts = [min((t.offset for t in file.tensors.values() if t.part == part), default=0)
                      for file in opened for part in range(len(file.paths))]
            for file in opened:
                file.close()
            if whole or max(starts) <= n_bytes:
                break
        yield firsts[0], firsts[1] if len(firsts) > 1 else None
