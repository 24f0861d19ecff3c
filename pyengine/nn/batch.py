"""The rows of a step, or of a text encoder's run, in a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyengine import ops
from pyengine.graph.tensor import Tensor
from pyengine.records import NamedTuple


class Across(NamedTuple):
    """What layers that attend across work on: `c` encoder rows that this step adds to their caches, and the `s` of its rows that
    see any. The others skip those layers, so a step of text alone does not pay for them.
    """

    states: Tensor           # F32 [c, d_model]
    rows: Tensor             # I32 [s]: which rows of the step see encoder rows
    back: Tensor             # I32 [m]: the number of a row among those, or -1 - its own number

    def pick(self, x: Tensor) -> Tensor:
        """Pick the rows of x [m, d] that see encoder rows: [s, d]."""
        return ops.rows(x, self.rows)

    def put(self, x: Tensor, y: Tensor) -> Tensor:
        """Return x [m, d] with those rows replaced by y [s, d]."""
        return ops.rows(y, self.back, x)


class Inner(NamedTuple):
    """What a head reads of a decoder besides its last hidden states, noted as the graph of a step is built."""

    states: list[Tensor]     # F32 [m, d_model]: what each layer takes
    caches: list[Any]        # each layer's as the layer leaves it


class Batch(NamedTuple):
    """The graph's inputs for one step of `m` rows.

    n_ctx    positions of the largest context: what some scalings of the rotation depend on
    """

    n_ctx: int
    ids: Tensor              # I32 [m]
    positions: Tensor        # I32 [axes, m]
    media: Tensor | None = None      # F32 [e, media_width]: embeddings of this step's media rows; id -1-j takes row j. None: there are none
    across: Across | None = None     # None: no layer attends across
    places: Tensor | None = None     # I32 [m]: ids of media rows, and 0 for all others; as media
    texts: Tensor | None = None      # I32 [m]: ids of all others, and `Architecture.media_id` for media rows; as media
    inner: Inner | None = None       # None: nothing is noted

    def noted(self, x: Tensor) -> Tensor:
        """Note what the next layer takes, and return it."""
        if self.inner is not None:
            self.inner.states.append(x)
        return x

    def left(self, caches: Sequence[Any]) -> None:
        """Note all layers' caches as they leave them."""
        if self.inner is not None:
            self.inner.caches.extend(caches)


class Source(NamedTuple):
    """The graph's inputs for one run of the encoder of an encoder-decoder: a prompt of `m` rows, which all see each other.

    n_ctx    rows of the longest prompt
    """

    n_ctx: int
    ids: Tensor              # I32 [m]
    positions: Tensor        # I32 [m]: from 0
    lo: Tensor               # I32 [m]: the rows that each one sees
    hi: Tensor
    media: Tensor | None = None      # F32 [e, media_width]: embeddings of its media rows; id -1-j takes row j. None: there are none

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, **more: Any) -> Tensor:
        """Attend with q [m, H, E] to k, v [m, G, E]; returns [m, H * E]. more: arguments of `ops.attention`."""
        k, v = (ops.transpose(t, axes=(1, 0, 2)) for t in (k, v))                          # [G, m, E], views
        return ops.attention(q, k, v, self.lo, self.hi, scale=scale, **more)
