"""Tiles of SME and products of SVE under qemu: the bits of i8mm for every number of rows and steps, the length of vectors, and the state of
the processor."""

from __future__ import annotations

from collections.abc import Sequence

import crossbuild
import numpy as np
import pytest
from crossbuild import Call, LENGTHS, SVE, SVL
from op_cases import rng_of
from test_linear_kernels import FLOATS, QUANTIZED, Matrix, rows_of
from test_neon import arm, linear_call, needs_instruction_set, results_of  # noqa: F401  arm: a fixture

FEW = (1, 2, 3, 4, 5, 7)
ROWS = (15, 16, 17, 31, 32, 48, 49, 64, 65, 130, 300)                 # a tile has 16 rows, or 64 of floats; a block 256


@pytest.fixture
def sme(arm: str) -> str:  # noqa: F811
    """The target, which has the instruction set."""
    needs_instruction_set(arm, "sme")
    return arm


def outputs(target: str, isa: str, threads: int, calls: Sequence[Call], cpu: str = LENGTHS) -> list[bytes]:
    return [results_of(call, done)[0].tobytes() for call, done in zip(calls, crossbuild.run(target, isa, threads, calls, cpu=cpu), strict=True)]


def calls_of(name: str) -> list[Call]:
    """Products with one format: odd numbers of rows, of outputs and of steps; several slices of k; a matrix in its file's layout."""
    rng = rng_of(("sme", name))
    unit = 0 if name in FLOATS else 256 if name.endswith(("_K", "_XS")) else 32
    sizes = [(1, unit or 5, (16, 37)), (49, 5 * unit or 333, ROWS), (17, 9 * unit or 16, (33,)), (40, 4096 + (unit or 77), (19, 64)),
             (16, 12288, (16, 20))]
    calls = []
    for n, k, rows in sizes:
        w, x = Matrix(rng, name, n, k), rows_of(rng, max(rows), k)
        calls += [linear_call(x[:m], [w]) for m in rows]
        calls.append(linear_call(x[: min(rows)], [w], packed=False))
    return calls


@pytest.mark.parametrize("name", [*QUANTIZED, *FLOATS])
def test_sme_has_the_bits_of_i8mm(sme: str, name: str) -> None:
    """On one thread all tiles of integers are SME's, on three those of the first."""
    calls = calls_of(name)
    want = outputs(sme, "i8mm", 1, calls)
    for threads in (1, 3):
        assert outputs(sme, "sme", threads, calls) == want


@pytest.mark.parametrize("name", [*QUANTIZED, *FLOATS])
def test_sve256_has_the_bits_of_i8mm(arm: str, name: str) -> None:  # noqa: F811
    needs_instruction_set(arm, "sve256")
    rng, unit = rng_of(("sve", name)), 256 if name.endswith(("_K", "_XS")) else 32
    calls = []
    for n, k in ((1, unit), (49, 5 * unit), (17, 4096 + unit)):
        w, x = Matrix(rng, name, n, k), rows_of(rng, max(FEW), k)
        calls += [linear_call(x[:m], [w]) for m in FEW]
    want = outputs(arm, "i8mm", 1, calls)
    for threads in (1, 3):
        assert outputs(arm, "sve256", threads, calls) == want


@pytest.mark.parametrize("bits", [128, 256, 512, 1024, 2048])
def test_vectors_of_other_lengths_are_refused(sme: str, bits: int) -> None:
    """In streaming mode, and of SVE outside of it; i8mm is there whatever they are."""
    have = crossbuild.instruction_sets(sme, f"{SVL.format(bits // 8)},{SVE.format(bits // 8)}")
    assert ("sme" in have) == (bits == 512) and ("sve256" in have) == (bits == 256) and "i8mm" in have


def test_ordinary_code_needs_no_sve(sme: str) -> None:
    """As on Apple's processors: an instruction of SVE outside of streaming mode would end the program."""
    cpu = f"sve=off,{SVL.format(64)}"
    if crossbuild.emulator_version(crossbuild.TARGETS[sme]) < (10, 1):
        pytest.skip("needs QEMU 10.1 or newer, which has SME without SVE")
    assert "sme" in crossbuild.instruction_sets(sme, cpu)
    for name in ("Q4_0", "Q6_K", "F16"):
        calls = calls_of(name)
        assert outputs(sme, "sme", 3, calls, cpu) == outputs(sme, "i8mm", 1, calls)


@pytest.mark.parametrize("name", ["Q4_K", "F32"])
def test_matrix_registers_of_a_caller_are_left_alone(sme: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread whose caller keeps something in ZA takes i8mm's tiles; the runner looks at the registers' state afterwards."""
    rng = rng_of(("sme za", name))
    calls = [linear_call(rows_of(rng, 40, 512), [Matrix(rng, name, 33, 512)])]
    want = outputs(sme, "i8mm", 1, calls)
    monkeypatch.setenv("RUNNER_ZA", "1")
    for threads in (1, 3):
        assert outputs(sme, "sme", threads, calls) == want


def test_values_that_are_not_numbers_stay_in_their_row(sme: str) -> None:
    rng = rng_of("sme hostile")
    for name in ("Q4_K", "Q8_0", "F32"):
        w, x = Matrix(rng, name, 40, 512), rows_of(rng, 64, 512)
        spoiled = x.copy()
        spoiled[0, 77], spoiled[37, 0] = np.nan, np.inf
        clean, got = (results_of(call, crossbuild.run(sme, "sme", 1, [call])[0])[0] for call in (linear_call(x, [w]), linear_call(spoiled, [w])))
        assert not np.isfinite(got[[0, 37]]).any()
        kept = [i for i in range(64) if i not in (0, 37)]
        assert got[kept].tobytes() == clean[kept].tobytes()
