"""Convolutions, pooling, resizing and group norm against torch: the reference, and the CPU's kernels on every instruction set."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import rng_of
from test_kernels import isas

from bench.blocks import Blocks
from pyengine import Dim, Graph, ops
from pyengine.backends.base import Declared
from pyengine.backends.cpu import kernels_of, Prepared
from pyengine.dtype import dtype
from pyengine.errors import ShapeError
from pyengine.graph.tensor import make_leaf, Tensor

torch = pytest.importorskip("torch", reason="pip install torch")
F = torch.nn.functional
SLOW = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def run(build: Any, x: np.ndarray, isa: str, threads: int = 2) -> np.ndarray:
    """Compute build(x) on one instruction set; every op must have a kernel."""
    y = build(make_leaf("input", "x", x.shape, dtype("F32")))
    prepared = Prepared(Declared([y]), None, (), kernels_of(isa), isa, threads)
    assert not prepared.fallbacks
    program = prepared.load()
    program.inputs["x"][...] = x
    program.execute()
    return program.outputs[0].copy()


def everywhere(build: Any, x: np.ndarray, want: np.ndarray, share: float = 2e-6) -> None:
    """The reference and every instruction set are within a share of the largest number; threads change no bit."""
    limit = share * max(1.0, np.abs(want).max(initial=0))
    near = lambda y: y.shape == want.shape and np.abs(y - want).max(initial=0) <= limit  # noqa: E731
    assert near(np.asarray(build(x)))
    for isa in isas():
        got = run(build, x, isa)
        assert near(got), (isa, np.abs(got - want).max())
        assert got.tobytes() == run(build, x, isa, 1).tobytes() == run(build, x, isa, 3).tobytes()


def first(x: np.ndarray) -> Any:
    """Channels to torch's place."""
    return torch.tensor(np.moveaxis(x, -1, 1).copy(), dtype=torch.float64)


def last(y: Any) -> np.ndarray:
    """And back."""
    return np.moveaxis(y.numpy(), 1, -1)


def matrix(w: np.ndarray) -> np.ndarray:
    """A weight of torch's [out, in, kh, kw] as conv2d takes it."""
    return np.ascontiguousarray(w.transpose(0, 2, 3, 1)).reshape(len(w), -1)


pairs = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731



@pytest.mark.parametrize("isa", isas())
def test_there_is_memory_for_any_number_of_pictures(isa: str) -> None:
    """Blocks of windows are as even as they can be: those of three pictures are larger than those of four."""
    weight, x = rng_of(1).standard_normal((24, 27), np.float32), rng_of(2).standard_normal((4, 20, 20, 3), np.float32)
    y = ops.conv2d(make_leaf("input", "x", (Dim("n", max=4), 20, 20, 3), dtype("F32")), weight, kernel=(3, 3), padding=(1, 1))
    program = Prepared(Declared([y]), None, (), kernels_of(isa), isa, 2).load()
    whole = program.run(x=x)[0]
    for n in range(4):
        assert program.run(x=x[:n])[0].tobytes() == whole[:n].tobytes()

@SLOW
@given(pairs(1, 12), pairs(1, 4), pairs(1, 3), pairs(0, 3), pairs(1, 3), st.sampled_from([(1, 3, 7), (1, 33, 50), (1, 64, 20), (2, 8, 6),
       (3, 12, 9), (4, 64, 64), (5, 5, 5), (48, 48, 48), (6, 6, 12)]), st.integers(1, 2), seeds)
