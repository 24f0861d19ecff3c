"""The emulator of blocks and warps: its words give what CUDA and PTX say, and faults that are planted in kernels are found where they are."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from emulated import Counted, compiled, counted
from pyengine.backends.building import ROOT
from pyengine.backends.cuda import build
from pyengine.errors import GraphError

HERE = ROOT / "tests" / "gpu" / "emulator"
SOURCES = [HERE / "planted.cu", HERE / "words.cu"]
PLANTED = {m[1]: n for n, line in enumerate(SOURCES[0].read_text().split("\n"), 1) if (m := re.search(r"// <- (\w+)", line))}

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler: install g++")


@pytest.fixture(scope="module", params=["plain", "checked"])
def flat(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """Both forms of a library of this folder's kernels."""
    return library(request.param == "checked")


@pytest.fixture(scope="module")
def checked() -> ctypes.CDLL:
    """The form that watches every access."""
    return library(True)


def library(watched: bool) -> ctypes.CDLL:
    """The kernels beside this file, compiled for the emulator."""
    flat = compiled("emulator", SOURCES, watched)
    flat.planted.restype = flat.word.restype = ctypes.c_char_p
    return flat


def word(flat: ctypes.CDLL, name: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, blocks: int = 1, threads: int = 32) -> np.ndarray:
    """Run a kernel of words.cu; returns what it made of c."""
    arrays = [np.ascontiguousarray(x).copy() for x in (a, b, c)]
    said = flat.word(name.encode(), blocks, threads, (ctypes.c_void_p * 3)(*(x.ctypes.data for x in arrays)),
                     (ctypes.c_int64 * 3)(*(x.nbytes for x in arrays)))
    assert said == b""
    return arrays[2]


# -- planted faults ----------------------------------------------------------------------------------------------------------

WORDS = {
    "missing_barrier": "that no thread of this block has written so far", "missing_barrier_behind": "after the read by thread (0,0,0)",
    "missing_syncwarp": "has written so far", "two_writers": "thread (40,0,0): a race: it writes shared memory at offset 12 after the write by thread (3,0,0)",
    "blocks_race": "block (1,0,0), thread (0,0,0): a race: it writes an allocation of device 0 at offset 0 after the write by thread (0,0,0) of block (0,0,0)",
    "atomic_race": "block (3,0,0), thread (0,0,0): a race: it changes atomically an allocation of device 0 at offset 0 after the read by thread (0,0,0) of block (2,0,0)", "last_block": "which nothing orders",
    "tile_edge": "block (3,0,0), thread (0,0,0): out of bounds: reads 4 bytes at offset 1024 of an allocation of device 0 of 1024 bytes",
    "shared_edge": "thread (63,0,0): out of bounds: reads 4 bytes at offset 256 of 256 bytes of shared memory",
    "shared_size": "shared memory of 256 bytes, but the launch gave 252", "divergent_barrier": "thread (16,0,0): a divergent __syncthreads, while thread 0 waits",
    "missing_lanes": "__shfl_xor_sync with mask ffffffff: not all lanes come, lane 16 waits at __syncthreads",
    "missing_lane_in_mask": "lane 0 reads lane 8, which does not take part", "shared_not_written": "thread (10,0,0): reads 4 bytes of shared memory at offset 20",
    "memory_not_written": "block (3,0,0), thread (63,0,0): reads 4 bytes of an allocation of device 0 at offset 1020 that nobody wrote",
    "misaligned_load": "misaligned: reads 16 bytes at an allocation of device 0 at offset 8",
    "misaligned_store": "misaligned: writes 8 bytes at an allocation of device 0 at offset 4",
    "missing_wait": "an asynchronous copy to it by thread (0,0,0)", "ldmatrix_race": "reads 16 bytes of shared memory",
    "stale_load": "thread (0,0,0): reads an allocation of device 0 at offset 0, which this launch writes at ",
    "host_memory": "which is no memory of the device", "bytes_race": "writes shared memory at offset 10 after the write by thread (9,0,0)"}
