"""Convolutions over pictures [n, h, w, c]: channels of a pixel lie side by side, so that a window's rows are runs of memory.

A convolution is a product: the window around each place, as one row of kh kw c numbers, times the weight [out, kh kw c / groups], whose
columns are in the order y, x, channel. No backend builds those rows for the whole picture.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from pyengine.dtype import dtype
from pyengine.errors import ShapeError
from pyengine.graph.op import F32, op, Weight
from pyengine.graph.tensor import Axis, axis_max, Dim
from pyengine.ops.elementwise import activation as activate


def pair(name: str, what: str, numbers: tuple[int, ...], least: int) -> tuple[int, int]:
    """Return (along y, along x). Raises: ShapeError unless it is two numbers, or one for both, of at least `least`."""
    if len(numbers) not in (1, 2) or min(numbers) < least:
        raise ShapeError(f"{name}: '{what}' is {numbers}; it must be two numbers (y, x), or one for both, of {least} or more")
    return numbers[0], numbers[-1]


def sides(name: str, padding: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Return padding as (top, bottom, left, right). Raises: ShapeError unless it has 1, 2 (y, x) or 4 numbers."""
    if len(padding) not in (1, 2, 4) or min(padding) < 0:
        raise ShapeError(f"{name}: 'padding' is {padding}; it must be one number, (y, x) or (top, bottom, left, right), none below 0")
    if len(padding) == 4:
        return padding[0], padding[1], padding[2], padding[3]
    return padding[0], padding[0], padding[-1], padding[-1]


def places(name: str, size: Axis, window: int, stride: int, padding: int, dilation: int = 1, ceil: bool = False) -> Axis:
    """Return at how many places a window stands along an axis. padding: of both ends together; ceil: the last may reach over the end.

    Of a run-time axis the result must be a multiple too: with stride s, one of s that the padding fits. Raises: ShapeError.
    """
    over = padding - dilation * (window - 1) - 1             # size + over: the first pixel of the last window
    up = stride - 1 if ceil else 0
    if isinstance(size, Dim):
        if size.scale % stride or (over + up) // stride != -1:
            raise ShapeError(f"{name}: a run-time axis {size} with windows of {window}, stride {stride} and padding {padding} does not give "
                             f"a multiple of {size.name}")
        return size // stride
    if size + over < 0:
        raise ShapeError(f"{name}: windows of {window} (dilation {dilation}) do not fit {size} pixels and {padding} of padding")
    return (size + over + up) // stride + 1


