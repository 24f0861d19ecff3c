"""A policy that mixes importance with diversity: MixKV."""

from __future__ import annotations

import numpy as np

from pyengine.arguments import takes
from pyengine.cache.compression.attention import SnapKV
from pyengine.cache.compression.base import best_and_recent, read_sums
from pyengine.errors import RequestError


class Diverse(SnapKV):
    """What the last queries attend to, mixed with what is unlike the rest. MixKV, Liu et al. 2025, arXiv:2510.20707.

    before = n - M tokens, u_j = k_j / |k_j|, m = their mean:
    importance  I[j] = C[j] + scaled(|v_j|),  C the pooled attention of `SnapKV`
    diversity   D[j] = scaled(-u_j . m)                      high where a key is unlike the mean of the head's keys
    redundancy  r = (T |m|^2 - 1) / (T - 1)                  the mean cosine of two different ones of T keys, clipped to 0..1
    kept = top_N(r D + (1 - r) I) + the last M

    scaled(x) is x brought to 0..1 within the head, then multiplied so that its mean is that of C. Heads with many similar keys, as those
    over pictures, are thus kept for what differs, the others for what is attended to.

    differs: m and r are of the tokens before the last M; the released code sums over all of them for m, and reads r from a file of
    measured means in place of the prompt's own, which the paper found better.
    """

    word = "diverse"
    contents = True

    @takes()
    def __init__(self, ratio: float | None = None, budget: int | None = None, recent: int | float | None = None, merge: str = "none",
                 when: str = "prompt", window: int = 32, kernel: int = 7, pooling: str = "max"):
        super().__init__(ratio, budget, recent, merge, when, window, kernel, pooling)

    def select(self, sums: np.ndarray, is_text: np.ndarray, *, budget: int | None = None, keys: np.ndarray | None = None,
               values: np.ndarray | None = None) -> np.ndarray:
        """Return the positions that are kept, int64 [h, b]. keys, values [h, n, e]: without them attention alone decides."""
        scores, _ = read_sums(sums, is_text)
        budget = self.cells_of(budget, scores.shape[1])
        recent = self.recents_of(budget)
        pooled = self._pooled(scores, recent)
        before = scores.shape[1] - recent
        if keys is None or values is None or before < 2:
            return best_and_recent(pooled, budget, recent)
        if keys.shape[:2] != scores.shape or values.shape[:2] != scores.shape:
            raise RequestError(f"keys and values must be [{scores.shape[0]}, {scores.shape[1]}, e] as sums are, got {list(keys.shape)} "
                               f"and {list(values.shape)}")
        mixed = pooled.copy()
        for h in range(len(mixed)):
            mixed[h, :before] = mixture(pooled[h, :before], keys[h, :before].astype(np.float64), values[h, :before].astype(np.float64))
        return best_and_recent(mixed, budget, recent)

    def choose(self, statistics: np.ndarray, is_text: np.ndarray, budget: int | None = None, *, counts: np.ndarray | None = None,
               keys: np.ndarray | None = None, values: np.ndarray | None = None) -> np.ndarray:
        return self.select(statistics[..., 0], is_text, budget=budget, keys=keys, values=values)


def mixture(attention: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return r D + (1 - r) I [n] of one head's attention [n], keys and values [n, e]."""
    length = np.sqrt((keys**2).sum(1, keepdims=True))
    units = np.divide(keys, length, out=np.zeros_like(keys), where=length > 0)
    mean, n = units.mean(0), len(units)
    redundancy = float(np.clip((n * (mean @ mean) - 1) / (n - 1), 0, 1))
    level = attention.mean()
    importance = attention + scaled(np.sqrt((values**2).sum(1)), level)
    return redundancy * scaled(-(units @ mean), level) + (1 - redundancy) * importance


def scaled(x: np.ndarray, level: float) -> np.ndarray:
    """Return x [n] brought to 0..1, times what makes `level` its mean; zeros where all of x are equal."""
    low, high = x.min(), x.max()
    if high <= low:
        return np.zeros_like(x)
    unit = (x - low) / (high - low)
    return unit * (level / unit.mean())
