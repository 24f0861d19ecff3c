"""All ops. Each is declared once, in this package: `pyengine.graph.op.REGISTRY` lists them."""

from __future__ import annotations

from pyengine.graph.op import REGISTRY
from pyengine.ops.attention import attention
from pyengine.ops.elementwise import (
    add, binary, div, exp, gelu, gelu_tanh, mul, relu, scale, sigmoid, silu, softcap, softplus, sub, tanh, unary,
)
from pyengine.ops.experts import expert_linear, sum_experts, top_experts
from pyengine.ops.layout import concat, contiguous, reshape, slice, transpose  # noqa: A004
from pyengine.ops.matmul import linear, matmul, rows
from pyengine.ops.norm import layer_norm, mean_rows, reduce, rms_norm, softmax
from pyengine.ops.recurrent import causal_conv, gated_delta_rule
from pyengine.ops.rope import cache_append, rope, rope_append, rope_table, temperature
from pyengine.ops.top import top_k
from pyengine.graph.tensor import Tensor

__all__ = [
    "REGISTRY", "add", "attention", "binary", "cache_append", "causal_conv", "concat", "contiguous", "div", "exp",
    "expert_linear", "gated_delta_rule", "gelu", "gelu_tanh", "layer_norm", "linear", "matmul", "mean_rows", "mul", "reduce", "relu",
    "reshape", "rms_norm", "rope", "rope_append", "rope_table", "rows", "scale", "sigmoid", "silu", "slice", "softcap",
    "softmax", "softplus", "sub", "sum_experts", "tanh", "temperature", "top_experts", "top_k", "transpose", "unary",
]

# Operators of symbolic tensors, so that models read as formulas.
Tensor.__add__ = Tensor.__radd__ = add                                   # type: ignore[attr-defined]
Tensor.__mul__ = Tensor.__rmul__ = mul                                   # type: ignore[attr-defined]
Tensor.__sub__ = sub                                                     # type: ignore[attr-defined]
Tensor.__truediv__ = div                                                 # type: ignore[attr-defined]
Tensor.reshape = lambda self, *shape: reshape(self, shape=shape)         # type: ignore[attr-defined]
Tensor.transpose = lambda self, *axes: transpose(self, axes=axes)        # type: ignore[attr-defined]
