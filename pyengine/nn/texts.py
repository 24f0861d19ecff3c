"""Several texts side by side in the graph of one run: their rows, which of them see each other, and what stands for each text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyengine import ops
from pyengine.files.hparams import Hparams
from pyengine.graph.tensor import Tensor
from pyengine.records import NamedTuple

HIDDEN, VECTORS, CLASSES, LOGITS = "hidden", "vectors", "classes", "logits"        # what a run of a tower may give
HEAD = "head"                        # a pooling by layers of the model's own
POOLINGS = "mean", "cls", "last", "eos", HEAD
# llama.cpp's enum llama_pooling_type (include/llama.h), as files give it; "" says nothing
_IN_FILES = {-1: "", 0: "", 1: "mean", 2: "cls", 3: "last", 4: "rank"}


def pooling_of(h: Hparams, key: str = "pooling_type") -> str:
    """Return what a file's keys say of pooling: one of POOLINGS, or "rank", or a number that is not known; "" if nothing."""
    said = h.get(key, 0, int)
    return _IN_FILES.get(said, str(said))


class Seen(NamedTuple):
    """Which rows each row sees: rows lo <= j < hi of its text, numbered in the text, and of the run."""

    lo: Tensor               # I32 [m]
    hi: Tensor
    first: Tensor            # I32 [m]: the same as rows of the run
    end: Tensor


class Texts(NamedTuple):
    """The inputs of a run of p texts with m rows together. Nothing is padded: a row sees an interval of rows, those of its own text.

    near     by the width of a window: the rows of its text that are at most so far away
    """

    ids: Tensor              # I32 [m]
    positions: Tensor        # I32 [m]: from 0 in each text
    types: Tensor            # I32 [m]: which part of a text a row belongs to, 0 or, of a pair, 1
    seq: Tensor              # I32 [m]: the number of its text
    table: Tensor            # I32 [p, longest text]: the row of the run at which each position of a text stands
    all: Seen
    near: Mapping[int, Seen]
    first: Tensor            # I32 [p]: the rows of a text
    end: Tensor
    at: Tensor               # I32 [p]: the row that stands for it, as `TextTower.place` says
    wanted: Tensor           # I32 [l]: rows that go through the head

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int = 0, products: str = "float", **more: Any) -> Tensor:
        """Attend with q [m, H, E] to k, v [m, G, E] of the same text, or of a window of it; returns [m, H * E].

        Keys are numbered in their text, so that a text has the same bits wherever in a run it stands. more: arguments of `ops.attention`.
        """
        k, v = (ops.transpose(t, axes=(1, 0, 2)) for t in (k, v))                          # [G, m, E], views
        seen = self.near[window] if window else self.all
        if products == "int8":                                                             # whose tiles begin where the interval does
            return ops.attention(q, k, v, seen.first, seen.end, scale=scale, products=products, **more)
        return ops.attention(q, k, v, seen.lo, seen.hi, self.table, self.seq, scale=scale, **more)

    def pooled(self, x: Tensor, how: str) -> Tensor:
        """Make one row of each text's rows of x [m, d]: their mean, or the row that stands for it; returns [p, d]."""
        if how == "mean":
            return ops.mean_rows(x, self.first, self.end)
        return ops.rows(x, self.first if how == "cls" else self.at)
