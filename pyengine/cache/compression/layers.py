"""Policies whose layers have budgets of their own: VL-Cache, by sparsity, and MEDA, by cross-modal entropy.

Both divide the cells of all layers, L times `budget_of(n)`, in proportion to a number of each layer, and bound each layer's share.
differs: the papers clip shares to 0.01 .. 1 of n once, which changes their sum. Here what clipping takes or gives is settled among the
other layers, and fractions of cells go to the largest remainders: the total is exact (`apportioned`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyengine.arguments import takes, whole
from pyengine.cache.compression.attention import LookM
from pyengine.cache.compression.base import AFTER, ALL, best_and_recent, Compression, MEDIA, read_sums, read_text, TEXT

LEAST = 0.01                                                 # of n: the papers' least share of a layer


class VLCache(Compression):
    """Scores by what follows the last picture, budgets by how dense a layer's attention is. VL-Cache, Tu et al. 2024, arXiv:2410.23317.

    P the rows behind the last picture, "post-vision" queries:
    C[j] = sum over i in P of A_ij,  kept = top_N(C[: n - M]) + the last M,  N + M = budget, M a tenth of it
    density of layer l  d_l = |{(i, j): i in P, A_ij >= 0.01 max_j A_ij}| / |{(i, j): i in P, j <= i}|, the mean over heads; 1 - sparsity
    cells of layer l    b_l = clip(r L d_l / sum d, 0.01, 1) n, r the ratio of n that is kept of all L layers

    window  at most so many of these rows count, the last ones: 50 where the paper measures speed; None, all of them
    differs: where no picture is in the prompt all rows count, and where none follows it the last row. Budgets are exact: see above.
    """

    word = "vl-cache"
    observed = ((AFTER, "sum"), (AFTER, "large"))
    uneven = True

    @takes()
    def __init__(self, ratio: float | None = None, budget: int | None = None, recent: int | float = 0.1, merge: str = "none",
                 when: str = "prompt", window: int | None = None):
        self._common(ratio, budget, recent, merge, when)
        self._set(window=None if window is None else whole("window", window, 1))

    def _rows(self, rows: str, text: np.ndarray) -> np.ndarray:
        marked = super()._rows(rows, text)
        if rows == AFTER and self.window is not None:
            marked = marked & (np.arange(len(text)) >= len(text) - self.window)
        return marked

    def select(self, sums: np.ndarray, is_text: np.ndarray, *, budget: int | None = None) -> np.ndarray:
        scores, _ = read_sums(sums, is_text)
        budget = self.cells_of(budget, scores.shape[1])
        return best_and_recent(scores, budget, self.recents_of(budget))

    def budgets(self, statistics: Sequence[np.ndarray], is_text: np.ndarray | Sequence[np.ndarray], group: int = 1,
                budget: int | None = None) -> list[int]:
        """Return each layer's cells by its density; the pairs that are counted are as many in all layers, so counts decide."""
        density = [s[..., 1].sum(dtype=np.float64) / len(s) for s in statistics]
        return layer_budgets(self, density, statistics, budget)


class MEDA(LookM):
    """LOOK-M's selection with budgets by cross-modal entropy. MEDA, Wan et al. 2025, arXiv:2502.17599.

    T text's rows, V those of pictures; H(X, Y) = -(1 / |X|) sum over i in X, j in Y of A_ij ln A_ij, the mean over heads
    E_l = H(T, V) + H(V, T)                                  of layer l
    b_l = clip(r L exp(E_l) / sum exp(E), 0.01, 1) n         more where text and pictures attend to each other more widely

    merge   "averaged", as in the paper
    differs: A is the attention of the model, over all keys that a row sees. The paper has a softmax of its own over the other kind's keys,
    also later ones; its released code takes the entropy over all keys. Prompts of one kind, which have no cross-modal entropy, have
    E_l = H over all of their keys. Budgets are exact: see above.
    """

    word = "meda"
    observed = ((ALL, "sum"), (TEXT, "entropy"), (MEDIA, "entropy"))   # type: ignore[assignment]
    uneven = True                                            # type: ignore[assignment]

    @takes()
    def __init__(self, ratio: float | None = None, budget: int | None = None, recent: int | float = 0.5, merge: str = "averaged",
                 when: str = "prompt"):
        super().__init__(ratio, budget, recent, merge, when)

    def budgets(self, statistics: Sequence[np.ndarray], is_text: np.ndarray | Sequence[np.ndarray], group: int = 1,
                budget: int | None = None) -> list[int]:
        """Return each layer's cells by the exponential of its entropy."""
        def level(s: np.ndarray, is_text: np.ndarray) -> float:
            text = np.broadcast_to(read_text(is_text, s.shape[1], len(s)), s.shape[:2])
            mixed = bool(text.any() and not text.all())
            found = 0.0
            for channel, rows in ((1, text), (2, ~text)):
                keys = ~rows if mixed else rows
                found += s[..., channel][keys].sum(dtype=np.float64) / (max(1.0, rows.sum() / len(s)) * len(s) * group)
            return found

        each = is_text if isinstance(is_text, (list, tuple)) else [is_text] * len(statistics)
        levels = np.array([level(s, text) for s, text in zip(statistics, each, strict=True)])
        return layer_budgets(self, np.exp(levels - levels.max(initial=-np.inf)), statistics, budget)


def layer_budgets(policy: Compression, weights: Sequence[float] | np.ndarray, statistics: Sequence[np.ndarray],
                  budget: int | None) -> list[int]:
    """Return cells of each layer in proportion to weights, which sum to as many as if all had the budget."""
    each, n = policy.mean_of(statistics, budget), max((s.shape[1] for s in statistics), default=0)
    return apportioned(weights, each * len(weights), min(each, max(1, int(LEAST * n))), n)


def apportioned(weights: Sequence[float] | np.ndarray, total: int, low: int, high: int) -> list[int]:
    """Return whole numbers in low..high in proportion to weights, which sum to total; low * k <= total <= high * k for k weights.

    The shares are clip(x w, low, high) with the x that makes their sum the total; they are rounded down, and the cells that are left
    go to the largest remainders, the first of equals. Weights that are not finite or not above 0 count as 0; all 0 are equal.
    """
    w = np.asarray(weights, np.float64)
    w = np.where(np.isfinite(w) & (w > 0), w, 0)
    if not len(w):
        return []
    w = w / w.max() if w.any() else np.ones_like(w)
    few, many = 0.0, 1.0
    while np.clip(many * w, low, high).sum() < total and many < 1e300:         # weights of 0 never reach more than low
        many *= 2
    for _ in range(200):
        x = (few + many) / 2
        few, many = (x, many) if np.clip(x * w, low, high).sum() < total else (few, x)
    shares = np.clip(many * w, low, high)
    cells = np.floor(shares).astype(np.int64)
    order = np.argsort(cells - shares, kind="stable")        # the largest remainder first
    while (left := total - int(cells.sum())) != 0:
        able = [i for i in order if (cells[i] < high if left > 0 else cells[i] > low)]
        for i in able[:abs(left)]:
            cells[i] += 1 if left > 0 else -1
    return [int(c) for c in cells]
