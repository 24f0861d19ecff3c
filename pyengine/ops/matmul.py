"""Products. `linear` is the one that models use: weights of any format, with everything fused that touches its rows."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from pyengine.errors import ShapeError
from pyengine.graph.op import F32, I32, op, Weight
from pyengine.ops.elementwise import activation
from pyengine.graph.tensor import axis_max, Tensor


def _linear_flops(x: Tensor, w: tuple[Tensor, ...], *_: Any, **__: Any) -> int:
    return 2 * axis_max(x.shape[0]) * sum(axis_max(t.shape[0]) * axis_max(t.shape[1]) for t in w)


def _linear_infer(args: tuple[Any, ...], params: dict[str, Any]) -> list[Any]:
    shapes = linear._infer(args)
    x, w, bias, norm, residual = args
    if not 1 <= len(w) <= 4:
        raise ShapeError(f"linear: {len(w)} weights; 1 to 4 are possible")
    if bias is not None and len(bias) != len(w):
        raise ShapeError(f"linear: {len(bias)} biases for {len(w)} weights")
    if params["glu"] != "none":
        if len(w) != 2 or w[0].shape != w[1].shape or residual is not None:
            raise ShapeError("linear: glu takes two weights of equal shape and no residual")
        return shapes[:1]
    if residual is not None and (len(w) != 1 or residual.shape != shapes[0][0]):
        raise ShapeError(f"linear: a residual needs one weight and the shape of the result, {shapes[0][0]}")
    return shapes


@op(per="w", infer=_linear_infer, flops=_linear_flops, packed=("w",), rowwise=True)
def linear(
    x: F32["m k"],
    w: list[Weight["n_ k"]],
    bias: list[F32["n_"]] | None = None,
    norm: F32["k"] | None = None,
    residual: F32["m n"] | None = None,
    *,
    norm_eps: float = 0.0,
    glu: Literal["none", "silu", "gelu_tanh", "gelu", "relu"] = "none",
    softcap: float = 0.0,
) -> list[F32["m n_"]]:
    """Multiply rows by one to four weight matrices that share the input.

    h = rms_norm(x, norm, norm_eps) if norm is given else x
    y_i = h @ w_i.T + bias_i
    glu:      one result, glu(y_0) * y_1          Shazeer 2020, arXiv:2002.05202
    residual: y_0 + residual
    softcap:  softcap * tanh(y / softcap)
    """
    h = x
    if norm is not None:
        h = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(norm_eps)) * norm
    y = [h @ t.T for t in w]
    if bias is not None:
        y = [a + b for a, b in zip(y, bias)]
    if glu != "none":
        y = [activation(y[0], glu) * y[1]]
    if residual is not None:
        y = [y[0] + residual]
    if softcap:
        y = [softcap * np.tanh(a / softcap) for a in y]
    return y


linear.case(x=(1, 64), w=[(48, 64)])
linear.case(x=(5, 96), w=[(33, 96), (17, 96), (16, 96)], bias=[(33,), (17,), (16,)], norm=(96,), norm_eps=1e-6)
linear.case(x=(3, 64), w=[(40, 64), (40, 64)], glu="silu")
linear.case(x=(3, 64), w=[(40, 64)], residual=(3, 40))
linear.case(x=(0, 64), w=[(40, 64)])
linear.case(x=(33, 256), w=[(100, 256)], softcap=30.0)


@op(strided=("x", "y"), flops=lambda x, y: 2 * axis_max(x.shape[-2]) * axis_max(y.shape[-2]) * axis_max(x.shape[-1]))
def matmul(x: F32["... m k"], y: F32["... n k"]) -> F32["... m n"]:
    """x @ y^T over the last two axes; both factors are activations. For weights use `linear`."""
    return x @ np.swapaxes(y, -1, -2)


matmul.case(x=(5, 7), y=(3, 7))
matmul.case(x=(2, 3, 17, 33), y=(2, 3, 9, 33))
matmul.case(x=(0, 4), y=(3, 4))


@op(any_format=("table",), fault="id {} of {}")
def rows(table: Weight["n k"], ids: I32["m"], media: F32["e k"] | None = None, *, scale: float = 1.0) -> F32["m k"]:
    """Pick rows of a table by number, times `scale` (token embeddings; rows whose logits are wanted).

    A negative id -1-j takes row j of `media` as it is: embeddings that stand between those of tokens.
    Raises: RequestError at run time for an id outside the table or `media`.
    """
    out = table[np.maximum(ids, 0)] * np.float32(scale)
    if media is not None:
        out[ids < 0] = media[-1 - ids[ids < 0]]
    return out


rows.case(table=(50, 64), ids=(5,))
rows.case(table=(7, 33), ids=(3,), scale=8.0)
rows.case(table=(7, 32), ids=(0,))
rows.case(table=(7, 32), ids=(6,), media=(3, 32), scale=8.0)
