"""Caches whose keys are quantized by channel, on CUDA cards, emulated or not: the tests of the CPU's kernels."""

from __future__ import annotations

from test_groups import (  # noqa: F401
    test_attention_to_groups, test_declared_cases_of_plain_numbers, test_groups_have_the_bytes_of_the_reference,
    test_groups_that_are_none_are_refused, test_merged_parts_are_one_softmax, test_sums_of_what_groups_get, test_wide_heads_in_several_chunks,
)
from test_sums import kernels  # noqa: F401
