"""Every GGUF format against gguf-py, bit by bit: random bytes as blocks, and data that gguf-py quantized."""

from __future__ import annotations

import cbuild
import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

FORMATS = (
    "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS TQ1_0 TQ2_0 MXFP4 NVFP4 "
    "IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ1_S IQ1_M"
).split()
QUANTIZABLE = "F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 TQ1_0 TQ2_0 MXFP4".split()
CODEBOOKS = tuple(name for name in FORMATS if name[:3] in ("IQ1", "IQ2", "IQ3"))
OK, BAD_SHAPE, BAD_DTYPE, BAD_VALUE, NO_KERNEL = 0, 1, 2, 3, 5


@pytest.fixture(scope="module")
def native():
    with cbuild.native("pe_dequantize_row") as module:
        from pyengine.native.blocks import ensure_codebooks
        from pyengine.dtype import dtype

        ensure_codebooks(dtype(name) for name in FORMATS)
        yield module


def dequantize(native, name: str, raw: np.ndarray, offset: int = 0) -> np.ndarray:
    """Dequantize uint8 `raw` from an address `offset` bytes past an aligned one, into guarded memory."""
    block, nbytes = gguf.GGML_QUANT_SIZES[Q[name]]
    n = raw.size // nbytes * block
    source = np.empty(raw.size + 64 + offset, np.uint8)
    start = -source.ctypes.data % 64 + offset
    source[start : start + raw.size] = raw.ravel()
    out = np.full(n + 2, 12345.0, np.float32)
    pointer = native.ffi.cast("void *", source.ctypes.data + start)
    result = native.ffi.cast("float *", out.ctypes.data + 4)
    assert native.lib.pe_dequantize_row(Q[name], pointer, result, n) == OK
    assert out[0] == out[-1] == 12345.0
    return out[1:-1]


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal bits, signed zeros included; one NaN is as good as another."""
    theirs = np.ascontiguousarray(theirs, np.float32).ravel()
    nan = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours), nan)
    np.testing.assert_array_equal(ours[~nan].view(np.uint32), theirs[~nan].view(np.uint32))


def test_formats_are_all_that_gguf_dequantizes():
    assert set(FORMATS) == {"F32", "F16"} | {qtype.name for qtype in gguf.quants._type_traits}


@pytest.mark.parametrize("name", FORMATS)
def test_random_bytes(native, name):
    rng = np.random.default_rng(list(name.encode()))
    blocks = rng.integers(0, 256, (600, gguf.GGML_QUANT_SIZES[Q[name]][1]), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, Q[name])
    for offset in (0, 1):
        assert_same_bits(dequantize(native, name, blocks, offset), expected)


@pytest.mark.parametrize("name", ("F16", "BF16"))
def test_every_half(native, name):
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    assert_same_bits(dequantize(native, name, halves), gguf.quants.dequantize(halves, Q[name]))


@pytest.mark.parametrize("name, count", (("MXFP4", 1), ("NVFP4", 4)))
def test_every_byte_scale(native, name, count):
    """All 256 scales, each with all sixteen codes."""
    nibbles = np.repeat(np.arange(16, dtype=np.uint8) * 17, count)[: gguf.GGML_QUANT_SIZES[Q[name]][1] - count]
    blocks = np.empty((256, count + nibbles.size), np.uint8)
    blocks[:, :count] = np.arange(256, dtype=np.uint8)[:, None]
    blocks[:, count:] = nibbles
    with np.errstate(over="ignore"):  # MXFP4's largest scales
        expected = gguf.quants.dequantize(blocks, Q[name])
    assert_same_bits(dequantize(native, name, blocks), expected)


@pytest.mark.parametrize("name", QUANTIZABLE)
def test_quantized_data(native, name):
    x = np.random.default_rng(7).standard_normal((32, 512)).astype(np.float32)
    raw = gguf.quants.quantize(x, Q[name]).view(np.uint8)
    y = dequantize(native, name, raw)
    assert_same_bits(y, gguf.quants.dequantize(raw, Q[name]))
    coarse = 1.0 if name.startswith("TQ") else 0.15
    assert np.sqrt(np.mean((y - x.ravel()) ** 2)) < coarse  # the values, not merely agreement on something else


def test_refusals(native):
    out = native.ffi.new("float[256]")
    raw = native.ffi.new("char[1024]")
    call = native.lib.pe_dequantize_row
    assert call(Q.Q4_0, raw, out, 0) == OK
    for n in (-32, -1, 1, 31, 33):
        assert call(Q.Q4_0, raw, out, n) == BAD_SHAPE
    assert call(Q.Q6_K, raw, out, 32) == BAD_SHAPE
    for dtype in (Q.Q8_1, Q.Q8_K, Q.I32, Q.F64, 41, 256 + Q.Q4_0, -1, 4, 10**9):
        assert call(dtype, raw, out, 256) == BAD_DTYPE


def test_codebooks_are_asked_for():
    """A fresh library knows no codebook, takes one of the right size, and then no other."""
    ffi, lib = cbuild.compile_c(("host/dequant.c",), ("host/dequant.h",))
    out, raw = ffi.new("float[256]", [5.0] * 256), ffi.new("char[256]")
    for name in CODEBOOKS:
        if name != "IQ1_M":  # shares IQ1_S's
            assert lib.pe_codebook(Q[name]) == ffi.NULL
            assert lib.pe_dequantize_row(Q[name], raw, out, 256) == NO_KERNEL
        quant = getattr(gguf.quants, name)
        quant.init_grid()
        table = np.ascontiguousarray(quant.grid, np.int8)
        assert lib.pe_set_codebook(Q[name], ffi.from_buffer(table), table.nbytes - 4) == BAD_SHAPE
        assert lib.pe_set_codebook(Q[name], ffi.NULL, table.nbytes) == BAD_SHAPE
        for _ in range(2):
            assert lib.pe_set_codebook(Q[name], ffi.from_buffer(table), table.nbytes) == OK
        assert bytes(ffi.buffer(lib.pe_codebook(Q[name]), table.nbytes)) == table.tobytes()
        assert lib.pe_set_codebook(Q[name], ffi.from_buffer(-table), table.nbytes) == BAD_VALUE
    assert lib.pe_set_codebook(Q.Q4_0, raw, 256) == BAD_DTYPE
    assert list(out) == [5.0] * 256  # refused calls wrote nothing


def test_without_undefined_behaviour(tmp_path):
    """Random blocks of every format under gcc's or clang's undefined-behaviour sanitizer, which exits on a finding."""
    sizes = {int(Q[name]): gguf.GGML_QUANT_SIZES[Q[name]] for name in FORMATS}
    calls = "".join(f"  if (run({dtype}, {size[0]}, {size[1]})) return 1;\n" for dtype, size in sizes.items())
    program = tmp_path / "run.c"
    program.write_text(
        f"""#include "{cbuild.CSRC / "host/dequant.h"}"
#include <stdlib.h>
static int run(int dtype, int elements, int bytes) {{
  static int8_t grid[2048 * 8];
  char *raw = malloc(1 + 64 * bytes);
  float *out = malloc(sizeof(float) * 64 * elements);
  unsigned state = 1;
  for (int size = 1024; size <= 16384; size *= 2) pe_set_codebook(dtype, grid, size);
  for (int i = 0; i <= 64 * bytes; i++) raw[i] = (char)((state = state * 1664525u + 1013904223u) >> 24);
  int bad = pe_dequantize_row(dtype, raw + 1, out, 64 * elements) != PE_OK;
  free(raw);
  free(out);
  return bad;
}}
int main(void) {{
{calls}  return 0;
}}
""",
        encoding="utf-8",
    )
    cbuild.run_sanitized((program, cbuild.CSRC / "host/dequant.c"), tmp_path / "run")
