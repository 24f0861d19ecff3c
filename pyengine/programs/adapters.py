"""LoRA in a step's graph: where an adapter changes W, the product x W^T becomes x W^T + (s * x A^T) B^T. W stays as it is.

    s   float32 [m, r], by rows of the step: each conversation's scales, times alpha / r
    A   [r, n_in], B [n_out, r]: of several adapters one below the other, and beside each other

Experts have two matrices each, and so products of their own. An embedding's A is a table of low rows: e[id] becomes e[id] + (s * A[id]) B^T.
So rows of one step may have different adapters: where a row's scale is 0 it gets the bits that it gets without that adapter. Nothing of
it is in a graph without adapters, and models do not know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from pyengine import ops
from pyengine.compiler.rewrite import rebuild
from pyengine.dtype import dtype as dtype_of
from pyengine.errors import UnsupportedModelError
from pyengine.files.adapters import Adapter, EMBEDDING, Pair
from pyengine.files.gguf import quoted
from pyengine.files.weights import DerivedRef, WeightRef
from pyengine.graph.op import as_tensor
from pyengine.graph.tensor import Dim, Node, Tensor
from pyengine.nn.layers import constant


def adapted(outputs: Sequence[Tensor], adapters: Sequence[Adapter], scales: Mapping[str, Tensor], absent: Collection[str] = ()) -> list[Tensor]:
    """Add the adapters' products to those of a graph.

    scales   by the name of an axis of rows: the scales of its rows [rows, adapters]
    absent   what names of weights begin with that are in no graph of these sizes
    Raises: UnsupportedModelError for a weight that is no factor of a product of rows.
    """
    found = _Adapting(adapters, scales)
    made = rebuild(outputs, found.rule)
    for adapter in adapters:
        for name, pair in adapter.pairs.items():
            if name not in found.changed and not name.startswith(tuple(absent)):
                raise UnsupportedModelError(f"{adapter.file.path}: tensor {quoted(pair.a.name)}: {quoted(name)} is not multiplied by rows of a step "
                                            "in this architecture, so it takes no adapter here")
    return made


# of each kind of product: the weights, and what has the rows of the step
_WEIGHTS: dict[Any, Callable[[tuple[Any, ...]], tuple[Sequence[Tensor], Tensor]]] = {
    ops.linear: lambda args: (args[1], args[0]), ops.expert_linear: lambda args: (args[1], args[2]), ops.rows: lambda args: ((args[0],), args[1])}


class _Adapting:
    """One rewriting. changed: the names of the weights whose products have changed."""

    def __init__(self, adapters: Sequence[Adapter], scales: Mapping[str, Tensor]):
        self.adapters, self.scales, self.changed = adapters, scales, set()
        self._spread: dict[Any, Tensor] = {}

    def rule(self, node: Node, args: tuple[Any, ...]) -> Sequence[Tensor] | None:
        """Return what a product of rows becomes; None for one that no adapter changes."""
        weights, of_rows = _WEIGHTS[node.op](args) if node.op in _WEIGHTS else ((), None)
        pairs = [self._pairs(w, embeds=node.op is ops.rows) for w in weights]
        axis = of_rows.shape[0] if any(pairs) else None
        if not isinstance(axis, Dim) or axis.scale != 1 or axis.name not in self.scales:
            return None
        self.changed.update(w.node.source.name for w, own in zip(weights, pairs) if own)
        if node.op is ops.rows:
            return [self._embedded(node, args, axis.name, pairs[0])]
        if node.op is ops.expert_linear:
            return [self._experts(node, args, axis.name, pairs)]
        outputs = node.outputs if args is node.args else node.with_args(args).outputs
        return [y if not own else y + self._low(args[0], axis.name, own) for y, own in zip(outputs, pairs)]

    def _pairs(self, w: Tensor, embeds: bool) -> list[tuple[int, Pair]]:
        """Return the numbers of the adapters that change a weight, with their matrices; of a part of a matrix, those rows.

        embeds  rows of it are looked up: an embedding's adapters change these, not the products of an output head that is the same matrix
        """
        ref = w.node.source
        if not isinstance(ref, WeightRef) or embeds is not (ref.name == EMBEDDING):
            return []
        found = []
        for i, adapter in enumerate(self.adapters):
            if (pair := adapter.pairs.get(ref.name)) is not None:
                whole = embeds or len(ref.shape) == 3
                found.append((i, pair if whole else pair._replace(b=pair.b.rows(ref.first // ref.shape[1], ref.shape[0]))))
        return found

    def _embedded(self, node: Node, args: tuple[Any, ...], axis: str, pairs: list[tuple[int, Pair]]) -> Tensor:
        """Add low rows to those of an embedding [m, D]; rows of pictures get none."""
        _, ids, media = args
        a, b = (constant(_joined([getattr(p, name) for _, p in pairs], 1)) for name in ("a", "b"))
        if media is not None:
            if a.shape[1] > media.shape[1]:
                raise UnsupportedModelError(f"{self.adapters[pairs[0][0]].file.path}: {quoted(EMBEDDING)}: adapters of a rank of {a.shape[1]}, above "
                                            f"{media.shape[1]}, are not supported")
            media = ops.scale(ops.contiguous(ops.slice(media, axis=1, start=0, stop=a.shape[1])), factor=0.0)
        low = ops.rows(a, ids, media) * self._scales(axis, pairs)                              # [m, r]
        y = node.outputs[0] if args is node.args else node.with_args(args).outputs[0]
        return y + ops.scale(ops.linear(low, [b])[0], factor=dict(node.params)["scale"])

    def _experts(self, node: Node, args: tuple[Any, ...], axis: str, pairs: list[list[tuple[int, Pair]]]) -> Tensor:
        """Add the low products of each row's experts, before the gate is applied to the second product."""
        x, weights, chosen = args
        used, made = chosen.shape[1], []
        for w, own in zip(weights, pairs):
            y = ops.expert_linear(x, [w], chosen)                                              # [m u, n]
            if own:
                a = constant(_joined([p.a for _, p in own], 1))
                b = constant(_joined([p.b for _, p in own], 2))
                low = ops.expert_linear(x, [a], chosen).reshape(-1, used, a.shape[1])          # [m, u, r]
                low = (low * self._scales(axis, own).reshape(-1, 1, a.shape[1])).reshape(-1, a.shape[1])
                y = y + ops.expert_linear(low, [b], chosen)
            made.append(y)
        glu = dict(node.params)["glu"]
        return made[0] if glu == "none" else ops.unary(made[0], kind=glu) * made[1]

    def _low(self, x: Tensor, axis: str, pairs: list[tuple[int, Pair]]) -> Tensor:             # [m, n_in] -> [m, n_out]
        a = constant(_joined([p.a for _, p in pairs], 0))
        b = constant(_joined([p.b for _, p in pairs], 1))
        return ops.linear(ops.linear(x, [a])[0] * self._scales(axis, pairs), [b])[0]

    def _scales(self, axis: str, pairs: list[tuple[int, Pair]]) -> Tensor:
        """Return the scales of rows [m, r], one for each of the low matrices' ranks; made once for all weights of the same ranks."""
        key = axis, tuple((i, p.rank, p.factor) for i, p in pairs)
        if key not in self._spread:
            spread = np.zeros((sum(p.rank for _, p in pairs), len(self.adapters)), np.float32)
            first = 0
            for i, p in pairs:
                spread[first : first + p.rank, i] = p.factor
                first += p.rank
            self._spread[key] = ops.linear(self.scales[axis], [as_tensor(spread)])[0]
        return self._spread[key]


def _joined(refs: list[WeightRef], axis: int) -> WeightRef | DerivedRef:
    """Return matrices of several adapters as one, in their format if they have the same; a single one is read where it lies."""
    if len(refs) == 1:
        return refs[0]
    shape = [*refs[0].shape]
    shape[axis] = sum(r.shape[axis] for r in refs)
    formats = {r.dtype for r in refs}
    join: Callable[..., np.ndarray] = partial(_concatenate, axis)
    same = len(formats) == 1 and len(shape) == 2
    return DerivedRef(refs[0].name, tuple(shape), tuple(refs), join, formats.pop() if same else dtype_of("F32"))


def _concatenate(axis: int, *parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts, axis)
