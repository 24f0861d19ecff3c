"""Rows that nobody asked for are not computed: graphs drawn before and after, and their results against computing all rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine import ops
from pyengine.backends.reference import Backend
from pyengine.compiler.wanted import only
from pyengine.graph.graph import Graph, topological
from pyengine.graph.tensor import Dim, Tensor

M, W, K = 12, 12, 8


def randn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


class Drawn(Graph):
    """A graph with rows m, of which w are wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.m, self.w = Dim("m", M), Dim("w", W)
        self.wanted = self.input("wanted", (self.w,), "I32")
        self.chosen: dict[str, Tensor] = {}

    def rows(self, name: str, *rest: int) -> Tensor:
        """An input [m, *rest]."""
        return self.input(name, (self.m, *rest))

    def numbers(self, name: str, chosen: bool = True) -> Tensor:
        """An int32 input [m]; with `chosen`, the wanted rows' values are an input too."""
        if chosen:
            self.chosen[name] = self.input(f"{name}_wanted", (self.w,), "I32")
        return self.input(name, (self.m,), "I32")

    def pick(self, x: Tensor) -> Tensor:
        return ops.rows(x, self.wanted)

    def only(self, *outputs: Tensor) -> list[Tensor]:
        return only(outputs, self.wanted, self.chosen)


def draw(outputs: list[Tensor]) -> str:
    """The ops in order, each with the axes of its results: "linear w 8"."""
    return ", ".join(f"{n.op.name} {' '.join(map(str, n.outputs[0].shape))}" for n in topological(outputs) if n.op is not None)


def linear(x: Tensor, n: int = K, seed: int = 0) -> Tensor:
    return ops.linear(x, [randn(n, int(x.shape[1]), seed=seed)])[0]


def same(g: Drawn, outputs: list[Tensor], m: int, wanted: list[int], **more: np.ndarray) -> None:
    """Results of the rewritten graph are those of the original one."""
    narrow, picked = only(outputs, g.wanted, g.chosen), np.array(wanted, np.int32)
    for t in topological(outputs) + topological(narrow):
        if t.kind == "input" and t.name not in more and t.name != "wanted":
            shape = [m if isinstance(a, Dim) else a for a in t.outputs[0].shape]
            more.setdefault(t.name, randn(*shape, seed=len(t.name)))
    given_ = {**more, "wanted": picked, **{f"{n}_wanted": more[n][picked] for n in g.chosen if n in more}}

    def run(graph: list[Tensor]) -> list[np.ndarray]:
        names = {n.name for n in topological(graph) if n.kind == "input"}
        return Backend(dtype=np.float64).compile(graph, passes=[]).run(**{n: a for n, a in given_.items() if n in names})

    for got, want, t in zip(run(narrow), run(outputs), narrow):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10, err_msg=repr(t))


# -- drawn ----------------------------------------------------------------------------------------------------------------


def test_nothing_chosen_is_the_graph_itself() -> None:
    g = Drawn()
    x = linear(g.rows("x", K))
    y = ops.softmax(x)
    assert [id(t) for t in g.only(x, y)] == [id(x), id(y)]
    other = ops.rows(x, g.input("other", (g.w,), "I32"))     # another choice than the one that is asked about
    assert g.only(other)[0] is other
    scaled = ops.rows(x, g.wanted, scale=2.0)                # and one that does something besides
    assert g.only(scaled)[0] is scaled


def test_a_choice_moves_up_through_what_works_row_by_row() -> None:
    g = Drawn()
    y = ops.silu(linear(ops.rms_norm(g.rows("x", K), eps=1e-5)))
    out = [linear(g.pick(y), 5)]
    assert draw(out) == "rms_norm m 8, linear m 8, unary m 8, rows w 8, linear w 5"
    assert draw(g.only(*out)) == "rows w 8, rms_norm w 8, linear w 8, unary w 8, linear w 5"
    same(g, out, 7, [6, 0, 0, 3])


