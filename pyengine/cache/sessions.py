"""A conversation's part of the caches in a file, so that it need not be computed again.

    header    magic, version, counts, formats of keys and values, fingerprint of the model      (`HEADER`, little-endian)
    sections  (sha256, bytes) each: header, notes, digests of pictures, what each row is, keys and values of each layer

Version 4 has notes, bytes of whoever saves (the command line's are the messages), whose number ends its header; a file without
them is of version 3. A conversation whose cells are compressed is of version 5: its notes are followed by what `Smaller` says.
Formats are those of tokens in groups, where there are such; the first files of those caches name that of the last tokens, in full, and
are told from others by their size and sums (`_misnamed`). A row is a token id and 0, or -1 - the number of a digest and the row of that
picture; of a picture that is seen across, less than 0: minus its encoder rows. A file holds what later tokens may see: all tokens of
layers that see everything, the window of those that slide, all encoder rows of those that attend across, the last state of those that
are recurrent. Lengths are not stored but follow from rows and the model, so a file's size is known before any cell is read. Nothing is
read into the caches before all sums were right.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, TYPE_CHECKING

import numpy as np

from pyengine.arguments import place
from pyengine.cache.cells import Conversation
from pyengine.cache.eviction import cells_of_sums, clear, compressed
from pyengine.cache.store import Store
from pyengine.dtype import CACHE_DTYPES, DTYPES
from pyengine.errors import ContextOverflowError, PlanError, SessionError
from pyengine.files.gguf import GGUFFile
from pyengine.files.writing import written

if TYPE_CHECKING:
    from pyengine.cache.compression.base import Compression

MAGIC, PLAIN, NOTED, SMALLER = b"pe-cells", 3, 4, 5  # versions without and with notes, compressed; 1 and 2 did not mix blocks
# version, tokens, position of the next one, digests of rows, digests of pictures, ggml's numbers of the formats of keys and values
HEADER = struct.Struct("<8s 7I 32s")
NOTES = struct.Struct("<I")              # bytes of the notes
BOTH = struct.Struct("<II")              # bytes of the notes, and of what says how cells are compressed
SUM, SAMPLE = 32, 256                    # bytes of a sha256; of each tensor's middle, for the fingerprint


def fingerprint(files: Iterable[GGUFFile | None], tables: Iterable[np.ndarray]) -> bytes:
    """Hash what tells two models apart: metadata, tensors' names, shapes and formats, sampled bytes of each; rotary frequencies.

    tables: what else keys in the cache depend on, such as frequencies that follow from the context's size.
    Raises: InvalidModelError for a file that was cut or written to since it was opened.
    """
    h = sha256()

    def add(data: bytes) -> None:
        h.update(len(data).to_bytes(8, "little") + data)

    for file in files:
        if file is None:
            continue
        for key in sorted(file.metadata):
            if not key.startswith(("general.", "split.")) or key == "general.architecture":      # a name does not count
                add(key.encode("utf-8", "surrogateescape"))
                add(file.metadata.encoded(key))
        for name, t in sorted(file.tensors.items()):
            add(f"{name} {t.shape} {t.dtype}".encode("utf-8", "surrogateescape"))
            middle = max(0, t.nbytes // 2 - SAMPLE)
            add(file.view(name)[middle : middle + SAMPLE].tobytes())
        file.check()
    for table in tables:
        add(np.ascontiguousarray(table).tobytes())
    return h.digest()


@dataclass(frozen=True)
class Session:
    """What the sections before the cells say; fields as in `cells.Conversation`. formats: ggml's numbers of those of keys and values."""

    keys: list[Hashable]
    pictures: list[tuple[int, int]]
    next: int
    media: frozenset[bytes]
    formats: tuple[int, int]
    smaller: Smaller | None = None


