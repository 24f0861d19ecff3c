"""Convolutions over pictures [n, h, w, C], bound by name, and blocks that are made of them."""

from __future__ import annotations

import numpy as np

from pyengine import ops
from pyengine.dtype import dtype
from pyengine.files.weights import DerivedRef, WeightRef, Weights
from pyengine.graph.tensor import Tensor
from pyengine.nn.layers import constant, LayerNorm, Linear, PatchEmbedding


class Conv2d:
    """A convolution with zeros around the picture: x [n, h, w, n_in] -> [n, y, x, n_out]. b [n_out] where the file has one.

    Files have the weight as torch has it, [n_out, n_in / groups, kh, kw] (conv1d: without kh), or as `ops.conv2d` reads it, [n_out, kh kw
    n_in / groups], which blocks need. The first is put in order when it is loaded: F16 and BF16 stay what they are.
    """

    def __init__(self, w: Weights, n_in: int, n_out: int, kernel: tuple[int, int], stride: tuple[int, ...] = (1,),
                 padding: tuple[int, ...] = (0,), groups: int = 1):
        """Bind weight and bias. Raises: InvalidModelError."""
        found, each = w.shape("weight"), n_in // groups
        flat = (n_out, kernel[0] * kernel[1] * each)
        shapes = {2: flat, 3: (n_out, each, kernel[1])}
        ref = w.tensor("weight", shapes.get(len(found or ()), (n_out, each, *kernel)))
        self.weight = constant(ref if len(ref.shape) == 2 else _in_order(ref, flat, each))
        bias = w.optional("bias", (n_out, 1, 1) if len(w.shape("bias") or ()) > 2 else (n_out,))       # llama.cpp's may be [1, n_out, 1, 1]
        self.bias = constant(bias._replace(shape=(n_out,)), dtype("F32")) if bias else None
        self.params = {"kernel": kernel, "stride": stride, "padding": padding, "groups": groups}

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """Apply the convolution, then an activation of `ops.conv2d`."""
        return ops.conv2d(x, self.weight, self.bias, activation=activation, **self.params)


class Conv1d(Conv2d):
    """The same over a sequence: x [n, t, n_in] -> [n, t', n_out]. padding: at both ends, or (before, after)."""

    def __init__(self, w: Weights, n_in: int, n_out: int, kernel: int, stride: int = 1, padding: tuple[int, int] = (0, 0), groups: int = 1):
        """Bind weight and bias. Raises: InvalidModelError."""
        super().__init__(w, n_in, n_out, (1, kernel), groups=groups)
        self.params = {"kernel": kernel, "stride": stride, "padding": padding, "groups": groups}

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """Apply the convolution, then an activation of `ops.conv2d`."""
        return ops.conv1d(x, self.weight, self.bias, activation=activation, **self.params)


def _in_order(ref: WeightRef, flat: tuple[int, int], each: int) -> DerivedRef:
    """Return a weight [n_out, channels, ..] with its channels last, as a matrix. Formats of 16 bits are moved as they are."""
    def order(a: np.ndarray) -> np.ndarray:
        return np.moveaxis(a.reshape(flat[0], each, -1), 1, 2)

    if ref.dtype.name in ("F16", "BF16"):
        return DerivedRef(ref.name, flat, (ref,), lambda a: np.ascontiguousarray(order(a.view(np.uint16))).view(np.uint8).reshape(flat[0], -1), ref.dtype)
    return DerivedRef(ref.name, flat, (ref,), lambda a: order(a).reshape(flat))


def pointwise(w: Weights, n_in: int, n_out: int) -> Linear:
    """Bind a convolution of 1 x 1, which files have as [n_out, n_in] or with two axes more, as a product over rows [m, n_in]."""
    shape = w.shape("weight")
    return PatchEmbedding(w, n_out, n_in, 1) if shape is not None and len(shape) == 4 else Linear(w, n_in, n_out)


class DepthwiseConv:
    """A convolution of each channel with a window of its own, k x k, zeros around the grid: x [h, w, D] -> [ceil(h / s), ceil(w / s), D].

    Files have the window as [D, k k], [D, k, k] or [D, 1, k, k].
    """

    def __init__(self, w: Weights, d: int, k: int, stride: int = 1):
        """Bind the window. Raises: InvalidModelError."""
        found = w.shape("weight")
        ref = w.tensor("weight", {2: (d, k * k), 4: (d, 1, k, k)}.get(len(found or ()), (d, k, k)))
        bias = w.optional("bias", (d,))
        self.weight = constant(ref._replace(shape=(d, k * k)))
        self.bias = constant(bias, dtype("F32")) if bias else None
        self.params = {"kernel": (k, k), "stride": (stride,), "padding": (k // 2,), "groups": d}

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the windows to the grid."""
        y = ops.conv2d(x.reshape(1, *x.shape), self.weight, self.bias, **self.params)
        return y.reshape(*y.shape[1:])


class Bottleneck:
    """RegNet's block (arXiv:2003.13678) with layer norms over channels: 1 x 1, 3 x 3 by channel, squeeze and excitation, 1 x 1, each product
    with a norm behind; the result and its input, which a product may bring to its width, are added: silu of the sum.

    Squeeze and excitation (arXiv:1709.01507): each channel times the sigmoid of two products over its mean.
    """

    def __init__(self, w: Weights, n_in: int, width: int, squeezed: int, eps: float):
        self.enter, self.leave = Linear(w["conv1"], n_in, width), Linear(w["conv3"], width, width)
        self.middle = DepthwiseConv(w["conv2"], width, 3)
        self.norms = [LayerNorm(w[f"norm{i}"], width, eps) for i in (1, 2, 3)]
        self.squeeze, self.excite = Linear(w["se1"], width, squeezed), Linear(w["se2"], squeezed, width)
        wider = "skip" in w
        self.skip, self.skip_norm = (Linear(w["skip"], n_in, width), LayerNorm(w["skip_norm"], width, eps)) if wider else (None, None)

    def __call__(self, x: Tensor, side: int) -> Tensor:                            # [n, C_in] -> [n, C]
        y = ops.silu(self.norms[0](self.enter(x)))
        y = self.middle(y.reshape(side, side, -1)).reshape(side * side, -1)
        y = ops.silu(self.norms[1](y))
        mean = adaptive_average(y, side, 1)                                        # [1, C]
        y = y * ops.sigmoid(self.excite(ops.silu(self.squeeze(mean))))
        y = self.norms[2](self.leave(y))
        return ops.silu(y + (self.skip_norm(self.skip(x)) if self.skip else x))


def adaptive_average(x: Tensor, side: int, to: int) -> Tensor:
    """Return a square [side * side, C] averaged down to [to * to, C], as torch's adaptive_avg_pool2d."""
    return ops.adaptive_avg_pool2d(x.reshape(1, side, side, -1), size=(to, to)).reshape(to * to, -1)
