"""What an encoder's processor gives: runs of the encoder, and what stands in a prompt around their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pyengine.records import dataclass, NamedTuple

MAX_DECODING = 1 << 30               # bytes at once that reading a picture's file may take: those of its decoder, and the pixels


class Limits(NamedTuple):
    """What a plan leaves for one medium: positions of the context, and the most rows of one run of the encoder; and how many pictures the
    prompt has, and what its text is for an encoder that reads it: ids of that one's own vocabulary."""

    n_ctx: int
    rows: int
    pictures: int = 1
    words: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class View:
    """One run of an encoder: a picture, a crop of it, or a video, after the model's own processor.

    make       computes the encoder graph's inputs, by name, when the run comes: those of a long video are never there together
    axes       values of its run-time axes
    positions, advance, grid, causal, atomic, token, alone: as in MediaSegment, which has positions.shape[1] rows
    """

    make: Callable[[], dict[str, np.ndarray]]
    axes: dict[str, int]
    positions: np.ndarray
    advance: int
    grid: tuple[int, int, int] | None = None
    causal: bool = True
    atomic: bool = False
    token: int | None = None
    alone: bool = False

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """The encoder graph's inputs, computed anew. Raises: ImageError for a frame that cannot be read."""
        return self.make()


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows [start, stop) of a view, where tokens, or rows of others, stand between the rows of one run of an encoder (the ends of lines,
    lines that go through several tiles).

    Each takes one position more than the row before it, on every axis; the view's own positions and advance do not count.
    """

    view: View
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Blend:
    """Rows that are sums of rows of views with weights: features that are resized, or pooled, over the grid of one or several runs.

    views    their rows are counted on from one to the next
    indices  int [n, k]: the k rows that each is made of; weights: float32 [n, k]
    Each takes one position more than the row before it, as in a Piece.
    """

    views: tuple[View, ...]
    indices: np.ndarray
    weights: np.ndarray

    def of(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """Compute them, float32 [n, D], of the rows of its views."""
        out = np.zeros((len(self.indices), rows[0].shape[1]), np.float32)
        first = 0
        for part in rows:
            for index, weight in zip(self.indices.T, self.weights.T):
                at = np.flatnonzero((index >= first) & (index < first + len(part)))
                out[at] += part[index[at] - first] * weight[at, None]
            first += len(part)
        return out


@dataclass(frozen=True, eq=False)
class Processed:
    """A picture or video as one model takes it.

    parts      what stands in the prompt in its place: texts and token ids (start, end ...), views, pieces of views in order, and blends
    size       (width, height) of the original in pixels
    processed  (width, height) after resizing, of the first view
    """

    parts: tuple[str | int | View | Piece | Blend, ...]
    size: tuple[int, int]
    processed: tuple[int, int]

    @property
    def views(self) -> list[View]:
        """The runs of the encoder, in the order in which they come first."""
        return list(dict.fromkeys(view for p in self.parts if isinstance(p, (View, Piece, Blend)) for view in views_of(p)))


def views_of(part: View | Piece | Blend) -> tuple[View, ...]:
    """Return the runs that a part's rows come from."""
    return part.views if isinstance(part, Blend) else (part.view,) if isinstance(part, Piece) else (part,)
