"""Random matrices in every format of weights, as bytes that a file could hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from pyengine.dtype import DType
from pyengine.native.blocks import dequantize

# Bytes of a block at which its float16 scales stand (csrc/quants.h); all other bytes may be anything.
SCALES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
          "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ2_0": (64,)}


@dataclass(frozen=True, eq=False)
class Blocks:
    """Random bytes of a block format that stand for a matrix; a constant's source, as a file's tensor is."""

    name: str
    dtype: DType
    raw: np.ndarray                                                            # uint8 [rows, bytes of a row]

    def view(self) -> np.ndarray:
        return self.raw.reshape(-1)

    def drop(self) -> bool:
        return False

    def values(self, rows: Any = slice(None)) -> np.ndarray:
        """Return the values, float64: dequantized by gguf-py, or where that is not installed by ours, which gives the same bits."""
        if find_spec("gguf") is None:
            return dequantize(np.ascontiguousarray(self.raw[rows]), self.dtype).astype(np.float64)
        import gguf

        return gguf.quants.dequantize(self.raw[rows], gguf.GGMLQuantizationType(self.dtype.id)).astype(np.float64)


def random_blocks(dtype: DType, shape: Sequence[int], rng: np.random.Generator) -> Blocks:
    """Make a random matrix whose products are of moderate size, in any format of `SCALES`, MXFP4, F16, BF16 or F32."""
    n, k = int(np.prod(shape[:-1])), shape[-1]
    if dtype.block == 1:
        x = rng.standard_normal((n, k), np.float32)
        values = (x.view(np.uint32) >> 16).astype(np.uint16) if dtype.name == "BF16" else x.astype(dtype.numpy)
        return Blocks("weight", dtype, values.view(np.uint8).reshape(n, -1))
    raw = rng.integers(0, 256, (n, dtype.size(k)), np.uint8)
    blocks = raw.reshape(-1, dtype.nbytes)
    if dtype.name == "MXFP4":
        blocks[:, 0] = rng.integers(118, 124, len(blocks))                     # exponents of the scale, 127 is 1
    for at in SCALES.get(dtype.name, ()):
        scale = (rng.uniform(0.5, 1.5, len(blocks)) * 2e-3).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return Blocks("weight", dtype, raw)
