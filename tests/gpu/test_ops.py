"""CUDA kernels of single ops against the NumPy reference in float64: the tests of the CPU's kernels, on a card or the emulator.

    pytest tests/gpu/test_ops.py -k rms_norm                                   one op
    PYENGINE_EMULATE=checked pytest tests/gpu/test_ops.py -k rms_norm          with every access to memory checked
    pytest tests/gpu/test_ops.py --backend cuda                                on the card
"""

from __future__ import annotations

import pytest
from device_kernels import DeviceKernels
from test_kernels import (  # noqa: F401
    OPS, test_a_cell_outside_the_cache_is_refused, test_a_state_goes_on_in_another_step_with_the_same_bits,
    test_a_state_outside_the_cells_is_refused, test_caches_with_gaps_between_heads_and_cells, test_declared_cases,
    test_experts_of_equal_and_bad_scores, test_reduce_of_nan, test_rope_table_of_large_angles,
    test_rope_table_refuses_an_axis_that_is_not_there, test_rows_of_any_width, test_softmax_of_masked_and_large_values,
    test_unary_of_special_values, test_unary_over_its_range,
)

from pyengine.backends import backend


@pytest.fixture(scope="session")
def kernels(cuda_device: str) -> DeviceKernels:
    """Kernels of the device that is tested."""
    own = backend(cuda_device)
    return DeviceKernels(own.own, own.index)
