"""Keys quantized by channel: the CPU's kernels that write groups of tokens, attend to them, and put parts of a softmax together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import bits, channels_of, check, close, copy_of, elements, in_blocks, KernelError, loaded, q2_1, reference, rng_of, run, stored, Value
from test_kernels import isas, Kernels, SLOW

from csrc import build_rules as rules
from pyengine.dtype import GROUP
from pyengine.graph.op import REGISTRY

SOURCES = [rules.CSRC / "cpu" / name for name in ("attention.c", "attention_int8.c", "attention_merge.c", "cache_groups.c", "key_sums.c", "rope.c")]
ATTENTION, GROUPS, MERGE, SUMS = (REGISTRY[name] for name in ("attention", "cache_groups", "merge_attention", "key_sums"))
KEYS = ("Q4_1_CHANNELS", "Q2_1_CHANNELS")
VALUES = ("F16", "Q8_0", "Q4_0", "Q4_1", "Q2_1")


@pytest.fixture(scope="module", params=isas())
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(request.param, tmp_path_factory.mktemp(f"groups_{request.param}"), SOURCES)


@pytest.mark.parametrize("op", [GROUPS, MERGE], ids=lambda op: op.name)
def test_declared_cases_of_plain_numbers(kernels: Kernels, op: Any) -> None:
    from op_cases import make_inputs

    for i, case in enumerate(op.cases):
        check(kernels, op, make_inputs(op, case, rng_of((op.name, i))), case.params)


def group_inputs(rng: np.random.Generator, k: str, v: str, full: str = "F16", g: int = 2, e: int = 64, f: int = 32, z: int = 3) -> list[Value]:
    """Caches of `k` and `v` that hold something else, tokens in full, groups in any order; one is left out."""
    source, target = rng.permutation(5)[:z] * GROUP, rng.permutation(4)[:z] * GROUP
    target[-1:] = -1
    scale = np.exp(rng.standard_normal((g, 1, e)) * 2)       # channels that differ
    return [stored(rng.standard_normal((g, 4 * GROUP, e)), k), stored(rng.standard_normal((g, 4 * GROUP, f)), v),
            stored(rng.standard_normal((g, 5 * GROUP, e)) * scale, full), stored(rng.standard_normal((g, 5 * GROUP, f)), full),
            source.astype(np.int32), target.astype(np.int32)]


@pytest.mark.parametrize("full", ["F16", "F32", "BF16"])
@pytest.mark.parametrize("v", VALUES)
@pytest.mark.parametrize("k", [*KEYS, "F16", "Q8_0"])
def test_groups_have_the_bytes_of_the_reference(kernels: Kernels, k: str, v: str, full: str) -> None:
    """What a group holds is what NumPy makes of its tokens, bit for bit; other cells stay."""
    if getattr(kernels, "isa", "") == "generic" and "Q2_1" in v:             # mixing has no fma there, and codes may differ
        pytest.skip("sums of mixed values round otherwise without fma")
    inputs = group_inputs(rng_of((k, v, full)), k, v, full)
    want = [copy_of(c) for c in inputs[:2]]
    for made, tokens, kind in zip(want, inputs[2:4], (k, v)):
        whole = stored(elements(tokens).astype(np.float32), kind)
        for a, b in zip(*inputs[4:]):
            if b >= 0:
                to, of = (x.raw if hasattr(x, "raw") else x for x in (made, whole))
                to[:, b : b + GROUP] = of[:, a : a + GROUP]
    for threads in (1, 3):
        got = run(kernels, GROUPS, inputs, {}, [c.shape for c in inputs[:2]], threads)
        assert bits(got[0]) == bits(want[0]) and bits(got[1]) == bits(want[1])


def test_scales_of_two_bits_are_better_than_the_range_s() -> None:
    """The search loses less than the ends of the range do, never more; equal elements and outliers stand."""
    x = rng_of("q2").standard_normal((500, 1, 1, 32)).astype(np.float32)
    x[:5] = 3.25
    x[5:10, ..., 7] = 1000
    plain = np.clip(np.rint((x - x.min(-1, keepdims=True)) / np.maximum(np.ptp(x, -1)[..., None], 1e-9) * 3), 0, 3)
    plain = plain * np.ptp(x, -1)[..., None] / 3 + x.min(-1, keepdims=True)
    from op_cases import Block

    own = elements(Block(q2_1(x), "Q2_1")).reshape(x.shape)
    ours, theirs = ((own - x) ** 2).sum(-1), ((plain - x) ** 2).sum(-1)
    assert (ours <= theirs * 1.01 + 1e-6).mean() > 0.99 and ours[10:].sum() < 0.7 * theirs[10:].sum() and (own[:5] == 3.25).all()


@st.composite
def channel_cases(draw: Any) -> tuple[list[Value], dict[str, Any]]:
    """Queries over groups of keys in pages anywhere; intervals that end at groups, or within them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    g, group, m, kind = draw(st.integers(1, 2)), draw(st.integers(1, 5)), draw(st.integers(0, 40)), draw(st.sampled_from(KEYS))
    e, f, b, n = 32 * draw(st.integers(1, 3)), 32 * draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 12))
    s = b * n + draw(st.integers(0, 2))                      # groups in all
    k = stored(rng.standard_normal((g, s * GROUP, e)), kind)
    v = stored(rng.standard_normal((g, s * GROUP, f)), draw(st.sampled_from(VALUES)))
    first = rng.permutation(s)[: b * n].reshape(b, n, 1) * GROUP
    cells = (first + np.arange(GROUP)).reshape(b, n * GROUP).astype(np.int32)
    q = rng.standard_normal((m, g * group, e)).astype(np.float32)
    hi = rng.integers(0, n * GROUP + 1, m) if draw(st.booleans()) else rng.integers(0, n + 1, m) * GROUP
    lo = np.where(rng.random(m) < 0.5, 0, rng.integers(0, n * GROUP, m))
    seq = rng.integers(0, b, m).astype(np.int32)
    params = {"scale": 0.2, "softcap": draw(st.sampled_from([0.0, 30.0])), "stats": True}
    return [q, k, v, lo.astype(np.int32), hi.astype(np.int32), cells, seq], params


