"""Layers with a state of fixed size instead of keys and values: a short causal convolution, and the gated delta rule.

A state lies in a cell, as a token's key does. Rows of several conversations stand one after the other in a step, those of one in the
order of its tokens, and two numbers for each row say where states are:

    before   the cell of the state before row i; BEGIN: there is none yet, it is zeros; FOLLOWS: what row i - 1 left
    after    the cell that the state after row i is written to; -1: to none

So a state can be left behind any row, and a step goes on from any state that was left. What a row gives does not depend on where it
stands in a step or on who else is there: rows of a conversation are computed one after the other, heads and columns side by side.
No cell is read and written in the same step, or written twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyengine.errors import RequestError, ShapeError
from pyengine.graph.op import F32, I32, op, Same
from pyengine.graph.tensor import axis_max

BEGIN, FOLLOWS = -1, -2


def _check_cells(name: str, before: np.ndarray, after: np.ndarray, n: int) -> None:
    if len(before) and (before[0] == FOLLOWS or before.min() < FOLLOWS or max(before.max(), after.max()) >= n):
        raise RequestError(f"{name}: a row reads or writes a cell that there is not, of {n}")


def _conv_infer(args: tuple[Any, ...], params: dict[str, Any]) -> list[Any]:
    taps, kept = args[1].shape[0], args[2].shape[0]
    if taps != kept + 1:
        raise ShapeError(f"causal_conv: 'state' holds {kept} inputs, and {taps} taps need {taps - 1}")
    return causal_conv._infer(args)


@op(infer=_conv_infer, fault="a row reads or writes cell {} of {}", flops=lambda x, weight, *a: 2 * x.size * axis_max(weight.shape[0]))
def causal_conv(
    x: F32["m d"], weight: F32["k d"], state: F32["t s d"], before: I32["m"], after: I32["m"]
) -> tuple[F32["m d"], Same["state"]]:
    """y[i] = sum over j of weight[j] * x[i - k + 1 + j], channel by channel: a depthwise convolution over the last k rows.

    The state of a conversation is its last t = k - 1 inputs, the oldest first. Cells: see above.
    """
    _check_cells("causal_conv", before, after, state.shape[1])
    out, last = np.empty_like(x), np.zeros((len(weight), x.shape[1]), x.dtype)
    for i in range(len(x)):
        if before[i] != FOLLOWS:
            last[1:] = state[:, before[i]] if before[i] >= 0 else 0
        last = np.concatenate([last[1:], x[i : i + 1]])
        out[i] = (last * weight).sum(axis=0)
        if after[i] >= 0:
            state[:, after[i]] = last[1:]
    return out, state


causal_conv.case(x=(9, 37), weight=(4, 37), state=(3, 6, 37), before=(9,), after=(9,))
causal_conv.case(x=(1, 80), weight=(2, 80), state=(1, 6, 80), before=(1,), after=(1,))
causal_conv.case(x=(0, 16), weight=(4, 16), state=(3, 6, 16), before=(0,), after=(0,))
causal_conv.case(x=(64, 4096), weight=(4, 4096), state=(3, 6, 4096), before=(64,), after=(64,))


@op(fault="a row reads or writes cell {} of {}",
    flops=lambda q, k, v, *a, **p: 7 * axis_max(v.shape[0]) * axis_max(v.shape[1]) * axis_max(k.shape[2]) * axis_max(v.shape[2]))
def gated_delta_rule(
    q: F32["m g e"],
    k: F32["m g e"],
    v: F32["m h f"],
    log_decay: F32["m h"],
    beta: F32["m h"],
    state: F32["h s e*f"],
    before: I32["m"],
    after: I32["m"],
    *,
    tiled: bool = False,
) -> tuple[F32["m h f"], Same["state"]]:
    """Keep a matrix S [e, f] for each of h heads, and change it with every row; out = S' q, where:

    S' = S exp(log_decay) + k (beta (v - k S exp(log_decay)))

    k and q [e] are the caller's, normalised and scaled or not. h heads share g of them: head i takes number i // (h / g), or with
    `tiled` number i mod g. Yang et al. 2024, arXiv:2412.06464, equation 10; without decay arXiv:2406.06484. Cells: see above.
    """
    _check_cells("gated_delta_rule", before, after, state.shape[1])
    (m, h, f), (g, e) = v.shape, k.shape[1:]
    which = np.arange(h) % g if tiled else np.arange(h) // (h // g)
    out, s = np.empty_like(v), np.zeros((h, e, f), v.dtype)
    for i in range(m):
        if before[i] != FOLLOWS:
            s = state[:, before[i]].reshape(h, e, f) if before[i] >= 0 else np.zeros((h, e, f), v.dtype)
        s = s * np.exp(log_decay[i])[:, None, None]
        change = beta[i][:, None] * (v[i] - np.einsum("he,hef->hf", k[i][which], s))
        s = s + k[i][which][:, :, None] * change[:, None]
        out[i] = np.einsum("he,hef->hf", q[i][which], s)
        if after[i] >= 0:
            state[:, after[i]] = s.reshape(h, e * f)
    return out, state


gated_delta_rule.case(q=(9, 2, 16), k=(9, 2, 16), v=(9, 4, 37), log_decay=(9, 4), beta=(9, 4), state=(4, 6, 592), before=(9,), after=(9,))
gated_delta_rule.case(q=(5, 2, 7), k=(5, 2, 7), v=(5, 4, 8), log_decay=(5, 4), beta=(5, 4), state=(4, 6, 56), before=(5,), after=(5,), tiled=True)
gated_delta_rule.case(q=(0, 1, 8), k=(0, 1, 8), v=(0, 2, 8), log_decay=(0, 2), beta=(0, 2), state=(2, 6, 64), before=(0,), after=(0,))
gated_delta_rule.case(q=(20, 1, 128), k=(20, 1, 128), v=(20, 1, 128), log_decay=(20, 1), beta=(20, 1), state=(1, 6, 16384), before=(20,),
                      after=(20,))
