"""Caches whose keys are quantized by channel, on Metal, emulated or on an Apple GPU: the tests of the CPU's kernels."""

from __future__ import annotations

import pytest
from metal_kernels import MetalKernels
from test_groups import (  # noqa: F401
    test_attention_to_groups, test_declared_cases_of_plain_numbers, test_groups_have_the_bytes_of_the_reference,
    test_groups_that_are_none_are_refused, test_merged_parts_are_one_softmax, test_sums_of_what_groups_get, test_wide_heads_in_several_chunks,
)

from pyengine.backends import backend


@pytest.fixture(scope="module")
def kernels(metal_device: str) -> MetalKernels:
    """Kernels of the device that is tested."""
    return MetalKernels(backend(metal_device).device)
