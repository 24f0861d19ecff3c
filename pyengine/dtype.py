"""Element types of tensors: plain numbers and the block formats of GGUF, with ggml's numbers.

A block format stores `block` consecutive elements of a row in `nbytes` bytes (quantized values and their scales);
a plain type is a block of one. Ids and sizes are those of ggml (`ggml.h: enum ggml_type`, `ggml-common.h`).
"""

from __future__ import annotations

import numpy as np

from pyengine.errors import ShapeError, UnsupportedModelError
from pyengine.records import NamedTuple

PACKED_BIT = 256  # id of a packed format = id of the format + PACKED_BIT; every id of ggml is far below
OWN = 512         # formats of ours, which only caches have, begin here
_PACKED_SUFFIX = ":packed"


class DType(NamedTuple):
    """How elements of one type lie in memory.

    name    ggml's name: "F32", "Q4_K"; a packed form appends ":packed"
    id      ggml's number, as GGUF files carry it; a packed form adds 256 and never stands in a file
    block   elements in one block: rows are whole numbers of blocks
    nbytes  bytes of one block
    numpy   element type of a NumPy array over the same bytes, None for block formats; BF16 shows its bits as uint16
    """

    name: str
    id: int
    block: int
    nbytes: int
    numpy: np.dtype | None

    def size(self, n_elements: int) -> int:
        """Return the bytes of `n_elements` consecutive elements. Raises ShapeError unless they are whole blocks."""
        if n_elements < 0 or n_elements % self.block:
            raise ShapeError(f"{self.name}: {n_elements} elements are not a whole number of blocks of {self.block}")
        return n_elements // self.block * self.nbytes

    @property
    def is_packed(self) -> bool:
        return bool(self.id & PACKED_BIT)

    @property
    def in_files(self) -> bool:
        """Whether files may have it; the others are forms in memory only."""
        return self.id < PACKED_BIT

    @property
    def by_channel(self) -> bool:
        """Whether it holds keys in blocks of one channel each."""
        return self.name in BY_CHANNEL

    @property
    def packed(self) -> DType:
        """The same format with 16 rows interleaved block by block, as kernels read it; same block and bytes."""
        return _BY_ID[self.id | PACKED_BIT]

    @property
    def unpacked(self) -> DType:
        """The format as files carry it: the inverse of `packed`."""
        return _BY_ID[self.id & ~PACKED_BIT]

    def __str__(self) -> str:
        return self.name


# name, id, elements in a block, bytes of a block, NumPy's element type
_TABLE = (
    ("F32", 0, 1, 4, "<f4"),
    ("F16", 1, 1, 2, "<f2"),
    ("Q4_0", 2, 32, 18, None),
    ("Q4_1", 3, 32, 20, None),
    ("Q5_0", 6, 32, 22, None),
    ("Q5_1", 7, 32, 24, None),
    ("Q8_0", 8, 32, 34, None),
    ("Q8_1", 9, 32, 40, None),  # never in files; as in gguf-py and csrc/quants.h, while ggml now has 36
    ("Q2_K", 10, 256, 84, None),
    ("Q3_K", 11, 256, 110, None),
    ("Q4_K", 12, 256, 144, None),
    ("Q5_K", 13, 256, 176, None),
    ("Q6_K", 14, 256, 210, None),
    ("Q8_K", 15, 256, 292, None),
    ("IQ2_XXS", 16, 256, 66, None),
    ("IQ2_XS", 17, 256, 74, None),
    ("IQ3_XXS", 18, 256, 98, None),
    ("IQ1_S", 19, 256, 50, None),
    ("IQ4_NL", 20, 32, 18, None),
    ("IQ3_S", 21, 256, 110, None),
    ("IQ2_S", 22, 256, 82, None),
    ("IQ4_XS", 23, 256, 136, None),
    ("I8", 24, 1, 1, "i1"),
    ("I16", 25, 1, 2, "<i2"),
    ("I32", 26, 1, 4, "<i4"),
    ("I64", 27, 1, 8, "<i8"),
    ("F64", 28, 1, 8, "<f8"),
    ("IQ1_M", 29, 256, 56, None),
    ("BF16", 30, 1, 2, "<u2"),
    ("TQ1_0", 34, 256, 54, None),
    ("TQ2_0", 35, 256, 66, None),
    ("MXFP4", 39, 32, 17, None),
    ("NVFP4", 40, 64, 36, None),
    ("Q1_0", 41, 128, 18, None),
)


