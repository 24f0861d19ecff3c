"""Mixtures of experts: which experts a row takes, the products with their weights, and the sum of what they give.

Axes: m rows, e experts, u experts that each row uses, k and n the width before and after a product. Row `u i + j` of a tensor
with m u rows belongs to row i and the j-th of its experts.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from pyengine.dtype import dtype
from pyengine.errors import ShapeError
from pyengine.graph.op import F32, I32, op, Weight
from pyengine.ops.elementwise import activation
from pyengine.graph.tensor import axis_max, product


def _top_experts_infer(args: tuple[Any, ...], params: dict[str, Any]) -> list[Any]:
    top_experts.match(args)
    (m, n), used = args[0].shape, params["n_used"]
    if not isinstance(n, int) or not 1 <= used <= n:
        raise ShapeError(f"top_experts: {used} of {n} experts cannot be chosen")
    return [((m, used), dtype("I32")), ((m, used), dtype("F32"))]


@op(infer=_top_experts_infer, rowwise=True)
def top_experts(
    scores: F32["m n"],
    bias: F32["n"] | None = None,
    *,
    n_used: int,
    gate: Literal["softmax", "sigmoid"],
    normed: bool = False,
    scale: float = 1.0,
) -> tuple[I32["m u"], F32["m u"]]:
    """Choose `n_used` experts for each row by its scores: (chosen, their gates), best first; of equals the lower number first.

    g = gate(scores) over all n        softmax along the row, or sigmoid of each
    chosen = the largest of g + bias where there is one, else of the scores themselves
    gates = scale * g[chosen], with `normed` divided by their sum (+ 1e-20, so that zeros give zeros)

    Mixtral (arXiv:2401.04088), Qwen3: softmax, normed. Qwen2-MoE: softmax. Llama 4: sigmoid. DeepSeek-V3 without its groups
    (arXiv:2412.19437, section 2.1.2): sigmoid, bias, normed, scale. torch.topk leaves the order of equals open. A row with a NaN
    has NaN gates (softmax), and still different experts.
    """
    s = scores - scores.max(axis=-1, keepdims=True) if gate == "softmax" else scores
    g = np.exp(s) / np.exp(s).sum(axis=-1, keepdims=True) if gate == "softmax" else activation(s, "sigmoid")
    key = scores if bias is None else g + bias
    chosen = np.argsort(-key, axis=-1, kind="stable")[:, :n_used].astype(np.int32)
    gates = np.take_along_axis(g, chosen, axis=-1)
    if normed:
        gates = gates / (gates.sum(axis=-1, keepdims=True) + 1e-20)
    return chosen, (gates * scale).astype(scores.dtype)


top_experts.case(scores=(3, 8), n_used=2, gate="softmax", normed=True)
top_experts.case(scores=(5, 16), n_used=1, gate="sigmoid")
top_experts.case(scores=(7, 60), n_used=4, gate="softmax", scale=2.5)
top_experts.case(scores=(33, 129), bias=(129,), n_used=8, gate="sigmoid", normed=True, scale=2.5)
top_experts.case(scores=(2, 3), n_used=3, gate="softmax")
top_experts.case(scores=(0, 8), n_used=2, gate="softmax")


def _expert_linear_flops(x: Any, w: Any, chosen: Any, **_: Any) -> int:
    return 2 * axis_max(chosen.shape[0]) * chosen.shape[1] * sum(t.shape[1] * t.shape[2] for t in w)


def _expert_linear_infer(args: tuple[Any, ...], params: dict[str, Any]) -> list[Any]:
    expert_linear.match(args)
    x, w, chosen = args
    pairs = product(chosen.shape)
    if x.shape[0] not in (chosen.shape[0], pairs):
        raise ShapeError(f"expert_linear: 'x' has {x.shape[0]} rows, but must have {chosen.shape[0]} or {pairs}")
    glu = params["glu"] != "none"
    if len(w) != 1 + glu or w[0].shape != w[-1].shape:
        raise ShapeError(f"expert_linear: {len(w)} weights; one is needed, and with glu two of equal shape")
    return [((pairs, w[0].shape[1]), dtype("F32"))]


@op(infer=_expert_linear_infer, flops=_expert_linear_flops, packed=("w",), sparse=("w",), rowwise=True, fault="expert {} of {}")
def expert_linear(
    x: F32["x k"],
    w: list[Weight["e n k"]],
    chosen: I32["m u"],
    *,
    glu: Literal["none", "silu", "gelu_tanh", "gelu", "relu"] = "none",
) -> F32["p n"]:
    """Multiply each row by the weights of its experts, a matrix [n, k] for each of e experts: F32 [m u, n].

    x has m rows, each for all of its experts, or m u rows, one for each.
    y[u i + j] = x[i or u i + j] @ w_0[chosen[i, j]].T         with glu: glu(y_0) * y_1, as in `linear`

    Raises: RequestError at run time for an expert that is not there.
    """
    m, used = chosen.shape
    rows = x if len(x) == m * used else np.repeat(x, used, axis=0)
    y = [np.stack([h @ t[i].T for h, i in zip(rows, chosen.reshape(-1))]) if m else np.zeros((0, t.shape[1]), x.dtype) for t in w]
    return activation(y[0], glu) * y[1] if glu != "none" else y[0]


expert_linear.case(x=(1, 64), w=[(5, 48, 64)], chosen=(1, 2))
expert_linear.case(x=(9, 64), w=[(4, 33, 64), (4, 33, 64)], chosen=(9, 3), glu="silu")
expert_linear.case(x=(14, 96), w=[(3, 40, 96)], chosen=(7, 2))
expert_linear.case(x=(70, 32), w=[(2, 100, 32)], chosen=(70, 1))
expert_linear.case(x=(0, 64), w=[(4, 16, 64)], chosen=(0, 2))


def _sum_experts_infer(args: tuple[Any, ...], params: dict[str, Any]) -> list[Any]:
    sum_experts.match(args)
    y, gates, residual = args
    used, rows = params["n_used"], y.shape[0]
    if used < 1 or (rows if isinstance(rows, int) else rows.scale) % used:
        raise ShapeError(f"sum_experts: {rows} rows are no whole number of {used}")
    m = rows // used
    if gates is not None and gates.shape != (m, used):
        raise ShapeError(f"sum_experts: 'gates' has shape {gates.shape}, but must have {(m, used)}")
    if residual is not None and residual.shape != (m, y.shape[1]):
        raise ShapeError(f"sum_experts: 'residual' has shape {residual.shape}, but must have {(m, y.shape[1])}")
    return [((m, y.shape[1]), dtype("F32"))]


@op(inplace="residual", infer=_sum_experts_infer, rowwise=True)
def sum_experts(y: F32["p n"], gates: F32["m u"] | None = None, residual: F32["m n"] | None = None, *, n_used: int) -> F32["m n"]:
    """Add up what the experts of each row give: out[i] = sum over j of gates[i, j] y[u i + j], then + residual[i]; u = n_used.

    Without gates each counts once. The order is that of `chosen`: the best expert first. (transformers adds in the order of the
    experts' numbers, llama.cpp in this one.)
    """
    z = y.reshape(-1, n_used, y.shape[-1])
    out = (z if gates is None else z * gates[:, :, None]).sum(axis=1)
    return out if residual is None else out + residual


sum_experts.case(y=(6, 40), gates=(3, 2), n_used=2)
sum_experts.case(y=(8, 1033), gates=(1, 8), residual=(1, 1033), n_used=8)
sum_experts.case(y=(15, 17), n_used=3)
sum_experts.case(y=(5, 32), residual=(5, 32), n_used=1)
sum_experts.case(y=(0, 32), gates=(0, 2), n_used=2)
