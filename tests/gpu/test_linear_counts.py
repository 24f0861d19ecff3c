"""What `linear` on CUDA asks of memory, counted by the emulator: the figures that the kernels' rooflines (csrc/cuda/linear*.cu) rest upon.

The checked emulator also watches every access here: bounds, races, memory that nobody wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from emulated import Counted, counted
from linear_on_device import LinearOnDevice
from op_cases import rng_of
from test_linear import matrix, OF_FILE, width
from test_linear_kernels import FLOATS, Matrix, QUANTIZED, rows_of

from pyengine.backends import backend

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kernels() -> Iterator[LinearOnDevice]:
    """Kernels of the emulator in its checked form."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYENGINE_EMULATE", "checked")
        own = backend("cuda-emulated")
        yield LinearOnDevice(own.own, own.index)


def run(kernels: LinearOnDevice, x: np.ndarray, w: list[Matrix], **params: Any) -> tuple[Counted, list[np.ndarray]]:
    """Multiply, and count."""
    with counted() as counts:
        got = kernels.linear(x, w, **params)
    return counts, got


def kernel_of(counts: Counted, ending: str = "") -> str:
    """The kernel of the product: the one beside the preparation of rows."""
    return next(name for name in counts if "prepare" not in name and ending in name)


@pytest.mark.parametrize("name", [*QUANTIZED, *FLOATS])
@pytest.mark.parametrize("m", [1, 7])
def test_few_rows_read_the_weights_once(kernels: LinearOnDevice, name: str, m: int) -> None:
    """Whole sectors, each asked for once, whatever the number of rows; no conflict of banks in what the warps exchange."""
    rng = rng_of(("counts", name, m))
    w = Matrix(rng, name, 64, 2048 if name in QUANTIZED else 512)
    counts, _ = run(kernels, rows_of(rng, m, w.k), [w])
    kernel = kernel_of(counts)
    loads, ideal = counts.buffer(kernel, kernels.address_of(w))[0], w.raw.nbytes
    assert ideal <= loads.sectors * 32 <= 1.03 * ideal, loads.sectors * 32 / ideal
    assert counts[kernel].conflicts == 0
    steps = w.k // 32 * 2
    halves = 2 if name in ("Q2_K", "Q3_K", "Q6_K") else 1
    parts = 2 if name == "BF16" else 1
    assert counts[kernel].mma == (steps * 2 * halves if name in QUANTIZED else 0 if name == "F32" else steps * 2 * 2 * parts)


@pytest.mark.parametrize("name", [*QUANTIZED, *FLOATS])
def test_many_rows_share_the_weights(kernels: LinearOnDevice, name: str) -> None:
    """64 rows of x a block: each block of weights is read once for them (heads of blocks of 256 twice, once for each half)."""
    rng = rng_of(("many", name))
    w = Matrix(rng, name, 128, 512)
    counts, _ = run(kernels, rows_of(rng, 64, w.k), [w])
    kernel = kernel_of(counts)
    loads = counts.buffer(kernel, kernels.address_of(w))[0]
    again = {"Q2_K": 0.239, "Q3_K": 0.164, "Q4_K": 0.112, "Q5_K": 0.091, "Q6_K": 0.105, "IQ4_XS": 0.059}.get(name, 0.03)
    assert loads.sectors * 32 <= (1 + again) * w.raw.nbytes, loads.sectors * 32 / w.raw.nbytes
    if name != "F32":                                                               # transposes x on its way
        assert counts[kernel].conflicts == 0


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "BF16"])
def test_large_blocks_have_no_conflicts(kernels: LinearOnDevice, name: str) -> None:
    """Blocks of 128 x 128 (four multiprocessors are emulated)."""
    rng = rng_of(("large", name))
    w = Matrix(rng, name, 512, 256)
    counts, _ = run(kernels, rows_of(rng, 128, w.k), [w])
    kernel = kernel_of(counts)
    assert counts[kernel].threads == 256 and counts[kernel].blocks == 4 and counts[kernel].conflicts == 0


@pytest.mark.parametrize("name", [*QUANTIZED, *FLOATS, *OF_FILE])
def test_nothing_is_touched_that_should_not_be(kernels: LinearOnDevice, name: str) -> None:
    """Odd sizes with everything that is fused, every kernel: the checked emulator has nothing to say."""
    rng = rng_of(("touched", name))
    packed, k = name not in OF_FILE, width(name, 3)
    w = [matrix(rng, name, n, k) for n in (33, 17)]
    bias, gain = [rng.standard_normal(t.n).astype(np.float32) for t in w], rng.standard_normal(k).astype(np.float32)
    for m in (1, 9, 20, 33):
        kernels.linear(rows_of(rng, m, k), w, bias=bias, norm=gain, norm_eps=1e-5, softcap=3.0, packed=packed)
    pair = [w[0], matrix(rng, name, 33, k)]
    for m in (2, 40):
        kernels.linear(rows_of(rng, m, k), pair, glu="gelu", packed=packed)
    experts = [[matrix(rng, name, 33, k) for _ in range(3)]]
    for m in (1, 5):
        kernels.experts(rows_of(rng, m, k), experts, rng.integers(0, 3, (m, 2)).astype(np.int32), packed=packed)