# The formats that only caches have, which csrc/quants.h draws. Those by channel hold keys: what stands in one cell of a head is a part of
# a group of GROUP neighbouring cells, which are whole blocks of one channel each.
_CACHE_TABLE = (
    ("Q2_1", OWN, 32, 12, None),
    ("Q4_1_CHANNELS", OWN + 1, 32, 20, None),
    ("Q2_1_CHANNELS", OWN + 2, 32, 12, None),
)
GROUP = 32
BY_CHANNEL = {"Q4_1_CHANNELS": "Q4_1", "Q2_1_CHANNELS": "Q2_1"}       # and the format of a channel's block


class PackedForm(NamedTuple):
    """How 16 rows of a format lie interleaved for kernels; csrc/cpu/pack.h draws it. Bytes are of 16 rows.

    unit    blocks whose heads stand together, so that heads fill whole cache lines
    head    bytes of the head of a block: scales of the whole block
    body    bytes of its body: codes, and scales of parts of the block; of plain numbers, all
    steps   how weights w follow from codes u in steps of 32, with a scale s: "zero" s (u - z), "offset" s u + o;
            "halves_zero" and "halves_offset" where s and o change every 16; None for plain numbers
    zero    z; codes are below 128 unless it is 128
    """

    unit: int
    head: int
    body: int
    steps: str | None
    zero: int


# The formats that have a packed form: their weights are multiplied as they are packed, all others as floats.
PACKED_FORMS = {
    "Q4_0": PackedForm(2, 32, 256, "zero", 8),
    "Q4_1": PackedForm(1, 64, 256, "offset", 0),
    "Q5_0": PackedForm(2, 32, 320, "zero", 16),
    "Q5_1": PackedForm(1, 64, 320, "offset", 0),
    "Q8_0": PackedForm(2, 32, 512, "zero", 128),
    "IQ4_NL": PackedForm(2, 32, 256, "zero", 128),
    "MXFP4": PackedForm(4, 16, 256, "zero", 12),
    "Q2_K": PackedForm(1, 320, 1024, "halves_offset", 0),
    "Q3_K": PackedForm(2, 32, 1728, "halves_zero", 4),
    "Q4_K": PackedForm(1, 256, 2048, "offset", 0),
    "Q5_K": PackedForm(1, 256, 2560, "offset", 0),
    "Q6_K": PackedForm(2, 32, 3328, "halves_zero", 32),
    "IQ4_XS": PackedForm(1, 128, 2048, "zero", 128),
    "F32": PackedForm(1, 0, 64, None, 0),
    "F16": PackedForm(1, 0, 32, None, 0),
    "BF16": PackedForm(1, 0, 32, None, 0),
}

# Numbers that older files carry and that ggml no longer reads.
REMOVED = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
           36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}

DTYPES = tuple(DType(name, id, block, nbytes, None if numpy is None else np.dtype(numpy))
               for name, id, block, nbytes, numpy in _TABLE)
CACHE_DTYPES = tuple(DType(*row) for row in _CACHE_TABLE)
_PACKED = tuple(DType(t.name + _PACKED_SUFFIX, t.id | PACKED_BIT, t.block, t.nbytes, t.numpy) for t in DTYPES)
_BY_ID = {t.id: t for t in DTYPES + _PACKED + CACHE_DTYPES}
_BY_NAME = {t.name.casefold(): t for t in DTYPES + _PACKED + CACHE_DTYPES}


def dtype(key: str | int) -> DType:
    """Return the dtype with this name (in any case: "Q4_K", "f16") or this number of ggml.

    Raises: UnsupportedModelError naming what was asked for.
    """
    if isinstance(key, str):
        found = _BY_NAME.get(key.casefold())
        if found is None:
            import difflib  # for errors only

            near = difflib.get_close_matches(key.upper(), [t.name for t in DTYPES], n=3)
            raise UnsupportedModelError(f"no dtype is named {key!r}" + (f"; near: {', '.join(near)}" if near else ""))
        return found
    found = _BY_ID.get(key)
    if found is None:
        was = f": it was {REMOVED[key]}, which GGUF has dropped; convert the model again" if key in REMOVED else ""
        raise UnsupportedModelError(f"no dtype has the number {key}{was}")
    return found


F32, F16, BF16, F64 = dtype("F32"), dtype("F16"), dtype("BF16"), dtype("F64")
I8, I16, I32, I64 = dtype("I8"), dtype("I16"), dtype("I32"), dtype("I64")
Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1 = map(dtype, ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q8_1"))
Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K = map(dtype, ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"))