NEEDS_NO_WATCH = {"shared_size", "divergent_barrier", "missing_lanes", "missing_lane_in_mask"}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(checked: ctypes.CDLL, name: str) -> None:
    """With its kernel, block, thread and line; and nothing is said about the same kernel without the fault."""
    assert checked.planted(name.encode(), 0) == b""
    said = checked.planted(name.encode(), 1).decode()
    assert said.startswith(f"kernel {name}<true>, block (") and WORDS[name] in said
    assert said.endswith(f"planted.cu:{PLANTED[name]}"), said


@pytest.mark.parametrize("name", sorted(NEEDS_NO_WATCH - {"divergent_barrier"}))
def test_what_would_hang_is_found_by_the_plain_form_too(name: str) -> None:
    flat = library(False)
    assert flat.planted(name.encode(), 0) == b""
    assert WORDS[name] in flat.planted(name.encode(), 1).decode()


def test_a_launch_after_one_that_failed(flat: ctypes.CDLL) -> None:
    """Lanes that stood in the middle of a kernel start anew."""
    for _ in range(3):
        assert flat.planted(b"missing_lanes", 1) != b"" and flat.planted(b"missing_lanes", 0) == b""


# -- words ---------------------------------------------------------------------------------------------------------------------

LANE = np.arange(32)
G, T = LANE // 4, LANE % 4                                     # PTX ISA: groupID and threadID_in_group