def windows(x: np.ndarray, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int, int, int], dilation: tuple[int, int],
            shape: tuple[int, int], fill: float = 0.0) -> np.ndarray:
    """Return the pixels of each window of x [n, h, w, c], at `shape` places: [n, oh, ow, kh, kw, c]. Beyond the picture they are `fill`."""
    (top, _, left, _), ends = padding, [(shape[i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
    wide = np.full((x.shape[0], max(ends[0], top + x.shape[1]), max(ends[1], left + x.shape[2]), x.shape[3]), fill, x.dtype)
    wide[:, top : top + x.shape[1], left : left + x.shape[2]] = x
    y, across = (np.arange(shape[i])[:, None] * stride[i] + np.arange(kernel[i]) * dilation[i] for i in (0, 1))
    return wide[:, y[:, None, :, None], across[None, :, None, :]]


def _geometry(params: dict[str, Any]) -> tuple[Any, ...]:
    """Return a convolution's window, stride, padding and dilation. Raises: ShapeError."""
    return (pair("conv2d", "kernel", params["kernel"], 1), pair("conv2d", "stride", params["stride"], 1), sides("conv2d", params["padding"]),
            pair("conv2d", "dilation", params["dilation"], 1))


def _conv_infer(args: tuple[Any, ...], params: dict[str, Any]) -> list[Any]:
    conv2d.match(args)
    (n, h, w, c), (out, k) = args[0].shape, args[1].shape
    kernel, stride, (top, bottom, left, right), dilation = _geometry(params)
    groups, format_ = params["groups"], args[1].dtype
    if groups < 1 or c < 1 or c % groups or out % groups:
        raise ShapeError(f"conv2d: {groups} groups do not divide {c} channels into {out}")
    if k != kernel[0] * kernel[1] * (c // groups):
        raise ShapeError(f"conv2d: 'weight' has {k} columns, but windows of {kernel[0]} x {kernel[1]} x {c // groups} channels")
    if groups > 1 and out // groups % 16 and format_.block > 1:
        raise ShapeError(f"conv2d: groups of {out // groups} results with a weight in {format_}; F32, F16 or BF16 is possible")
    shape = (n, places("conv2d", h, kernel[0], stride[0], top + bottom, dilation[0]),
             places("conv2d", w, kernel[1], stride[1], left + right, dilation[1]), out)
    return [(shape, dtype("F32"))]


def _conv_flops(x: Any, weight: Any, bias: Any = None, **params: Any) -> int:
    kernel, stride, (top, bottom, left, right), dilation = _geometry(params)
    n, h, w = (axis_max(a) for a in x.shape[:3])
    at = (places("conv2d", h, kernel[0], stride[0], top + bottom, dilation[0]), places("conv2d", w, kernel[1], stride[1], left + right, dilation[1]))
    return 2 * n * axis_max(at[0]) * axis_max(at[1]) * weight.shape[0] * weight.shape[1]


@op(infer=_conv_infer, flops=_conv_flops, packed=("weight",))
def conv2d(
    x: F32["n h w c"],
    weight: Weight["o k"],
    bias: F32["o"] | None = None,
    *,
    kernel: tuple[int, ...],
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
    activation: Literal["none", "silu", "gelu_tanh", "gelu", "relu"] = "none",
) -> F32["n y x o"]:
    """Multiply the window around each place with the weight [out, kh * kw * c / groups], columns in the order y, x, channel.

    y = activation(window @ weight.T + bias), as torch's conv2d with channels last. kernel (kh, kw); padding with zeros, (y, x) or (top,
    bottom, left, right). Group j of the outputs sees group j of the channels; groups = c is a depthwise convolution.
    Run-time axes: n, and h or w where the result is a multiple too (see `places`).
    """
    geometry = _geometry({"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation})
    (kernel, stride, padding, dilation), (n, h, w, c), o = geometry, x.shape, len(weight)
    at = (int(places("conv2d", h, kernel[0], stride[0], padding[0] + padding[1], dilation[0])),
          int(places("conv2d", w, kernel[1], stride[1], padding[2] + padding[3], dilation[1])))
    rows = windows(x, kernel, stride, padding, dilation, at).reshape(n, *at, kernel[0] * kernel[1], groups, c // groups)
    rows = rows.transpose(0, 1, 2, 4, 3, 5).reshape(n, *at, groups, weight.shape[1])          # [n, y, x, groups, k]
    y = np.einsum("nyxgk,gok->nyxgo", rows, weight.reshape(groups, o // groups, weight.shape[1]), optimize=True).reshape(n, *at, o)
    y = y.astype(x.dtype)
    return activate(y if bias is None else y + bias, activation)


conv2d.case(x=(1, 7, 9, 5), weight=(33, 45), bias=(33,), kernel=(3, 3), padding=(1, 1))
conv2d.case(x=(2, 8, 6, 16), weight=(48, 64), kernel=(2, 2), stride=(2, 2), activation="gelu")
conv2d.case(x=(1, 9, 11, 32), weight=(32, 9), bias=(32,), kernel=(3, 3), stride=(2, 2), padding=(1, 1), groups=32, activation="silu")
conv2d.case(x=(1, 6, 10, 37), weight=(37, 9), kernel=(3, 3), padding=(0, 2, 0, 2), dilation=(2, 2), groups=37)
conv2d.case(x=(1, 6, 7, 12), weight=(9, 24), bias=(9,), kernel=(2, 3), padding=(1,), groups=3, activation="relu")
conv2d.case(x=(1, 5, 5, 64), weight=(32, 288), kernel=(3, 3), padding=(1, 1), groups=2)
conv2d.case(x=(0, 5, 5, 8), weight=(4, 72), kernel=(3, 3))
conv2d.case(x=(1, 1, 40, 80), weight=(70, 240), bias=(70,), kernel=(1, 3), stride=(1, 2), padding=(0, 1), activation="gelu_tanh")
conv2d.case(x=(2, 9, 14, 20), weight=(50, 180), bias=(50,), kernel=(3, 3), padding=(1, 0), activation="relu")      # 6 x 6 pixels at a time
conv2d.case(x=(1, 17, 15, 37), weight=(20, 333), kernel=(3, 3), stride=(2, 2), padding=(0, 1, 1, 0))
conv2d.case(x=(1, 31, 40, 3), weight=(70, 147), bias=(70,), kernel=(7, 7), stride=(4, 4), padding=(3, 3))


def conv1d(x: Any, weight: Any, bias: Any = None, *, kernel: int, stride: int = 1, padding: int | tuple[int, int] = 0, dilation: int = 1,
           **others: Any) -> Any:
    """Apply windows over the rows of a sequence, x [n, t, c] with weight [out, kernel * c / groups]: [n, t', out].

    padding: both ends, or (before, after); others: groups and activation. It is `conv2d` of pictures of one row.
    """
    n, t, c = x.shape
    ends = (padding, padding) if isinstance(padding, int) else padding
    y = conv2d(_shaped(x, n, 1, t, c), weight, bias, kernel=(1, kernel), stride=(1, stride), padding=(0, 0, *ends), dilation=(1, dilation), **others)
    return _shaped(y, n, *y.shape[2:])


def _shaped(x: Any, *shape: Axis) -> Any:
    """Return an array or tensor with another shape."""
    return x.reshape(*(-1 if isinstance(a, Dim) else a for a in shape))
