"""Normalisations and reductions over the last axis."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from pyengine.errors import ShapeError
from pyengine.graph.op import F32, I32, op
from pyengine.graph.tensor import axis_max


@op(inplace="x", flops=lambda x, weight, residual, eps: 4 * x.size, rowwise=True, light=True)
def rms_norm(x: F32["... d"], weight: F32["d"] | None = None, residual: F32["... d"] | None = None, *, eps: float) -> F32["... d"]:
    """Scale each row to unit root-mean-square, then by `weight`; add `residual`.

    y = x / sqrt(mean(x^2) + eps) * weight + residual          Zhang & Sennrich 2019, arXiv:1910.07467
    """
    inv = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps))
    y = x * inv if weight is None else x * inv * weight
    return y if residual is None else y + residual


rms_norm.case(x=(1, 640), weight=(640,), eps=1e-6)
rms_norm.case(x=(3, 5, 7), weight=(7,), eps=1e-5)
rms_norm.case(x=(3, 5, 33), eps=1e-5)
rms_norm.case(x=(4, 640), weight=(640,), residual=(4, 640), eps=1e-6)
rms_norm.case(x=(0, 8), weight=(8,), eps=1e-6)
rms_norm.case(x=(512, 896), weight=(896,), eps=1e-6)


@op(inplace="x", flops=lambda x, weight, bias, eps: 6 * x.size, rowwise=True, light=True)
def layer_norm(x: F32["... d"], weight: F32["d"] | None = None, bias: F32["d"] | None = None, *, eps: float) -> F32["... d"]:
    """Centre each row, scale it to unit variance, then weight and bias.

    y = (x - mean) / sqrt(var + eps) * weight + bias           Ba et al. 2016, arXiv:1607.06450
    """
    centred = x - np.mean(x, axis=-1, keepdims=True)
    y = centred / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + x.dtype.type(eps))
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


layer_norm.case(x=(2, 1152), weight=(1152,), bias=(1152,), eps=1e-6)
layer_norm.case(x=(3, 5, 7), weight=(7,), eps=1e-5)
layer_norm.case(x=(3, 17), eps=1e-5)
layer_norm.case(x=(0, 8), eps=1e-5)


def _group_infer(args: tuple[Any, ...], params: dict[str, Any]) -> list[Any]:
    shapes = group_norm._infer(args)
    x, groups = args[0], params["groups"]
    if x.ndim < 2 or groups < 1 or x.shape[-1] % groups:
        raise ShapeError(f"group_norm: {groups} groups do not divide the channels of {x.shape} [pictures, .., channels]")
    return shapes


@op(inplace="x", infer=_group_infer, flops=lambda x, weight, bias, **_: 6 * x.size)
def group_norm(x: F32["... c"], weight: F32["c"] | None = None, bias: F32["c"] | None = None, *, groups: int, eps: float) -> F32["... c"]:
    """Norm each picture of x [n, .., c], in groups of neighbouring channels, over all of its places; then weight and bias, channel by channel.

    With groups = 1 over the whole picture; of x [n, c] over the groups of each row. Wu & He 2018, arXiv:1803.08494
    """
    rows = x.reshape(x.shape[0], int(np.prod(x.shape[1:-1])), groups, x.shape[-1] // groups)
    centred = rows - np.mean(rows, axis=(1, 3), keepdims=True)
    y = (centred / np.sqrt(np.mean(centred * centred, axis=(1, 3), keepdims=True) + x.dtype.type(eps))).reshape(x.shape)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


group_norm.case(x=(2, 5, 7, 36), weight=(36,), bias=(36,), groups=3, eps=1e-5)
group_norm.case(x=(1, 33, 64), weight=(64,), bias=(64,), groups=4, eps=1e-6)
group_norm.case(x=(3, 4, 3, 10), groups=1, eps=1e-5)
group_norm.case(x=(5, 40), weight=(40,), groups=8, eps=1e-5)
group_norm.case(x=(0, 5, 8), weight=(8,), groups=2, eps=1e-5)


@op(inplace="x", flops=lambda x, eps: 3 * x.size, rowwise=True, light=True)
def l2_norm(x: F32["... d"], *, eps: float = 1e-12) -> F32["... d"]:
    """Bring each row to length 1: x / max(|x|, eps), as torch's normalize."""
    length = np.sqrt(np.sum(x * x, axis=-1, keepdims=True))
    return x / np.maximum(length, x.dtype.type(eps))


l2_norm.case(x=(3, 384))
l2_norm.case(x=(2, 5, 37), eps=1e-6)
l2_norm.case(x=(0, 8))


@op(inplace="x", flops=lambda x, scale: 5 * x.size)
def softmax(x: F32["... d"], *, scale: float = 1.0) -> F32["... d"]:
    """exp(scale * x), normalised over the last axis."""
    z = x * x.dtype.type(scale)
    e = np.exp(z - np.max(z, axis=-1, keepdims=True, initial=-np.inf))
    return e / np.sum(e, axis=-1, keepdims=True)


softmax.case(x=(3, 50))
softmax.case(x=(2, 4, 33), scale=0.125)
softmax.case(x=(0, 8))


@op(flops=lambda x, kind: x.size, rowwise=True)
def reduce(x: F32["... d"], *, kind: Literal["sum", "mean", "max", "min"]) -> F32["..."]:
    """Reduce the last axis, which disappears."""
    return {"sum": np.sum, "mean": np.mean, "max": np.max, "min": np.min}[kind](x, axis=-1)


for _kind in ("sum", "mean", "max", "min"):
    reduce.case(x=(3, 5, 33), kind=_kind)


@op(flops=lambda x, lo, hi: min(1, axis_max(lo.shape[0])) * x.size, fault="a mean of rows {} .. of {}")
def mean_rows(x: F32["n d"], lo: I32["m"], hi: I32["m"]) -> F32["m d"]:
    """The mean of rows lo[i] <= j < hi[i] of x for each i, added one after the other; zeros for an interval without rows.

    What a vector of a text is made of by the pooling "mean" (Reimers & Gurevych 2019, arXiv:1908.10084), of several texts in one run.
    """
    out = np.zeros((len(lo), x.shape[1]), x.dtype)
    for i, (first, end) in enumerate(zip(lo, hi)):
        if end > first:
            out[i] = np.cumsum(x[first:end], axis=0)[-1] / x.dtype.type(end - first)
    return out


mean_rows.case(x=(9, 384), lo=(3,), hi=(3,))
mean_rows.case(x=(40, 33), lo=(5,), hi=(5,))
mean_rows.case(x=(4, 8), lo=(0,), hi=(0,))
