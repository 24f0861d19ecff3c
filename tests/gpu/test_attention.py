"""`attention`, `rope_append` and `cache_append` on CUDA cards, emulated or not: the tests of the CPU's kernels, and what only these kernels
have: floats for queries of few keys and halves on tensor cores for the others, chunks that are spread over the card, units of 8 to 128
queries, heads of 512.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from device_kernels import DeviceKernels
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import bits, CACHES, close, KernelError, loaded, make_inputs, reference, rng_of, stored, Value
from test_kernels import (  # noqa: F401
    attend, ATTENTION, attention_cases, isas, Kernels, SLOW, test_a_masked_key_contributes_nothing_whatever_it_holds,
    test_a_nan_of_a_query_or_value_stays_there, test_blocks_hold_hadamard_mixed_elements, test_bytes_take_no_cells_sinks_or_cap,
    test_caches_of_whole_blocks_only, test_cells_are_written_with_the_bits_of_gguf, test_cells_that_no_row_needs_may_be_unset,
    test_empty_intervals_give_zeros, test_one_large_channel_does_not_coarsen_a_cell, test_prefill_in_any_chunks_is_one_pass,
    test_sinks_take_probability,
)

from csrc import build_rules as rules
from pyengine.backends import backend
from pyengine.backends.cuda.library import library
from pyengine.graph.op import Case, REGISTRY


@pytest.fixture(scope="session")
def kernels(cuda_device: str) -> DeviceKernels:
    """Kernels of the device that is tested."""
    own = backend(cuda_device)
    return DeviceKernels(own.own, own.index)


@pytest.fixture(scope="session")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The CPU's kernels of attention, rotation and caches."""
    return Kernels(isas()[-1], tmp_path_factory.mktemp("cpu"), [rules.CSRC / "cpu" / f"{name}.c" for name in ("attention", "attention_int8", "rope")])


BORDER = "PYENGINE_CUDA_EXACT_KEYS"
ALL_FLOATS, ALL_HALVES = 1 << 30, 0


@contextmanager
def border(keys: int) -> Iterator[None]:
    """Queries of up to so many keys are for floats."""
    os.environ[BORDER] = str(keys)
    try:
        yield
    finally:
        del os.environ[BORDER]


