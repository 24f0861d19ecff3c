"""How much work a model's program is: what its steps read and compute, from the plan that it runs and the ops' own declarations.

No product is named here: operations are those that an op declares, weights are its arguments of kind Weight, and a weight that
stands beside integers is one of which they pick rows or matrices.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pyengine.graph.op import Op
from pyengine.graph.tensor import Axis, axis_value, Node, Tensor


class Sized:
    """An argument as an op's `flops` sees it: axes in numbers, once the program's own have the values `dims`."""

    def __init__(self, shape: Sequence[Axis], dims: Mapping[str, int] = {}):
        self._shape, self._dims = shape, dims

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis_value(a, self._dims) for a in self._shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def listed(value: Any) -> Sequence[Any]:
    """List what an argument holds: all of a list, one thing, or nothing."""
    return value if isinstance(value, (list, tuple)) else () if value is None else (value,)


def weights_of(op: Op) -> list[str]:
    """List the arguments that may have any format."""
    return [name for name, spec in op.args.items() if spec.kind == "Weight"]


def picked_by(op: Op, name: str) -> str | None:
    """Return the argument whose numbers select what is read of a weight, along its first axis; None where all of it is."""
    numbers = [n for n, spec in op.args.items() if spec.kind == "I32"]
    return numbers[0] if numbers and name in weights_of(op) else None


def operations(op: Op, args: Mapping[str, Any], params: Mapping[str, Any]) -> float:
    """Count operations by the op's declaration (a product and a sum are 2), 0 if it has none; `args`: `Sized`, lists, or None."""
    values = [tuple(listed(args[name])) if spec.many else args[name] for name, spec in op.args.items()]
    return float(op.flops(*values, **params)) if op.flops else 0.0


def seen(lo: np.ndarray, hi: np.ndarray, n_keys: int) -> float:
    """Return the share of an attention's declared operations that is on keys in a query's interval."""
    return float((hi - lo).sum()) / max(1, len(lo) * n_keys)


def of_node(node: Node, dims: Mapping[str, int]) -> dict[str, Any]:
    sized = {n: [Sized(t.shape, dims) for t in listed(a)] for n, a in zip(node.op.args, node.args)}
    return {n: s if node.op.args[n].many else s[0] if s else None for n, s in sized.items()}


def on_weights(node: Node, dims: Mapping[str, int]) -> Iterator[tuple[Tensor, float]]:
    """Yield the operations on each weight of a node; what an op declares is their sum."""
    args, own = of_node(node, dims), dict(zip(node.op.args, node.args))
    for name in weights_of(node.op):
        for weight in listed(own[name]):
            yield weight, operations(node.op, {**args, name: Sized(weight.shape, dims)}, dict(node.params))


def generation_bytes(program: Any, n: int) -> float:
    """Count the bytes that one token reads on average while n tokens are generated from an empty cache.

    All weights, whole, but for those that are picked from: one row of a table, and the matrices of the experts that a row uses, all
    different. Of each cache the cells that hold tokens by then (for a sliding layer at most all its cells). What only rows beside
    pictures need is not read. Activations are left out: they stay in the processor's caches.
    """
    layout, residents = program.prepared.layout, program.prepared.residents
    dims = defaultdict(int, m=1, w=1, l=1)                                     # of other kinds of rows there are none
    weights: dict[int, float] = {}
    caches: dict[int, float] = {}
    for node in layout.steps:
        sized = of_node(node, dims)
        if node.op.flops and not operations(node.op, sized, dict(node.params)):
            continue
        for name, arg in zip(node.op.args, node.args):
            by = picked_by(node.op, name)
            for t in listed(arg):
                root = layout.of(t).root
                if root.node.kind == "constant":
                    r = residents[id(root.node)]
                    share = min(1.0, sized[by].size / int(t.shape[0])) if by else 1.0
                    weights[id(r.tensor.node)] = max(r.nbytes * share, weights.get(id(r.tensor.node), 0))
                elif node.op.args[name].kind == "Cache" and node.op.flops:     # read; others write
                    heads, cells, width = (int(a) for a in root.shape)
                    caches[id(root.node)] = heads * t.dtype.size(width) * sum(min(i + 1, cells) for i in range(n)) / n
    return sum(weights.values()) + sum(caches.values())


def prompt_operations(program: Any, m: int) -> float:
    """Count operations on weights for a prompt of m tokens in one batch that wants its last row's logits."""
    dims = defaultdict(int, m=m, w=1, l=1)
    return sum(count for node in program.prepared.layout.steps for _, count in on_weights(node, dims))


def encoder_operations(program: Any, view: Any) -> dict[str, float]:
    """Count operations of one media encoder run: products with weights in blocks ("int8"), attention in each of the two, all else.

    Attention counts the keys in each row's interval, which stand in the inputs of the view or are constants.
    """
    total = {"int8": 0.0, "float": 0.0, "attention": 0.0, "attention_int8": 0.0}
    for node in program.prepared.layout.steps:
        args, params = dict(zip(node.op.args, node.args)), dict(node.params)
        if weights_of(node.op):
            for weight, count in on_weights(node, view.axes):
                total["int8" if weight.dtype.block > 1 else "float"] += count
            continue
        count = operations(node.op, of_node(node, view.axes), params)
        if node.op.name == "attention":
            lo, hi = (view.inputs[t.name] if t.node.kind == "input" else t.node.source for t in (args["lo"], args["hi"]))
            keys = axis_value(args["k"].shape[1], view.axes)
            total["attention_int8" if params["products"] == "int8" else "attention"] += count * seen(lo, hi, keys)
        else:
            total["float"] += count
    return total
