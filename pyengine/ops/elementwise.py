"""Element by element: arithmetic with NumPy's broadcasting, activations, soft caps."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from pyengine.dtype import dtype
from pyengine.errors import ShapeError
from pyengine.graph.op import F32, op
from pyengine.graph.tensor import axis_max, Tensor


def broadcast_shapes(name: str, a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    """Broadcast two shapes by NumPy's rule: axes are aligned at the end, an axis of 1 stretches."""
    n = max(len(a), len(b))
    a, b = (1,) * (n - len(a)) + a, (1,) * (n - len(b)) + b
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y and x != 1 and y != 1:
            x, y = (f"{a} (at most {axis_max(a)})" if str(x) == str(y) else a for a in (x, y))
            raise ShapeError(f"{name}: axis {i - n} is {x} in the first argument but {y} in the second")
    return tuple(y if x == 1 else x for x, y in zip(a, b))


def _infer_binary(args: tuple[Tensor, Tensor], params: dict[str, Any]) -> list[Any]:
    for t in args:
        if t.dtype.name != "F32":
            raise ShapeError(f"binary: dtype is {t.dtype.name}, but must be F32")
    return [(broadcast_shapes("binary", args[0].shape, args[1].shape), dtype("F32"))]


@op(inplace="x", strided=("x", "y"), infer=_infer_binary, rowwise=True)
def binary(x: F32["..."], y: F32["..."], *, kind: Literal["add", "sub", "mul", "div", "max", "min"]) -> F32["..."]:
    """Combine two arrays with NumPy's broadcasting."""
    f = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum, "min": np.minimum}
    return f[kind](x, y)


binary.case(x=(1, 640), y=(1, 640), kind="add")
binary.case(x=(5, 3, 7), y=(7,), kind="mul")
binary.case(x=(5, 3, 7), y=(5, 1, 7), kind="sub")
binary.case(x=(4, 1), y=(1, 33), kind="div")
binary.case(x=(0, 8), y=(8,), kind="max")


@op(inplace="x", rowwise=True)
def unary(
    x: F32["..."],
    *,
    kind: Literal["none", "silu", "gelu_tanh", "gelu", "relu", "quick_gelu", "relu2", "sigmoid", "tanh", "exp", "log", "sqrt",
                  "neg", "square", "softplus"],
) -> F32["..."]:
    """Apply a function to each element. gelu is the exact one (erf), gelu_tanh its tanh form; both of arXiv:1606.08415.

    quick_gelu = x sigmoid(1.702 x), as CLIP was trained with; relu2 = relu(x)^2; softplus = log(1 + e^x).
    """
    return activation(x, kind)


_erf = np.vectorize(math.erf, otypes=[np.float64])


def activation(x: np.ndarray, kind: str) -> np.ndarray:
    """Apply a function of `unary` to an array."""
    sigmoid = lambda z: np.exp(-np.logaddexp(0, -z))  # noqa: E731  exact at both ends
    functions = {
        "none": lambda: x,
        "silu": lambda: x * sigmoid(x),
        "gelu_tanh": lambda: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "gelu": lambda: (0.5 * x * (1 + _erf(x / math.sqrt(2)))).astype(x.dtype) if x.size else x,
        "relu": lambda: np.maximum(x, 0),
        "quick_gelu": lambda: x * sigmoid(1.702 * x),
        "relu2": lambda: np.maximum(x, 0) ** 2,
        "sigmoid": lambda: sigmoid(x),
        "tanh": lambda: np.tanh(x),
        "exp": lambda: np.exp(x),
        "log": lambda: np.log(x),
        "sqrt": lambda: np.sqrt(x),
        "neg": lambda: -x,
        "square": lambda: x * x,
        "softplus": lambda: np.logaddexp(0, x).astype(x.dtype),
    }
    return functions[kind]()


for _kind in ("silu", "gelu_tanh", "gelu", "relu", "quick_gelu", "relu2", "sigmoid", "tanh", "exp", "neg", "square", "softplus"):
    unary.case(x=(3, 37), kind=_kind)
unary.case(x=(512, 2048), kind="silu")
unary.case(x=(0, 8), kind="gelu")


@op(inplace="x", rowwise=True)
def scale(x: F32["..."], *, factor: float, offset: float = 0.0) -> F32["..."]:
    """x * factor + offset."""
    return x * np.float32(factor) + np.float32(offset)


scale.case(x=(7, 33), factor=0.5)
scale.case(x=(1, 640), factor=25.25, offset=-1.0)


@op(inplace="x", rowwise=True)
def softcap(x: F32["..."], *, cap: float) -> F32["..."]:
    """cap * tanh(x / cap): keeps values within +-cap. Gemma 2, arXiv:2408.00118, section 2."""
    return np.float32(cap) * np.tanh(x / np.float32(cap))


softcap.case(x=(2, 99), cap=30.0)


def _real(x: Any) -> Any:
    """Take an int for the float of its value: x + 1 means x + 1.0."""
    return float(x) if type(x) is int else x


def add(x: Any, y: Any) -> Any:
    """Compute x + y."""
    return binary(_real(x), _real(y), kind="add")


def sub(x: Any, y: Any) -> Any:
    """Compute x - y."""
    return binary(_real(x), _real(y), kind="sub")


def mul(x: Any, y: Any) -> Any:
    """Compute x * y, element by element."""
    return binary(_real(x), _real(y), kind="mul")


def div(x: Any, y: Any) -> Any:
    """Compute x / y."""
    return binary(_real(x), _real(y), kind="div")


def silu(x: Any) -> Any:
    """Compute x * sigmoid(x)."""
    return unary(x, kind="silu")


def gelu(x: Any) -> Any:
    """Compute x * Phi(x), exact."""
    return unary(x, kind="gelu")


def gelu_tanh(x: Any) -> Any:
    """Compute the tanh form of gelu."""
    return unary(x, kind="gelu_tanh")


def relu(x: Any) -> Any:
    """Compute max(x, 0)."""
    return unary(x, kind="relu")


def sigmoid(x: Any) -> Any:
    """Compute 1 / (1 + exp(-x))."""
    return unary(x, kind="sigmoid")


def tanh(x: Any) -> Any:
    """Compute the hyperbolic tangent."""
    return unary(x, kind="tanh")


def exp(x: Any) -> Any:
    """Compute e^x."""
    return unary(x, kind="exp")


def softplus(x: Any) -> Any:
    """Compute log(1 + e^x)."""
    return unary(x, kind="softplus")
