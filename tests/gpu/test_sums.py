"""Sums over queries of what attention gives a key, on CUDA cards, emulated or not: the tests of the CPU's kernels, where attention is of floats
and where it is of halves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from device_kernels import DeviceKernels
from test_attention import ALL_FLOATS, ALL_HALVES, border
from test_key_sums import (  # noqa: F401
    test_a_prompt_in_pieces_has_the_sums_of_one, test_sums, test_what_attention_says_of_its_softmax, test_wrong_numbers_are_refused,
)

from pyengine.backends import backend


@pytest.fixture(scope="module", params=[ALL_FLOATS, ALL_HALVES], ids=["floats", "halves"])
def kernels(request: pytest.FixtureRequest, cuda_device: str) -> Iterator[DeviceKernels]:
    """Kernels of the device that is tested; which keys are for halves is read when one runs."""
    own = backend(cuda_device)
    with border(request.param):
        yield DeviceKernels(own.own, own.index)