def test_convolutions_of_any_geometry(size, kernel, stride, padding, dilation, channels, n, seed):
    groups, c, o = channels
    rng = np.random.default_rng(seed)
    size = tuple(max(s, d * (k - 1) + 1 - 2 * p) for s, k, p, d in zip(size, kernel, padding, dilation))
    x = rng.standard_normal((n, *size, c)).astype(np.float32)
    w = rng.standard_normal((o, c // groups, *kernel)).astype(np.float32)
    bias = rng.standard_normal(o).astype(np.float32) if seed % 2 else None
    want = last(F.conv2d(first(x), torch.tensor(w).double(), None if bias is None else torch.tensor(bias).double(), stride, padding,
                         dilation, groups))
    everywhere(lambda t: ops.conv2d(t, matrix(w), bias, kernel=kernel, stride=stride, padding=padding, dilation=dilation, groups=groups),
               x, want, 4e-6)


@pytest.mark.parametrize("groups, c, o", ((1, 130, 200), (150, 150, 150)))
def test_large_convolutions(groups, c, o):
    """Several blocks of windows, strips of outputs, and parts of k."""
    rng = rng_of(groups)
    x = rng.standard_normal((1, 25, 33, c)).astype(np.float32)
    w, bias = rng.standard_normal((o, c // groups, 3, 3)).astype(np.float32), rng.standard_normal(o).astype(np.float32)
    want = last(F.relu(F.conv2d(first(x), torch.tensor(w).double(), torch.tensor(bias).double(), 1, 1, 1, groups)))
    everywhere(lambda t: ops.conv2d(t, matrix(w), bias, kernel=(3, 3), padding=(1, 1), groups=groups, activation="relu"), x, want, 4e-6)


@SLOW
@given(pairs(1, 20), pairs(1, 7), pairs(1, 4), pairs(0, 3), st.integers(1, 2), st.integers(1, 8), st.integers(1, 140), st.sampled_from(["F32", "F16", "BF16"]),
       seeds)
def test_pictures_of_few_channels(to, kernel, stride, padding, dilation, c, o, kind, seed):
    """Any windows, places and outputs: a picture alone has the bits that it has among others; so has a weight that is not packed."""
    rng, k = np.random.default_rng(seed), kernel[0] * kernel[1] * c
    size = tuple(max(1, (t - 1) * s + d * (n - 1) + 1 - 2 * p) for t, n, s, p, d in zip(to, kernel, stride, padding, (dilation, 1)))
    if size[0] + 2 * padding[0] < dilation * (kernel[0] - 1) + 1 or size[1] + 2 * padding[1] < kernel[1]:
        return
    x, w = rng.standard_normal((2, *size, c)).astype(np.float32), (rng.standard_normal((o, k)) / k**0.5).astype(np.float32)
    raw = w if kind == "F32" else gguf.quants.quantize(w, gguf.GGMLQuantizationType[kind])
    weight = w if kind == "F32" else Blocks("w", dtype(kind), np.ascontiguousarray(raw).view(np.uint8).reshape(o, -1))
    values, bias = w if kind == "F32" else weight.values().reshape(o, -1), rng.standard_normal(o).astype(np.float32)
    want = last(F.conv2d(first(x), torch.tensor(values.reshape(o, *kernel, c).transpose(0, 3, 1, 2).copy()).double(), torch.tensor(bias).double(),
                         stride, padding, (dilation, 1)).relu())
    leaf = lambda: make_leaf("constant", "w", w.shape, dtype(kind), weight)  # noqa: E731
    build = lambda t, w=None: ops.conv2d(t, w or leaf(), bias, kernel=kernel, stride=stride, padding=padding, dilation=(dilation, 1),  # noqa: E731
                                         activation="relu")
    for isa in isas():
        got = run(build, x, isa)
        assert np.abs(got - want).max(initial=0) <= 2e-6 * max(1.0, np.abs(want).max(initial=0)), isa
        assert got.tobytes() == run(build, x, isa, 1).tobytes() == b"".join(run(build, one[None], isa).tobytes() for one in x)
        if kind == "F32":
            assert got.tobytes() == run(lambda t: _beside(build, leaf(), t), x, isa)[: got.size].tobytes()


@pytest.mark.parametrize("channels, stride, groups", (((3, 64), 1, 1), ((32, 64), 1, 1), ((64, 64), 1, 64), ((20, 64), 2, 1), ((20, 90), 2, 1)))
def test_large_results_are_stored_whole(channels, stride, groups):
    """Results of more than 2 MB, which pass the caches where outputs are whole vectors, by each way of computing them."""
    (c, o), rng = channels, rng_of((channels, stride, groups))
    x, w = rng.standard_normal((1, 100 * stride, 101 * stride, c)).astype(np.float32), rng.standard_normal((o, c // groups, 3, 3)).astype(np.float32)
    w /= np.float32(3 * (c // groups) ** 0.5)
    bias = rng.standard_normal(o).astype(np.float32)
    want = last(F.conv2d(first(x), torch.tensor(w).double(), torch.tensor(bias).double(), stride, 1, 1, groups))
    assert 4 * want.size > 2 << 20
    everywhere(lambda t: ops.conv2d(t, matrix(w), bias, kernel=(3, 3), stride=(stride,), padding=(1,), groups=groups), x, want)


TILED = [(3, 1), (2, 1), (3, 2), (4, 2), (5, 2), (7, 4), (7, 3)]     # window and stride: those without a stride are computed by tiles of 6 x 6 values (winograd.c)


@SLOW
@given(pairs(7, 17), st.sampled_from(TILED), st.tuples(*[st.integers(0, 3)] * 4), st.integers(1, 80), st.integers(1, 120),
       st.sampled_from(["F32", "F16", "BF16"]), seeds)
def test_small_windows_over_pictures_of_some_size(to, window, padding, c, o, kind, seed):
    """Any edges, channels and outputs; a picture alone has the bits that it has among others; so has a weight that is not packed."""
    rng, (k, stride), (top, bottom, left, right) = np.random.default_rng(seed), window, padding
    size = ((to[0] - 1) * stride + k - top - bottom, (to[1] - 1) * stride + k - left - right)
    if min(size) < 1:
        return
    x, w = rng.standard_normal((2, *size, c)).astype(np.float32), (rng.standard_normal((o, k * k * c)) / k).astype(np.float32)
    raw = w if kind == "F32" else gguf.quants.quantize(w, gguf.GGMLQuantizationType[kind])
    weight = w if kind == "F32" else Blocks("w", dtype(kind), np.ascontiguousarray(raw).view(np.uint8).reshape(o, -1))
    values = w if kind == "F32" else weight.values().reshape(o, -1)
    bias = rng.standard_normal(o).astype(np.float32)
    want = last(F.conv2d(F.pad(first(x), (left, right, top, bottom)), torch.tensor(values.reshape(o, k, k, c).transpose(0, 3, 1, 2).copy()).double(),
                         torch.tensor(bias).double(), stride))
    leaf = lambda: make_leaf("constant", "w", w.shape, dtype(kind), weight)  # noqa: E731
    build = lambda t, w=None: ops.conv2d(t, w or leaf(), bias, kernel=(k,), stride=(stride,), padding=padding)  # noqa: E731
    for isa in isas():
        got = run(build, x, isa)
        assert np.abs(got - want).max() <= 3e-6 * np.abs(want).max(), isa
        assert got.tobytes() == run(build, x, isa, 1).tobytes() == b"".join(run(build, one[None], isa).tobytes() for one in x)
        if kind == "F32":
            assert got.tobytes() == run(lambda t: _beside(build, leaf(), t), x, isa)[: got.size].tobytes()


def _beside(build: Any, weight: Tensor, t: Tensor) -> Tensor:
    """build(t, weight), and the weight's own numbers: where something else reads them, it is not packed."""
    return ops.concat([build(t, weight).reshape(-1), ops.relu(weight).reshape(-1)], axis=0)


@pytest.mark.parametrize("c, o", ((64, 64), (512, 100)))
def test_tiles_are_as_exact_as_plain_sums(c, o):
    """The range of the results and 1e-5 of it are what a model may differ in as a whole: a layer has a tenth of that."""
    rng = rng_of((c, o))
    x, w = rng.standard_normal((1, 21, 30, c)).astype(np.float32), (rng.standard_normal((o, c, 3, 3)) / c**0.5).astype(np.float32)
    want = last(F.conv2d(first(x), torch.tensor(w).double(), None, 1, 1))
    for isa in isas():
        got = run(lambda t: ops.conv2d(t, matrix(w), kernel=(3, 3), padding=(1, 1)), x, isa)
        assert np.abs(got - want).max() <= 1e-6 * (want.max() - want.min()), isa


def test_what_is_no_number_stays_near():
    """A NaN reaches its window and no further than the tiles that read it: 4 x 4 results of 6 x 6 pixels."""
    rng = rng_of("nan")
    x, w = rng.standard_normal((1, 20, 20, 5)).astype(np.float32), rng.standard_normal((7, 45)).astype(np.float32)
    build = lambda t: ops.conv2d(t, w, kernel=(3, 3), padding=(1, 1))  # noqa: E731
    for isa in isas():
        clean, spoiled = run(build, x, isa), x.copy()
        spoiled[0, 10, 5, 2] = np.nan
        got = run(build, spoiled, isa)
        assert np.isnan(got[0, 9:12, 4:7]).all() and not np.isnan(np.delete(got, np.s_[8:12], 1)).any()
        kept = np.delete(got, np.s_[4:8], 2)
        assert kept.tobytes() == np.delete(clean, np.s_[4:8], 2).tobytes()


@pytest.mark.parametrize("kind", ("F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "TQ1_0"))
@pytest.mark.parametrize("c, groups", ((64, 1), (64, 2), (256, 1), (16, 1)))
def test_weights_of_every_kind(kind, c, groups):
    """Formats of files: packed, and those that have no packed form; pixels of whole blocks, and blocks that reach over pixels."""
    o, k, kernel = 40 if groups == 1 else 64, 4 * 4 * c // groups, (4, 4)
    if k % dtype(kind).block:
        pytest.skip("windows are no whole blocks")
    rng = rng_of((kind, c, groups))
    raw = gguf.quants.quantize(rng.standard_normal((o, k)).astype(np.float32), gguf.GGMLQuantizationType[kind]) if kind in (
        "F16", "BF16", "Q8_0", "Q4_0", "TQ1_0") else None
    weight = Blocks("w", dtype(kind), raw.view(np.uint8).reshape(o, -1)) if raw is not None else _random(kind, o, k, rng)
    values = weight.values().reshape(o, k).astype(np.float64)
    x = rng.standard_normal((2, 9, 8, c)).astype(np.float32)
    torch_weight = torch.tensor(values.reshape(o, *kernel, c // groups).transpose(0, 3, 1, 2).copy())
    want = last(F.conv2d(first(x), torch_weight, None, (2, 1), (1, 2), 1, groups))
    limit = (2e-2 if dtype(kind).block > 1 else 1e-5) * np.abs(want).max()
    build = lambda t: ops.conv2d(t, make_leaf("constant", "w", (o, k), weight.dtype, weight), kernel=kernel, stride=(2, 1),  # noqa: E731
                                 padding=(1, 2), groups=groups)
    rows = lambda t: ops.linear(t, [make_leaf("constant", "w", (o, k), weight.dtype, weight)])[0]  # noqa: E731
    for isa in isas():
        got = run(build, x, isa)
        assert np.abs(got - want).max() <= limit, isa
        assert got.tobytes() == run(build, x, isa, 1).tobytes()
        if groups == 1:                                      # the bits of a product with the windows as rows
            seen = ops.convolution.windows(x, kernel, (2, 1), (1, 1, 2, 2), (1, 1), got.shape[1:3])
            assert got.tobytes() == run(rows, np.ascontiguousarray(seen.reshape(-1, k)), isa).tobytes()


def _random(kind: str, n: int, k: int, rng: np.random.Generator) -> Blocks:
    from bench.blocks import random_blocks

    return random_blocks(dtype(kind), (n, k), rng)


@pytest.mark.parametrize("channels, groups", ((24, 1), (24, 24), (24, 2)))
@pytest.mark.parametrize("stride, padding", ((1, 1), (2, (1, 0)), (3, 0)))
def test_sequences(channels, groups, stride, padding):
    rng = rng_of((channels, groups, stride))
    x, w = rng.standard_normal((2, 50, channels)).astype(np.float32), rng.standard_normal((48 if groups < 24 else 24, channels // groups, 3))
    ends = (padding, padding) if isinstance(padding, int) else padding
    want = last(F.conv1d(F.pad(first(x), ends), torch.tensor(w), None, stride, 0, 1, groups))
    flat = np.ascontiguousarray(w.transpose(0, 2, 1)).reshape(len(w), -1).astype(np.float32)
    everywhere(lambda t: ops.conv1d(t, flat, kernel=3, stride=stride, padding=padding, groups=groups), x, want)


def test_sizes_that_are_known_when_it_runs():
    """Pictures of a batch, and frames of a sequence whose number is halved."""
    rng, g = rng_of("dims"), Graph()
    w = rng.standard_normal((8, 12)).astype(np.float32)
    n, t = Dim("n", 5), Dim("t", 20)
    pictures, frames = g.input("pictures", (n, 6, 5, 4)), g.input("frames", (1, 2 * t, 4))
    found = ops.conv2d(pictures, np.tile(w, 3), kernel=(3, 3), padding=(1, 1)), ops.conv1d(frames, w, kernel=3, stride=2, padding=1)
    assert found[0].shape == (n, 6, 5, 8) and found[1].shape == (1, t, 8)
    program = g.compile(found, strict=True)
    for pictures, half in ((1, 3), (5, 20), (2, 1)):
        x, y = (rng.standard_normal(s).astype(np.float32) for s in ((pictures, 6, 5, 4), (1, 2 * half, 4)))
        a, b = program.run(pictures=x, frames=y)
        np.testing.assert_allclose(a, ops.conv2d(x, np.tile(w, 3), kernel=(3, 3), padding=(1, 1)), atol=1e-4)
        np.testing.assert_allclose(b, ops.conv1d(y, w, kernel=3, stride=2, padding=1), atol=1e-4)
    with pytest.raises(ShapeError, match="run-time axis"):
        ops.conv1d(frames, w, kernel=3, stride=2)


@SLOW
@given(pairs(1, 14), pairs(1, 4), pairs(1, 3), st.integers(1, 40), st.booleans(), st.booleans(), seeds)
def test_pooling(size, kernel, stride, c, ceil, count, seed):
    rng = np.random.default_rng(seed)
    padding = tuple(int(rng.integers(0, k // 2 + 1)) for k in kernel)
    size = tuple(max(s, k) for s, k in zip(size, kernel))
    x = rng.standard_normal((2, *size, c)).astype(np.float32)
    want = last(F.max_pool2d(first(x), kernel, stride, padding, 1, ceil))
    everywhere(lambda t: ops.max_pool2d(t, kernel=kernel, stride=stride, padding=padding, ceil=ceil), x, want, 0)
    want = last(F.avg_pool2d(first(x), kernel, stride, padding, ceil, count))
    everywhere(lambda t: ops.avg_pool2d(t, kernel=kernel, stride=stride, padding=padding, ceil=ceil, count_padding=count), x, want)


@SLOW
@given(pairs(1, 14), pairs(1, 9), st.integers(1, 300), seeds)
def test_adaptive_pooling(size, to, c, seed):
    x = np.random.default_rng(seed).standard_normal((2, *size, c)).astype(np.float32)
    everywhere(lambda t: ops.adaptive_avg_pool2d(t, size=to), x, last(F.adaptive_avg_pool2d(first(x), to)))
    everywhere(lambda t: ops.adaptive_pool2d(t, kind="max", size=to), x, last(F.adaptive_max_pool2d(first(x), to)), 0)


def test_the_largest_keeps_nan_and_infinities():
    x = np.zeros((1, 2, 6, 20), np.float32)
    x[0, 0, 1], x[0, 1, 2], x[0, :, 4:] = np.nan, np.inf, -np.inf
    for isa in isas():
        got = run(lambda t: ops.max_pool2d(t, kernel=(2, 2)), x, isa)[0, 0]
        assert np.isnan(got[0]).all() and (got[1] == np.inf).all() and (got[2] == -np.inf).all()


@SLOW
@given(pairs(1, 17), pairs(1, 17), st.integers(1, 40), st.sampled_from(["bilinear", "bicubic"]), st.sampled_from(["", "corners", "antialias"]),
       seeds)
def test_resizing(size, to, c, kind, how, seed):
    if how == "antialias":
        size = size[0], max(2, size[1])                      # torch 2's antialias takes one row for all of a picture that is one pixel wide
    x = np.random.default_rng(seed).standard_normal((2, *size, c)).astype(np.float32)
    flags = {"align_corners": how == "corners", "antialias": how == "antialias"}
    want = last(F.interpolate(first(x), to, mode=kind, **flags))
    everywhere(lambda t: ops.resize2d(t, kind=kind, size=to, **flags), x, want, 4e-6)


@pytest.mark.parametrize("to", ((10, 14), (5, 7), (2, 3), (20, 7)))
def test_nearest(to):
    x = rng_of(to).standard_normal((1, 5, 7, 20)).astype(np.float32)
    everywhere(lambda t: ops.resize2d(t, kind="nearest", size=to), x, last(F.interpolate(first(x), to, mode="nearest")), 0)


@SLOW
@given(st.sampled_from([(1, 7), (3, 3), (2, 16), (4, 12), (8, 20)]), st.lists(st.integers(1, 20), max_size=2), seeds)
def test_group_norm(channels, size, seed):
    rng, (groups, each) = np.random.default_rng(seed), channels
    x = (3 * rng.standard_normal((2, *size, groups * each)) + 1).astype(np.float32)
    w, b = rng.standard_normal((2, groups * each)).astype(np.float32)
    if each * int(np.prod(size)) == 1:                       # torch refuses one number a group
        return
    want = last(F.group_norm(first(x), groups, torch.tensor(w).double(), torch.tensor(b).double(), 1e-5))
    everywhere(lambda t: ops.group_norm(t, w, b, groups=groups, eps=1e-5), x, want, 1e-5)


def test_rows_of_length_one():
    x = rng_of("l2").standard_normal((5, 77)).astype(np.float32)
    x[3] = 0
    everywhere(ops.l2_norm, x, F.normalize(torch.tensor(x).double(), dim=-1).numpy())


def test_what_does_not_fit_is_said():
    x = np.zeros((1, 5, 5, 8), np.float32)
    t = make_leaf("input", "x", x.shape, dtype("F32"))
    w = np.zeros((8, 72), np.float32)
    for words, call in (
        ("72 columns", lambda: ops.conv2d(t, w, kernel=(2, 3))),
        ("do not fit", lambda: ops.conv2d(t, np.zeros((8, 392), np.float32), kernel=(7, 7))),
        ("3 groups", lambda: ops.conv2d(t, w, kernel=(3, 3), groups=3)),
        ("'stride'", lambda: ops.conv2d(t, w, kernel=(3, 3), stride=(0, 1))),
        ("'padding'", lambda: ops.conv2d(t, w, kernel=(3, 3), padding=(1, 1, 1))),
        ("without a pixel", lambda: ops.max_pool2d(t, kernel=(2, 2), padding=(2, 0))),
        ("'size'", lambda: ops.resize2d(t, kind="bilinear", size=(0, 2))),
        ("align_corners", lambda: ops.resize2d(t, kind="bilinear", size=(2, 2), align_corners=True, antialias=True)),
        ("groups", lambda: ops.group_norm(t, groups=3, eps=1e-5)),
        ("must be known", lambda: ops.adaptive_avg_pool2d(_tall(), size=(1, 1))),
    ):
        with pytest.raises(ShapeError, match=words):
            call()


def _tall() -> Tensor:
    return make_leaf("input", "x", (1, Dim("h", 5), 5, 8), dtype("F32"))
