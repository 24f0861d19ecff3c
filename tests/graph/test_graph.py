"""Ops as declarations, shape rules and their errors, graphs, passes, the null and reference backends."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import pyengine as pe
from pyengine import ops
from pyengine.compiler import codegen, passes
from pyengine.backends.cpu import Backend as Cpu
from pyengine.backends.reference import Backend as Reference
from pyengine.dtype import dtype
from pyengine.errors import GraphError, RequestError, ShapeError
from pyengine.compiler.listing import to_dot
from pyengine.graph.graph import topological
from pyengine.nn.cache import LayerCache
from pyengine.graph.op import REGISTRY
from pyengine.graph.tensor import Dim

rng = np.random.default_rng(7)


def randn(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def test_shape_errors_name_op_input_and_axis() -> None:
    g = pe.Graph()
    x = g.input("x", (4, 8))
    with pytest.raises(ShapeError, match=r"rms_norm: 'weight': axis 'd' is 7 here but 8 earlier"):
        ops.rms_norm(x, np.ones(7, np.float32), eps=1e-6)
    with pytest.raises(ShapeError, match=r"linear: 'w': axis 'k' is 9 here but 8 earlier"):
        ops.linear(x, [np.ones((3, 9), np.float32)])
    with pytest.raises(ShapeError, match=r"binary: axis -1 is 8 in the first argument but 5"):
        x + np.ones(5, np.float32)
    with pytest.raises(ShapeError, match=r"rows: 'ids': dtype is F32, but must be I32"):
        ops.rows(x, np.ones(3, np.float32))
    with pytest.raises(ShapeError, match="reshape: .* has 32 elements"):
        x.reshape(5, 7)
    with pytest.raises(ShapeError, match="'kind' is 'swish'"):
        ops.unary(x, kind="swish")
    with pytest.raises(TypeError, match="unexpected"):
        ops.softmax(x, axis=0)
    with pytest.raises(ShapeError, match="glu takes two weights"):
        ops.linear(x, [np.ones((3, 8), np.float32)], glu="silu")


def test_run_time_axes_keep_their_arithmetic() -> None:
    m = Dim("m", 16)
    g = pe.Graph()
    x = g.input("x", (m, 12))
    assert x.reshape(-1, 3, 4).shape == (m, 3, 4)
    assert x.reshape(-1, 4).shape == (m * 3, 4)
    assert x.reshape(-1, 4).reshape(-1, 12).shape == (m, 12)
    assert ops.linear(x, [np.ones((5, 12), np.float32)])[0].shape == (m, 5)
    with pytest.raises(ShapeError):
        x + g.input("y", (Dim("n", 16), 12))


def test_every_op_is_documented_has_cases_and_a_parameter_struct() -> None:
    for name, op in REGISTRY.items():
        assert op.__doc__ and op.__doc__.strip().split("\n")[0].endswith((".", ":")), name
        assert op.view or op.cases, name
        for case in op.cases:
            defaults = {p.name: p.default for p in op.params.values()}
            assert len(codegen.pack_params(op, defaults | case.params)) % 4 == 0


def mlp(g: pe.Graph) -> pe.Tensor:
    x = g.input("x", (Dim("m", 8), 16))
    gate, up, down = (np.ascontiguousarray(randn(*s)) for s in ((24, 16), (24, 16), (16, 24)))
    h = ops.rms_norm(x, randn(16), eps=1e-5)
    return x + ops.linear(ops.silu(ops.linear(h, [gate])[0]) * ops.linear(h, [up])[0], [down])[0]


def test_passes_fuse_the_feed_forward_into_two_nodes() -> None:
    y = passes.apply([mlp(pe.Graph())])
    nodes = [n for n in topological(y) if n.op]
    assert [n.op.name for n in nodes] == ["linear", "linear"]
    assert dict(nodes[0].params)["glu"] == "silu" and nodes[0].args[3] is not None and len(nodes[0].args[1]) == 2
    assert nodes[1].args[4] is not None


def attention_block(g: pe.Graph) -> list[pe.Tensor]:
    m, d, h, e, s = Dim("m", 8), 32, 4, 8, 20
    x = g.input("x", (m, d))
    i32 = {n: g.input(n, (m,), "I32") for n in ("cells", "lo", "hi")}
    pos = g.input("pos", (1, m), "I32")
    k_cache, v_cache = g.state("k", (2, s, e)), g.state("v", (2, s, e))
    hn = ops.rms_norm(x, randn(d), eps=1e-5)
    q, k, v = (ops.linear(hn, [randn(n * e, d)], [randn(n * e)])[0].reshape(-1, n, e) for n in (h, 2, 2))
    table = lambda: ops.rope_table(pos, inv)  # noqa: E731  made twice on purpose: `share` must find it
    inv = g.constant((1 / 100 ** (np.arange(4) / 4)).astype(np.float32))
    q = ops.rope(ops.rms_norm(q, randn(e), eps=1e-5), table())
    k = ops.rope(ops.rms_norm(k, randn(e), eps=1e-5), table())
    y = ops.attention(q, ops.cache_append(k_cache, k, i32["cells"]), ops.cache_append(v_cache, v, i32["cells"]),
                      i32["lo"], i32["hi"], scale=0.3)
    out = ops.linear(y, [randn(d, h * e)])[0]
    return [ops.softcap(ops.linear(x + out, [randn(9, d)])[0], cap=5.0)]


def test_passes_fuse_an_attention_block() -> None:
    nodes = [n.op.name for n in topological(passes.apply(attention_block(pe.Graph()))) if n.op and not n.op.view]
    assert sorted(nodes) == sorted(["linear", "rope_table", "rope_append", "attention", "linear", "linear"])


def test_blocks_hold_keys_without_what_they_have_in_common() -> None:
    """One bias of 200 leaves other keys their scales, and other caches as they were."""
    m, g, h, e, n = 40, 2, 4, 64, 40
    common = np.zeros((g, e), np.float32)
    common[:, 63] = 200
    q, k, v, lo = randn(m, h, e), randn(m, g, e) + common, randn(m, g, e), np.zeros(m, np.int32)

    def attend(kind: str, left_out: np.ndarray | None) -> np.ndarray:
        graph = pe.Graph()
        states = [graph.state(x, (g, n, e), dtype(kind)) for x in "kv"]
        index = {x: graph.input(x, (m,), "I32") for x in ("cells", "lo", "hi")}
        given = [graph.input(x, a.shape) for x, a in (("q", q), ("new_k", k), ("new_v", v))]
        cache = LayerCache(*states, None, index["cells"], None, index["lo"], index["hi"])
        out = cache.attend(*given, scale=0.125, k_common=None if left_out is None else graph.constant(left_out))
        return Cpu(n_threads=2).compile([out], single=True).run(q=q, new_k=k, new_v=v, cells=np.arange(m), lo=lo, hi=np.arange(m) + 1)

    exact = attend("F32", None)
    assert (attend("F32", common) == exact).all()
    error = [np.square(attend("Q8_0", c) - exact).mean() / np.square(exact).mean() for c in (None, common)]
    assert error[1] < 1e-4 < 1e-3 < error[0]


FEED = {"x": randn(5, 32), "cells": np.arange(5), "lo": np.zeros(5, int), "hi": np.arange(5) + 1, "pos": np.arange(5)[None] + 3}


def with_seed(build, g: pe.Graph):
    global rng
    rng = np.random.default_rng(11)
    return build(g)


@pytest.mark.parametrize("left_out", [None, *passes.PASSES])
def test_each_pass_keeps_the_result(left_out: str | None) -> None:
    want = Reference(dtype=np.float64).compile(with_seed(attention_block, pe.Graph()), passes=[]).run(**FEED)[0]
    some = [p for p in passes.PASSES if p != left_out]
    got = Reference(dtype=np.float64).compile(with_seed(attention_block, pe.Graph()), passes=some).run(**FEED)[0]
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_a_norm_with_two_readers_is_not_folded() -> None:
    g = pe.Graph()
    h = ops.rms_norm(g.input("x", (2, 8)), randn(8), eps=1e-5)
    nodes = [n.op.name for n in topological(passes.apply([ops.linear(h, [randn(4, 8)])[0], h])) if n.op]
    assert nodes == ["rms_norm", "linear"] or nodes == ["linear", "rms_norm"]


def test_reference_computes_and_missing_inputs_are_named() -> None:
    g = pe.Graph()
    program = g.compile(ops.softmax(g.input("x", (2, 3))), device="reference")
    x = randn(2, 3)
    e = np.exp(x)
    np.testing.assert_allclose(program.run(x=x), e / e.sum(-1, keepdims=True), rtol=1e-6)
    with pytest.raises(GraphError, match="'x' is missing"):
        program.run()


def test_null_backend_traces_and_refuses_to_compute() -> None:
    g = pe.Graph()
    program = g.compile(mlp(g), device="null")
    assert [line.split()[0] for line in program.trace] == ["linear", "linear"]
    with pytest.raises(GraphError, match="does not compute"):
        program.run()
    with pytest.raises(GraphError, match="no device 'tpu'"):
        g.compile(mlp(pe.Graph()), device="tpu")


def test_dot_names_every_op_and_input() -> None:
    text = to_dot(attention_block(pe.Graph()))
    assert text.startswith("digraph") and text.endswith("}")
    for word in ("attention", "rope_table", "cache_append", "input x", "state k"):
        assert word in text


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_threads_that_run_one_program_take_turns(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    g = pe.Graph()
    program = g.compile(ops.relu(ops.linear(g.input("x", (Dim("m", max=8), 4)), [np.ones((3, 4), np.float32)])[0]), device=device)
    execute = program.execute

    def slowly(**dims: int) -> None:
        time.sleep(0.002)                                    # so that others come before and behind it
        execute(**dims)
        time.sleep(0.002)

    monkeypatch.setattr(program, "execute", slowly)
    with ThreadPoolExecutor(6) as pool:
        for i, got in enumerate(pool.map(lambda i: program.run(x=np.full((i % 8 + 1, 4), i, np.float32)), range(24))):
            assert np.array_equal(got, np.full((i % 8 + 1, 3), 4 * i, np.float32))


def test_names_and_axes_that_are_wrong_are_said() -> None:
    g, other = pe.Graph(), pe.Graph()
    both = g.input("x", (3,)) + other.input("x", (3,))
    for device in ("cpu", "reference"):
        with pytest.raises(GraphError, match="two graphs declare 'x'"):
            g.compile(both, device=device)
    for dim in (Dim("m", "8"), Dim("m", -1), Dim("m", None), Dim("m", 1.5), Dim("m", True)):  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="the most of Dim 'm' must be an integer"):
            g.input("y", (dim, 4))
    for name in ("", 5):
        with pytest.raises(GraphError, match="the name of a Dim is a text"):
            g.input("y", (Dim(name, 8), 4))                  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"is m \(at most 8\) in the first argument but m \(at most 9\) in the second"):
        g.input("a", (Dim("m", 8),)) + g.input("b", (Dim("m", 9),))


def test_numbers_and_arrays_stand_on_either_side() -> None:
    g, x = pe.Graph(), np.array([1.0, 2.0, 4.0], np.float32)
    t = g.input("x", (3,))
    made = [t + 1, 1 + t, t - 1, 1 - t, t * 2, 2 * t, t / 2, 2 / t, x + t, x - t, x * t, x / t, np.float32(2) * t, 0.5 - t]
    want = [x + 1, 1 + x, x - 1, 1 - x, x * 2, 2 * x, x / 2, 2 / x, x + x, x - x, x * x, x / x, np.float32(2) * x, 0.5 - x]
    for got, expected in zip(g.compile(made).run(x=x), want):
        assert got.shape == (3,) and np.array_equal(got, expected.astype(np.float32))
