"""Key/value caches: what a layer's attention needs is a policy; storage and masks follow from it.

A query sees an interval of earlier tokens, so a mask is two numbers a row, and a cache is a ring of cells: token j of a
sequence lies in cell table[j % len(table)]. Layers that attend across, to an encoder's rows, number those rows instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Full:
    """Every earlier token is seen."""

    def slots(self, n_ctx: int, n_batch: int) -> int:
        """Cells of one sequence."""
        return n_ctx


@dataclass(frozen=True)
class Sliding:
    """The last `window` tokens are seen, the query itself included."""

    window: int

    def slots(self, n_ctx: int, n_batch: int) -> int:
        """Cells of one sequence: the window of the oldest row of a batch, and the batch."""
        return min(n_ctx, self.window + n_batch)


@dataclass(frozen=True)
class Chunked:
    """Tokens of the query's own chunk are seen: those from the last multiple of `size` (Llama 4)."""

    size: int

    def slots(self, n_ctx: int, n_batch: int) -> int:
        """Cells of one sequence: a chunk, and the batch that may begin the next one."""
        return min(n_ctx, self.size + n_batch)


@dataclass(frozen=True)
class Cross:
    """Rows of an encoder are seen, not tokens (`seen_across`); a conversation holds at most `n`, which the plan decides."""

    n: int = 0

    def slots(self, n_ctx: int, n_batch: int) -> int:
        """Cells of one sequence."""
        return self.n


Policy = Full | Sliding | Chunked | Cross


def seen_across(pictures: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Encoder rows lo <= j < hi that a token sees behind these pictures: those of the last ones, as far as they stand side by side.

    pictures: (number of its token, encoder rows up to its end) of each; rows are counted through the whole conversation. The
    same as transformers' `get_cross_attention_token_mask` says from the pictures' side.
    """
    if not pictures:
        return 0, 0
    first = len(pictures) - 1
    while first and pictures[first - 1][0] == pictures[first][0] - 1:
        first -= 1
    return pictures[first - 1][1] if first else 0, pictures[-1][1]


def visible(policy: Full | Sliding | Chunked, index: np.ndarray,
            span_end: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The one mask rule of self-attention: row i sees keys lo[i] <= j < hi[i]. int32 [m] each.

    index: number of each row's token in its sequence. span_end: for rows of a non-causal span (a picture that attends to
    itself in both directions) the number after its last token, else anything <= index + 1. The window limits backwards
    only, spans forwards only, as transformers does for Gemma 3 (`token_type_ids_mask_function`).
    """
    hi = index + 1 if span_end is None else np.maximum(index + 1, span_end)
    match policy:
        case Full():
            lo = np.zeros_like(index)
        case Sliding(window):
            lo = np.maximum(index - window + 1, 0)
        case Chunked(size):
            lo = index // size * size
    return lo.astype(np.int32), hi.astype(np.int32)