def test_a_residual_is_picked_once_above_both_ways() -> None:
    g = Drawn()
    x = linear(g.rows("x", K))
    y = x
    for seed in range(2):
        y = y + linear(ops.rms_norm(y, eps=1e-5), seed=seed)
    out = [g.pick(y)]
    assert "m" not in draw(g.only(*out)).replace("rms_norm", "").replace("unary", "")
    assert draw(g.only(*out)).count("rows") == 1
    same(g, out, 9, [8, 1])


def test_a_norm_is_computed_again_and_a_product_is_not() -> None:
    """All rows' keys need the norm of all rows; the feed-forward behind it is done on the wanted ones."""
    g = Drawn()
    x = ops.softmax(g.rows("x", K))                          # not done row by row: the border
    h = ops.rms_norm(x, eps=1e-5)
    out = [linear(h, 3), g.pick(x + linear(h))]
    assert draw(g.only(*out)) == "softmax m 8, rms_norm m 8, linear m 3, rows w 8, rms_norm w 8, linear w 8, binary w 8"
    dear = linear(h)                                         # read as a whole and by row: picked behind, not computed twice
    out = [dear, g.pick(ops.silu(dear))]
    assert draw(g.only(*out)) == "softmax m 8, rms_norm m 8, linear m 8, rows w 8, unary w 8"
    same(g, out, 6, [5, 2])


def attention(g: Drawn, chosen: bool = True) -> Tensor:
    x = g.rows("x", K)
    k, v = (linear(x, 4, seed).reshape(-1, 1, 4) for seed in (1, 2))
    q = linear(ops.rms_norm(x, eps=1e-5)).reshape(-1, 2, 4)
    cells = g.input("cells", (g.m,), "I32")
    lo, hi, seq = (g.numbers(name, chosen) for name in ("lo", "hi", "seq"))
    table = g.table("table", (1, M))
    k, v = (ops.cache_append(g.state(n, (1, M, 4)), t, cells) for n, t in (("k", k), ("v", v)))
    return x + linear(ops.attention(q, k, v, lo, hi, table, seq, scale=0.5))


def test_attention_is_for_the_wanted_queries_over_the_keys_of_all_rows() -> None:
    g = Drawn()
    text = draw(g.only(g.pick(attention(g))))
    assert "attention w 8" in text and "cache_append 1 12 4" in text and "linear m 4" in text and "linear w 8" in text
    g = Drawn()
    names = {n.name for n in topological(g.only(g.pick(attention(g)))) if n.kind == "input"}
    assert {"lo_wanted", "hi_wanted", "seq_wanted", "cells"} <= names and not {"lo", "hi", "seq"} & names
    i = np.arange(9, dtype=np.int32)
    g = Drawn()
    same(g, [g.pick(attention(g))], 9, [8, 0, 4], cells=i, lo=np.maximum(i - 3, 0), hi=i + 1, seq=0 * i)


def test_numbers_that_nobody_chose_keep_attention_whole() -> None:
    """There is no choosing among int32 rows in a graph: without the inputs for it, attention is computed for all rows."""
    g = Drawn()
    text = draw(g.only(g.pick(attention(g, chosen=False))))
    assert "attention m 8" in text and "linear w 8" in text and "binary w 8" in text
    i = np.arange(5, dtype=np.int32)
    g = Drawn()
    same(g, [g.pick(attention(g, chosen=False))], 5, [4, 4, 1], cells=i, lo=0 * i, hi=i + 1, seq=0 * i)


def mixture(x: Tensor, used: int, scale_input: bool) -> tuple[Tensor, Tensor]:
    chosen, gates = ops.top_experts(linear(x, 5, 4), n_used=used, gate="softmax", normed=True)
    w = [randn(5, 6, K, seed=i) for i in range(2)], randn(5, K, 6, seed=3)
    h = (x.reshape(-1, 1, K) * gates.reshape(-1, used, 1)).reshape(-1, K) if scale_input else x
    y = ops.expert_linear(ops.expert_linear(h, w[0], chosen, glu="silu"), [w[1]], chosen)
    return ops.sum_experts(y, None if scale_input else gates, n_used=used), chosen


