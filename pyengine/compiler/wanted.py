"""Rows that nobody asked for are not computed: a choice of rows at a graph's end moves up as far as it can.

A model writes its graph for all rows of a step. Where only some of the last layer's are wanted, everything that works row by row is
done on those alone: the last feed-forward, the last attention's queries, its output. Keys and values of all rows are still written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyengine import ops
from pyengine.compiler.rewrite import make
from pyengine.graph.graph import topological
from pyengine.graph.tensor import Axis, Dim, Node, Tensor

ALL, SOME = 1, 2                         # which rows of a node are needed; both bits where some readers want all


def only(outputs: Sequence[Tensor], wanted: Tensor, chosen: Mapping[str, Tensor]) -> list[Tensor]:
    """Rewrite a graph so that what `ops.rows(x, wanted)` reads is computed for those rows only, and equal ones come out.

    wanted   input I32 [w]: numbers of rows; chosen: of inputs with a value a row, by name, the input with the wanted rows' values
    """
    nodes = topological(outputs)
    picks = [n for n in nodes if n.op is ops.rows and n.args[1] is wanted and n.args[2] is None and dict(n.params)["scale"] == 1.0]
    axes = {n.args[0].shape[0] for n in picks}
    axis = axes.pop() if len(axes) == 1 else None
    if not isinstance(axis, Dim) or axis.scale != 1:         # nothing is chosen, or not whole rows of one kind
        return list(outputs)
    return _Narrowing(nodes, {id(n) for n in picks}, axis.name, wanted, chosen).of(outputs)


class _Narrowing:
    """One rewriting: rows along the axis `name` give way to those of `wanted`."""

    def __init__(self, nodes: list[Node], picks: set[int], name: str, wanted: Tensor, chosen: Mapping[str, Tensor]):
        self.nodes, self.picks, self.name, self.wanted, self.chosen = nodes, picks, name, wanted, chosen
        self.whole: dict[tuple[int, int], Tensor] = {}       # tensors with all rows, rebuilt
        self.narrow: dict[tuple[int, int], Tensor] = {}      # and with the wanted ones
        self.needs: dict[int, int] = {}

    def of(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of the rewritten graph."""
        for t in outputs:
            self.needs[id(t.node)] = ALL
        for node in reversed(self.nodes):
            need = self.needs.setdefault(id(node), 0)
            if id(node) in self.picks:
                self._need(node.args[0].node, SOME)
                self._need(node.args[1].node, ALL)
                continue
            moves = self._moves(node)
            for t in node.inputs:
                if need & ALL or not moves or not self._has_rows(t):
                    self._need(t.node, ALL)
                if moves and self._has_rows(t):
                    self._need(t.node, SOME)
        for node in self.nodes:
            if node.op is not None:
                self._rebuild(node)
        return [self._whole(t) for t in outputs]

    def _need(self, node: Node, which: int) -> None:
        self.needs[id(node)] = self.needs.get(id(node), 0) | which

    def _has_rows(self, t: Tensor) -> bool:
        """Whether the first axis, and no other one, is that of the rows."""
        return bool(t.shape) and self._is_rows(t.shape[0]) and not any(map(self._is_rows, t.shape[1:]))

    def _is_rows(self, axis: Axis) -> bool:
        return isinstance(axis, Dim) and axis.name == self.name

    def _moves(self, node: Node) -> bool:
        """Whether the choice of rows moves above this node: it is done on the wanted rows, and on all where those are needed too.

        Numbers (int32) cannot be picked in a graph: they must be computed again, or be an input of their own.
        """
        need = self.needs[id(node)]
        if not need & SOME or node.op is None or not node.op.rowwise or not all(self._has_rows(t) for t in node.outputs):
            return False
        rows = [t for t in node.inputs if self._has_rows(t)]
        numbers = [t for t in rows if t.dtype.name == "I32"]
        given = all(t.name in self.chosen if t.node.op is None else t.node.op.rowwise for t in numbers)
        return bool(rows) and given and (not need & ALL or node.op.light or any(t.dtype.name == "I32" for t in node.outputs))

    def _whole(self, t: Tensor) -> Tensor:
        """A tensor with all its rows in the new graph; of a choice of rows, those."""
        return t if t.node.op is None else self.whole[id(t.node), t.index]

    def _rebuild(self, node: Node) -> None:
        """Make a node's new forms; those of its arguments are there."""
        if id(node) in self.picks:
            self.whole[id(node), 0] = self._narrow(node.args[0])
            return
        moves = self._moves(node)
        if moves:
            args = tuple(_each(a, lambda t: self._narrow(t) if self._has_rows(t) else self._whole(t)) for a in node.args)
            self.narrow.update({(id(node), t.index): t for t in make(node.op, args, dict(node.params))})
        if self.needs[id(node)] & ALL or not moves:
            args = tuple(_each(a, self._whole) for a in node.args)
            made = node.outputs if args == node.args else node.with_args(args).outputs
            self.whole.update({(id(node), t.index): t for t in made})

    def _narrow(self, t: Tensor) -> Tensor:
        """The wanted rows of a tensor: computed so, given as an input of their own, or picked."""
        key = id(t.node), t.index
        if key not in self.narrow:
            given = t.node.kind == "input" and t.name in self.chosen
            self.narrow[key] = self.chosen[t.name] if given else self._picked(self._whole(t))
        return self.narrow[key]

    def _picked(self, t: Tensor) -> Tensor:
        """The wanted rows of x [s m, ..], s of which belong to each row of the step."""
        times, rest = t.shape[0].scale, t.shape[1:]
        if times == 1 and len(rest) == 1:
            return ops.rows(t, self.wanted)
        return ops.rows(t.reshape(-1, times * math.prod(rest)), self.wanted).reshape(-1, *rest)


def _each(arg: Any, new: Callable[[Tensor], Tensor]) -> Any:
    """An argument of a node, each of its tensors replaced."""
    return tuple(new(t) for t in arg) if isinstance(arg, tuple) else None if arg is None else new(arg)
