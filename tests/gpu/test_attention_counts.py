"""What attention asks of memory on a CUDA card, counted by the checked emulator: a cache's bytes once, in whole sectors; no conflicts.

The first run compiles the checked form of all kernels, which takes minutes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from device_kernels import DeviceKernels
from emulated import counted, Counted
from op_cases import Block, CTensor, rng_of, stored, Value

from pyengine.backends.cuda import build
from pyengine.backends.cuda.library import Library, Memory
from pyengine.dtype import GROUP

pytestmark = pytest.mark.slow
KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]


class Watched(DeviceKernels):
    """Remembers where the tensors of the last call were."""

    held: list[tuple[int, int, Memory]]

    def _copied(self, tensors: Sequence[CTensor]) -> list[tuple[int, int, Memory]]:
        self.held = super()._copied(tensors)
        return self.held

    def address(self, a: Value) -> int:
        """The address on the device of an array of the last call."""
        at = (a.raw if isinstance(a, Block) else a).ctypes.data
        return next(memory.address for start, n, memory in self.held if start <= at < start + n)


@pytest.fixture(scope="module")
def kernels() -> Watched:
    return Watched(Library(build.emulated(True), True))


@pytest.fixture(params=[1 << 30, 0], ids=["floats", "halves"])
def exact(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both kernels of plain numbers, one after the other."""
    monkeypatch.setenv("PYENGINE_CUDA_EXACT_KEYS", str(request.param))
    return request.param > 0


def floats(kind: str, exact: bool) -> bool:
    """Whether queries are for attention of floats."""
    return kind == "F32" or exact


def attend(kernels: Watched, inputs: list[Value], **params: Any) -> Counted:
    """Counts of one call."""
    q, _, v = inputs[:3]
    with counted(ctypes.CDLL(str(kernels.own.path))) as counts:
        kernels.call("attention", inputs, [np.zeros((q.shape[0], q.shape[1] * v.shape[2]), np.float32)], {"scale": 0.1, **params})
    return counts


def bytes_of(c: Value) -> int:
    return (c.raw if isinstance(c, Block) else c).nbytes


def copies(kind: str) -> float:
    """Conflicts of stores, as a share: cells of blocks are copied 8 or 4 bytes a lane and lie apart, so a request over two wraps around."""
    return 0.35 if kind.startswith("Q") else 0.01


