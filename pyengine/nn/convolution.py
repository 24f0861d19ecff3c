"""Convolutions over patches that lie as rows [n, C], row after row of a square; made of products, slices and sums."""

from __future__ import annotations

import numpy as np

from pyengine import ops
from pyengine.dtype import dtype
from pyengine.files.weights import DerivedRef, Weights
from pyengine.graph.tensor import Tensor
from pyengine.nn.layers import constant, LayerNorm, Linear


class DepthwiseConv:
    """A convolution of each channel with a window of its own, k x k, zeros around the grid: x [h, w, D] -> [ceil(h / s), ceil(w / s), D].

    As shifted copies of the grid, each times its row of the window, added up. Files have the window as [D, k k], [D, k, k] or [D, 1, k, k].
    """

    def __init__(self, w: Weights, d: int, k: int, stride: int = 1):
        """Bind the window. Raises: InvalidModelError."""
        found = w.shape("weight")
        shape = {2: (d, k * k), 4: (d, 1, k, k)}.get(len(found or ()), (d, k, k))
        ref, bias = w.tensor("weight", shape), w.optional("bias", (d,))
        self.weight = constant(DerivedRef(ref.name, (k * k, d), (ref,), lambda a: a.reshape(d, k * k).T))
        self.bias = constant(bias, dtype("F32")) if bias else None
        self.k, self.stride = k, stride

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the windows to the grid."""
        s, p = self.stride, self.k // 2
        h, w, d = (int(n) for n in x.shape)
        down, across = (p + -(n + 2 * p) % s for n in (h, w))                      # behind the grid, so that phases are whole
        x = ops.concat([_zeros(p, w, d), x, _zeros(down, w, d)], axis=0)
        x = ops.concat([_zeros(h + p + down, p, d), x, _zeros(h + p + down, across, d)], axis=1)
        x = x.reshape((h + p + down) // s, s, (w + p + across) // s, s, d)
        out: Tensor | None = None
        for i, j in np.ndindex(self.k, self.k):
            tap = ops.slice(ops.slice(x, axis=0, start=i // s, stop=i // s + -(-h // s)), axis=1, start=i % s, stop=i % s + 1)
            tap = ops.slice(ops.slice(tap, axis=2, start=j // s, stop=j // s + -(-w // s)), axis=3, start=j % s, stop=j % s + 1)
            tap = tap * ops.slice(self.weight, axis=0, start=i * self.k + j, stop=i * self.k + j + 1).reshape(d)
            out = tap if out is None else out + tap
        assert out is not None
        out = out.reshape(-(-h // s), -(-w // s), d)
        return out if self.bias is None else out + self.bias


def _zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


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
        mean = ops.reduce(ops.contiguous(ops.transpose(y, axes=(1, 0))), kind="mean").reshape(1, -1)                 # [1, C]
        y = y * ops.sigmoid(self.excite(ops.silu(self.squeeze(mean))))
        y = self.norms[2](self.leave(y))
        return ops.silu(y + (self.skip_norm(self.skip(x)) if self.skip else x))


def adaptive_average(x: Tensor, side: int, to: int) -> Tensor:
    """Return a square [side * side, C] averaged down to [to * to, C]: cell i is the mean of rows floor(i side / to) up to ceil((i + 1) side / to)."""
    one = np.zeros((to, side), np.float32)
    for i in range(to):
        start, stop = i * side // to, -(-(i + 1) * side // to)
        one[i, start:stop] = 1 / (stop - start)
    return ops.matmul(np.kron(one, one), ops.contiguous(ops.transpose(x, axes=(1, 0))))
