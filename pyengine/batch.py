"""What one step of a model works on: the graph's run-time inputs, and the segments that a prompt is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pyengine import ops
from pyengine.tensor import Dim, Tensor


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
    """

    embedding: np.ndarray
    positions: np.ndarray
    advance: int
    grid: tuple[int, int, int] | None
    causal: bool
    atomic: bool
    digest: bytes

    def __len__(self) -> int:
        return len(self.embedding)


Segment = TokenSegment | MediaSegment


@dataclass(frozen=True, eq=False)
class View:
    """One run of an encoder: a picture, a crop of it, or a video, after the model's own processor.

    inputs     the encoder graph's inputs by name
    axes       values of its run-time axes
    positions, advance, grid, causal, atomic: as in MediaSegment, whose length is positions.shape[1]
    """

    inputs: dict[str, np.ndarray]
    axes: dict[str, int]
    positions: np.ndarray
    advance: int
    grid: tuple[int, int, int] | None = None
    causal: bool = True
    atomic: bool = False


@dataclass(frozen=True, eq=False)
class Processed:
    """A picture or video as one model takes it.

    parts      what stands in the prompt in its place: texts and token ids (start, end ...), and views
    size       (width, height) of the original in pixels
    processed  (width, height) after resizing, of the first view
    """

    parts: tuple[str | int | View, ...]
    size: tuple[int, int]
    processed: tuple[int, int]

    @property
    def views(self) -> list[View]:
        """The runs of the encoder, in order."""
        return [p for p in self.parts if isinstance(p, View)]


@dataclass(frozen=True)
class Batch:
    """The graph's inputs for one step of `m` rows, `w` of which go through the last layer and `l` through the output head."""

    rows: Dim                # m
    ids: Tensor              # I32 [m]
    positions: Tensor        # I32 [axes, m]
    wanted: Tensor           # I32 [w]: rows that the last layer computes
    head: Tensor             # I32 [l]: of those, rows whose logits are computed
    media: Tensor | None     # F32 [e, d]: embeddings of this step's media rows; id -1-j takes row j. None: no media encoder

    def select(self, x: Tensor) -> Tensor:
        """The wanted rows of x [m, d]: [w, d]."""
        return ops.rows(x, self.wanted)

    def select_head(self, x: Tensor) -> Tensor:
        """Of wanted rows x [w, d], those whose logits are asked for: [l, d]."""
        return ops.rows(x, self.head)