@pytest.mark.parametrize("e", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_reads_the_cache_once(kernels: Watched, exact: bool, kind: str, e: int) -> None:
    """One token with 8 heads that share 2: every byte of K and V once for all heads of a group, sectors within 3% of the least."""
    rng = rng_of((kind, e))
    n = 1024
    k, v = (stored(rng.standard_normal((2, n, e)), kind) for _ in range(2))
    q, one = rng.standard_normal((1, 8, e)).astype(np.float32), np.zeros(1, np.int32)
    counts = attend(kernels, [q, k, v, one, one + n, np.arange(n, dtype=np.int32)[None], None, None])
    name = "attend_floats_kernel" if floats(kind, exact) else "attend_few_kernel"
    for c in (k, v):
        loads, stores = counts.buffer(name, kernels.address(c))
        assert stores.bytes == 0
        assert loads.bytes == bytes_of(c)
        assert loads.sectors * 32 <= 1.03 * bytes_of(c), f"{loads.sectors * 32 / bytes_of(c):.3f} of the bytes"
    assert counts[name].shared_loads.conflicts == 0
    assert counts[name].shared_stores.conflicts <= copies(kind) * counts[name].shared_stores.sectors
    tiles, columns = 2 * n // 64, e // 32
    scores, values = (8 * columns * 4, 16 * columns * 2) if kind in ("F16", "BF16") else (8 * columns, 16 * columns * 3)
    assert counts[name].mma == (0 if floats(kind, exact) else tiles * (scores + values + 32))
    merged, _ = counts.buffer("merge_kernel", kernels.address(q))
    assert merged.bytes == 0 and counts["merge_kernel"].blocks == 8


@pytest.mark.parametrize(("m", "group"), [(1, 4), (256, 1)])
@pytest.mark.parametrize(("kind", "v"), [("Q4_1_CHANNELS", "Q4_1"), ("Q2_1_CHANNELS", "Q2_1")])
def test_groups_of_keys_are_read_once(kernels: Watched, exact: bool, kind: str, v: str, m: int, group: int) -> None:
    """Heads that share one, or many rows, over groups anywhere: every byte once for each unit, in whole sectors; neither codes nor floats meet a bank twice."""
    rng, n, e = rng_of((kind, m)), 1024, 128
    groups = rng.permutation(n // GROUP)[:, None] * GROUP + np.arange(GROUP)
    k, values = stored(rng.standard_normal((2, n, e)), kind), stored(rng.standard_normal((2, n, e)), v)
    q, lo = rng.standard_normal((m, 2 * group, e)).astype(np.float32), np.zeros(m, np.int32)
    counts = attend(kernels, [q, k, values, lo, lo + n, groups.reshape(1, n).astype(np.int32), None, None])
    name, units = ("attend_floats_kernel", max(1, m // 32)) if exact else ("attend_few_kernel", 1) if m == 1 else ("attend_many_kernel", m // 128)
    for c in (k, values):
        loads, _ = counts.buffer(name, kernels.address(c))
        assert loads.bytes == units * bytes_of(c) and loads.sectors * 32 <= 1.03 * units * bytes_of(c)
    own = counts[name]
    assert own.shared_loads.conflicts == 0 and own.shared_stores.conflicts <= copies(v) * own.shared_stores.sectors


@pytest.mark.parametrize(("kind", "v"), [("Q4_1_CHANNELS", "Q4_1"), ("Q2_1_CHANNELS", "Q2_1")])
def test_groups_are_read_and_written_once(kernels: Watched, kind: str, v: str) -> None:
    """Of the tokens in full every byte once, in whole sectors; of the groups that are written too, and nothing of others."""
    rng, n, e = rng_of(("write", kind)), 256, 128
    full = [stored(rng.standard_normal((2, n, e)), "F16") for _ in range(2)]
    made = [stored(np.zeros((2, n, e)), kind), stored(np.zeros((2, n, e)), v)]
    source, target = (np.array(cells, np.int32) for cells in ([32, 0, 128, 64], [64, -1, 0, 224]))
    with counted(ctypes.CDLL(str(kernels.own.path))) as counts:
        kernels.call("cache_groups", [*made, *full, source, target], made, {})
    for c in full:
        loads, _ = counts.buffer("cache_groups_kernel", kernels.address(c))
        assert loads.bytes == bytes_of(c) * 3 * GROUP // n and loads.sectors * 32 == loads.bytes
    for c in made:
        _, stores = counts.buffer("cache_groups_kernel", kernels.address(c))
        assert stores.bytes == bytes_of(c) * 3 * GROUP // n
        assert stores.sectors * 32 <= (1 if c is made[0] else 2) * stores.bytes           # values are written cell by cell
    assert counts["cache_groups_kernel"].shared_loads.conflicts == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_shares_its_tiles(kernels: Watched, exact: bool, kind: str) -> None:
    """256 rows that see each other, one head of 128: K and V are read once for each unit, in whole sectors."""
    rng = rng_of(("prompt", kind))
    m = 256
    q, lo = rng.standard_normal((m, 1, 128)).astype(np.float32), np.zeros(m, np.int32)
    k, v = (stored(rng.standard_normal((1, m, 128)), kind) for _ in range(2))
    counts = attend(kernels, [q, k, v, lo, lo + m, None, None, None])
    name, queries = ("attend_floats_kernel", 32) if floats(kind, exact) else ("attend_many_kernel", 128)
    units = m // queries
    assert counts[name].blocks == units
    for c in (k, v):
        loads, _ = counts.buffer(name, kernels.address(c))
        assert loads.bytes == units * bytes_of(c) and loads.sectors * 32 <= 1.03 * units * bytes_of(c)
    assert counts[name].shared_loads.conflicts == 0
    assert counts[name].shared_stores.conflicts <= copies(kind) * counts[name].shared_stores.sectors
    scores, values = (8 * 4 * 4, 16 * 4 * 2) if kind in ("F16", "BF16") else (8 * 4, 16 * 4 * 3)
    assert counts[name].mma == (0 if floats(kind, exact) else m // 16 * (m // 64) * (scores + values + 8))


def test_a_causal_prompt_skips_tiles(kernels: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles behind all rows of a unit are not read, and those behind all of a warp's 16 rows give no work."""
    monkeypatch.setenv("PYENGINE_CUDA_EXACT_KEYS", "0")
    rng = rng_of("causal")
    m = 256
    q, lo = rng.standard_normal((m, 1, 64)).astype(np.float32), np.zeros(m, np.int32)
    k, v = (stored(rng.standard_normal((1, m, 64)), "F16") for _ in range(2))
    counts = attend(kernels, [q, k, v, lo, np.arange(1, m + 1, dtype=np.int32), None, None, None])
    loads, _ = counts.buffer("attend_many_kernel", kernels.address(k))
    assert loads.bytes == bytes_of(k) // 2 + bytes_of(k)
    tiles = sum((16 * warp + 15) // 64 + 1 for warp in range(m // 16))
    assert counts["attend_many_kernel"].mma == tiles * (8 * 2 * 4 + 16 * 2 * 2 + 8)


@pytest.mark.parametrize("cache", ["F16", "Q8_0"])
def test_appending_reads_and_writes_once(kernels: Watched, cache: str) -> None:
    """Each query, key and value is read once (twice with a norm) and written once."""
    rng = rng_of(("append", cache))
    m, h, g, e = 16, 8, 2, 128
    q, k, v = (rng.standard_normal((m, n, e)).astype(np.float32) for n in (h, g, g))
    k_cache, v_cache = (stored(np.zeros((g, m, e), np.float32), cache) for _ in range(2))
    out, table = np.empty_like(q), rng.standard_normal((m, e)).astype(np.float32)
    inputs = [q, k, v, table, k_cache, v_cache, np.arange(m, dtype=np.int32), None, None, None]
    with counted(ctypes.CDLL(str(kernels.own.path))) as counts:
        kernels.call("rope_append", inputs, [out, k_cache, v_cache], {})
    for a in (q, k, v):
        loads, _ = counts.buffer("rope_append_kernel", kernels.address(a))
        assert loads.bytes == a.nbytes and loads.sectors * 32 == a.nbytes
    for a in (out, k_cache, v_cache):
        _, stores = counts.buffer("rope_append_kernel", kernels.address(a))
        assert stores.bytes == bytes_of(a)
