"""Convolutions over patches that lie as rows [n, C], row after row of a square; made of products, picked rows and sums."""

from __future__ import annotations

import numpy as np

from pyengine import ops
from pyengine.files.weights import DerivedRef, Weights
from pyengine.graph.tensor import Tensor
from pyengine.nn.layers import constant, LayerNorm, Linear


class Depthwise:
    """A 3 x 3 convolution of each channel by itself, with zeros around: tensor "weight" [C, 9], no bias."""

    def __init__(self, w: Weights, width: int):
        weight = w.tensor("weight", (width, 9))
        self.taps = [constant(DerivedRef(f"{weight.name}.{k}", (width,), (weight,), lambda a, k=k: np.ascontiguousarray(a[:, k]))) for k in range(9)]

    def __call__(self, x: Tensor, side: int) -> Tensor:                            # [n, C] -> [n, C]
        n, width = side * side, int(x.shape[1])
        padded = ops.concat([x, np.zeros((1, width), np.float32)], axis=0)         # [n + 1, C]
        numbers = np.pad(np.arange(n, dtype=np.int32).reshape(side, side), 1, constant_values=n)
        total = None
        for k, tap in enumerate(self.taps):
            part = ops.rows(padded, numbers[k // 3 : k // 3 + side, k % 3 : k % 3 + side].reshape(-1)) * tap
            total = part if total is None else total + part
        return total


class Bottleneck:
    """RegNet's block (arXiv:2003.13678) with layer norms over channels: 1 x 1, 3 x 3 by channel, squeeze and excitation, 1 x 1, each product
    with a norm behind; the result and its input, which a product may bring to its width, are added: silu of the sum.

    Squeeze and excitation (arXiv:1709.01507): each channel times the sigmoid of two products over its mean.
    """

    def __init__(self, w: Weights, n_in: int, width: int, squeezed: int, eps: float):
        self.enter, self.leave = Linear(w["conv1"], n_in, width), Linear(w["conv3"], width, width)
        self.middle = Depthwise(w["conv2"], width)
        self.norms = [LayerNorm(w[f"norm{i}"], width, eps) for i in (1, 2, 3)]
        self.squeeze, self.excite = Linear(w["se1"], width, squeezed), Linear(w["se2"], squeezed, width)
        wider = "skip" in w
        self.skip, self.skip_norm = (Linear(w["skip"], n_in, width), LayerNorm(w["skip_norm"], width, eps)) if wider else (None, None)

    def __call__(self, x: Tensor, side: int) -> Tensor:                            # [n, C_in] -> [n, C]
        y = ops.silu(self.norms[0](self.enter(x)))
        y = ops.silu(self.norms[1](self.middle(y, side)))
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
