"""Fusions: small rewrites of the graph. Each takes the outputs and returns equal ones with fewer nodes.

Every pass can be switched off by name (`Graph.compile(passes=...)`); a test compares results with and without each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pyengine import ops
from pyengine.compiler.rewrite import make, rebuild
from pyengine.graph.graph import topological, users
from pyengine.graph.tensor import Node, Tensor
from pyengine.ops.attention import SUMS
from pyengine.records import NamedTuple

Pass = Callable[[list[Tensor]], list[Tensor]]


def _is(t: Any, op: Any) -> bool:
    return isinstance(t, Tensor) and t.node.op is op


def share(outputs: list[Tensor]) -> list[Tensor]:
    """Merge nodes of the same op, arguments and parameters into one (rope tables of all layers), and constants that are the same
    weight of a file (tied embeddings)."""
    seen: dict[Any, Sequence[Tensor]] = {}

    def key_of(arg: Any) -> Any:
        if isinstance(arg, tuple):
            return tuple(key_of(a) for a in arg)
        return None if arg is None else (id(arg.node), arg.index)

    def rule(node: Node, args: tuple[Any, ...]) -> Sequence[Tensor]:
        key = (node.op.name, tuple(key_of(a) for a in args), node.params)
        if key not in seen:
            seen[key] = node.outputs if args == node.args else node.with_args(args).outputs
        return seen[key]

    def leaf(node: Node) -> Sequence[Tensor]:
        if node.kind != "constant" or isinstance(node.source, np.ndarray):
            return node.outputs
        return seen.setdefault((node.source, node.outputs[0].dtype), node.outputs)

    return rebuild(outputs, rule, leaf)


def _file_of(w: Tensor) -> int:
    """Return what tells the file of a weight, or of its parts, from others."""
    source = w.node.source
    return id(getattr(getattr(source, "parts", (source,))[0], "source", None))


def merge_products(outputs: list[Tensor]) -> list[Tensor]:
    """Merge plain products of one input into one node: q/k/v, gate/up. The input is read and quantized once.

    Weights of two files stay apart: an adapter's low matrices are merged with each other.
    """
    groups: dict[Any, list[Node]] = {}
    nodes = topological(outputs)
    for node in nodes:
        if node.op is not ops.linear:
            continue
        x, w, bias, norm, residual = node.args
        plain = dict(node.params) == {"norm_eps": 0.0, "glu": "none", "softcap": 0.0}
        if len(w) == 1 and plain and norm is None and residual is None and w[0].node.kind == "constant":
            groups.setdefault((id(x.node), x.index, bias is None, _file_of(w[0])), []).append(node)
    member = {id(n): g for g in groups.values() if 2 <= len(g) <= 4 for n in g}
    merged: dict[int, tuple[Tensor, ...]] = {}

    def rule(node: Node, args: tuple[Any, ...]) -> Sequence[Tensor] | None:
        group = member.get(id(node))
        if group is None:
            return None
        if id(group) not in merged:
            w = [n.args[1][0] for n in group]
            bias = None if args[2] is None else [n.args[2][0] for n in group]
            merged[id(group)] = make(ops.linear, (args[0], tuple(w), bias and tuple(bias), None, None), dict(node.params))
        i = next(i for i, n in enumerate(group) if n is node)
        return (merged[id(group)][i],)

    return rebuild(outputs, rule, nodes=nodes)


def fold_norm(outputs: list[Tensor]) -> list[Tensor]:
    """Fold an RMS norm that only one product reads into that product."""
    nodes = topological(outputs)
    read = users(nodes)
    kept = {(id(t.node), t.index) for t in outputs}

    def rule(node: Node, args: tuple[Any, ...]) -> Sequence[Tensor] | None:
        old = node.args[0] if node.op is ops.linear else None
        if not _is(old, ops.rms_norm) or node.args[3] is not None or len(read[id(old.node), 0]) != 1:
            return None
        if (id(old.node), 0) in kept or not _is(args[0], ops.rms_norm):
            return None
        x, weight, residual = args[0].node.args
        if weight is None or residual is not None:
            return None
        params = dict(node.params) | {"norm_eps": dict(args[0].node.params)["eps"]}
        return make(ops.linear, (x, args[1], args[2], weight, args[4]), params)

    return rebuild(outputs, rule, nodes=nodes)


_GLU = frozenset(ops.linear.params["glu"].choices) - {"none"}


def fold_glu(outputs: list[Tensor]) -> list[Tensor]:
    """Fold activation(gate) * up, both from one product, into that product."""
    nodes = topological(outputs)
    read = users(nodes)

    def rule(node: Node, args: tuple[Any, ...]) -> Sequence[Tensor] | None:
        if node.op is not ops.binary or dict(node.params)["kind"] != "mul":
            return None
        for act, up, old_act, old_up in ((*args, *node.args), (args[1], args[0], node.args[1], node.args[0])):
            if not _is(act, ops.unary) or dict(act.node.params)["kind"] not in _GLU:
                continue
            gate, old_gate = act.node.args[0], old_act.node.args[0]
            if not (_is(gate, ops.linear) and _is(up, ops.linear) and gate.node is up.node):
                continue
            if (gate.index, up.index) != (0, 1) or len(gate.node.outputs) != 2 or gate.shape != up.shape:
                continue
            once = all(len(read[id(t.node), t.index]) == 1 for t in (old_act, old_gate, old_up))
            if once and gate.node.args[4] is None and dict(gate.node.params)["softcap"] == 0.0:
                return make(ops.linear, gate.node.args, dict(gate.node.params) | {"glu": dict(act.node.params)["kind"]})
        return None

    return rebuild(outputs, rule, nodes=nodes)


def fold_residual(outputs: list[Tensor]) -> list[Tensor]:
    """Fold y + residual into the product, the RMS norm or the sum over experts that makes y."""
    nodes = topological(outputs)
    read = users(nodes)

    def rule(node: Node, args: tuple[Any, ...]) -> Sequence[Tensor] | None:
        if node.op is not ops.binary or dict(node.params)["kind"] != "add":
            return None
        for y, other, old in ((args[0], args[1], node.args[0]), (args[1], args[0], node.args[1])):
            if len(read[id(old.node), old.index]) != 1 or y.shape != other.shape:
                continue
            p = dict(y.node.params)
            if _is(y, ops.linear) and len(y.node.args[1]) == 1 and y.node.args[4] is None and p["softcap"] == 0.0:
                if p["glu"] == "none":
                    return make(ops.linear, (*y.node.args[:4], other), p)
            if _is(y, ops.rms_norm) and y.node.args[2] is None:
                return make(ops.rms_norm, (*y.node.args[:2], other), p)
            if _is(y, ops.sum_experts) and y.node.args[2] is None:
                return make(ops.sum_experts, (*y.node.args[:2], other), p)
        return None

    return rebuild(outputs, rule, nodes=nodes)


def fold_softcap(outputs: list[Tensor]) -> list[Tensor]:
    """Fold a soft cap of a product's only result into the product."""
    nodes = topological(outputs)
    read = users(nodes)

    def rule(node: Node, args: tuple[Any, ...]) -> Sequence[Tensor] | None:
        if node.op is not ops.softcap or not _is(args[0], ops.linear) or len(args[0].node.outputs) != 1:
            return None
        old, y = node.args[0], args[0]
        if len(read[id(old.node), old.index]) != 1 or dict(y.node.params)["softcap"] != 0.0:
            return None
        return make(ops.linear, y.node.args, dict(y.node.params) | {"softcap": dict(node.params)["cap"]})

    return rebuild(outputs, rule, nodes=nodes)


