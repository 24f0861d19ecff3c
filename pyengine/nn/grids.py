"""Grids of rows that are resized to a picture's own: position embeddings, features. As `torch.nn.functional.interpolate` does, corners not aligned."""

from __future__ import annotations

import math

import numpy as np

NEAR = 1e-5                          # of scales: `get_image_size_for_max_num_patches`


def largest_grid(width: int, height: int, patch: int, most: int) -> tuple[int, int]:
    """Compute (lines, columns) of a picture that is scaled until one more step would take more than `most` patches: sides are rounded up
    to patches. Source: `get_image_size_for_max_num_patches` in transformers' `image_processing_pil_siglip2.py`, its bisection in float64."""
    def count(scale: float, size: int) -> int:
        return max(1, math.ceil(size * scale / patch))

    low, high = NEAR / 10, 100.0
    while high - low >= NEAR:
        scale = (low + high) / 2
        low, high = (scale, high) if count(scale, height) * count(scale, width) <= most else (low, scale)
    return count(low, height), count(low, width)


def triangles(size: int, wanted: int) -> np.ndarray:
    """Return the weights [wanted, size] of a bilinear resize that is smoothed where it shrinks (`antialias`), edges cut off."""
    scale = size / wanted
    width = max(scale, 1.0)
    middle = (np.arange(wanted)[:, None] + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(size) + 0.5 - middle) / width)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def cubics(size: int, wanted: int) -> np.ndarray:
    """Return the weights [wanted, size] of a bicubic resize that is not smoothed, whose edges go on (Keys 1981, a = -0.75)."""
    at = np.float32(size / wanted) * (np.arange(wanted, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    low = np.floor(at)
    weights = np.zeros((wanted, size))
    for tap in range(-1, 3):
        x = np.abs((at - low).astype(np.float64) - tap)
        inner, outer = (1.25 * x - 2.25) * x * x + 1, ((-0.75 * x + 3.75) * x - 6) * x + 3
        np.add.at(weights, (np.arange(wanted), np.clip(low.astype(int) + tap, 0, size - 1)), np.where(x <= 1, inner, outer))
    return weights.astype(np.float32)


def smooth_cubics(size: int, wanted: int) -> np.ndarray:
    """Return the weights [wanted, size] of a bicubic resize that is smoothed where it shrinks (`antialias`), edges cut off (Keys 1981, a = -0.5)."""
    scale = size / wanted
    x = np.abs(np.arange(size) + 0.5 - (np.arange(wanted)[:, None] + 0.5) * scale) / max(scale, 1.0)
    inner, outer = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, inner, np.where(x < 2, outer, 0.0))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def resized(grid: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Resize rows of a grid [h * w, d] with weights of its lines [h', h] and columns [w', w]: [h' * w', d], float32."""
    squares = grid.reshape(rows.shape[1], columns.shape[1], -1).astype(np.float64)
    made = np.einsum("ya,xb,abd->yxd", rows, columns, squares, optimize=True)
    return made.reshape(-1, grid.shape[1]).astype(np.float32)
