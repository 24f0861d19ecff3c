"""All ops. Each is declared once, in this package: `pyengine.graph.op.REGISTRY` lists them."""

from __future__ import annotations

from pyengine.graph.op import REGISTRY
from pyengine.ops.attention import attention, attention_sums, key_sums
from pyengine.ops.convolution import conv1d, conv2d
from pyengine.ops.elementwise import (
    add, binary, div, exp, gelu, gelu_tanh, mul, relu, scale, sigmoid, silu, softcap, softplus, sub, tanh, unary,
)
from pyengine.ops.experts import expert_linear, sum_experts, top_experts
from pyengine.ops.groups import cache_groups, merge_attention
from pyengine.ops.layout import concat, contiguous, reshape, slice, transpose  # noqa: A004
from pyengine.ops.matmul import linear, matmul, rows
from pyengine.ops.norm import group_norm, l2_norm, layer_norm, mean_rows, reduce, rms_norm, softmax
from pyengine.ops.pooling import adaptive_avg_pool2d, adaptive_pool2d, avg_pool2d, max_pool2d, pool2d, resize2d
from pyengine.ops.recurrent import causal_conv, gated_delta_rule
from pyengine.ops.rope import cache_append, rope, rope_append, rope_table, temperature
from pyengine.ops.top import top_k
from pyengine.graph.tensor import Tensor

__all__ = [
    "REGISTRY", "adaptive_avg_pool2d", "adaptive_pool2d", "add", "attention", "attention_sums", "avg_pool2d", "binary", "cache_append",
    "cache_groups", "causal_conv", "concat", "contiguous", "conv1d", "conv2d", "div", "exp", "expert_linear", "gated_delta_rule", "gelu",
    "gelu_tanh", "group_norm", "key_sums", "l2_norm", "layer_norm", "linear", "matmul", "max_pool2d", "mean_rows", "merge_attention", "mul",
    "pool2d",
    "reduce", "relu", "reshape", "resize2d", "rms_norm", "rope", "rope_append", "rope_table", "rows", "scale", "sigmoid",
    "silu", "slice", "softcap", "softmax", "softplus", "sub", "sum_experts", "tanh", "temperature", "top_experts", "top_k",
    "transpose", "unary",
]

# Operators of symbolic tensors, so that models read as formulas.
Tensor.__add__ = Tensor.__radd__ = add                                   # type: ignore[attr-defined]
Tensor.__mul__ = Tensor.__rmul__ = mul                                   # type: ignore[attr-defined]
Tensor.__sub__ = sub                                                     # type: ignore[attr-defined]
Tensor.__rsub__ = lambda self, other: sub(other, self)                   # type: ignore[attr-defined]
Tensor.__truediv__ = div                                                 # type: ignore[attr-defined]
Tensor.__rtruediv__ = lambda self, other: div(other, self)               # type: ignore[attr-defined]
Tensor.__array_ufunc__ = None           # array + tensor is the tensor's + too    # type: ignore[attr-defined]
Tensor.reshape = lambda self, *shape: reshape(self, shape=shape)         # type: ignore[attr-defined]
Tensor.transpose = lambda self, *axes: transpose(self, axes=axes)        # type: ignore[attr-defined]