@pytest.fixture(params=[ALL_FLOATS, ALL_HALVES], ids=["floats", "halves"])
def exact(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Both kernels of plain numbers, one after the other."""
    with border(request.param):
        yield request.param > 0


MOST = 2e-6                                                  # how far results may be from the reference, of values of about 1


def alone(kernels: DeviceKernels, inputs: list[Value], got: np.ndarray, **params: Any) -> None:
    """The same bits for a row alone, and for some rows in another order."""
    q, k, v, lo, hi, cells, seq, sinks = inputs
    m = len(q)
    for rows in ([m - 1], rng_of(got.shape).permutation(m)[: m // 2 + 1]) if m else ():
        part = [np.ascontiguousarray(q[rows]), k, v, lo[rows], hi[rows], cells, None if seq is None else seq[rows], sinks]
        assert bits(attend(kernels, part, **params)) == bits(got[rows]), f"rows {rows} differ in other company"


def compare(kernels: DeviceKernels, inputs: list[Value], params: dict[str, Any]) -> None:
    """Against the reference, and row by row."""
    q, _, v = inputs[:3]
    (want,) = reference(ATTENTION, inputs, params)
    got = attend(kernels, inputs, **params)
    # a score's error is that of its sum; it enters the result through exp, times the spread of the values
    spread = 1 + np.abs(params["scale"]) * np.abs(q).max(initial=0) * np.sqrt(q.shape[2]) * 4
    close(got, want, 3e-7 * spread, np.abs(loaded(v)[np.isfinite(loaded(v))]).max(initial=0), "attention")
    alone(kernels, inputs, got, **params)


@settings(SLOW, max_examples=25)
@given(attention_cases(), st.sampled_from([ALL_FLOATS, ALL_HALVES, 50, 200]))
def test_any_case(kernels: DeviceKernels, case: Any, exact: int) -> None:
    inputs, params = case
    with border(exact):
        compare(kernels, inputs, params)


@pytest.mark.slow
@settings(SLOW, max_examples=400)
@given(attention_cases(), st.sampled_from([ALL_FLOATS, ALL_HALVES, 50, 200]))
def test_many_cases(kernels: DeviceKernels, case: Any, exact: int) -> None:
    inputs, params = case
    with border(exact):
        compare(kernels, inputs, params)


def prompt(kind: str, e: int, f: int, m: int = 150, g: int = 2, group: int = 3, first: int = 0) -> tuple[list[Value], dict[str, Any]]:
    """Rows m of a causal prompt that begins behind `first` keys, its cache's cells in random order."""
    rng = rng_of((kind, e, f, m))
    n = first + m
    q = rng.standard_normal((m, g * group, e)).astype(np.float32)
    k, v = (stored(rng.standard_normal((g, n + 3, width)), kind) for width in (e, f))
    cells = rng.permutation(n + 3)[None, :n].astype(np.int32)
    hi = np.arange(first + 1, n + 1, dtype=np.int32)
    return [q, k, v, np.zeros(m, np.int32), hi, cells, None, None], {"scale": e**-0.5}


@pytest.mark.parametrize("e,f", [(64, 64), (128, 128), (32, 96), (96, 32), (256, 256), pytest.param(192, 128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_heads_of_any_width(kernels: DeviceKernels, exact: bool, kind: str, e: int, f: int) -> None:
    """A prompt's rows together, and the last of them alone: other kernels, the same bits."""
    inputs, params = prompt(kind, e, f, m=90)
    (want,) = reference(ATTENTION, inputs, params)
    got = attend(kernels, inputs, **params)
    close(got, want, MOST, 1.0)
    alone(kernels, inputs, got, **params)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", pytest.param("F32", marks=pytest.mark.slow), pytest.param("Q4_1", marks=pytest.mark.slow)])
@pytest.mark.parametrize("capability", ["90", pytest.param("75", marks=pytest.mark.slow)])
def test_wide_heads(monkeypatch: pytest.MonkeyPatch, kind: str, capability: str) -> None:
    """Heads of 512: floats with any number of keys, and blocks; on cards with little shared memory too."""
    monkeypatch.setenv("PYENGINE_EMULATED_SM", capability)
    kernels = DeviceKernels(library(True), 1)
    inputs, params = prompt(kind, 512, 512, m=40, g=1, group=4, first=300)
    got = attend(kernels, inputs, **params)
    close(got, reference(ATTENTION, inputs, params)[0], MOST, 1.0)
    alone(kernels, inputs, got, **params)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_cards_with_little_shared_memory(monkeypatch: pytest.MonkeyPatch, exact: bool, kind: str) -> None:
    """sm_75 has 64 KB a block: of heads of 256 a tile of K, then of V. The bits are those of cards with room for both."""
    inputs, params = prompt(kind, 256, 256, m=70)
    got = []
    for capability in ("90", "75"):
        monkeypatch.setenv("PYENGINE_EMULATED_SM", capability)
        kernels = DeviceKernels(library(True), 1)
        got.append(attend(kernels, inputs, **params))
    close(got[1], reference(ATTENTION, inputs, params)[0], MOST, 1.0)
    assert bits(got[0]) == bits(got[1])


@pytest.mark.parametrize("e", [72, 80, 88])
def test_heads_of_encoders(kernels: DeviceKernels, e: int) -> None:
    """Windows of rows that see each other, q, k and v side by side in one product's result: floats, and halves for int8."""
    rng = rng_of(("windows", e))
    m, h = 100, 2
    both = rng.standard_normal((m, 3, h, e)).astype(np.float32)
    q, k, v = both[:, 0], both[:, 1].swapaxes(0, 1), both[:, 2].swapaxes(0, 1)
    lo = np.arange(m, dtype=np.int32) // 48 * 48
    inputs = [q, k, v, lo, np.minimum(lo + 48, m).astype(np.int32), None, None, None]
    params = {"scale": e**-0.5}
    (want,) = reference(ATTENTION, inputs, params)
    close(attend(kernels, inputs, **params), want, 2e-6, 1.0)
    got = attend(kernels, inputs, products="int8", **params)
    close(got, want, 1e-3, 1.0)
    alone(kernels, inputs, got, products="int8", **params)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_many_chunks(kernels: DeviceKernels, exact: bool, kind: str) -> None:
    """Generation of several sequences, a prompt's end beside them: chunks are made by several blocks, and merged in order."""
    rng = rng_of(("chunks", kind))
    n, g, h, e = 1300, 1, 4, 64
    q = rng.standard_normal((7, h, e)).astype(np.float32)
    k, v = (stored(rng.standard_normal((g, 2 * n, e)), kind) for _ in range(2))
    cells = rng.permutation(2 * n).reshape(2, n).astype(np.int32)
    seq = np.array([0, 1, 1, 1, 1, 1, 0], np.int32)
    hi = np.array([1300, 600, 601, 602, 603, 604, 5], np.int32) + 40_000
    lo = np.array([0, 0, 0, 500, 513, 603, 2], np.int32) + 40_000
    inputs = [q, k, v, lo, hi, cells, seq, rng.standard_normal(h).astype(np.float32)]
    params = {"scale": e**-0.5, "softcap": 20.0}
    (want,) = reference(ATTENTION, inputs, params)
    got = attend(kernels, inputs, **params)
    close(got, want, MOST, 1.0)
    for i in range(7):
        part = [q[i : i + 1], k, v, lo[i : i + 1], hi[i : i + 1], cells, seq[i : i + 1], inputs[7]]
        assert bits(attend(kernels, part, **params)) == bits(got[i : i + 1]), f"row {i} alone"


@pytest.mark.parametrize("kind", ["F32", "F16", pytest.param("Q8_0", marks=pytest.mark.slow)])
def test_a_prompt_beside_generation(kernels: DeviceKernels, exact: bool, kind: str) -> None:
    """300 rows behind 700 keys, many rows to a block: each chunk's sums join those before it; rows of them alone have the same bits."""
    inputs, params = prompt(kind, 64, 64, m=300, g=1, group=4, first=700)
    got = attend(kernels, inputs, **params)
    (want,) = reference(ATTENTION, inputs, params)
    close(got, want, MOST, 1.0)
    q, k, v, lo, hi, cells, _, _ = inputs
    for rows in (np.s_[:1], np.s_[37:45], np.s_[100:200], np.s_[299:]):
        part = [q[rows], k, v, lo[rows], hi[rows], cells, None, None]
        assert bits(attend(kernels, part, **params)) == bits(got[rows]), f"rows {rows}"


def test_both_kinds_of_queries_in_one_node(kernels: DeviceKernels) -> None:
    """Rows of up to 100 keys have the bits of floats, those of more the bits of halves, and of two sequences neither disturbs the other."""
    inputs, params = prompt("F16", 64, 64, m=150, g=1, group=2)
    cells = np.tile(inputs[5], (2, 1))
    inputs = [np.tile(x, (2, 1, 1)[: x.ndim]) if i in (0, 3, 4) else x for i, x in enumerate(inputs)]
    inputs[3:7] = [np.tile(inputs[3][:150], 2), np.tile(inputs[4][:150], 2), cells, np.repeat(np.arange(2, dtype=np.int32), 150)]
    for rows in (np.s_[:], np.s_[90:110]):
        part = [np.ascontiguousarray(inputs[0][rows]), *inputs[1:3], *(x[rows] for x in inputs[3:5]), cells, inputs[6][rows], None]
        got = {}
        for keys in (100, ALL_FLOATS, ALL_HALVES):
            with border(keys):
                got[keys] = attend(kernels, part, **params)
        few = part[4] <= 100
        assert few.any() and not few.all()
        assert bits(got[100][few]) == bits(got[ALL_FLOATS][few]) and bits(got[100][~few]) == bits(got[ALL_HALVES][~few])


@pytest.mark.parametrize("kinds", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q8_0/F16", "F16/Q4_0", "Q4_0/F32", "BF16/Q8_0"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_how_far_from_the_cpu(kernels: DeviceKernels, cpu: Kernels, exact: bool, kinds: str, size: float) -> None:
    """Prompts and single rows over 700 keys, queries of any size, scores of one: floats have the CPU's bits, halves are as near as sums are."""
    rng = rng_of(("near", kinds))
    key_kind, _, value_kind = kinds.partition("/")
    n, m, h, e = 700, 40, 4, 64
    q = (size * rng.standard_normal((m, h, e))).astype(np.float32)
    k, v = (stored(rng.standard_normal((2, n, e)), kind) for kind in (key_kind, value_kind or key_kind))
    hi = np.arange(n - m + 1, n + 1, dtype=np.int32)
    inputs = [q, k, v, np.zeros(m, np.int32), hi, rng.permutation(n)[None].astype(np.int32), None, rng.standard_normal(h).astype(np.float32)]
    params = {"scale": e**-0.5 / size}
    got, want = attend(kernels, inputs, **params), attend(cpu, inputs, **params)
    if exact or "F32" in kinds:
        assert bits(got) == bits(want)
    else:
        close(got, want, 2e-6, 1.0)
    row = [q[-1:], k, v, *(a[-1:] for a in inputs[3:5]), *inputs[5:]]
    assert bits(attend(kernels, row, **params)) == bits(got[-1:])


def test_scores_of_blocks_are_the_cpus(kernels: DeviceKernels) -> None:
    """One key: its probability is 1 whatever the score; two keys of one value: their sum is."""
    rng = rng_of("one")
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((2, 2, 64), (1, 2, 64), (1, 1, 64)))
    v = np.repeat(v, 2, axis=1)
    for kind in ("Q8_0", "Q4_0", "Q4_1"):
        cache = stored(v, kind)
        inputs = [q, stored(k, kind), cache, np.zeros(2, np.int32), np.array([1, 2], np.int32), None, None, None]
        got = attend(kernels, inputs)
        close(got.reshape(4, 64), np.tile(loaded(cache)[0, 0], (4, 1)), 1e-3, 1.0)


HOSTILE = [
    ("-1 of 40", {"lo": -1, "hi": 3}), ("41 of 40", {"lo": 0, "hi": 41}), ("2147483647 of 40", {"hi": 2**31 - 1}),
    ("-2147483648 of 40", {"lo": -(2**31)}), ("40 of 40", {"cell": 40}), ("-1 of 40", {"cell": -1}),
    ("2147483647 of 40", {"cell": 2**31 - 1}), ("2 of 2", {"seq": 2}), ("-1 of 2", {"seq": -1}), ("11 of 10", {"l": 10, "hi": 11}),
]


@pytest.mark.parametrize("message,change", HOSTILE, ids=[f"{m} {next(iter(c))}" for m, c in HOSTILE])
@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_hostile_numbers_are_refused(kernels: DeviceKernels, exact: bool, kind: str, message: str, change: dict[str, int]) -> None:
    """What only the device sees: the row is left out and the program fails, with the number and its limit."""
    q, k = np.ones((2, 2, 16), np.float32), stored(np.ones((1, 40, 16), np.float32), kind)
    lo, hi = np.array([0, change.get("lo", 0)], np.int32), np.array([1, change.get("hi", 3)], np.int32)
    cells = seq = None
    if {"cell", "seq", "l"} & set(change):
        cells = np.tile(np.arange(change.get("l", 40), dtype=np.int32), (2, 1))
        cells[1, 2] = change.get("cell", 2)
        seq = np.array([0, change.get("seq", 1)], np.int32)
    with pytest.raises(KernelError, match=message):
        attend(kernels, [q, k, k, lo, hi, cells, seq, None])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_caches_hold_what_the_cpu_writes(kernels: DeviceKernels, cpu: Kernels, cache: str, interleaved: bool) -> None:
    """rope_append with norms, on both backends: queries and every byte of the caches are the same."""
    rng = rng_of(("append", cache))
    shapes = {"q": (7, 4, 96), "k": (7, 2, 96), "v": (7, 2, 64), "table": (7, 48), "k_cache": (2, 9, 96), "v_cache": (2, 9, 64),
              "cells": (7,), "q_norm": (96,), "k_norm": (96,), "k_offset": (2, 96)}
    op = REGISTRY["rope_append"]
    inputs = make_inputs(op, Case(shapes, {}, {}), rng, cache)
    inputs[6][2] = -1
    params = {"interleaved": interleaved, "eps": 1e-6}
    both = []
    for where in (kernels, cpu):
        held = [c.copy() if isinstance(c, np.ndarray) else type(c)(c.raw.copy(), c.kind) if c is not None else None for c in inputs]
        out = np.empty_like(inputs[0])
        where.call("rope_append", held, [out, held[4], held[5]], params)
        both.append((bits(out), bits(held[4]), bits(held[5])))
    assert both[0] == both[1]
