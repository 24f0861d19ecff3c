"""Search over pictures: an index of folders, whose vectors usearch keeps (extra "search"), beside a catalogue of files in SQLite.

    with PictureIndex(place) as index:
        index.use(title, fingerprint, width)              # whose vectors it has; another model's are refused
        index.update(folder, lambda path: model.embed(pe.open_image(path)))
        index.nearest(model.embed("a red car"), 10)

A file whose size and time are the same is not opened; one whose bytes are the same is not encoded. What is done is kept every now and then, and an interrupted
update goes on from there: vectors are written first, and those that the catalogue does not know are taken out when it is opened.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pyengine.errors import PyEngineError, RequestError

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm"))
LEAST_SECONDS, MOST_SHARE = 10.0, 0.05       # between two times of keeping what is done; of the time that may go into it
SAMPLES, SAMPLE = 64, 1 << 16                # of a file that is told from others by pieces of it: how many, bytes of each

_TABLES = """
create table if not exists facts (name text primary key, value text not null);
create table if not exists files (path text primary key, size integer not null, mtime integer not null, digest text not null, key integer, fault text);
create index if not exists digests on files (digest);
"""


class Found(NamedTuple):
    """A picture that a search found, and how near it is: the cosine."""

    path: Path
    score: float


class Faulty(NamedTuple):
    """A file that is no picture that can be read, and why."""

    path: Path
    why: str


class Update(NamedTuple):
    """What an update did: numbers of files, and those that could not be read."""

    new: int
    changed: int
    removed: int
    unchanged: int
    faulty: list[Faulty]


class _Seen(NamedTuple):
    """A row of the catalogue."""

    size: int
    mtime: int
    digest: str
    key: int | None
    fault: str | None


def fingerprint(path: Path) -> str:
    """Tell a model's file from others by its size and pieces of it."""
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for i in range(SAMPLES):
            file.seek(max(0, size - SAMPLE) * i // (SAMPLES - 1))
            found.update(file.read(SAMPLE))
    return found.hexdigest()


def digest_of(path: Path) -> str:
    """Tell a picture's file from others by all its bytes."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def pictures_below(folder: Path) -> Iterator[Path]:
    """List the files of a folder that are named as pictures are, in order, those of folders below too; hidden ones and links to folders are left out."""
    for at, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(at, name)


class PictureIndex:
    """An index in a folder of its own, which is made; one process at a time writes to it, and others read."""

    def __init__(self, place: Path, writes: bool = True):
        """Open it. Raises: RequestError where usearch is missing, there is nothing to read, the place cannot be written to, or its files are damaged
        or in use."""
        try:
            from filelock import FileLock, Timeout
            from usearch.index import Index
        except ImportError:
            raise RequestError("search over pictures needs the package usearch: pip install 'pyengine-local[search]'") from None
        self.place, self._make = place, Index
        if not writes and not (place / "files.sqlite").exists():
            raise RequestError(f"{place}: no index is here: `pyengine-run index FOLDER --model MODEL` makes one")
        try:
            place.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(place / "lock")
            if writes:
                self._lock.acquire(timeout=0)
        except Timeout:
            raise RequestError(f"{place}: another process works on this index") from None
        except OSError as error:
            raise RequestError(f"{place}: {error.strerror}") from None
        self._vectors: Any = None
        try:
            self._catalogue = sqlite3.connect(place / "files.sqlite")
            self._catalogue.executescript(_TABLES)
        except sqlite3.DatabaseError as error:
            self._lock.release()
            raise RequestError(f"{place / 'files.sqlite'}: {error}; remove the folder and index again") from None

    def __enter__(self) -> PictureIndex:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it; what was not kept is lost."""
        self._catalogue.close()
        self._lock.release()

    # -- the model ----------------------------------------------------------------------------------------------------

    @property
    def model(self) -> str | None:
        """The model whose vectors it has, by the path or name that it was given by; None for a new index."""
        return self._fact("model")

    def _fact(self, name: str) -> str | None:
        row = self._catalogue.execute("select value from facts where name = ?", (name,)).fetchone()
        return row[0] if row else None

    def use(self, model: str, mark: str, width: int) -> None:
        """Say whose vectors these are, of how many numbers. mark: `fingerprint` of its file. Raises: RequestError for another model's index."""
        known = self._fact("fingerprint")
        if known is None:
            with self._catalogue:
                self._catalogue.executemany("insert into facts values (?, ?)", (("model", model), ("fingerprint", mark), ("width", str(width))))
        elif known != mark:
            raise RequestError(f"{self.place}: this index was made with {self.model}, and vectors of {model} cannot be compared with its; "
                               "give that model, or another --index for this one")
        self._open(width)

    def _open(self, width: int) -> None:
        """Open the vectors and take out those that the catalogue does not know. Raises: RequestError."""
        file = self.place / "vectors.usearch"
        if file.exists():
            try:
                self._vectors = self._make.restore(str(file))
            except Exception as error:                       # usearch raises RuntimeError and others
                raise RequestError(f"{file}: {error}; remove the folder and index again") from None
            if self._vectors is None or self._vectors.ndim != width:
                raise RequestError(f"{file}: holds no vectors of {width} numbers; remove the folder and index again")
        else:
            self._vectors = self._make(ndim=width, metric="cos", dtype="f32")
        known = {key for (key,) in self._catalogue.execute("select key from files where key is not null")}
        for key in [int(k) for k in self._vectors.keys if int(k) not in known]:
            self._vectors.remove(key)

    # -- pictures -----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(self._catalogue.execute("select count(*) from files where key is not null").fetchone()[0])

    def update(self, folder: Path, embed: Callable[[Path], np.ndarray], progress: Callable[[int, int, Path], None] | None = None) -> Update:
        """Bring the index up to date with a folder: new and changed pictures are encoded, those that are gone are taken out.

        embed gives a picture's vector. progress(done, all, path) is called before each. What is done when it is interrupted is kept.
        Raises: RequestError for what is no folder.
        """
        folder = folder.resolve()
        if not folder.is_dir():
            raise RequestError(f"{folder}: not a folder")
        known = {Path(path): _Seen(*row) for path, *row in self._catalogue.execute("select path, size, mtime, digest, key, fault from files")
                 if Path(path).is_relative_to(folder)}
        there = list(pictures_below(folder))
        gone, counts, faulty, work = set(known).difference(there), {"new": 0, "changed": 0, "unchanged": 0}, [], _Keeping(self._keep)
        try:
            for path in gone:
                self._forget(path, known[path])
            for done, path in enumerate(there):
                if progress:
                    progress(done, len(there), path)
                what, why = self._bring(path, known.get(path), embed)
                counts[what] += not why
                faulty += [Faulty(path, why)] if why else []
                work.now_and_then()
        finally:
            self._keep()
        return Update(**counts, removed=len(gone), faulty=faulty)

    def _bring(self, path: Path, seen: _Seen | None, embed: Callable[[Path], np.ndarray]) -> tuple[str, str]:
        """Bring one picture up to date: what it is, and why it cannot be read, "" where it can."""
        what = "changed" if seen else "new"
        try:
            str(path).encode()
            stat = path.stat()
            if seen and (seen.size, seen.mtime) == (stat.st_size, stat.st_mtime_ns) and self._whole(seen):
                return "unchanged", seen.fault or ""
            mark = digest_of(path)
        except UnicodeEncodeError:
            return what, f"{path!r}: its name is no UTF-8"
        except OSError as error:
            return what, f"{path}: {error.strerror}"
        if seen and mark == seen.digest and self._whole(seen):
            self._put(path, stat, seen._replace(digest=mark))
            return "unchanged", seen.fault or ""
        try:
            vector, why = self._same(mark), ""
            vector = embed(path) if vector is None else vector
        except PyEngineError as error:
            vector, why = None, str(error)
        key = None if vector is None else 1 + max(int(self._fact("key") or 0), 0)
        if key is not None:
            self._vectors.add(key, np.ascontiguousarray(vector, np.float32))
            self._catalogue.execute("insert or replace into facts values ('key', ?)", (str(key),))
        if seen and seen.key is not None and seen.key in self._vectors:
            self._vectors.remove(seen.key)
        self._put(path, stat, _Seen(0, 0, mark, key, why or None))
        return what, why

    def _whole(self, seen: _Seen) -> bool:
        """Say whether nothing is missing of a row: a vector, or why there is none."""
        return seen.fault is not None or seen.key is not None and seen.key in self._vectors

    def _same(self, mark: str) -> np.ndarray | None:
        """Return the vector of another file with the same bytes."""
        row = self._catalogue.execute("select key from files where digest = ? and key is not null", (mark,)).fetchone()
        return None if row is None or row[0] not in self._vectors else np.array(self._vectors.get(row[0]), np.float32)

    def _put(self, path: Path, stat: os.stat_result, row: _Seen) -> None:
        self._catalogue.execute("insert or replace into files values (?, ?, ?, ?, ?, ?)",
                                (str(path), stat.st_size, stat.st_mtime_ns, row.digest, row.key, row.fault))

    def _forget(self, path: Path, row: _Seen) -> None:
        self._catalogue.execute("delete from files where path = ?", (str(path),))
        if row.key is not None and row.key in self._vectors:
            self._vectors.remove(row.key)

    def _keep(self) -> None:
        """Write vectors, then the catalogue that knows them."""
        file = self.place / "vectors.usearch"
        partial = file.with_suffix(".partial")
        self._vectors.save(str(partial))
        os.replace(partial, file)
        self._catalogue.commit()

    def nearest(self, vector: np.ndarray, n: int) -> list[Found]:
        """Return the n pictures whose vectors are nearest, the nearest first; all are compared."""
        if not len(self._vectors):
            return []
        paths = dict(self._catalogue.execute("select key, path from files where key is not null"))
        matches = self._vectors.search(np.ascontiguousarray(vector, np.float32), min(n, len(self._vectors)), exact=True)
        return [Found(Path(paths[int(key)]), 1 - float(far)) for key, far in zip(matches.keys, matches.distances) if int(key) in paths]


class _Keeping:
    """When what is done is kept: not more often than is worth while."""

    def __init__(self, keep: Callable[[], None]):
        self._keep, self._next = keep, time.monotonic() + LEAST_SECONDS

    def now_and_then(self) -> None:
        if (started := time.monotonic()) >= self._next:
            self._keep()
            ended = time.monotonic()
            self._next = ended + max(LEAST_SECONDS, (ended - started) / MOST_SHARE)
