"""What the kernels of products and attention on Metal ask of memory, counted by the emulator: weights and cells are read once, in whole sectors.

These bounds are what the kernels' rooflines (csrc/metal/*.metal) rest upon. The checked emulator also watches every access here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from emulated import Counted, counted
from metal_kernels import MetalKernels
from op_cases import rng_of, stored
from test_kernels import attend
from test_linear_kernels import FLOATS, Matrix, QUANTIZED, rows_of
from test_metal_linear import Products

from pyengine.backends import backend
from pyengine.dtype import dtype

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kernels() -> Iterator[MetalKernels]:
    """Kernels of the emulator in its checked form."""
    from pyengine.backends.metal.emulated import EmulatedDevice

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYENGINE_EMULATE", "checked")
        yield MetalKernels(EmulatedDevice())
