"""Pictures that tests of whole models show them, and how near logits must be to transformers'."""

from __future__ import annotations

import numpy as np
from PIL import Image


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours and noise: resizing must be right, not only close."""
    rng = np.random.default_rng((seed, height, width))
    y, x = np.mgrid[0:height, 0:width]
    waves = 90 * np.sin(x[..., None] * rng.uniform(0.02, 0.3, 3)) * np.cos(y[..., None] * rng.uniform(0.02, 0.3, 3))
    return Image.fromarray(np.clip(128 + waves + rng.normal(0, 20, (height, width, 3)), 0, 255).astype(np.uint8))


A, B, LONG, THIN, DOT = picture(60, 80), picture(97, 53, 1), picture(40, 170), picture(150, 29, 2), picture(1, 1)


def same(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 2e-5 * np.ptp(want)
    assert np.array_equal(got.argmax(-1), want.argmax(-1))
