"""Pooling and resizing of pictures [n, h, w, c]: windows of pixels to one, channel by channel."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from pyengine.dtype import dtype
from pyengine.errors import ShapeError
from pyengine.graph.op import F32, op
from pyengine.graph.tensor import Axis, axis_max
from pyengine.ops.convolution import pair, places, sides, windows


def _pool_places(h: Axis, w: Axis, params: dict[str, Any]) -> tuple[Axis, Axis]:
    kernel, stride = pair("pool2d", "kernel", params["kernel"], 1), pair("pool2d", "stride", params["stride"], 1)
    top, bottom, left, right = sides("pool2d", params["padding"])
    if max(top, bottom) >= kernel[0] or max(left, right) >= kernel[1]:
        raise ShapeError(f"pool2d: padding {params['padding']} leaves windows of {kernel} without a pixel")
    found = []
    for size, window, step, before, after in ((h, kernel[0], stride[0], top, bottom), (w, kernel[1], stride[1], left, right)):
        n = places("pool2d", size, window, step, before + after, 1, params["ceil"])
        if params["ceil"] and isinstance(n, int) and isinstance(size, int) and (n - 1) * step >= size + before:
            n -= 1                                           # a window must not begin behind the picture
        found.append(n)
    return found[0], found[1]


def _pool_infer(args: tuple[Any, ...], params: dict[str, Any]) -> list[Any]:
    pool2d.match(args)
    n, h, w, c = args[0].shape
    return [((n, *_pool_places(h, w, params), c), dtype("F32"))]


def _pool_flops(x: Any, **params: Any) -> int:
    n, h, w, c = (axis_max(a) for a in x.shape)
    at = _pool_places(h, w, params)
    return n * axis_max(at[0]) * axis_max(at[1]) * c * params["kernel"][0] * params["kernel"][-1]


@op(infer=_pool_infer, flops=_pool_flops)
def pool2d(
    x: F32["n h w c"],
    *,
    kind: Literal["max", "mean"],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...] = (0, 0),
    count_padding: bool = False,
    ceil: bool = False,
) -> F32["n y x c"]:
    """Take the largest or the mean of each window's pixels, as torch's max_pool2d and avg_pool2d with channels last.

    Padding is never the largest; in a mean it counts as zeros with count_padding (torch's default), else not at all.
    ceil: a last window may reach over the end of the picture and its padding, where nothing counts.
    """
    h, w = x.shape[1:3]
    at = _pool_places(h, w, {"kernel": kernel, "stride": stride, "padding": padding, "ceil": ceil})
    kernel, stride, ends = pair("pool2d", "kernel", kernel, 1), pair("pool2d", "stride", stride, 1), sides("pool2d", padding)
    shape = (int(at[0]), int(at[1]))
    seen = windows(x, kernel, stride, ends, (1, 1), shape, -np.inf if kind == "max" else 0.0)
    if kind == "max":
        return seen.max(axis=(3, 4), initial=-np.inf)
    inside = np.zeros((1, h + ends[0] + ends[1], w + ends[2] + ends[3], 1), x.dtype)
    inside[:, :, :] = count_padding
    inside[:, ends[0] : ends[0] + h, ends[2] : ends[2] + w] = 1
    counts = windows(inside, kernel, stride, (0, 0, 0, 0), (1, 1), shape).sum(axis=(3, 4))
    return (seen.sum(axis=(3, 4)) / counts).astype(x.dtype)


pool2d.case(x=(1, 7, 9, 5), kind="max", kernel=(2, 2), stride=(2, 2))
pool2d.case(x=(2, 8, 9, 33), kind="max", kernel=(3, 3), stride=(2, 2), padding=(1, 1), ceil=True)
pool2d.case(x=(1, 7, 9, 20), kind="mean", kernel=(3, 2), stride=(2, 1), padding=(1, 1, 0, 1))
pool2d.case(x=(1, 6, 6, 16), kind="mean", kernel=(3,), stride=(2,), padding=(1,), count_padding=True, ceil=True)
pool2d.case(x=(0, 4, 4, 8), kind="max", kernel=(2, 2), stride=(2, 2))


def max_pool2d(x: Any, *, kernel: tuple[int, ...], stride: tuple[int, ...] | None = None, padding: tuple[int, ...] = (0, 0),
               ceil: bool = False) -> Any:
    """Take the largest of each window. stride: the window's size by default."""
    return pool2d(x, kind="max", kernel=kernel, stride=stride or kernel, padding=padding, ceil=ceil)


def avg_pool2d(x: Any, *, kernel: tuple[int, ...], stride: tuple[int, ...] | None = None, padding: tuple[int, ...] = (0, 0),
               count_padding: bool = True, ceil: bool = False) -> Any:
    """Take the mean of each window. stride: the window's size by default."""
    return pool2d(x, kind="mean", kernel=kernel, stride=stride or kernel, padding=padding, count_padding=count_padding, ceil=ceil)


def _sized(name: str, args: tuple[Any, ...], params: dict[str, Any]) -> list[Any]:
    n, h, w, c = args[0].shape
    if not isinstance(h, int) or not isinstance(w, int):
        raise ShapeError(f"{name}: height and width must be known, and are {h} and {w}")
    if h < 1 or w < 1:
        raise ShapeError(f"{name}: a picture of {h} x {w} pixels has none to make others from")
    return [((n, *pair(name, "size", params["size"], 1), c), dtype("F32"))]


def _adaptive_infer(args: tuple[Any, ...], params: dict[str, Any]) -> list[Any]:
    adaptive_pool2d.match(args)
    return _sized("adaptive_pool2d", args, params)


@op(infer=_adaptive_infer, flops=lambda x, kind, size: x.size)
def adaptive_pool2d(x: F32["n h w c"], *, kind: Literal["max", "mean"], size: tuple[int, ...]) -> F32["n y x c"]:
    """Divide a picture into `size` = (y, x) windows as even as they can be, and take the largest or the mean of each.

    Window i of m spans pixels floor(i h / m) up to ceil((i + 1) h / m), as torch's adaptive_avg_pool2d.
    """
    (n, h, w, c), (rows, columns) = x.shape, pair("adaptive_pool2d", "size", size, 1)
    out = np.empty((n, rows, columns, c), x.dtype)
    for i, j in np.ndindex(rows, columns):
        part = x[:, i * h // rows : -(-(i + 1) * h // rows), j * w // columns : -(-(j + 1) * w // columns)]
        out[:, i, j] = part.max(axis=(1, 2)) if kind == "max" else part.mean(axis=(1, 2))
    return out


adaptive_pool2d.case(x=(1, 7, 9, 20), kind="mean", size=(3, 4))
adaptive_pool2d.case(x=(2, 5, 5, 33), kind="max", size=(2, 3))
adaptive_pool2d.case(x=(2, 14, 14, 64), kind="mean", size=(1, 1))
adaptive_pool2d.case(x=(1, 3, 2, 7), kind="mean", size=(5, 4))
adaptive_pool2d.case(x=(0, 3, 2, 7), kind="mean", size=(2, 2))


def adaptive_avg_pool2d(x: Any, *, size: tuple[int, ...]) -> Any:
    """Take the means of `size` windows."""
    return adaptive_pool2d(x, kind="mean", size=size)


# ---- resizing -----------------------------------------------------------------------------------------------------------------

CUBIC = {False: -0.75, True: -0.5}       # the cubic's parameter: without and with antialiasing, as torch has it


def _cubic(t: np.ndarray, a: float) -> np.ndarray:
    t = np.abs(t)
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = a * (((t - 5) * t + 8) * t - 4)
    return np.where(t < 1, near, np.where(t < 2, far, 0.0))


def _taps(size: int, to: int, kind: str, align_corners: bool, antialias: bool) -> np.ndarray:
    """Return what each of `to` pixels takes of `size` ones: [to, size], float64."""
    step = (size - 1) / (to - 1) if align_corners and to > 1 else 0.0 if align_corners else size / to
    out, taps = np.zeros((to, size)), 2 if kind == "bilinear" else 4
    for i in range(to):
        if kind == "nearest":
            out[i, min(size - 1, int(i * size / to))] = 1
        elif antialias:
            wide = max(step, 1.0)
            centre, reach = step * (i + 0.5), wide * taps / 2
            at = np.arange(max(0, int(centre - reach + 0.5)), min(size, int(centre + reach + 0.5)))
            far = (at - centre + 0.5) / wide
            weight = _cubic(far, CUBIC[True]) if kind == "bicubic" else np.maximum(0.0, 1 - np.abs(far))
            out[i, at] = weight / weight.sum()
        else:
            centre = step * i if align_corners else step * (i + 0.5) - 0.5
            centre = max(0.0, centre) if kind == "bilinear" else centre
            first = int(np.floor(centre)) - taps // 2 + 1
            for j in range(first, first + taps):
                weight = max(0.0, 1 - abs(centre - j)) if kind == "bilinear" else float(_cubic(np.float64(centre - j), CUBIC[False]))
                out[i, min(max(j, 0), size - 1)] += weight
    return out


def _resize_infer(args: tuple[Any, ...], params: dict[str, Any]) -> list[Any]:
    resize2d.match(args)
    if params["align_corners"] and (params["antialias"] or params["kind"] == "nearest"):
        raise ShapeError("resize2d: align_corners is for bilinear and bicubic without antialias")
    if params["antialias"] and params["kind"] == "nearest":
        raise ShapeError("resize2d: antialias is for bilinear and bicubic")
    return _sized("resize2d", args, params)


@op(infer=_resize_infer, flops=lambda x, kind, size, **_: 2 * axis_max(x.shape[0]) * axis_max(x.shape[3]) * size[0] * size[-1] * (4 if kind == "bilinear" else 16))
def resize2d(
    x: F32["n h w c"],
    *,
    kind: Literal["nearest", "bilinear", "bicubic"],
    size: tuple[int, ...],
    align_corners: bool = False,
    antialias: bool = False,
) -> F32["n y x c"]:
    """Resize pictures to `size` = (y, x), as torch's interpolate with channels last.

    align_corners: the outermost pixels' centres stay where they are, else the picture's edges. antialias: windows widen where the
    picture shrinks, and are cut at its edge; without it, pixels beyond the edge are those at it. Keys 1981 (the cubic).
    """
    (_, h, w, _), (rows, columns) = x.shape, pair("resize2d", "size", size, 1)
    down, across = (_taps(n, to, kind, align_corners, antialias) for n, to in ((h, rows), (w, columns)))
    return np.einsum("yh,xw,nhwc->nyxc", down, across, x, optimize=True).astype(x.dtype)


resize2d.case(x=(1, 5, 7, 20), kind="bilinear", size=(9, 4))
resize2d.case(x=(2, 6, 5, 7), kind="bicubic", size=(11, 8))
resize2d.case(x=(1, 5, 7, 33), kind="bilinear", size=(9, 11), align_corners=True)
resize2d.case(x=(1, 5, 7, 16), kind="bicubic", size=(1, 11), align_corners=True)
resize2d.case(x=(1, 16, 17, 20), kind="bilinear", size=(5, 6), antialias=True)
resize2d.case(x=(1, 16, 5, 20), kind="bicubic", size=(5, 9), antialias=True)
resize2d.case(x=(1, 5, 7, 8), kind="nearest", size=(10, 3))
resize2d.case(x=(0, 5, 7, 8), kind="bilinear", size=(10, 3))