@pytest.mark.parametrize("scale_input", [False, True])
@pytest.mark.parametrize("used", [1, 3])
def test_mixtures_have_several_rows_for_one(used: int, scale_input: bool) -> None:
    g = Drawn()
    x = ops.softmax(g.rows("x", K))
    y, _ = mixture(ops.rms_norm(x, eps=1e-5), used, scale_input)
    out = [g.pick(x + y)]
    text = draw(g.only(*out))
    assert f"expert_linear {'' if used == 1 else '3*'}w 6" in text and "m" not in text.replace("softmax m 8", "").replace("sum", "").replace(
        "rms_norm", "").replace("softmax", "")
    same(g, out, 7, [6, 6, 2])


def test_experts_that_are_asked_for_by_all_rows_too() -> None:
    """Numbers of experts cannot be picked: they are chosen again from the wanted rows' scores."""
    g = Drawn()
    y, chosen = mixture(ops.softmax(g.rows("x", K)), 2, False)
    out = [chosen, g.pick(y)]
    text = draw(g.only(*out))
    assert "top_experts m 2" in text and "top_experts w 2" in text and "expert_linear 2*w 6" in text
    same(g, out, 5, [4, 0])


def test_borders_of_three_and_of_one_axes() -> None:
    g = Drawn()
    x = ops.contiguous(ops.transpose(g.rows("x", 3, 4), axes=(0, 2, 1)))
    out = [g.pick(ops.rms_norm(x, eps=1e-5).reshape(-1, 12))]
    assert draw(g.only(*out)) == "transpose m 4 3, contiguous m 4 3, reshape m 12, rows w 12, reshape w 4 3, rms_norm w 4 3, reshape w 12"
    same(g, out, 6, [3, 5])
    g = Drawn()
    warm = ops.temperature(g.input("p", (1, g.m), "I32"), floor=2, scale=0.5)
    out = [g.pick((g.rows("x", K) * warm.reshape(-1, 1)))]
    assert "temperature m" in draw(g.only(*out)) and "binary w 8" in draw(g.only(*out))
    same(g, out, 6, [3, 5], p=np.arange(6, dtype=np.int32)[None])
    g = Drawn()                                              # a border with several rows for one
    x = ops.softmax(g.rows("x", K).reshape(-1, 4))
    out = [g.pick(ops.silu(x).reshape(-1, K))]
    assert "unary 2*w 4" in draw(g.only(*out))
    same(g, out, 6, [0, 5])


def test_a_transposed_border_is_copied_when_it_is_laid_out() -> None:
    g = Drawn()
    turned = ops.transpose(ops.softmax(g.input("x", (3, g.m, 4))), axes=(1, 0, 2))
    out = [g.pick(ops.silu(turned).reshape(-1, 12))]
    same(g, out, 6, [0, 5])
    from pyengine.backends.cpu import Backend as Cpu

    x, wanted = randn(3, 6, 4), np.array([5, 1], np.int32)
    got = Cpu(n_threads=1).compile(g.only(*out), single=True).run(x=x, wanted=wanted)
    want = Backend(dtype=np.float64).compile(out, single=True).run(x=x, wanted=wanted)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_choice_among_parts_of_rows_is_left_alone() -> None:
    """Rows of x.reshape(2 m, 4) are halves: numbers of `wanted` mean other rows there."""
    g = Drawn()
    out = [g.pick(linear(g.rows("x", K)).reshape(-1, 4))]
    assert draw(g.only(*out)) == draw(out)
    same(g, out, 4, [7, 0])


