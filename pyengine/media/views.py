"""What an encoder's processor gives: runs of the encoder, and what stands in a prompt around their rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MAX_DECODING = 1 << 30               # bytes at once that reading a picture's file may take: those of its decoder, and the pixels


class Limits(NamedTuple):
    """What a plan leaves for one medium: positions of the context, and the most rows of one run of the encoder."""

    n_ctx: int
    rows: int


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
class Processed:
    """A picture or video as one model takes it.

    parts      what stands in the prompt in its place: texts and token ids (start, end ...), views, and pieces of views in order
    size       (width, height) of the original in pixels
    processed  (width, height) after resizing, of the first view
    """

    parts: tuple[str | int | View | Piece, ...]
    size: tuple[int, int]
    processed: tuple[int, int]

    @property
    def views(self) -> list[View]:
        """The runs of the encoder, in the order in which they come first."""
        return list(dict.fromkeys(p.view if isinstance(p, Piece) else p for p in self.parts if isinstance(p, (View, Piece))))