def fold_rope_append(outputs: list[Tensor]) -> list[Tensor]:
    """Fuse q/k-norm, rotation of q and k, and both cache writes before an attention into one node."""
    nodes = topological(outputs)
    read = users(nodes)

    def once(t: Tensor) -> bool:
        return sum(node.op is not ops.key_sums for node in read[id(t.node), t.index]) == 1

    def before_rope(turned: Tensor, old: Tensor) -> tuple[Tensor, Tensor | None, float | None]:
        """Return what a rope rotates: (tensor before q/k-norm, norm weight, eps)."""
        x, old_x = turned.node.args[0], old.node.args[0]
        if _is(x, ops.rms_norm) and once(old_x) and x.node.args[1] is not None and x.node.args[2] is None:
            return x.node.args[0], x.node.args[1], dict(x.node.params)["eps"]
        return x, None, None

    def rule(node: Node, args: tuple[Any, ...]) -> Sequence[Tensor] | None:
        if node.op is ops.key_sums:                              # it reads what the attention reads whose stats it takes
            of = ops.key_sums.argument(args, "stats").node
            changed = of.op is ops.attention and of.args[:2] != args[1:3]
            return make(ops.key_sums, (args[0], *of.args[:2], *args[3:]), dict(node.params)) if changed else None
        if node.op is not ops.attention:
            return None
        (q, k, v), (old_q, old_k, old_v) = args[:3], node.args[:3]
        if not (_is(q, ops.rope) and _is(k, ops.cache_append) and _is(v, ops.cache_append)):
            return None
        (k_cache, k_turned, cells, k_offset), (v_cache, v_new, v_cells, v_offset) = k.node.args, v.node.args
        if not (_is(k_turned, ops.rope) and cells is v_cells and v_offset is None and all(map(once, (old_q, old_k, old_v, old_k.node.args[1])))):
            return None
        table = q.node.args[1]
        if table is not k_turned.node.args[1] or q.node.params != k_turned.node.params:
            return None
        q0, q_norm, q_eps = before_rope(q, old_q)
        k0, k_norm, k_eps = before_rope(k_turned, old_k.node.args[1])
        if q_eps is not None and k_eps is not None and q_eps != k_eps:
            return None
        q, k, v = make(ops.rope_append, (q0, k0, v_new, table, k_cache, v_cache, cells, q_norm, k_norm, k_offset),
                       dict(q.node.params) | {"eps": q_eps or k_eps or 0.0})
        return make(ops.attention, (q, k, v, *args[3:]), dict(node.params))

    return rebuild(outputs, rule, nodes=nodes)


