"""How much work a model's program is: what its steps read and compute, from the plan that it runs."""

from __future__ import annotations

import math
from typing import Any

from pyengine.graph.tensor import axis_value


def generation_bytes(program: Any, n: int) -> float:
    """Bytes that one token reads on average while n tokens are generated from an empty cache.

    All weights that a product reads, whole; one row of a table that rows are picked from; of each cache the cells that hold
    tokens by then (for a sliding layer at most all its cells). Activations are left out: they stay in the caches.
    """
    layout, residents = program.prepared.layout, program.prepared.residents
    weights: dict[int, float] = {}
    for node in layout.steps:
        for name, arg in zip(node.op.args, node.args):
            for t in arg if isinstance(arg, tuple) else (arg,):
                if t is None or layout.of(t).root.node.kind != "constant":
                    continue
                r = residents[id(layout.of(t).root.node)]
                picked = node.op.name == "rows" and name == "table"
                nbytes = r.nbytes / int(t.shape[0]) if picked else r.nbytes
                weights[id(r.tensor.node)] = max(nbytes, weights.get(id(r.tensor.node), 0))
    cached = 0.0
    for t in program.prepared.states:
        if t.ndim == 3:                                                        # [kv heads, cells, head_dim]
            heads, cells, width = (int(a) for a in t.shape)
            seen = sum(min(i + 1, cells) for i in range(n)) / n
            cached += heads * seen * t.dtype.size(width)
    return sum(weights.values()) + cached


def prompt_operations(program: Any, m: int) -> float:
    """Operations (a product and a sum are 2) on weights for a prompt of m tokens in one batch that wants its last row's logits."""
    total = 0
    dims = {"m": m, "w": 1, "l": 1}
    for node in program.prepared.layout.steps:
        if node.op.name == "linear":
            x, w = node.args[0], node.args[1]
            total += 2 * axis_value(x.shape[0], dims) * sum(math.prod(int(a) for a in t.shape) for t in w)
    return float(total)


def encoder_operations(program: Any, view: Any) -> dict[str, float]:
    """Operations of one run of a media encoder: products with weights in blocks ("int8") and in floats, attention in each of the two.

    Attention counts the keys in each row's interval, which stand in the inputs of the view or are constants.
    """
    total = {"int8": 0.0, "float": 0.0, "attention": 0.0, "attention_int8": 0.0}
    for node in program.prepared.layout.steps:
        args = dict(zip(node.op.args, node.args))
        if node.op.name == "linear":
            rows = axis_value(args["x"].shape[0], view.axes)
            for t in args["w"]:
                total["int8" if t.dtype.block > 1 else "float"] += 2.0 * rows * math.prod(int(a) for a in t.shape)
        elif node.op.name == "attention":
            lo, hi = (view.inputs[t.name] if t.node.kind == "input" else t.node.source for t in (args["lo"], args["hi"]))
            widths = int(args["q"].shape[2]) + int(args["v"].shape[2])
            kind = "attention_int8" if dict(node.params)["products"] == "int8" else "attention"
            total[kind] += 2.0 * float((hi - lo).sum()) * int(args["q"].shape[1]) * widths
    return total
