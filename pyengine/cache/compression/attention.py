"""Policies that keep what was attended to most: StreamingLLM, H2O, SnapKV, RoCo and LOOK-M.

Written A_ij for the attention of query i to key j after softmax, A_s[j] for its sum over queries, M for the recent tokens. The papers
treat each query head; heads that share a key/value head are summed here, which orders keys as their mean does. Budgets are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyengine.arguments import number, takes, whole
from pyengine.cache.compression.base import AFTER, ALL, best_and_recent, Compression, largest, LAST, one_of, part, positions, read_sums, TEXT
from pyengine.errors import RequestError

POOLINGS = ("max", "avg", "peak")
ROWS = (ALL, TEXT, AFTER)


class StreamingLLM(Compression):
    """Attention sinks and a window: the first `sinks` tokens and the last ones. Xiao et al. 2023, arXiv:2309.17453.

    kept = {0 .. sinks-1} + {n - (budget - sinks) .. n-1}, in every layer and head; no attention is read.

    sinks   the first tokens that are kept, at most half of the budget; 4 in the paper
    differs: the paper numbers positions within the cache, so that they stay small. Here tokens keep the positions that they had.
    """

    word = "streaming-llm"

    @takes()
    def __init__(self, ratio: float | None = None, budget: int | None = None, merge: str = "none", when: str = "prompt", sinks: int = 4):
        self._common(ratio, budget, 1.0, merge, when)
        self._set(sinks=whole("sinks", sinks))

    def select(self, sums: np.ndarray, is_text: np.ndarray, *, budget: int | None = None) -> np.ndarray:
        """Return the first and the last positions, int64 [h, b]; of sums [h, n] only the shape is read."""
        scores, _ = read_sums(sums, is_text)
        budget = self.cells_of(budget, scores.shape[1])
        return best_and_recent(np.zeros_like(scores), budget, budget - min(self.sinks, budget // 2))


class H2O(Compression):
    """Heavy hitters: the keys of the largest attention summed over all queries, and the last. Zhang et al. 2023, arXiv:2306.14048.

    A_s[j] = sum_i A_ij,  kept = top_N(A_s[: n - M]) + the last M,  N + M = budget; M is half of it, as in the paper.

    differs: the paper drops one key as each query is read (Algorithm 1). With when="prompt" the sums of the whole prompt decide, once,
    as in the released code for language models; when="always" asks again as the cache fills.
    """

    word = "h2o"
    observed = ((ALL, "sum"),)

    @takes()
    def __init__(self, ratio: float | None = None, budget: int | None = None, recent: int | float = 0.5, merge: str = "none",
                 when: str = "prompt"):
        self._common(ratio, budget, recent, merge, when)

    def select(self, sums: np.ndarray, is_text: np.ndarray, *, budget: int | None = None) -> np.ndarray:
        scores, _ = read_sums(sums, is_text)
        budget = self.cells_of(budget, scores.shape[1])
        return best_and_recent(scores, budget, self.recents_of(budget))


class SnapKV(Compression):
    """What the last queries of a prompt attend to, pooled over neighbours. Li et al. 2024, arXiv:2404.14469.

    C[j] = sum over the last `window` queries of A_ij,  kept = top_N(pool(C)[: n - M]) + the last M,  N + M = budget

    window   the queries that observe: 32. They are kept themselves (M = window) where `recent` says nothing else
    kernel   how many neighbours are pooled, an odd number: 7
    pooling  "max", or "avg", where keys beyond the ends count as 0. The paper's measurements have windows of 32, kernels of 7 and
             maxima; the released code without settings 64, 5 and means
             "peak" is ours: the maximum and half of the key's own score. With maxima a key and its neighbours are equals, and of few cells
             the neighbour before it gets the first
    differs: the released code refuses budgets below the window. Here at most half of a budget is the window's.
    """

    word = "snapkv"
    observed = ((LAST, "sum"),)

    @takes()
    def __init__(self, ratio: float | None = None, budget: int | None = None, recent: int | float | None = None, merge: str = "none",
                 when: str = "prompt", window: int = 32, kernel: int = 7, pooling: str = "max"):
        self._common(ratio, budget, recent, merge, when)
        self._set(window=whole("window", window, 1), kernel=whole("kernel", kernel, 1, 4095), pooling=one_of("pooling", pooling, POOLINGS))
        if self.kernel % 2 == 0:
            raise RequestError(f"kernel must be an odd number, as many neighbours on both sides, got {self.kernel}")

    def recents_of(self, budget: int) -> int:
        """Return how many of the kept cells are the last tokens': the window, where `recent` says nothing, in half of the budget; of one cell none."""
        return super().recents_of(budget) if self.recent is not None else min(self.window, budget // 2)

    def select(self, sums: np.ndarray, is_text: np.ndarray, *, budget: int | None = None) -> np.ndarray:
        scores, _ = read_sums(sums, is_text)
        budget = self.cells_of(budget, scores.shape[1])
        recent = self.recents_of(budget)
        return best_and_recent(self._pooled(scores, recent), budget, recent)

    def _pooled(self, scores: np.ndarray, recent: int) -> np.ndarray:
        """Return scores [h, n] whose first n - recent are pooled among themselves."""
        before = scores.shape[1] - recent
        if before == 0 or self.kernel == 1:
            return scores
        mean, half = self.pooling == "avg", self.kernel // 2
        padded = np.pad(scores[:, :before], ((0, 0), (half, half)), constant_values=0.0 if mean else -np.inf)
        windows = np.lib.stride_tricks.sliding_window_view(padded, self.kernel, axis=1)        # [h, before, kernel]
        pooled = windows.mean(2) if mean else windows.max(2)
        return np.concatenate([pooled + 0.5 * scores[:, :before] if self.pooling == "peak" else pooled, scores[:, before:]], axis=1)


class RoCo(Compression):
    """Robust omission: the largest mean attention, and those whose attention varies most. Ren and Zhu 2024, arXiv:2402.06262.

    mean[j] = sum_i A_ij / c_j,  std[j] = sqrt(sum_i A_ij^2 / c_j - mean[j]^2),  c_j the number of queries that see key j
    kept = the last M + those of the largest std, `robust` of the budget with the last M + the largest means among the others

    A key that only some queries need has a small mean and a large deviation: the deviation keeps it.

    recent  10, at most half of the budget, as in the released code
    robust  share of the budget; 0.3, the released code's for generation
    differs: the released code drops one key, or a stride of them, at a time; here all at once by the same order.
    """

    word = "roco"
    observed = ((ALL, "sum"), (ALL, "square"))

    @takes()
    def __init__(self, ratio: float | None = None, budget: int | None = None, recent: int | float | None = None, merge: str = "none",
                 when: str = "prompt", robust: float = 0.3):
        self._common(ratio, budget, recent, merge, when)
        self._set(robust=number("robust", robust, 0, 1))

    def recents_of(self, budget: int) -> int:
        """Return how many of the kept cells are the last tokens'."""
        return super().recents_of(budget) if self.recent is not None else min(10, budget // 2)

    def select(self, sums: np.ndarray, is_text: np.ndarray, *, budget: int | None = None, squares: np.ndarray | None = None,
               counts: np.ndarray | None = None) -> np.ndarray:
        """Return the positions that are kept, int64 [h, b].

        squares  [h, n]: sums of squared probabilities; without them only means decide
        counts   [n] or [h, n]: how many probabilities are in each key's sums, of all query heads that share it; n - j where they are
                 not given, a causal prompt of one query head for each key/value head
        """
        scores, _ = read_sums(sums, is_text)
        n = scores.shape[1]
        budget = self.cells_of(budget, n)
        recent = self.recents_of(budget)
        seen = np.maximum(np.arange(n, 0, -1) if counts is None else np.asarray(counts, np.float64), 1)
        mean = scores / seen
        kept = np.ones(scores.shape, np.bool_)
        kept[:, : n - recent] = False
        if squares is not None:
            varies = np.sqrt(np.maximum(read_sums(squares, is_text, "squares")[0] / seen - mean**2, 0))
            kept |= largest(np.where(kept, -np.inf, varies), max(part(self.robust, budget) - recent, 0))
        return positions(kept | largest(np.where(kept, -np.inf, mean), budget - int(kept[:1].sum())))

    def choose(self, statistics: np.ndarray, is_text: np.ndarray, budget: int | None = None, *, counts: np.ndarray | None = None,
               keys: np.ndarray | None = None, values: np.ndarray | None = None) -> np.ndarray:
        return self.select(statistics[..., 0], is_text, budget=budget, squares=statistics[..., 1], counts=counts)


class LookM(Compression):
    """Text before pictures, and evicted cells merged into kept ones. LOOK-M, Wan et al. 2024, arXiv:2406.18139.

    A_s[j] = sum_i A_ij;  A_s[j] += T_p for the tokens of text, T_p = max(A_s)
    kept = top_N(A_s[: n - M]) + the last M,  N + M = budget; M is half of it, as in the paper

    merge     "pivotal", the paper's best; "averaged", "weighted": `pyengine.cache.compression.merging`; "attention" is ours
    pictures  share of N that goes to the best tokens of pictures before text has its turn: 0 in the paper. Where a budget of 1 or 5%
              is less than the text, a picture would otherwise live on in merged cells only
    least     share of the budget that every prompt gets; what is above it is spent by the entropy of the prompt's attention, layer by
              layer: all where rows attend to all keys alike, nothing where each attends to one. 1, the paper: the same for all
    rows      whose attention A_s sums: "all", the paper; "text", or "after", what stands behind the last picture. Patches attend to
              patches beside them, and are many: with "all" they decide which patches stay, not the question

    differs: the released code keeps all of the text even where the budget is smaller, and so exceeds it. Here the budget is exact: text
    competes with text by A_s. It counts 576 tokens for each picture, and merges "averaged" and "weighted" only those evicted
    tokens whose similarity is at least the mean; here is_text says what is text, and all are merged, as in the paper's equations.
    """

    word = "look-m"

    @takes()
    def __init__(self, ratio: float | None = None, budget: int | None = None, recent: int | float = 0.5, merge: str = "pivotal",
                 when: str = "prompt", pictures: float = 0.0, least: float = 1.0, rows: str = ALL):
        self._common(ratio, budget, recent, merge, when)
        self._set(pictures=number("pictures", pictures, 0, 1), least=number("least", least, 0, 1), rows=one_of("rows", rows, ROWS))

    @property
    def observed(self) -> tuple[Any, ...]:                   # type: ignore[override]
        """The sums, and entropies where budgets follow them."""
        return ((self.rows, "sum"), (ALL, "entropy")) if self.least < 1 else ((self.rows, "sum"),)

    def select(self, sums: np.ndarray, is_text: np.ndarray, *, budget: int | None = None) -> np.ndarray:
        scores, text = read_sums(sums, is_text)
        budget = self.cells_of(budget, scores.shape[1])
        recent = self.recents_of(budget)
        before = scores.shape[1] - recent
        first = scores + np.where(text, scores.max(axis=1, keepdims=True, initial=0), 0)
        if self.pictures:
            patches = np.where(text, -np.inf, scores)[:, :before]
            first[:, :before][largest(patches, part(self.pictures, budget - recent)) & ~text[:, :before]] = np.inf
        return best_and_recent(first, budget, recent)

    @property
    def uneven(self) -> bool:                                # type: ignore[override]
        """Whether the budget of a layer follows its entropy."""
        return self.least < 1

    def budgets(self, statistics: Sequence[np.ndarray], is_text: np.ndarray | Sequence[np.ndarray], group: int = 1,
                budget: int | None = None) -> list[int]:
        """Return each layer's cells: least B + (1 - least) B H, B the budget and H the entropy of attention over its largest, ln of
        the keys that each row sees. Never above B, so that a plan made for B holds."""
        most, n = self.mean_of(statistics, budget), max((s.shape[1] for s in statistics), default=0)
        if self.least == 1:
            return [most] * len(statistics)
        low, whole_entropy = max(1, part(self.least, most)), np.log(np.arange(1, n + 1)).sum()
        spent = [s[..., 1].sum(dtype=np.float64) / (len(s) * group * whole_entropy) if n > 1 else 0.0 for s in statistics]
        return [low + int(np.clip(h, 0, 1) * (most - low)) for h in spent]
