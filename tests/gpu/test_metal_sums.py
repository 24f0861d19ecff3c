"""Sums over queries of what attention gives a key, on Metal, emulated or on an Apple GPU: the tests of the CPU's kernels."""

from __future__ import annotations

import pytest
from metal_kernels import MetalKernels
from test_key_sums import (  # noqa: F401
    test_a_prompt_in_pieces_has_the_sums_of_one, test_sums, test_what_attention_says_of_its_softmax, test_wrong_numbers_are_refused,
)

from pyengine.backends import backend


@pytest.fixture(scope="module")
def kernels(metal_device: str) -> MetalKernels:
    """Kernels of the device that is tested."""
    return MetalKernels(backend(metal_device).device)