def registers(m: np.ndarray, places: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """[32, len(places)] registers of lanes: register i of a lane begins at element places[i] = (row, column) and goes on along the row."""
    per = 4 // m.itemsize
    return np.stack([np.stack([m[r, c + e] for e in range(per)], 1).copy().view(np.uint32)[:, 0] for r, c in places], 1)


def a_registers(m: np.ndarray) -> np.ndarray:
    """Fragments of A [16, k], k in one (8-bit, k = 16) or two parts: rows g and g + 8 of each part."""
    per = 4 // m.itemsize
    return registers(m, [(G + r, per * T + part) for part in range(0, m.shape[1], 4 * per) for r in (0, 8)])


def b_registers(m: np.ndarray) -> np.ndarray:
    """Fragments of B [k, 8]: column g."""
    per = 4 // m.itemsize
    return registers(np.ascontiguousarray(m.T), [(G, per * T + part) for part in range(0, m.shape[0], 4 * per)])


def d_matrix(d: np.ndarray) -> np.ndarray:
    """[16, 8] from the registers [32, 4] of D."""
    out = np.empty((16, 8), d.dtype)
    for i in range(4):
        out[G + i // 2 * 8, 2 * T + i % 2] = d[:, i]
    return out


def d_registers(m: np.ndarray) -> np.ndarray:
    """Registers [32, 4] of a matrix [16, 8]."""
    return np.stack([m[G + i // 2 * 8, 2 * T + i % 2] for i in range(4)], 1)


@pytest.mark.parametrize("name,k", [("mma_f16", 16), ("mma_bf16", 16), ("mma_s8", 32), ("mma_s8_k16", 16)])
def test_mma(flat: ctypes.CDLL, name: str, k: int) -> None:
    rng = np.random.default_rng(k)
    if "s8" in name:
        a, b = (rng.integers(-128, 128, shape).astype(np.int8) for shape in ((16, k), (k, 8)))
        c = rng.integers(-1000, 1000, (16, 8)).astype(np.int32)
        want = a.astype(np.int64) @ b + c
        given = a, b
    else:
        a, b = (rng.standard_normal(shape).astype(np.float16 if name == "mma_f16" else np.float32) for shape in ((16, k), (k, 8)))
        c = rng.standard_normal((16, 8)).astype(np.float32)
        given = a, b
        if name == "mma_bf16":
            given = tuple((x.view(np.uint32) >> 16).astype(np.uint16) for x in (a, b))
            a, b = ((x.astype(np.uint32) << 16).view(np.float32) for x in given)
        want = a.astype(np.float64) @ b.astype(np.float64) + c
    got = d_matrix(word(flat, name, a_registers(given[0]), b_registers(given[1]), d_registers(c)))
    assert np.abs(got - want).max() <= (0 if "s8" in name else 1e-6)


def test_a_wrong_fragment_gives_a_wrong_product(flat: ctypes.CDLL) -> None:
    """Rows g and g + 8 of A exchanged: an emulated mma that read what it likes would not notice."""
    rng = np.random.default_rng(1)
    a, b = rng.integers(-9, 9, (16, 32)).astype(np.int8), rng.integers(-9, 9, (32, 8)).astype(np.int8)
    got = d_matrix(word(flat, "mma_s8", a_registers(a)[:, [1, 0, 3, 2]], b_registers(b), np.zeros((32, 4), np.int32)))
    want = a.astype(np.int32) @ b
    assert (got != want).any() and (got == want[[*range(8, 16), *range(8)]]).all()


@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(flat: ctypes.CDLL, trans: bool) -> None:
    m = np.random.default_rng(2).integers(0, 1 << 16, (4, 8, 8)).astype(np.uint16)
    got = word(flat, f"ldmatrix<{str(trans).lower()}>", m, m[:1, :1], np.zeros((32, 4), np.uint32)).view(np.uint16).reshape(32, 4, 2)
    for i in range(4):
        for e in range(2):
            row, column = (2 * T + e, G) if trans else (G, 2 * T + e)
            assert (got[:, i, e] == m[i, row, column]).all()


def test_cp_async(flat: ctypes.CDLL) -> None:
    x = np.arange(1, 129, dtype=np.uint32)
    got = word(flat, "cp_async", x, x[:1], np.zeros(96, np.uint32)).reshape(3, 32)
    assert (got[0] == np.where(LANE % 3 != 0, x[4 * LANE] + x[4 * LANE + 3], 0)).all()
    assert (got[1] == x[2 * LANE] + x[2 * LANE + 1]).all() and (got[2] == np.where(LANE % 2 == 0, x[LANE], 0)).all()


def test_collectives_and_integers(flat: ctypes.CDLL) -> None:
    rng = np.random.default_rng(3)
    x, y = rng.integers(-1000, 1000, 32).astype(np.int32), rng.integers(0, 64, 32).astype(np.int32)
    got = word(flat, "collectives", x, y, np.full(16 * 32 + 2, -5000, np.int32))
    o = got[:512].reshape(32, 16).T
    assert (o[0] == x[y % 32]).all() and (o[1] == x[LANE // 8 * 8 + y % 8]).all() and (o[2] == x[LANE ^ 5]).all()
    assert (o[3] == np.where(LANE >= 3, x[LANE - 3], x)).all()
    assert (o[4] == np.where(LANE % 16 + 3 < 16, x[np.minimum(LANE + 3, 31)], x)).all()
    assert (o[5] == np.packbits(x & 1, bitorder="little").view(np.int32)).all()
    assert (o[6] == (x == 7).any()).all() and (o[7] == (x > -1000).all()).all() and (o[8] == x.sum()).all()
    assert (o[9] == x.reshape(4, 8).max(1).repeat(8)).all()
    bytes_x, bytes_y = (v.view(np.int8).reshape(32, 4).astype(np.int32) for v in (x, y))
    assert (o[10] == 100 + (bytes_x * bytes_y).sum(1)).all()
    both = np.concatenate([x[:, None], y[:, None]], 1).view(np.uint8)
    sign = np.where(both[:, 3] & 128, 255, 0).astype(np.uint8)                   # selector 0x6b20: bytes 0, 2, the sign of 3, 6
    assert (o[11] == np.stack([both[:, 0], both[:, 2], sign, both[:, 6]], 1).copy().view(np.int32)[:, 0]).all()
    assert [int(v) for v in o[12]] == [(32 - int(v).bit_length() if v >= 0 else 0) + 64 * int(v & 0xffffffff).bit_count() for v in map(int, x)]
    assert [int(v) for v in o[13]] == [(v & -v).bit_length() for v in map(int, x)]
    assert (o[14] == np.rint(x / 2)).all() and (o[15] == 32).all()
    assert got[512] == -5000 + x.sum() and got[513] == x.max()


def test_16_bit_floats(flat: ctypes.CDLL) -> None:
    """All halves as floats, and floats of all sizes rounded to half and bfloat16."""
    bits = np.arange(1 << 16, dtype=np.uint32)
    rng = np.random.default_rng(4)
    floats = rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32)
    halves = bits.astype(np.uint16).view(np.float16)
    with np.errstate(all="ignore"):
        floats[:1 << 15] = rng.standard_normal(1 << 15).astype(np.float32) * np.float32(2.0) ** rng.integers(-30, 18, 1 << 15)
        floats[:20000] = (halves[:20000].astype(np.float32) + halves[1:20001].astype(np.float32)) / 2        # ties
        want_half = floats.astype(np.float16)
    floats[:2], want_half[:2] = (np.nan, np.inf), (np.nan, np.inf)
    got = word(flat, "conversions", floats, bits | bits << 16, np.zeros((1 << 16, 4), np.uint32), blocks=2048)
    nan = np.isnan(floats)
    assert (got[~nan, 0] & 0xffff == want_half[~nan].view(np.uint16)).all() and np.isnan((got[nan, 0] & 0xffff).astype(np.uint16).view(np.float16)).all()
    exact = floats.view(np.uint32).astype(np.uint64)
    assert (got[~nan, 0] >> 16 == ((exact + 0x7fff + (exact >> 16 & 1)) >> 16)[~nan]).all()
    for i in (1, 3):
        assert (got[:, i].view(np.float32) == halves.astype(np.float32))[~np.isnan(halves)].all()
        assert np.isnan(got[:, i].view(np.float32)[np.isnan(halves)]).all()
    assert (got[~nan, 2] == (want_half[~nan].view(np.uint16).astype(np.uint32) | 0x3c00 << 16)).all()


# -- counts ----------------------------------------------------------------------------------------------------------------------

def requests_of(flat: ctypes.CDLL, blocks: int) -> Counted:
    """Counts of the kernel `requests`."""
    x = np.arange(128 * 16, dtype=np.float32)
    with counted(flat) as counts:
        word(flat, "requests", x, np.zeros(1, np.int32), np.zeros(32, np.float32), blocks=blocks)
    return counts


def test_requests_are_counted(checked: ctypes.CDLL) -> None:
    counts = requests_of(checked, 1)
    assert list(counts) == ["requests"]
    k = counts["requests"]
    assert (k.threads, k.shared_bytes, k.different_loads, k.different_stores) == (32, 32 * (33 + 32) * 4, 16 + 32 - 4 + 1, 4)
    assert (k.launches, k.blocks, k.barriers, k.collectives, k.mma) == (1, 1, 0, 1, 0)
    assert (k.loads.requests, k.loads.bytes, k.loads.sectors) == (4, 32 * (4 + 16 + 4 + 4), 4 + 16 + 32 + 1)
    assert (k.stores.requests, k.stores.bytes, k.stores.sectors) == (1, 128, 4) and k.sectors == 57
    assert (k.shared_stores.requests, k.shared_stores.sectors, k.shared_stores.conflicts) == (2, 1 + 32, 31)
    assert (k.shared_loads.requests, k.shared_loads.sectors) == (2 + 1 + 1, 32 + 32 + 16 + 1)
    assert k.conflicts == 31 + 31 + 31 + 15


def test_counts_without_a_kernel(checked: ctypes.CDLL) -> None:
    with pytest.raises(KeyError, match="no kernel 'norm' was launched, only"):
        requests_of(checked, 1)["norm"]
    with pytest.raises(RuntimeError, match="PYENGINE_EMULATE=checked"), counted(library(False)):
        pass


def seconds(flat: ctypes.CDLL, name: str, n: int) -> float:
    """How long a kernel of 256 threads takes for n turns of its loop."""
    x = np.zeros(256, np.float32)
    start = time.process_time()
    word(flat, name, x, np.array([n], np.int32), x, threads=256)
    return time.process_time() - start


@pytest.mark.slow
def test_speed(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints ns for a shuffle of one lane, and for an access in the checked form."""
    with capsys.disabled():
        for form in ("plain", "checked"):
            flat = library(form == "checked")
            for name, per in (("many_shuffles", 1), ("many_accesses", 4)):
                took = (seconds(flat, name, 20000) - seconds(flat, name, 10000)) / (10000 * 256 * per)
                print(f"{form} {name}: {1e9 * took:.1f} ns")
                assert took < 1e-6


# -- the same source for cards ----------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("target", build.TARGETS)
def test_nvcc_compiles_the_same_source(tmp_path: Path, target: str) -> None:
    try:
        compiler = build.nvcc()
    except GraphError as error:
        pytest.skip(str(error))
    done = subprocess.run([compiler, *build.gencode([target]), *build.CUDA_FLAGS, "-x", "cu", "-c", str(SOURCES[1]), "-o", str(tmp_path / "words.o")],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
