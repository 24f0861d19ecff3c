"""Numbers from repeated measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Return median, extremes, and spread: half the interquartile range as a fraction of the median."""
    values = np.asarray(samples, float)
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "min": float(values.min()), "max": float(values.max()),
            "spread": float((high - low) / 2 / median) if median else 0.0, "samples": [float(v) for v in values]}
