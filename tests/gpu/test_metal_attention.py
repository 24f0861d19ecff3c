"""`attention` on Metal, emulated or on an Apple GPU: the tests of the CPU's kernel, and what only this one has: rows that are split over
chunks of keys or not, and matrices that several queries share.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import test_kernels
from hypothesis import given, settings
from metal_kernels import MetalKernels
from op_cases import bits, CACHES, close, KernelError, loaded, reference, rng_of, stored, Value
from test_kernels import (  # noqa: F401
    attend, ATTENTION, attention_cases, SLOW, test_a_masked_key_contributes_nothing_whatever_it_holds,
    test_a_nan_of_a_query_or_value_stays_there, test_bytes_take_no_cells_sinks_or_cap, test_cells_that_no_row_needs_may_be_unset,
    test_empty_intervals_give_zeros, test_sequences_do_not_see_each_other,
    test_sinks_take_probability,
)

from pyengine.backends import backend


@pytest.fixture(scope="session")
def kernels(metal_device: str) -> MetalKernels:
    """Kernels of the device that is tested."""
    return MetalKernels(backend(metal_device).device)


def compare(kernels: MetalKernels, inputs: list[Value], params: dict[str, Any]) -> None:
    """Against the reference; bit for bit for a row alone and for some rows in another order."""
    q, _, v, lo, hi, cells, seq, sinks = inputs
    (want,) = reference(ATTENTION, inputs, params)
    got = attend(kernels, inputs, **params)
    # a score's error is that of its sum; it enters the result through exp, times the spread of the values
    spread = 1 + np.abs(params["scale"]) * np.abs(q).max(initial=0) * np.sqrt(q.shape[2]) * 4
    close(got, want, 3e-7 * spread, np.abs(loaded(v)[np.isfinite(loaded(v))]).max(initial=0), "attention")
    m = len(q)
    for rows in ([m - 1], rng_of(got.shape).permutation(m)[: m // 2 + 1]) if m else ():
        part = [np.ascontiguousarray(q[rows]), *inputs[1:3], lo[rows], hi[rows], cells, None if seq is None else seq[rows], sinks]
        assert bits(attend(kernels, part, **params)) == bits(got[rows]), f"rows {rows} differ in other company"


@settings(SLOW, max_examples=25)
@given(attention_cases())
def test_any_case(kernels: MetalKernels, case: Any) -> None:
    inputs, params = case
    compare(kernels, inputs, params)


@pytest.mark.parametrize("e,f,cache", [(256, 256, "F16"), (192, 128, "BF16"), (250, 129, "F32"), (256, 256, "Q8_0"), (256, 160, "Q4_1"),
                                       (512, 512, "F16"), (512, 480, "Q8_0"), (288, 512, "Q4_1")])
@pytest.mark.parametrize("m", [2, 20])
def test_wide_heads(kernels: MetalKernels, e: int, f: int, cache: str, m: int) -> None:
    """Up to 512 elements, also keys wider than values; more heads to a key/value head than a matrix has rows; more chunks than one."""
    rng = rng_of(("wide", e, f, cache, m))
    q = rng.standard_normal((m, 12, e)).astype(np.float32)
    k, v = (stored(rng.standard_normal((1, 600, n)), cache) for n in (e, f))
    hi = (600 - m + 1 + np.arange(m)).astype(np.int32)
    compare(kernels, [q, k, v, np.full(m, 3, np.int32), hi, rng.permutation(600).astype(np.int32)[None], None, None], {"scale": e**-0.5})


def test_a_head_wider_than_512_is_refused(kernels: MetalKernels) -> None:
    q, k, one = np.ones((1, 1, 520), np.float32), np.ones((1, 4, 520), np.float32), np.ones(1, np.int32)
    with pytest.raises(KernelError, match="at most 512"):
        attend(kernels, [q, k, k, one - 1, one, None, None, None])


@pytest.mark.slow
@settings(SLOW, max_examples=300)
@given(attention_cases())
def test_many_cases(kernels: MetalKernels, case: Any) -> None:
    inputs, params = case
    compare(kernels, inputs, params)


@pytest.mark.parametrize("cache,window", [
    pytest.param(cache, window, marks=() if (cache, window) in (("F16", None), ("Q4_0", 100)) else pytest.mark.slow)
    for cache in CACHES for window in (None, 100)])
def test_prefill_in_any_chunks_is_one_pass(kernels: MetalKernels, cache: str, window: int | None) -> None:
    """Chunks of 1 to 3 rows are split over keys, those of 50 and more are not."""
    test_kernels.test_prefill_in_any_chunks_is_one_pass(kernels, cache, window)