def fold_key_sums(outputs: list[Tensor]) -> list[Tensor]:
    """Sum what keys get where attention computes it, in one pass over the keys."""
    nodes = topological(outputs)
    read = users(nodes)

    def summing(node: Node) -> Node | None:
        """Return the node that sums an attention's probabilities, if it is all that reads the stats, and can be done beside."""
        if node.op is not ops.attention or len(node.outputs) < 2 or node.args[8] is not None:
            return None
        readers = read.get((id(node), 1), [])
        if len(readers) != 1 or readers[0].op is not ops.key_sums or SUMS.index("entropy") in dict(readers[0].params)["kinds"]:
            return None
        sums, weights = (ops.key_sums.argument(readers[0].args, name) for name in ("sums", "weights"))
        return readers[0] if sums.node.op is None and weights.node.op is None else None

    def rule(node: Node, args: tuple[Any, ...]) -> Sequence[Tensor] | None:
        if node.op is ops.key_sums and _is(stats := ops.key_sums.argument(args, "stats"), ops.attention_sums):
            return (stats,)                                  # its second result, in the place of attention's
        summed = summing(node)
        if summed is None:
            return None
        sums, weights = (ops.key_sums.argument(summed.args, name) for name in ("sums", "weights"))
        params = dict(summed.params)
        return make(ops.attention_sums, (*args[:8], sums, weights), {name: params[name] for name in ("scale", "softcap", "kinds")})

    return rebuild(outputs, rule, nodes=nodes)


class Fusion(NamedTuple):
    """A pass, and the ops that it writes: a backend without a kernel of one of them runs the graph unfused instead."""

    rewrite: Pass
    needs: frozenset[str] = frozenset()


def _fusion(rewrite: Pass, *needs: Any) -> Fusion:
    return Fusion(rewrite, frozenset(op.name for op in needs))


PASSES: dict[str, Fusion] = {
    "share": _fusion(share),
    "merge_products": _fusion(merge_products, ops.linear),
    "fold_norm": _fusion(fold_norm, ops.linear),
    "fold_glu": _fusion(fold_glu, ops.linear),
    "fold_residual": _fusion(fold_residual, ops.linear, ops.rms_norm, ops.sum_experts),
    "fold_softcap": _fusion(fold_softcap, ops.linear),
    "fold_rope_append": _fusion(fold_rope_append, ops.rope_append),
    "fold_key_sums": _fusion(fold_key_sums, ops.attention_sums),
}


def apply(outputs: Sequence[Tensor], names: Sequence[str] | None = None, kernels: frozenset[str] | None = None) -> list[Tensor]:
    """Run passes in the order of PASSES; `names` picks some. kernels: ops that the backend has; None: all."""
    result = list(outputs)
    for name, fusion in PASSES.items():
        if (names is None or name in names) and (kernels is None or fusion.needs <= kernels):
            result = fusion.rewrite(result)
    return result
