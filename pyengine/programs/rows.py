"""A prompt laid out: segments of tokens and media, and one entry a position."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import field
from typing import Any

import numpy as np

from pyengine.cache.policy import seen_across
from pyengine.errors import RequestError
from pyengine.records import dataclass


@dataclass(frozen=True)
class TokenSegment:
    """A run of token ids."""

    ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class MediaSegment:
    """A run of positions that one picture or video fills. It travels with the tokens; nothing of it is kept on a model.

    embedding  float32 [n, d_model]
    positions  int32 [axes, n], relative to the position at which the segment starts
    advance    how far the positions of what follows move on
    grid       (t, h, w) after patch merging, or None
    causal     False: its rows see each other in both directions, and nothing else does
    atomic     True: never cut at a batch boundary
    digest     sha256 of pixels, shape and processor settings
    source     digest of the picture or video that it shows, the key of the image cache
    token      None: its rows stand in the sequence. Else one position stands there, with this id, and the rows are what
               cross-attention sees
    alone      its own position sees its own rows only, not those of pictures right before it; what follows sees all of them
    """

    embedding: np.ndarray
    positions: np.ndarray
    advance: int
    grid: tuple[int, int, int] | None
    causal: bool
    atomic: bool
    digest: bytes
    token: int | None = None
    source: bytes = b""
    alone: bool = False

    def __len__(self) -> int:
        """Count the segment's positions in the prompt."""
        return len(self.embedding) if self.token is None else 1


@dataclass(frozen=True, eq=False)
class SourceSegment(MediaSegment):
    """A prompt that an encoder reads in front of the decoder: one position, whose id is the first that the decoder gets."""


Segment = TokenSegment | MediaSegment


