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


@dataclass(frozen=True)
class Batch:
    """The graph's inputs for one step of `m` rows, `w` of which go through the last layer and `l` through the output head."""

    rows: Dim                # m
    ids: Tensor              # I32 [m]
    positions: Tensor        # I32 [axes, m]
    wanted: Tensor           # I32 [w]: rows that the last layer computes
    head: Tensor             # I32 [l]: of those, rows whose logits are computed

    def select(self, x: Tensor) -> Tensor:
        """The wanted rows of x [m, d]: [w, d]."""
        return ops.rows(x, self.wanted)

    def select_head(self, x: Tensor) -> Tensor:
        """Of wanted rows x [w, d], those whose logits are asked for: [l, d]."""
        return ops.rows(x, self.head)