@settings(SLOW, max_examples=60)
@given(channel_cases())
def test_attention_to_groups(kernels: Kernels, case: Any) -> None:
    """As in float64; the same bits for any number of threads, and for each row alone, whose keys are read where they lie."""
    inputs, params = case
    q, k, v, lo, hi, cells, seq = inputs
    (m, h, _), f = q.shape, v.shape[2]
    shapes = [(m, h * f), (m, h, 2)]
    got = run(kernels, ATTENTION, inputs, params, shapes)
    if m:
        for a, b in zip(got, reference(ATTENTION, [*inputs, None, None, None], params)):
            close(a, b, 4e-6, 1.0 + np.abs(elements(k)).max(), "attention")
    assert list(map(bits, run(kernels, ATTENTION, inputs, params, shapes, 3))) == list(map(bits, got))
    for i in range(min(m, 3)):
        row = [q[i : i + 1], k, v, lo[i : i + 1], hi[i : i + 1], cells, seq[i : i + 1]]
        alone = run(kernels, ATTENTION, row, params, [(1, h * f), (1, h, 2)], 2)
        assert [bits(a) for a in alone] == [bits(a[i : i + 1]) for a in got]


@pytest.mark.parametrize(("kind", "v", "e", "f"), [("Q4_1_CHANNELS", "Q4_1", 128, 128), ("Q2_1_CHANNELS", "Q2_1", 256, 256), ("Q4_1_CHANNELS", "Q8_0", 320, 64),
                                                   ("Q2_1_CHANNELS", "F16", 512, 96)])
@pytest.mark.parametrize("m", [2, 40])
def test_wide_heads_in_several_chunks(kernels: Kernels, kind: str, v: str, e: int, f: int, m: int) -> None:
    """Heads wider than what is staged at once, more keys than a chunk has; a row alone has the same bits."""
    rng = rng_of((kind, e, f, m))
    q, n = rng.standard_normal((m, 6, e)).astype(np.float32), 600
    inputs = [q, stored(rng.standard_normal((2, 640, e)), kind), stored(rng.standard_normal((2, 640, f)), v), rng.integers(0, 300, m).astype(np.int32),
              (n - m + 1 + np.arange(m)).astype(np.int32), (rng.permutation(20)[:, None] * GROUP + np.arange(GROUP)).reshape(1, 640).astype(np.int32)]
    params = {"scale": e**-0.5}
    (got,) = run(kernels, ATTENTION, [*inputs, None, None], params, [(m, 6 * f)])
    close(got, reference(ATTENTION, [*inputs, None, None, None, None], params)[0], 4e-6, 1.0 + np.abs(elements(inputs[1])).max(), "attention")
    row = [q[-1:], *inputs[1:3], inputs[3][-1:], inputs[4][-1:], inputs[5], None, None]
    assert bits(run(kernels, ATTENTION, row, params, [(1, 6 * f)])[0]) == bits(got[-1:])