@dataclass
class Rows:
    """A prompt laid out, one entry a position.

    keys       what stands there: a token id, or (digest, row) of a media segment; equal keys have equal embeddings
    ids        int32 [n]: token ids; -1 for rows of media
    positions  int32 [axes, n]
    span_end   int32 [n]: for rows of a non-causal segment the number after its last row, else 0
    media      (first row, segment) of each media segment
    next       position of what follows
    sees       int32 [2, n]: encoder rows lo <= j < hi that cross-attention sees from each row
    crossed    (row, segment) of each picture whose rows are seen so
    adapters   the scale of each adapter; () where none is loaded
    compression  by which policy the conversation's cells are compressed; counts: how much each row counts in sums of attention,
               float32 [n, kinds]; None: nothing
    """

    keys: list[Hashable]
    ids: np.ndarray
    positions: np.ndarray
    span_end: np.ndarray
    media: list[tuple[int, MediaSegment]]
    next: int
    sees: np.ndarray
    crossed: list[tuple[int, MediaSegment]] = field(default_factory=list)
    adapters: tuple[float, ...] = ()
    compression: Any = None
    counts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def steps(self, start: int, n_batch: int) -> Iterator[tuple[int, int]]:
        """Cut the rows from `start` on into steps of at most n_batch rows that do not cut atomic segments."""
        while start < len(self):
            stop = self.cut(start, n_batch)
            if stop == start:
                n = next(len(s) for first, s in self.media if first == start)
                raise RequestError(f"a picture of {n} rows must be one step, but n_batch is {n_batch}")
            yield start, stop
            start = stop

    def cut(self, start: int, n: int) -> int:
        """Find where to cut after at most n rows from `start`; `start` itself where an atomic segment of more rows begins there."""
        return max(start, self.whole(min(start + n, len(self))))

    def whole(self, n: int) -> int:
        """Return n, or the start of the atomic segment that would be cut there."""
        return next((first for first, s in self.media if s.atomic and first < n < first + len(s)), n)

    def atom(self, start: int) -> int:
        """Count the rows from `start` on that must be one step: those of the atomic segment that begins there, or 1."""
        return next((len(s) for first, s in self.media if s.atomic and first == start), 1)

    def position(self, n: int) -> int:
        """Return the position at which row n stands, or would stand."""
        return int(self.positions[:, n].max()) if n < len(self) else int(self.next)

    def embeddings(self, start: int, stop: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield which of rows [start, stop) are media, counted from `start`, and their embeddings."""
        for first, s in self.media:
            a, b = max(first, start), min(first + len(s), stop)
            if a < b:
                yield slice(a - start, b - start), s.embedding[a - first : b - first]

    def across(self, start: int, stop: int) -> list[tuple[int, np.ndarray]]:
        """List the pictures among rows [start, stop) that are seen across: (row, encoder rows [n, d_model])."""
        return [(i, s.embedding) for i, s in self.crossed if start <= i < stop]

    @property
    def source(self) -> SourceSegment | None:
        """The prompt that an encoder reads."""
        return next((s for _, s in self.crossed if isinstance(s, SourceSegment)), None)

    @property
    def n_asked(self) -> int:
        """Tokens of what was asked: all positions, or those of the prompt that an encoder reads, and what the decoder is given to go on from."""
        return len(self) if self.source is None else len(self.source.embedding) + len(self) - 1


def lay_out_rows(segments: Iterable[Segment], axes: int = 1) -> Rows:
    """Lay a prompt's segments out; positions start at 0 and go on behind a media segment by its `advance`."""
    keys: list[Hashable] = []
    ids, positions, span_end, media, sees = [], [], [], [], []
    crossed: list[tuple[int, MediaSegment]] = []
    pictures: list[tuple[int, int]] = []                     # as `seen_across` takes them: the last run as one, and the picture before it
    at, n_across = 0, 0
    for s in segments:
        n, first = len(s), len(keys)
        if isinstance(s, TokenSegment):
            keys += s.ids
            ids.append(np.array(s.ids, np.int32))
            positions.append(np.broadcast_to(np.arange(at, at + n, dtype=np.int32), (axes, n)))
            at += n
        elif s.token is not None:
            crossed.append((first, s))
            n_across += len(s.embedding)
            pictures = [*(pictures[:-1] if pictures and pictures[-1][0] == first - 1 else pictures[-1:]), (first, n_across)]
            keys.append((s.digest, 0))
            ids.append(np.array([s.token], np.int32))
            positions.append(np.full((axes, 1), at, np.int32))
            at += s.advance
        else:
            keys += [(s.digest, j) for j in range(n)]
            ids.append(np.full(n, -1, np.int32))
            positions.append(np.broadcast_to(s.positions, (axes, n)).astype(np.int32) + at)
            media.append((first, s))
            at += s.advance
        seen = (n_across - len(s.embedding), n_across) if isinstance(s, MediaSegment) and s.alone else seen_across(pictures)
        sees.append(np.repeat(np.array(seen, np.int32)[:, None], n, axis=1))
        span_end.append(np.full(n, 0 if isinstance(s, TokenSegment) or s.causal else first + n, np.int32))
    if not keys:
        none = np.empty(0, np.int32)
        return Rows([], none, np.empty((axes, 0), np.int32), none, [], 0, np.empty((2, 0), np.int32))
    return Rows(keys, np.concatenate(ids), np.concatenate(positions, axis=1), np.concatenate(span_end), media, at,
                np.concatenate(sees, axis=1), crossed)


def token_rows(ids: Sequence[int], position: int, axes: int, sees: tuple[int, int] = (0, 0)) -> Rows:
    """Make rows of tokens that follow at `position` and see these encoder rows."""
    n, array = len(ids), np.array(ids, np.int32)
    positions = np.broadcast_to(np.arange(position, position + n, dtype=np.int32), (axes, n))
    return Rows(array.tolist(), array, positions, np.zeros(n, np.int32), [], position + n,
                np.repeat(np.array(sees, np.int32)[:, None], n, axis=1))


def common(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Return the length of the common beginning."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])
