"""The memory planner is pure: no two live tensors share bytes, views and in-place results share what they should."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import pyengine as pe
from pyengine import ops
from pyengine.compiler import passes
from pyengine.errors import GraphError
from pyengine.compiler.arena import contiguous_strides, Interval, lay_out, place
from pyengine.dtype import dtype
from pyengine.graph.tensor import Dim

intervals = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 10), st.integers(0, 5000)).map(lambda t: Interval(t[0], t[0] + t[1], t[2])),
    max_size=40,
)


@given(intervals)
def test_no_two_live_intervals_overlap(items: list[Interval]) -> None:
    offsets, total = place(items)
    for i, a in enumerate(items):
        assert offsets[i] % 64 == 0 and (a.size == 0 or offsets[i] + a.size <= total)
        for j in range(i):
            b = items[j]
            together = a.start <= b.end and b.start <= a.end and a.size and b.size
            assert not together or offsets[i] + a.size <= offsets[j] or offsets[j] + b.size <= offsets[i]


@given(intervals)
def test_total_is_at_least_the_peak_and_at_most_the_sum(items: list[Interval]) -> None:
    _, total = place(items)
    peak = max((sum(b.size for b in items if b.start <= t <= b.end) for t in range(45)), default=0)
    assert peak <= total <= sum(-(-i.size // 64) * 64 for i in items)


def test_strides_of_block_formats_and_run_time_axes() -> None:
    m = Dim("m", 8)
    assert contiguous_strides((3, 64), dtype("Q8_0")) == (68, 34)
    assert contiguous_strides((2, m, 4), dtype("F32")) == (m * 16, 16, 4)


def chain(n: int) -> tuple[pe.Graph, pe.Tensor]:
    g = pe.Graph()
    x = g.input("x", (4, 8))
    for i in range(n):
        x = ops.linear(x, [np.full((8, 8), 0.1 * (i + 1), np.float32)])[0]
    return g, x


def test_a_chain_needs_two_buffers_whatever_its_length() -> None:
    sizes = {n: lay_out([chain(n)[1]], lambda node: 0).arena_bytes for n in (4, 5, 20)}
    assert sizes[4] == sizes[5] == sizes[20] == 2 * 128


def test_in_place_results_share_memory_only_when_the_argument_dies() -> None:
    g = pe.Graph()
    x = ops.linear(g.input("x", (4, 8)), [np.eye(8, dtype=np.float32)])[0]
    y = ops.silu(x)
    layout = lay_out([y], lambda node: 0)
    assert layout.of(layout.outputs[0]).root is layout.of(layout.steps[0].outputs[0]).root
    kept = lay_out([y, x], lambda node: 0)
    assert kept.of(kept.outputs[0]).root is not kept.of(kept.outputs[1]).root


def test_a_residual_that_is_the_input_too_is_not_overwritten() -> None:
    g = pe.Graph()
    x = ops.scale(g.input("x", (4, 8)), factor=2.0)
    y = passes.apply([ops.linear(x, [np.eye(8, dtype=np.float32)])[0] + x])
    layout = lay_out(y, lambda node: 0)
    assert layout.steps[-1].op is ops.linear
    assert layout.of(layout.outputs[0]).root is not layout.of(layout.steps[0].outputs[0]).root


def test_views_cost_nothing_and_copies_appear_where_they_must() -> None:
    g = pe.Graph()
    x = g.input("x", (4, 6, 8))
    turned = ops.transpose(x, axes=(1, 0, 2))
    assert [n.op.name for n in lay_out([ops.silu(turned)], lambda node: 0).steps] == ["contiguous", "unary"]
    assert [n.op.name for n in lay_out([ops.matmul(turned, turned)], lambda node: 0).steps] == ["matmul"]
    assert [n.op.name for n in lay_out([turned], lambda node: 0).steps] == ["contiguous"]


def test_a_state_that_is_overwritten_cannot_be_read_in_its_old_form() -> None:
    g = pe.Graph()
    cache = g.state("cache", (2, 9, 8))
    k, cells = g.input("k", (3, 2, 8)), g.input("cells", (3,), "I32")
    new = ops.cache_append(cache, k, cells)
    assert lay_out([ops.reduce(new, kind="sum")], lambda node: 0).of(new).root is cache
    with pytest.raises(GraphError, match="changed in place"):
        lay_out([ops.reduce(new, kind="sum"), ops.reduce(cache, kind="sum")], lambda node: 0)
    with pytest.raises(GraphError, match="must be a state"):
        other = g.input("other", (2, 9, 8))
        lay_out([ops.reduce(ops.cache_append(other, k, cells), kind="sum")], lambda node: 0)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(3, 25))
def test_random_graphs_never_share_live_memory(seed: int, size: int) -> None:
    """Replay the plan on paper: a tensor's bytes must not be written between its step and its last reader."""
    rng = np.random.default_rng(seed)
    g = pe.Graph()
    made = [g.input("a", (4, 8)), g.input("b", (4, 8))]
    for _ in range(size):
        x, y = (made[i] for i in rng.integers(0, len(made), 2))
        made.append([lambda: ops.silu(x), lambda: x + y, lambda: ops.rms_norm(x, eps=1e-6),
                     lambda: ops.reshape(ops.reshape(x, shape=(8, 4)), shape=(4, 8)),
                     lambda: ops.linear(x, [np.eye(8, dtype=np.float32)])[0]][rng.integers(0, 5)]())
    layout = lay_out(made[-2:], lambda node: int(rng.integers(0, 200)))
    owner: dict[int, int] = {}                        # byte -> number of the value that it holds
    value_of: dict[tuple[int, int], int] = {}
    counter = 0

    def span(t):
        place_ = layout.of(t)
        start = layout.offsets[id(place_.root)] + place_.offset
        return range(start, start + t.nbytes_max)

    def value(t):
        """Number of the value that a tensor, or the tensor it is a view of, was given."""
        while t.node.op is not None and t.node.op.view:
            t = t.node.args[0]
        return value_of[id(t.node), t.index]

    for node in [*[n for n in layout.leaves if n.kind == "input"], *layout.steps]:
        for t in node.inputs if node.op else ():
            if t.node.kind != "constant":
                assert {owner[b] for b in span(t)} == {value(t)}, node
        if node.op:
            start, n = layout.scratch[layout.steps.index(node)]
            used = {b for t in (*node.inputs, *node.outputs) if t.node.kind != "constant" for b in span(t)}
            assert not used & set(range(start, start + n))
            for b in range(start, start + n):
                owner[b] = -1
        for t in node.outputs:
            counter += 1
            value_of[id(node), t.index] = counter
            for b in span(t):
                owner[b] = counter
    for t in layout.outputs:
        assert {owner[b] for b in span(t)} == {value(t)}
