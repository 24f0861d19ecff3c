"""What the kernels of products and attention on Metal ask of memory, counted by the emulator: weights and cells are read once.

These bounds are what the kernels' rooflines (csrc/metal/*.metal) rest upon. The checked emulator also watches every access here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from emulated import Counted, counted
from metal_kernels import MetalKernels
from op_cases import rng_of, stored
from test_kernels import attend
from test_linear_kernels import FLOATS, Matrix, QUANTIZED, rows_of
from test_metal_linear import Products

from pyengine.backends.metal import emulated
from pyengine.dtype import GROUP

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kernels() -> Iterator[MetalKernels]:
    """Kernels of the emulator in its checked form."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYENGINE_EMULATE", "checked")
        yield MetalKernels(emulated.EmulatedDevice())


def library() -> ctypes.CDLL:
    """The emulator's library, which counts."""
    return ctypes.CDLL(str(emulated.build(True)))


def traffic(kernels: MetalKernels, counts: Counted, kernel: str, buffer: str) -> Any:
    """What a kernel loaded from one of its buffers in the last run."""
    view = next(one for one in kernels.launches if one.kernel == kernel).buffers[buffer]
    return counts.buffer(f"metal::{kernel}", kernels.memories[view.memory].array.ctypes.data + view.offset)[0]


@pytest.mark.parametrize("name", [*QUANTIZED, *FLOATS])
@pytest.mark.parametrize("m", [1, 7])
def test_few_rows_read_the_weights_once(kernels: MetalKernels, name: str, m: int) -> None:
    """Each byte is asked for once, in whole sectors, whatever the number of rows; the main loop has no conflict of banks."""
    rng = rng_of(("counts", name, m))
    w = Matrix(rng, name, 32, 2048 if name in QUANTIZED else 512)
    with counted(library()) as counts:
        Products(kernels).linear(rows_of(rng, m, w.k), [w])
    kernel = "linear_floats_few" if name in FLOATS else "linear_few"
    loads, ideal = traffic(kernels, counts, kernel, "w0"), w.raw.nbytes
    assert ideal <= loads.sectors * 32 <= 1.03 * ideal, loads.sectors * 32 / ideal
    assert loads.bytes <= 2 * ideal                                            # scales and planes by both halves of a simdgroup
    if name in QUANTIZED:
        assert counts[f"metal::{kernel}"].conflicts == 0


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "BF16"])
def test_many_rows_read_the_weights_once_a_tile(kernels: MetalKernels, name: str) -> None:
    """Two tiles of 32 rows: each reads every byte once; half of the threads read the other half's scales."""
    rng = rng_of(("tiles", name))
    w = Matrix(rng, name, 64, 1024)
    with counted(library()) as counts:
        Products(kernels).linear(rows_of(rng, 64, w.k), [w])
    loads = traffic(kernels, counts, "linear_floats_tiles" if name in FLOATS else "linear_tiles", "w0")
    assert 2 * w.raw.nbytes <= loads.sectors * 32 <= 1.03 * 2 * w.raw.nbytes


@pytest.mark.parametrize("glu", ["none", "silu"])
def test_experts_read_the_weights_of_those_that_are_chosen(kernels: MetalKernels, glu: str) -> None:
    rng = rng_of(("expert counts", glu))
    w = [[Matrix(rng, "Q4_K", 32, 512) for _ in range(6)] for _ in range(1 + (glu != "none"))]
    with counted(library()) as counts:
        Products(kernels).experts(rows_of(rng, 1, 512), w, np.array([[4, 1]], np.int32), glu=glu)
    for i in range(len(w)):
        loads = traffic(kernels, counts, "linear_few", f"w{i}")
        assert 2 * w[i][0].raw.nbytes <= loads.sectors * 32 <= 1.03 * 2 * w[i][0].raw.nbytes


@pytest.mark.parametrize("cache,bound", [("F32", 1.03), ("F16", 1.03), ("BF16", 1.03), ("Q8_0", 1.4), ("Q4_0", 1.6), ("Q4_1", 1.5)])
@pytest.mark.parametrize("m", [1, 16, 32])
def test_cells_are_read_once(kernels: MetalKernels, cache: str, bound: float, m: int) -> None:
    """By one row of a key/value head's heads, and by up to 32 queries that share its keys. Cells in blocks begin and
    end anywhere in a sector: 136 bytes of Q8_0 touch 4.25 to 6."""
    rng, n = rng_of(("cells", cache)), 300
    q = rng.standard_normal((m, 4 if m == 1 else 1, 128)).astype(np.float32)
    k, v = (stored(rng.standard_normal((1, n, 128)), cache) for _ in range(2))
    cells = rng.permutation(n).astype(np.int32)[None]
    with counted(library()) as counts:
        attend(kernels, [q, k, v, np.zeros(m, np.int32), np.full(m, n, np.int32), cells, None, None])
    read = m if 1 < m <= 16 else 1                                              # few rows are split by row
    for name, c in (("k", k), ("v", v)):
        ideal = read * (c.raw.nbytes if hasattr(c, "raw") else c.nbytes)
        loads = traffic(kernels, counts, "attention_chunks", name)
        assert ideal <= loads.sectors * 32 <= bound * ideal, loads.sectors * 32 / ideal


@pytest.mark.parametrize(("kind", "v", "bound"), [("Q4_1_CHANNELS", "Q4_1", 1.5), ("Q2_1_CHANNELS", "Q2_1", 1.7)])
@pytest.mark.parametrize("m", [1, 32])
def test_groups_of_keys_are_read_once(kernels: MetalKernels, kind: str, v: str, bound: float, m: int) -> None:
    """A group of keys by channel is one piece: whole sectors. bound: of values, whose cells of 80 and 48 bytes end anywhere."""
    rng, n = rng_of(("groups", kind)), 320
    q = rng.standard_normal((m, 4 if m == 1 else 1, 128)).astype(np.float32)
    k, values = stored(rng.standard_normal((1, n, 128)), kind), stored(rng.standard_normal((1, n, 128)), v)
    cells = (rng.permutation(n // GROUP)[:, None] * GROUP + np.arange(GROUP)).reshape(1, n).astype(np.int32)
    with counted(library()) as counts:
        attend(kernels, [q, k, values, np.zeros(m, np.int32), np.full(m, n, np.int32), cells, None, None])
    for name, c, most in (("k", k, 1.0), ("v", values, bound)):
        loads = traffic(kernels, counts, "attention_chunks", name)
        assert c.raw.nbytes <= loads.sectors * 32 <= most * c.raw.nbytes, loads.sectors * 32 / c.raw.nbytes