def test_rows_that_come_from_another_axis_are_no_rows() -> None:
    g = Drawn()
    flat = ops.contiguous(g.input("x", (2, g.m, K))).reshape(-1, K)            # [2 m, K]: all of one, then all of the other
    mixed = ops.silu(flat).reshape(-1, 2 * K)                                  # [m, 2 K], in which rows have been mixed
    out = [g.pick(ops.silu(mixed))]
    same(g, out, 6, [5, 2])
    g = Drawn()
    pairs = ops.sub(g.rows("x", 1), g.rows("y"))             # [m, m]: the second axis is not cut
    out = [g.pick(ops.silu(pairs))]
    same(g, out, 6, [5, 2])


def test_several_choices_and_other_outputs() -> None:
    g = Drawn()
    x = linear(g.rows("x", K))
    a, b = ops.silu(x), linear(x, 4)
    out = [g.pick(a), ops.softmax(g.pick(b)), b, g.pick(g.rows("z", 3))]
    text = draw(g.only(*out))
    assert "unary w 8" in text and "linear m 4" in text and "unary m" not in text
    same(g, out, 8, [7, 7, 0])


@pytest.mark.parametrize("wanted", [[], [0], [3, 3, 3], list(range(5))])
def test_any_number_of_rows(wanted: list[int]) -> None:
    g = Drawn()
    x = g.rows("x", K)
    same(g, [g.pick(x + linear(ops.rms_norm(x, eps=1e-5)))], 5, wanted)


# -- random graphs --------------------------------------------------------------------------------------------------------

Picture = list[tuple[str, int, int]]
STEPS = ("norm", "layer norm", "linear", "two", "silu", "scale", "add", "mul", "halves", "heads", "softmax", "mixture", "broadcast", "rope", "row")


def grown(g: Drawn, plan: Picture) -> list[Tensor]:
    """Tensors [m, K], each made from earlier ones by a step of the plan."""
    made = [g.rows("x", K)]
    table = ops.rope_table(g.input("p", (1, g.m), "I32"), np.array([1.0, 0.1], np.float32))
    for kind, i, j in plan:
        x, y = made[i % len(made)], made[j % len(made)]
        new: Any = {
            "norm": lambda: ops.rms_norm(x, randn(K, seed=i), eps=1e-5), "layer norm": lambda: ops.layer_norm(x, eps=1e-5),
            "linear": lambda: linear(x, seed=i), "two": lambda: ops.linear(x, [randn(K, K, seed=i), randn(3, K, seed=j)])[0],
            "silu": lambda: ops.silu(x), "scale": lambda: ops.scale(x, factor=0.5), "add": lambda: x + y, "mul": lambda: x * ops.sigmoid(y),
            "halves": lambda: ops.silu(x.reshape(-1, 4)).reshape(-1, K), "heads": lambda: ops.rms_norm(x.reshape(-1, 2, 4), eps=1e-5).reshape(-1, K),
            "softmax": lambda: ops.softmax(x), "mixture": lambda: mixture(x, 1 + j % 3, bool(i % 2))[0],
            "broadcast": lambda: x * ops.reduce(y, kind="mean").reshape(-1, 1), "rope": lambda: ops.rope(x.reshape(-1, 2, 4), table).reshape(-1, K),
            "row": lambda: x + randn(1, K, seed=i),
        }[kind]()
        made.append(new)
    return made


@settings(max_examples=120, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=9), st.data())
def test_results_are_those_of_all_rows(plan: Picture, data: Any) -> None:
    g = Drawn()
    made = grown(g, plan)
    m = data.draw(st.integers(1, 6))
    wanted = data.draw(st.lists(st.integers(0, m - 1), max_size=6))
    picks = [g.pick(t) for t in data.draw(st.lists(st.sampled_from(made), min_size=1, max_size=3))]
    others = data.draw(st.lists(st.sampled_from(made[1:]), max_size=2))
    same(g, [*picks, *others], m, wanted, p=np.arange(m, dtype=np.int32)[None])
