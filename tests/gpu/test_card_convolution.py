"""Convolutions of GPUs against the reference: every declared case, and weights of every kind, packed or as files have them.

Pooling, resizing and group norm have the tests of test_ops.py and test_metal_ops.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from bench.blocks import random_blocks
from pyengine import Graph, ops
from pyengine.dtype import dtype
from pyengine.graph.tensor import make_leaf

DEVICES = ("cuda_device", "metal_device")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device that there is, or its emulator."""
    return request.getfixturevalue(request.param)


def compared(device: str, x: np.ndarray, weight: object, values: np.ndarray, bias: np.ndarray | None, params: dict, share: float) -> None:
    """A convolution on the device is within a share of the largest number of the reference's."""
    g = Graph()
    y = ops.conv2d(g.input("x", x.shape), weight, bias, **params)
    got = g.compile(y, device=device, strict=True).run(x=x)
    want = ops.conv2d(x.astype(np.float64), values.astype(np.float64), bias, **params)
    assert got.shape == want.shape
    assert np.abs(got - want).max(initial=0) <= share * np.abs(want).max(initial=1)


@pytest.mark.parametrize("index", range(len(ops.conv2d.cases)))
def test_declared_cases(device: str, index: int) -> None:
    case, rng = ops.conv2d.cases[index], np.random.default_rng(index)
    x, w, *bias = (rng.standard_normal(case.shapes[name]).astype(np.float32) for name in ("x", "weight", "bias") if name in case.shapes)
    compared(device, x, w, w, bias[0] if bias else None, case.params, 2e-6)


@pytest.mark.parametrize("kind", ("F16", "BF16", "Q8_0", "Q4_K", "TQ1_0"))
@pytest.mark.parametrize("groups", (1, 2, 64))
def test_weights_of_every_kind(device: str, kind: str, groups: int) -> None:
    if groups == 64 and dtype(kind).block > 1:
        pytest.skip("each channel's window is of plain numbers")
    rng, c, o, kernel = np.random.default_rng(1), 64, 64 if groups > 1 else 40, (4, 2)
    k = 8 * c // groups
    if k % dtype(kind).block:
        pytest.skip("windows are no whole blocks")
    x, blocks = rng.standard_normal((2, 6, 5, c)).astype(np.float32), random_blocks(dtype(kind), (o, k), rng)
    weight = make_leaf("constant", "w", (o, k), dtype(kind), blocks)
    params = {"kernel": kernel, "stride": (2, 1), "padding": (1, 1), "groups": groups, "activation": "silu"}
    values = blocks.values().reshape(o, k)
    halves = kind == "F16" and device.startswith("cuda")     # whose products round x to 11 bits
    share = 2e-2 if dtype(kind).block > 1 else 1e-3 if halves else 1e-5
    compared(device, x, weight, values, rng.standard_normal(o).astype(np.float32), params, share)


def test_many_windows_in_parts(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than are gathered at once."""
    rng = np.random.default_rng(2)
    x, w = rng.standard_normal((1, 150, 100, 64)).astype(np.float32), rng.standard_normal((3, 576)).astype(np.float32)
    compared(device, x, w, w, None, {"kernel": (3, 3), "padding": (1, 1)}, 2e-6)
