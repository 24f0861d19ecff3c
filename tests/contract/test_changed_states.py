"""A step that keeps what attention gives each token: on every backend that computes, a prompt in pieces leaves the state of a whole one."""

from __future__ import annotations

from collections.abc import Sequence

import devices
import numpy as np
import pytest

from pyengine import ops
from pyengine.backends import names
from pyengine.backends.base import Backend, Declared, Program
from pyengine.backends.cpu import Backend as Cpu
from pyengine.backends.reference import Backend as Reference
from pyengine.compiler.cut import cut
from pyengine.compiler.wanted import only
from pyengine.errors import GraphError
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Dim
from pyengine.nn.cache import LayerCache

M, N, G, H, E, LAYERS = 24, 20, 2, 6, 32, 2        # rows of a step at most, cells of a conversation
KINDS = ("sum", "entropy", "square")


@pytest.fixture(params=names())
def own(request: pytest.FixtureRequest) -> Backend:
    if request.param == "null":
        pytest.skip("null does not compute")
    return devices.opened(request, request.param)


def step() -> Declared:
    """Layers whose caches have sums; rows that nobody wants are left out, and a head stands behind an entry."""
    g, m = Graph(), Dim("m", M)
    q, k, v = (g.input(name, (m, heads, E)) for name, heads in (("q", H), ("k", G), ("v", G)))
    cells, lo, hi, seq = (g.input(name, (m,), "I32") for name in ("cells", "lo", "hi", "seq"))
    table, weights = g.table("table", (2, N)), g.input("weights", (m, len(KINDS)))
    turn = ops.rope_table(g.input("positions", (1, m), "I32"), g.constant((10.0 ** -(np.arange(E // 2) / 8)).astype(np.float32)))
    caches = [LayerCache(g.state(f"blk.{i}.k", (G, 2 * N, E)), g.state(f"blk.{i}.v", (G, 2 * N, E)), table, cells, seq, lo, hi,
                         g.state(f"blk.{i}.sums", (G, 2 * N, len(KINDS))), weights, KINDS, []) for i in range(LAYERS)]
    for i, cache in enumerate(caches):
        y = cache.attend(ops.rope(q, turn), ops.rope(ops.scale(k, factor=1.0 + i), turn), v, scale=0.3)
        q = y.reshape(-1, H, E)
    wanted, head = g.input("wanted", (Dim("w", M),), "I32"), g.input("head", (Dim("l", M),), "I32")
    hidden = ops.rows(y, wanted)
    logits = ops.linear(ops.rows(hidden, head), [np.eye(9, H * E, dtype=np.float32)])[0]
    chosen = {f"{name}": g.input(f"{name}_wanted", wanted.shape, "I32") for name in ("seq", "lo", "hi")}
    return Declared(only([logits, hidden, *(cache.changed[-1] for cache in caches)], wanted, chosen), {"head": ("head",)})


def run(program: Program, begin: int, end: int) -> None:
    """Rows begin .. end - 1 of a prompt of conversation 1, and before each a row of conversation 0 that counts nothing."""
    rng, i = np.random.default_rng(1), np.repeat(np.arange(begin, end), 2)
    second = np.arange(len(i)) % 2 == 1
    dims = {"m": len(i), "w": 1, "l": 1}
    given = {name: rng.standard_normal((N, heads, E))[i] for name, heads in (("q", H), ("k", G), ("v", G))}
    given |= {"cells": np.where(second, 2 * i, 2 * i + 1), "lo": np.maximum(0, i - 14), "hi": i + 1, "seq": second, "positions": i,
              "weights": second[:, None] * np.array([[1, 0.5, 2]]), "wanted": [len(i) - 1], "head": [0]}
    given |= {f"{name}_wanted": given[name][-1:] for name in ("seq", "lo", "hi")}
    program.tables["table"][:] = [2 * np.arange(N) + 1, 2 * np.arange(N)]
    for name, value in given.items():
        if name in program.inputs:
            flat = np.asarray(value).reshape(-1)
            program.inputs[name].reshape(-1)[: len(flat)] = flat
    program.execute(**dims)
    before, program.inputs["head"][0] = sums(program), 0
    program.execute("head", **dims)                        # once more from there: the sums are no part of it
    assert sums(program) == before


def sums(program: Program) -> list[bytes]:
    return [program.states[f"blk.{i}.sums"].gather(np.arange(2 * N)).tobytes() for i in range(LAYERS)]


def after(own: Backend, cuts: Sequence[int]) -> list[bytes]:
    program, at = own.prepare(step()).load(), 0
    for end in [*cuts, N]:
        for begin in range(at, end, M // 2):
            run(program, begin, min(end, begin + M // 2))
        at = end
    return sums(program)


def test_a_prompt_in_pieces_leaves_the_sums_of_a_whole_one(own: Backend) -> None:
    whole = after(own, [])
    assert all(after(own, cuts) == whole for cuts in ([1, 2, 9], [12, 13]))
    want, close = after(Reference(), []), 1e-5 if own.name in ("cpu", "reference") else 5e-3
    for got, right in zip(whole, want):
        a, b = (np.frombuffer(x, np.float32).reshape(G, 2, N, len(KINDS)) for x in (got, right))
        np.testing.assert_allclose(a, b, rtol=close, atol=close)
        assert not a[:, 0].any()                            # the other conversation counts nothing
        assert np.abs(a[:, 1, :, 0].sum(1) - N * H / G).max() < 1e-3


def test_threads_give_the_same_sums() -> None:
    assert after(Cpu(n_threads=1), [7]) == after(Cpu(n_threads=2), [])


def test_sums_come_before_other_outputs_and_leave_the_fusions() -> None:
    """So that queries need not be kept, and that a run from the head on counts nothing twice."""
    prepared = Cpu(n_threads=1).prepare(step())
    order = [node.op.name for node in prepared.layout.steps]
    assert order.count("rope_append") == LAYERS and "rope" not in order
    assert [i for i, name in enumerate(order) if name == "key_sums"] == [i + 1 for i, name in enumerate(order) if name == "attention"]
    assert order[-4:] == ["key_sums", "rows", "rows", "linear"] and [len(a) for a in prepared.load().outputs] == [M, M, 0, 0]


def test_each_device_keeps_its_layers_sums() -> None:
    declared = step()
    first, second = cut(declared.outputs, lambda name: int(name[4]) if name.startswith("blk.") else None, [0, 1])
    assert [i for i, _ in first.results] == [2] and [i for i, _ in second.results] == [0, 1, 3]
    for part, layer in ((first, 0), (second, 1)):
        layout = Cpu(n_threads=1).prepare(Declared(part.outputs), part.turns).layout
        assert sum(node.op.name == "key_sums" for node in layout.steps) == 1
        assert any(node.name == f"blk.{layer}.sums" for node in layout.leaves)


def test_sums_need_what_they_are_made_with() -> None:
    g, m = Graph(), Dim("m", M)
    x, index = g.input("x", (m, 2, E)), g.input("i", (m,), "I32")
    cache = LayerCache(*(g.state(name, (2, N, E)) for name in "kv"), g.table("t", (1, N)), *[index] * 4, sums=g.state("s", (2, N, 1)))
    with pytest.raises(GraphError, match="need weights"):
        cache.read(x, scale=1.0)
