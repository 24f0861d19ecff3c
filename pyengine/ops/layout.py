"""Ops that only move or rename elements. `reshape` and `transpose` are views: they cost nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pyengine.dtype import dtype
from pyengine.errors import ShapeError
from pyengine.graph.op import F32, Float, op
from pyengine.graph.tensor import Dim, product, Tensor


def _infer_reshape(args: tuple[Tensor], params: dict[str, Any]) -> list[Any]:
    x, target = args[0], list(params["shape"])
    total = product(x.shape)
    if target.count(-1) > 1:
        raise ShapeError(f"reshape: more than one -1 in {tuple(target)}")
    if -1 in target:
        known = math.prod(n for n in target if n != -1)
        scale = total.scale if isinstance(total, Dim) else total
        if known == 0 or scale % known:
            raise ShapeError(f"reshape: {x.shape} does not divide into {tuple(target)}")
        target[target.index(-1)] = total // known
    if product(target) != total:
        raise ShapeError(f"reshape: {x.shape} has {total} elements, but {tuple(params['shape'])} has {product(target)}")
    return [(tuple(target), x.dtype)]


@op(view="reshape", infer=_infer_reshape, rowwise=True)
def reshape(x: Float["..."], *, shape: tuple[int, ...]) -> Float["..."]:
    """The same elements in another shape; one axis may be -1. A run-time axis can only come back through -1."""
    return x.reshape(shape)


def _infer_transpose(args: tuple[Tensor], params: dict[str, Any]) -> list[Any]:
    x, axes = args[0], params["axes"]
    if sorted(axes) != list(range(x.ndim)):
        raise ShapeError(f"transpose: axes {axes} are no permutation of the {x.ndim} axes of {x.shape}")
    return [(tuple(x.shape[a] for a in axes), x.dtype)]


@op(view="transpose", strided=("x",), infer=_infer_transpose)
def transpose(x: Float["..."], *, axes: tuple[int, ...]) -> Float["..."]:
    """Permute the axes, as np.transpose."""
    return np.transpose(x, axes)


def _infer_same(args: tuple[Tensor], params: dict[str, Any]) -> list[Any]:
    return [(args[0].shape, dtype("F32"))]


@op(strided=("x",), infer=_infer_same)
def contiguous(x: F32["..."]) -> F32["..."]:
    """A copy in row-major order."""
    return np.ascontiguousarray(x)


contiguous.case(x=(3, 4, 5))
contiguous.case(x=(0, 5))


def _infer_concat(args: tuple[Any], params: dict[str, Any]) -> list[Any]:
    parts, axis = args[0], params["axis"]
    first = parts[0].shape
    if not 0 <= axis < len(first):
        raise ShapeError(f"concat: axis {axis} of {len(first)} axes")
    for t in parts:
        if t.shape[:axis] + t.shape[axis + 1 :] != first[:axis] + first[axis + 1 :]:
            raise ShapeError(f"concat: shapes {first} and {t.shape} differ outside axis {axis}")
    sizes = [t.shape[axis] for t in parts]
    if not all(isinstance(n, int) for n in sizes):
        raise ShapeError("concat: a run-time axis cannot be the one that is joined")
    return [((*first[:axis], sum(sizes), *first[axis + 1 :]), dtype("F32"))]


@op(infer=_infer_concat, rowwise=True)
def concat(parts: list[F32["..."]], *, axis: int) -> F32["..."]:
    """Join arrays along one axis."""
    return np.concatenate(parts, axis=axis)


concat.case(parts=[(3, 4), (3, 5)], axis=1)
concat.case(parts=[(2, 3, 4), (1, 3, 4)], axis=0)


def _infer_slice(args: tuple[Tensor], params: dict[str, Any]) -> list[Any]:
    x, axis, start, stop = args[0], params["axis"], params["start"], params["stop"]
    if not 0 <= axis < x.ndim or not isinstance(x.shape[axis], int) or not 0 <= start <= stop <= x.shape[axis]:
        raise ShapeError(f"slice: [{start}, {stop}) of axis {axis} is not within {x.shape}")
    return [((*x.shape[:axis], stop - start, *x.shape[axis + 1 :]), x.dtype)]


@op(view="slice", strided=("x",), infer=_infer_slice, rowwise=True)
def slice(x: Float["..."], *, axis: int, start: int, stop: int) -> Float["..."]:  # noqa: A001  NumPy's word
    """Elements start <= i < stop of one axis."""
    return x[(np.s_[:],) * axis + (np.s_[start:stop],)]