@settings(SLOW, max_examples=40)
@given(channel_cases(), st.integers(1, 3))
def test_merged_parts_are_one_softmax(kernels: Kernels, case: Any, n: int) -> None:
    """Attention to keys cut into intervals, put together, is attention to all of them."""
    inputs, params = case
    q, k, v, lo, hi, cells, seq = inputs
    (m, h, _), f = q.shape, v.shape[2]
    whole, stats = run(kernels, ATTENTION, inputs, params, [(m, h * f), (m, h, 2)])
    edges = np.linspace(lo, np.maximum(hi, lo), n + 1).astype(np.int32)
    parts = [run(kernels, ATTENTION, [q, k, v, a, b, cells, seq], params, [(m, h * f), (m, h, 2)]) for a, b in zip(edges, edges[1:])]
    merged = [[p for p, _ in parts], [s for _, s in parts]]
    (got,) = run(kernels, MERGE, merged, {}, [(m, h * f)])
    close(got, whole.astype(np.float64), 3e-6, 1.0 + np.abs(whole).max(initial=0), "merged")
    assert bits(run(kernels, MERGE, merged, {}, [(m, h * f)], 3)[0]) == bits(got)
    both = run(kernels, MERGE, merged, {"together": True}, [(m, h * f), (m, h, 2)], 3)
    assert bits(both[0]) == bits(got) and bits(both[1][..., :1]) == bits(stats[..., :1])
    close(both[1][..., 1], stats[..., 1].astype(np.float64), 2e-6, 0.0, "total of all parts")


@settings(SLOW, max_examples=60)
@given(channel_cases(), st.integers(0, 2**32 - 1))
def test_sums_of_what_groups_get(kernels: Kernels, case: Any, seed: int) -> None:
    """Against the reference; bit for bit over threads, and with the rows one after the other, whose keys are read where they lie."""
    (q, k, v, lo, hi, cells, seq), params = case
    (m, h, _), g, rng = q.shape, k.shape[0], np.random.default_rng(seed)
    stats = run(kernels, ATTENTION, [q, k, v, lo, hi, cells, seq], params, [(m, h * v.shape[2]), (m, h, 2)])[1]
    weights = np.where(rng.random((m, 1)) < 0.7, rng.standard_normal((m, 4)), 0).astype(np.float32)
    params = {"scale": params["scale"], "softcap": params["softcap"], "kinds": (0, 1, 2, 3)}
    sums = np.zeros((g, cells.size, 4), np.float32)
    got = check(kernels, SUMS, [sums, q, k, lo, hi, cells, seq, stats, weights], params)[0]
    for i in range(m):
        row = np.s_[i : i + 1]
        sums = run(kernels, SUMS, [sums, q[row], k, lo[row], hi[row], cells, seq[row], stats[row], weights[row]], params, [sums.shape], 2)[0]
    assert bits(sums) == bits(got)


def test_groups_that_are_none_are_refused(kernels: Kernels) -> None:
    rng = rng_of("refused")
    inputs = group_inputs(rng, "Q4_1_CHANNELS", "Q4_1")
    for at, wrong in ((4, [0, 33, 0]), (4, [160, 0, 0]), (5, [0, 16, 32]), (5, [128, 32, 0])):
        bad = [*inputs[:at], np.array(wrong, np.int32), *inputs[at + 1 :]]
        bad[5] = np.abs(bad[5])
        with pytest.raises(KernelError, match="begins at cell"):
            run(kernels, GROUPS, bad, {}, [c.shape for c in inputs[:2]])
    q, ends = rng.standard_normal((1, 2, 64)).astype(np.float32), [np.array([n], np.int32) for n in (0, 40)]
    for cells in (np.arange(1, 65), np.r_[np.arange(32), np.arange(63, 31, -1)]):
        with pytest.raises(KernelError, match="a group of 32 cells|a row reads key, cell or sequence"):
            run(kernels, ATTENTION, [q, *inputs[:2], *ends, cells[None].astype(np.int32)], {"scale": 1.0}, [(1, 64)])


def test_the_test_sees_groups() -> None:
    """Elements of a cache by channel are those that went in, within a step of each channel's range."""
    x = rng_of("see").standard_normal((2, 64, 32)).astype(np.float32)
    for kind, steps in (("Q4_1_CHANNELS", 15), ("Q2_1_CHANNELS", 3)):
        span = np.ptp(channels_of(x), -1)[..., None]
        assert (np.abs(channels_of(elements(stored(x, kind))) - channels_of(x)) <= 0.9 * span / steps).all()
        assert not in_blocks(stored(x, kind)) and np.array_equal(loaded(stored(x, kind)), elements(stored(x, kind)))