@dataclass(frozen=True)
class Smaller:
    """How a conversation's cells are compressed: the policy's text, and the statistics that were summed; by group number tokens without a
    cell; by layer how many cells were kept of each head; the number of tokens when they were chosen."""

    policy: str
    kinds: list[str]
    gone: dict[int, int]
    kept: dict[int, int]
    floor: int

    @classmethod
    def of(cls, store: Store, s: Conversation) -> Smaller | None:
        """Describe a conversation; None for one that is not compressed."""
        if s.compression is None:
            return None
        policy: Compression = s.compression                  # type: ignore[assignment]
        return cls(policy.text, list(kinds_of(store)), s.gone, {layer: a.shape[1] for layer, a in s.kept.items()}, s.floor)

    def made(self) -> Compression:
        """Make the policy. Raises: RequestError for what is none."""
        from pyengine.cache.compression.written import compression_of

        return compression_of(self.policy)                   # type: ignore[return-value]

    @classmethod
    def read(cls, path: Path, text: bytes, store: Store, n: int) -> Smaller:
        """Read what `of` gave. Raises: SessionError for what this model's caches do not hold."""
        try:
            found = json.loads(text)
            gone, kept = ({int(k): int(v) for k, v in found[name].items()} for name in ("gone", "kept"))
            smaller = cls(str(found["policy"]), [str(k) for k in found["kinds"]], gone, kept, int(found["floor"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SessionError(f"{path}: does not say how its cells are compressed: {error}") from None
        own = {layer.number: layer.group for layer in compressed(store)}
        groups = {one.group for layer in compressed(store) for one in (layer, *layer.parts)}
        if smaller.kinds != list(kinds_of(store)) or not own:
            raise SessionError(f"{path}: its cells were compressed by {smaller.policy}; load with compress={smaller.policy!r}")
        if not (gone.keys() <= groups and kept.keys() <= own.keys() and 0 <= smaller.floor <= n
                and all(0 <= v < n for v in gone.values()) and all(0 < v <= n - gone.get(own[layer], 0) for layer, v in kept.items())):
            raise SessionError(f"{path}: cells that were kept, tokens and layers contradict each other")
        return smaller


def kinds_of(store: Store) -> tuple[str, ...]:
    """Return the statistics of attention that a model's caches have."""
    return next((store.cells.groups[layer.group].policy.kinds for layer in compressed(store)), ())


def save(path: str | Path, store: Store, s: Conversation, model: bytes, notes: bytes = b"") -> int:
    """Write a conversation, all of it or nothing, and notes for `read_notes`; returns the file's bytes.

    Into a pipe or a device, as `files.writing.written` does. Raises: SessionError.
    """
    path = Path(place("session", path))
    if len(notes) >= 1 << 32:
        raise SessionError(f"{path}: notes of {len(notes)} bytes are not saved")
    if s.partial or not len(s) or not all(isinstance(k, int) or isinstance(k[0], bytes) for k in s.keys):
        raise SessionError(f"{path}: a conversation that is empty, whose prompt was not read to its end, or from which tokens were removed, is not saved")
    nbytes = 0
    try:
        with written(path, private=True, lasting=True) as file:
            for section in _sections(store, s, model, notes):
                nbytes += file.write(sha256(section).digest()) + file.write(section)
    except (OSError, ValueError) as error:                   # ValueError: a NUL in the path
        raise SessionError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    return nbytes


def _sections(store: Store, s: Conversation, model: bytes, notes: bytes) -> Iterator[Any]:
    digests = sorted({k[0] for k in s.keys if isinstance(k, tuple)})
    number = {d: i for i, d in enumerate(digests)}
    keys = np.array([(k, 0) if isinstance(k, int) else (-1 - number[k[0]], k[1]) for k in s.keys], "<i4")
    ends = [0, *(end for _, end in s.pictures)]
    for (token, end), start in zip(s.pictures, ends):
        keys[token, 1] = start - end
    smaller = Smaller.of(store, s)
    version, formats = SMALLER if smaller else NOTED if notes else PLAIN, (d.id for d in store.formats)
    head = HEADER.pack(MAGIC, version, len(s), s.next, len(digests), len(s.media), *formats, model)
    if smaller:
        text = json.dumps(asdict(smaller)).encode()
        yield head + BOTH.pack(len(notes), len(text))
        yield notes
    elif notes:
        yield head + NOTES.pack(len(notes))
        yield notes
    else:
        yield head
    yield b"".join([*digests, *sorted(s.media)])
    yield keys.tobytes()
    if smaller:
        yield text
        for layer in compressed(store):
            yield s.kept.get(layer.number, np.empty(0, np.int32)).astype("<i4").tobytes()
            if layer.sums is not None:
                yield np.ascontiguousarray(layer.sums.gather(cells_of_sums(store, s, layer))).tobytes()
    for cache, cells in store.live(s):
        yield np.ascontiguousarray(cache.gather(cells))


def _shapes(store: Store, tokens: int, crossed: int, smaller: Smaller | None) -> list[tuple[int, int, int]]:
    """Return the shape of what each cache saves for these numbers of tokens and encoder rows: (heads, cells, bytes of one)."""
    shapes, gone = [], smaller.gone if smaller else {}
    for layer in store.lasting:
        n = crossed if store.cells.groups[layer.group].policy.across else tokens - gone.get(layer.group, 0)
        shapes += [(cache.shape[0], len(store.cells.seen(layer.group, n)), cache.dtype.size(cache.shape[2])) for cache in layer.states]
    return shapes


def restore(path: str | Path, store: Store, model: bytes, n_ids: int, n_ctx: int, adapters: tuple[float, ...] = ()) -> Conversation:
    """Read a conversation into the caches, where it is idle: the next prompt with the same beginning continues from it.

    n_ids: ids that a prompt may have; adapters: their scales, of which `model` knows. Raises: SessionError for a file that is damaged, not one of these, or of another model,
    version or cache format; ContextOverflowError for more tokens than the context has, or more encoder rows than a conversation
    holds; PlanError when no cells are free.
    """
    path = Path(place("session", path))
    try:
        with open(path, "rb", opener=_regular) as file:
            session = _read_head(path, file, model, store, n_ids, n_ctx)
            at, n, smaller = file.tell(), len(session.keys), session.smaller
            crossed = session.pictures[-1][1] if session.pictures else 0
            beside, shapes = _beside(store, n, smaller), _shapes(store, n, crossed, smaller)
            want = at + sum(SUM + size for size in beside) + sum(SUM + int(np.prod(shape)) for shape in shapes)
            size = os.fstat(file.fileno()).st_size
            if size != want:
                _check_formats(path, session.formats, store)
                raise SessionError(f"{path}: has {size} bytes, but {n} tokens of this model take {want}: it is cut off or damaged")
            for nbytes in (*beside, *(int(np.prod(shape)) for shape in shapes)):
                _section(path, file, nbytes)
            file.seek(at)
            policy, gone = (smaller.made(), smaller.gone) if smaller else (None, {})
            s = store.cells.restore(session.keys, session.pictures, adapters, policy, gone)
            try:
                if smaller:
                    _read_beside(path, file, store, s, smaller)
                for (cache, cells), shape in zip(store.live(s), shapes):
                    cache.scatter(cells, np.frombuffer(_section(path, file, int(np.prod(shape))), np.uint8).reshape(shape))
            except BaseException:                            # Ctrl-C, or the file has changed
                store.cells.drop(s)
                raise
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None
    except (OSError, ValueError) as error:                   # ValueError: a NUL in the path
        raise SessionError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    s.next, s.media, s.active = session.next, session.media, False
    return s


def _beside(store: Store, n: int, smaller: Smaller | None) -> list[int]:
    """Return the bytes of what is saved beside cells that are compressed: of which tokens each head's are, and sums, layer by layer."""
    sizes: list[int] = []
    for layer in compressed(store) if smaller else ():
        heads = layer.states[0].shape[0]
        sizes.append(4 * heads * smaller.kept.get(layer.number, 0))
        if layer.sums is not None:
            sizes.append(4 * heads * (n - smaller.gone.get(layer.group, 0)) * layer.sums.shape[2])
    return sizes


def _read_beside(path: Path, file: BinaryIO, store: Store, s: Conversation, smaller: Smaller) -> None:
    """Read what is saved beside cells. Raises: SessionError for tokens that are not there."""
    sizes = iter(_beside(store, len(s), smaller))
    clear(store, s)
    for layer in compressed(store):
        heads = layer.states[0].shape[0]
        if nbytes := next(sizes):
            s.kept[layer.number] = np.frombuffer(_section(path, file, nbytes), "<i4").reshape(heads, -1).astype(np.int32)
            if (np.diff(s.kept[layer.number], axis=1) <= 0).any() or s.kept[layer.number].min() < 0 or s.kept[layer.number].max() >= len(s):
                raise SessionError(f"{path}: names tokens that are not there")
        else:
            _section(path, file, 0)
        if layer.sums is not None:
            cells = cells_of_sums(store, s, layer)
            layer.sums.scatter(cells, np.frombuffer(_section(path, file, next(sizes)), np.uint8).reshape(heads, len(cells), -1))
    s.floor = smaller.floor


def read_notes(path: str | Path) -> bytes:
    """Return the notes that a conversation was saved with; empty if there are none. Reads no cells. Raises: SessionError."""
    path = Path(place("session", path))
    try:
        with open(path, "rb", opener=_regular) as file:
            return _read_header(path, file)[1]
    except (OSError, ValueError) as error:                   # ValueError: a NUL in the path
        raise SessionError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _regular(path: str, flags: int) -> int:
    """Open a regular file only: a pipe could wait for ever."""
    fd = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(0, "not a regular file")
    return fd


def _section(path: Path, file: BinaryIO, nbytes: int) -> bytes:
    """Read the next section, whose size the caller has compared with the file's. Raises: SessionError unless its sum is right."""
    start = file.tell()
    want, data = file.read(SUM), file.read(nbytes)
    if len(data) != nbytes:
        raise SessionError(f"{path}: ends at byte {start + len(want) + len(data)}, within a section: it is cut off")
    if sha256(data).digest() != want:
        raise SessionError(f"{path}: bytes {start} to {start + SUM + nbytes} do not have the sum that was written with them: it is damaged")
    return data


def _read_header(path: Path, file: BinaryIO) -> tuple[bytes, bytes, int]:
    """Read the header without the lengths at its end, the notes, and the bytes of what says how cells are compressed; 0: they are not."""
    start = file.read(SUM + 12)
    if start[SUM : SUM + 8] != MAGIC:
        raise SessionError(f"{path}: is not a saved conversation")
    version = int.from_bytes(start[SUM + 8 :], "little")
    if version not in (PLAIN, NOTED, SMALLER):
        raise SessionError(f"{path}: has version {version}, but only {PLAIN}, {NOTED} and {SMALLER} are read")
    file.seek(0)
    if version == PLAIN:
        return _section(path, file, HEADER.size), b"", 0
    lengths = BOTH if version == SMALLER else NOTES
    header = _section(path, file, HEADER.size + lengths.size)
    n_notes, *more = lengths.unpack_from(header, HEADER.size)
    if (size := os.fstat(file.fileno()).st_size) < file.tell() + SUM + n_notes + sum(more):
        raise SessionError(f"{path}: has {size} bytes, but {n_notes + sum(more)} of notes: it is cut off or damaged")
    return header[: HEADER.size], _section(path, file, n_notes), sum(more)


def _read_head(path: Path, file: BinaryIO, model: bytes, store: Store, n_ids: int, n_ctx: int) -> Session:
    """Read and check all that stands before the cells."""
    header, _, n_text = _read_header(path, file)
    _, _, n, position, n_digests, n_media, k, v, saved = HEADER.unpack(header)
    if saved != model:
        raise SessionError(f"{path}: is a conversation with another model, or with this one under other rotary settings or adapters")
    if not _misnamed(k, v, store):
        _check_formats(path, (k, v), store)
    if n > n_ctx:
        raise ContextOverflowError(f"{path}: the conversation has {n} tokens, but the context holds {n_ctx}; load with a larger n_ctx")
    if not 0 < n or n_digests > n or n_media > n or position >= 1 << 31:
        raise SessionError(f"{path}: {n} tokens, {n_digests} + {n_media} digests and position {position} contradict each other")
    raw = _section(path, file, SUM * (n_digests + n_media))
    digests = [raw[i : i + SUM] for i in range(0, len(raw), SUM)]
    rows = np.frombuffer(_section(path, file, 8 * n), "<i4").reshape(n, 2)
    if rows[:, 0].min() < -n_digests or rows[:, 0].max() >= n_ids or rows[rows[:, 0] >= 0, 1].any():
        raise SessionError(f"{path}: names tokens or pictures that are not there")
    keys: list[Hashable] = [a if a >= 0 else (digests[-1 - a], max(b, 0)) for a, b in rows.tolist()]
    across = np.flatnonzero(rows[:, 1] < 0)
    ends = np.cumsum(-rows[across, 1].astype(np.int64))
    most = max((g.policy.n for g in store.cells.groups if g.policy.across), default=0)
    if len(ends) and ends[-1] > most:
        raise ContextOverflowError(f"{path}: its pictures have {ends[-1]} encoder rows, but a conversation holds {most}; "
                                   "load with images=(width, height, number) for more")
    smaller = Smaller.read(path, _section(path, file, n_text), store, n) if n_text else None
    return Session(keys, list(zip(across.tolist(), ends.tolist())), position, frozenset(digests[n_digests:]), (k, v), smaller)


def _check_formats(path: Path, saved: tuple[int, int], store: Store) -> None:
    """Compare the formats of a file, as ggml's numbers, with those of a model's caches. Raises: SessionError for others."""
    if saved != tuple(d.id for d in store.formats):
        k, v = (next((t.name for t in DTYPES + CACHE_DTYPES if t.id == number), number) for number in saved)
        raise SessionError(f"{path}: its cache has formats {k}/{v}, this model's {'/'.join(map(str, store.formats))}: "
                           "load with the kv_dtype that it was saved with")


def _misnamed(k: int, v: int, store: Store) -> bool:
    """Say whether a file may be an early one of a cache in groups: it names the format of tokens in full, which are beside them."""
    full = next((part.states for layer in store.layers for part in layer.parts), ())
    return bool(full) and (k, v) == tuple(state.dtype.id for state in full)
