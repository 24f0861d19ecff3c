"""Metal kernels of single ops against the NumPy reference in float64: the tests of the CPU's kernels, on a Mac's GPU or the emulator.

    pytest tests/gpu/test_metal_ops.py -k rms_norm                             one op
    PYENGINE_EMULATE=checked pytest tests/gpu/test_metal_ops.py -k rms_norm    with every access to memory checked
    pytest tests/gpu/test_metal_ops.py --backend metal                         on the GPU
"""

from __future__ import annotations

import pytest
from metal_kernels import MetalKernels
from test_kernels import (  # noqa: F401
    CASES, test_a_cell_outside_the_cache_is_refused, test_a_state_goes_on_in_another_step_with_the_same_bits,
    test_a_state_outside_the_cells_is_refused, test_caches_with_gaps_between_heads_and_cells,
    test_cells_are_written_with_the_bits_of_gguf, test_declared_cases as declared_case, test_experts_of_equal_and_bad_scores,
    test_reduce_of_nan, test_rope_table_of_large_angles, test_rope_table_refuses_an_axis_that_is_not_there, test_rows_of_any_width,
    test_softmax_of_masked_and_large_values, test_unary_of_special_values, test_unary_over_its_range,
)

from pyengine.backends import backend


@pytest.fixture(scope="session")
def kernels(metal_device: str) -> MetalKernels:
    """Kernels of the device that is tested."""
    return MetalKernels(backend(metal_device).device)


@pytest.mark.parametrize("name,index", [c for c in CASES if c[0] != "attention"])      # that has a file of its own
def test_declared_cases(kernels: MetalKernels, name: str, index: int) -> None:
    """Every case of an op's declaration, caches of every format, arguments with other strides, results in place."""
    declared_case(kernels, name, index)
