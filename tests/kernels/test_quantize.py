"""Quantizers: error against ggml's on many kinds of numbers, the bytes, the mixtures, and whole files."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import ROOT, real_path
from gguf import GGMLQuantizationType as Q

from converters.quantize import MIXTURES, Facts, choose, quantize_file
from converters.quantize.__main__ import main
from pyengine.dtype import dtype
from pyengine.errors import InvalidModelError, RequestError, ShapeError
from pyengine.files.gguf import GGUFFile, TensorInfo
from pyengine.native.blocks import dequantize, QUANTIZABLE, quantize

BLOCKS = [name for name in QUANTIZABLE if dtype(name).block > 1]


def numbers(kind: str) -> np.ndarray:
    """512 rows of 512 numbers."""
    rng = np.random.default_rng(len(kind))
    normal = rng.standard_normal((512, 512))
    match kind:
        case "normal":
            x = normal
        case "heavy tails":
            x = rng.standard_t(3, (512, 512))
        case "uniform":
            x = rng.uniform(-1, 1, (512, 512))
        case "constant rows":
            x = np.repeat(normal[:, :1], 512, axis=1)
        case "one outlier a row":
            x = 0.02 * normal
            x[np.arange(512), rng.integers(0, 512, 512)] = 5
        case "positive":
            x = abs(normal)
        case "far from zero":
            x = 3 + 0.1 * normal
        case "sparse":
            x = normal * (rng.random((512, 512)) < 0.1)
        case "small":
            x = 1e-6 * normal
    return x.astype(np.float32)


# root mean square error of ggml_quantize_chunk (llama-cpp-python 0.3.36) on numbers(kind); the tests with llama.cpp measure it anew
GGML = {
    "normal": dict(Q8_0=0.0053623, Q4_0=0.085854, Q4_1=0.078273, Q5_0=0.042675, Q5_1=0.037916, IQ4_NL=0.076255,
                   Q2_K=0.29631, Q3_K=0.15104, Q4_K=0.071423, Q5_K=0.036194, Q6_K=0.017747),
    "heavy tails": dict(Q8_0=0.014364, Q4_0=0.21967, Q4_1=0.1717, Q5_0=0.11292, Q5_1=0.082501, IQ4_NL=0.17382,
                        Q2_K=0.60063, Q3_K=0.32514, Q4_K=0.15885, Q5_K=0.080304, Q6_K=0.043789),
    "uniform": dict(Q8_0=0.0021716, Q4_0=0.037559, Q4_1=0.035016, Q5_0=0.018011, Q5_1=0.016969, IQ4_NL=0.036968,
                    Q2_K=0.13458, Q3_K=0.072278, Q4_K=0.031488, Q5_K=0.015935, Q6_K=0.0076504),
    "constant rows": dict(Q8_0=0.0002186, Q4_0=0.0002259, Q4_1=0.0002259, Q5_0=0.0002259, Q5_1=0.0002259, IQ4_NL=0.0002117,
                          Q2_K=0.00020218, Q3_K=0.0002259, Q4_K=0.00019679, Q5_K=0.00020783, Q6_K=0.00022833),
    "one outlier a row": dict(Q8_0=0.0027993, Q4_0=0.0052229, Q4_1=0.011578, Q5_0=0.0050198, Q5_1=0.011199, IQ4_NL=0.012096,
                              Q2_K=0.027934, Q3_K=0.014276, Q4_K=0.0052661, Q5_K=0.0051776, Q6_K=0.0036716),
    "positive": dict(Q8_0=0.0053655, Q4_0=0.085, Q4_1=0.04393, Q5_0=0.042452, Q5_1=0.021237, IQ4_NL=0.074962,
                     Q2_K=0.18862, Q3_K=0.14545, Q4_K=0.042433, Q5_K=0.02083, Q6_K=0.017753),
    "far from zero": dict(Q8_0=0.0072011, Q4_0=0.13015, Q4_1=0.0078636, Q5_0=0.057145, Q5_1=0.0038395, IQ4_NL=0.098213,
                          Q2_K=0.15917, Q3_K=0.10767, Q4_K=0.055617, Q5_K=0.027958, Q6_K=0.024885),
    "sparse": dict(Q8_0=0.00095538, Q4_0=0.015593, Q4_1=0.034749, Q5_0=0.0076616, Q5_1=0.016632, IQ4_NL=0.01719,
                   Q2_K=0.14076, Q3_K=0.022393, Q4_K=0.015699, Q5_K=0.011435, Q6_K=0.0025245),
    "small": dict(Q8_0=9.9984e-07, Q4_0=1.0433e-07, Q4_1=1.646e-07, Q5_0=1.2387e-07, Q5_1=2.8753e-07, IQ4_NL=9.9988e-07,
                  Q2_K=3.5721e-07, Q3_K=9.7666e-07, Q4_K=3.0095e-06, Q5_K=3.0139e-06, Q6_K=1.0007e-06),
}


def rmse(name: str, x: np.ndarray, isa: str | None = None) -> float:
    """Of our quantizer, decoded by gguf-py."""
    decoded = gguf.quants.dequantize(quantize(x, dtype(name), isa), Q[name])
    return float(np.sqrt(np.mean((decoded.astype(np.float64) - x) ** 2)))


@pytest.mark.parametrize("kind", GGML)
@pytest.mark.parametrize("name", BLOCKS)
def test_error_is_at_most_ggmls(name: str, kind: str) -> None:
    assert rmse(name, numbers(kind)) <= GGML[kind][name] * 1.0001     # five digits are stored


@pytest.mark.parametrize("name", ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"))
def test_no_block_is_worse_than_gguf_pys(name: str) -> None:
    for kind in GGML:
        x = numbers(kind)
        theirs = gguf.quants.quantize(x, Q[name])
        ours = quantize(x, dtype(name))
        if name == "Q8_0":
            np.testing.assert_array_equal(ours, theirs)
        error = [np.square(gguf.quants.dequantize(q, Q[name]).astype(np.float64) - x).reshape(-1, 32).sum(1)
                 for q in (ours, theirs)]
        assert (error[0] <= error[1] * 1.0001 + 1e-30).all(), kind


@pytest.mark.parametrize("name", ("F16", "BF16"))
def test_halves_are_gguf_pys(name: str) -> None:
    x = numbers("heavy tails")[:, :37] * 100                                 # no whole vectors
    np.testing.assert_array_equal(quantize(x, dtype(name)), gguf.quants.quantize(x, Q[name]).view(np.uint8).reshape(512, 74))


@pytest.mark.parametrize("name", BLOCKS)
def test_instruction_sets_agree(name: str) -> None:
    x = numbers("heavy tails")[:8]
    want = quantize(x, dtype(name))
    found = 0
    for isa in ("avx512", "avx2", "sme", "sve256", "i8mm", "neon"):
        try:
            same = quantize(x, dtype(name), isa)
        except RequestError:                                                 # not on this machine
            continue
        np.testing.assert_array_equal(same, want)
        found += 1
    assert rmse(name, x, "generic") == pytest.approx(rmse(name, x), rel=1e-3)
    if not found:
        np.testing.assert_array_equal(quantize(x, dtype(name), "generic"), want)


@pytest.mark.parametrize("name", QUANTIZABLE)
def test_a_block_depends_on_itself_alone(name: str) -> None:
    kind = dtype(name)
    x = numbers("normal")[:9, :256]                  # 9 super-blocks, or 72 blocks of 32: the last vector is not full
    want = quantize(x, kind)
    for cut in (1, 2, 4):
        np.testing.assert_array_equal(np.concatenate([quantize(x[:cut], kind), quantize(x[cut:], kind)]), want)
    np.testing.assert_array_equal(dequantize(want, kind), gguf.quants.dequantize(want, Q[name]) if name != "F32" else x)
    assert quantize(x[:0], kind).shape == (0, want.shape[1])


@pytest.mark.parametrize("name", QUANTIZABLE)
def test_zeros_and_tiny_numbers(name: str) -> None:
    kind = dtype(name)
    assert not dequantize(quantize(np.zeros((3, 256), np.float32), kind), kind).any()
    for scale in (1e-12, 1e-30, 1e-42):
        x = numbers("normal")[:1, :256] * np.float32(scale)
        y = dequantize(quantize(x, kind), kind)
        assert np.isfinite(y).all() and abs(y).max() <= 3 * abs(x).max()


@pytest.mark.parametrize("name", QUANTIZABLE[1:])
def test_what_is_no_number_is_refused(name: str) -> None:
    kind = dtype(name)
    for bad, says in ((np.nan, r"element \[1, 77\] is nan: only finite"), (-np.inf, r"\[1, 77\] is -inf: only finite"),
                      (np.finfo(np.float32).max, r"\[1, 77\] is 3.40282e\+38: .* cannot hold it")):
        x = numbers("normal")[:2, :256].copy()
        x[1, 77] = bad
        with pytest.raises(RequestError, match=says):
            quantize(x, kind)


def test_wrong_requests_are_refused() -> None:
    x = np.zeros((2, 48), np.float32)
    for name, error in (("Q4_0", ShapeError), ("Q6_K", ShapeError), ("IQ2_XXS", RequestError), ("I32", RequestError)):
        with pytest.raises(error, match=name):
            quantize(x, dtype(name))
    with pytest.raises(RequestError, match="sse9"):
        quantize(np.zeros((1, 32), np.float32), dtype("Q8_0"), "sse9")


# --- llama.cpp, where it is installed ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ggml():
    """ggml(x, "Q4_K") -> bytes, by ggml_quantize_chunk without an importance matrix."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="`make peers` builds it")
    found = sorted(Path(llama_cpp.__file__).parent.glob("lib/*ggml-base*"))
    if not found:
        pytest.skip("llama-cpp-python has no ggml-base library of its own")
    lib = ctypes.CDLL(str(found[0]))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def run(x: np.ndarray, name: str) -> np.ndarray:
        out = np.empty((len(x), dtype(name).size(x.shape[1])), np.uint8)
        assert lib.ggml_quantize_chunk(dtype(name).id, x.ctypes.data, out.ctypes.data, 0, *x.shape, None) == out.nbytes
        return out

    return run


def ratio(x: np.ndarray, name: str, ggml) -> float:
    """Our error over ggml's; 0 / 0 is 1."""
    theirs = gguf.quants.dequantize(ggml(x, name), Q[name])
    other = float(np.sqrt(np.mean((theirs.astype(np.float64) - x) ** 2)))
    ours = rmse(name, x)
    return 1.0 if ours == other else ours / other if other else np.inf


@pytest.mark.parametrize("name", BLOCKS)
def test_error_is_at_most_that_of_the_installed_ggml(name: str, ggml) -> None:
    found = {kind: ratio(numbers(kind)[:128], name, ggml) for kind in GGML}
    assert max(found.values()) <= 1.000001, found


@pytest.mark.parametrize("model, tensor", [
    ("qwen", "output.weight"), ("qwen", "blk.0.ffn_down.weight"), ("gemma", "token_embd.weight"),
    ("smollm2", "blk.3.ffn_up.weight")])
def test_error_on_real_tensors(model: str, tensor: str, ggml) -> None:
    with GGUFFile(real_path(model)) as file:
        info = file.tensors[tensor]
        x = dequantize(file.view(tensor).reshape(info.shape[0], -1)[:512], info.dtype)
    x = x.ravel()[:x.size // 256 * 256].reshape(-1, 256)
    found = {name: ratio(x, name, ggml) for name in BLOCKS}
    assert max(found.values()) <= 1.000001, found


@pytest.fixture(scope="module")
def wide(tiny_gguf):
    """A tiny model whose rows are blocks of 256 and whose layers are enough for every rule."""
    return tiny_gguf("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=9, num_attention_heads=8,
                     num_key_value_heads=2, head_dim=32)[0]


def test_mixtures_are_llama_cpps(wide, tmp_path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="`make peers` builds it")
    params = llama_cpp.llama_model_quantize_default_params()
    with GGUFFile(wide) as file:
        facts = Facts.of(file)
        for mixture, (_, number) in MIXTURES.items():
            params.ftype, params.nthread = int(number), 2
            out = tmp_path / "theirs.gguf"
            assert llama_cpp.llama_model_quantize(str(wide).encode(), str(out).encode(), ctypes.byref(params)) == 0
            with GGUFFile(out) as theirs:
                want = {name: info.dtype.name for name, info in theirs.tensors.items()}
                assert theirs.metadata["general.file_type"] == number
            assert {name: choose(info, mixture, facts).name for name, info in file.tensors.items()} == want, mixture


def test_llama_cpp_reads_what_we_write(wide, tmp_path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="`make peers` builds it")
    import pyengine as pe

    ids = np.random.default_rng(3).integers(0, 400, 48).tolist()
    for mixture in ("Q4_K_M", "Q5_K_M", "IQ4_NL", "Q2_K"):
        path = tmp_path / f"{mixture}.gguf"
        quantize_file(wide, path, mixture)
        theirs = llama_cpp.Llama(str(path), n_ctx=64, n_batch=64, n_threads=2, logits_all=True, verbose=False)
        theirs.eval(ids)
        ours, other = pe.load(path, n_ctx=64).logits(ids), theirs.scores[:len(ids)]
        # random weights amplify how each rounds activations: measured 0.11; the quantized weights themselves are 0.1 to 1.1 away
        assert np.sqrt(np.mean((ours - other) ** 2)) < 0.2 * other.std(), mixture


# --- mixtures and files -----------------------------------------------------------------------------------------------

def info(name: str, *shape: int, kind: str = "F32") -> TensorInfo:
    return TensorInfo(name, shape, dtype(kind), 0, 0, 0)


def test_formats_that_a_mixture_gives() -> None:
    layers = 18
    f = Facts(layers, 4, 0, False, {f"blk.{i}.attn_v.weight": i for i in range(layers)})
    # the outer eighths (2 and 3 of 18) and every third between
    fine = [i for i in range(layers) if choose(info(f"blk.{i}.ffn_down.weight", 256, 512), "Q4_K_M", f).name == "Q6_K"]
    assert fine == [0, 1, 4, 7, 10, 13, 15, 16, 17]
    assert fine == [i for i in range(layers) if choose(info(f"blk.{i}.attn_v.weight", 64, 256), "Q5_K_M", f).name == "Q6_K"]
    for name, shape, mixture, want in (
        ("token_embd.weight", (512, 256), "Q4_K_M", "Q4_K"), ("output.weight", (512, 256), "Q4_K_M", "Q6_K"),
        ("output.weight", (512, 96), "Q4_K_M", "Q8_0"), ("output.weight", (512, 256), "Q8_0", "Q8_0"),
        ("output.weight", (512, 256), "Q4_0", "Q6_K"), ("blk.5.attn_q.weight", (256, 256), "Q4_K_M", "Q4_K"),
        ("blk.5.attn_q.weight", (256, 96), "Q4_K_M", "Q5_0"), ("blk.5.attn_q.weight", (256, 96), "Q5_K_S", "Q5_1"),
        ("blk.5.attn_q.weight", (256, 48), "Q4_K_M", "F16"), ("blk.5.ffn_down_exps.weight", (4, 256, 512), "Q6_K", "Q6_K"),
        ("blk.5.ffn_gate_inp.weight", (4, 256), "Q4_0", "F32"), ("blk.5.attn_norm.weight", (256,), "Q4_0", "F32"),
        ("blk.5.attn_q.bias", (256,), "Q4_0", "F32"), ("rope_freqs.weight", (16,), "F16", "F32"),
        ("v.blk.0.attn_q.weight", (64, 64), "Q4_K_M", "Q8_0"), ("v.blk.0.ffn_down.weight", (64, 100), "Q4_K_M", "F16"),
        ("v.blk.0.attn_v.weight", (64, 64), "BF16", "BF16"), ("v.patch_embd.weight", (64, 3, 14, 14), "Q4_0", "F32"),
        ("v.position_embd.weight", (16, 64), "Q8_0", "F32"), ("mm.input_projection.weight", (64, 256), "Q4_0", "F32"),
        ("mm.0.weight", (256, 256), "Q4_K_M", "Q8_0"), ("mm.soft_emb_norm.weight", (64,), "Q4_0", "F32"),
    ):
        assert choose(info(name, *shape), mixture, f).name == want, (name, mixture)
    assert choose(info("blk.5.attn_q.weight", 256, 48, kind="BF16"), "Q4_0", f).name == "BF16"
    assert choose(info("v.blk.0.attn_q.weight", 64, 256), "Q4_K_M", f, vision="Q4_K").name == "Q4_K"
    tied = Facts(layers, 4, 0, True, {})
    assert choose(info("token_embd.weight", 512, 256), "Q4_K_S", tied).name == "Q6_K"
    assert choose(info("blk.0.attn_v.weight", 64, 256), "IQ4_NL", tied).name == "Q5_K"


def write(path: Path, tensors: dict[str, np.ndarray], split: tuple[int, int] | None = None,
          kind: dict[str, Q] | None = None) -> Path:
    out = gguf.GGUFWriter(path, "llama")
    out.add_custom_alignment(64)
    out.add_string("a.text", "Zürich")
    out.add_token_list(["a", "", "日本", "b" * 300])
    out.add_array("a.numbers", [1, -2, 3])
    out.add_array("a.bools", [True, False])
    out.add_float64("a.double", 0.1)
    out.add_file_type(0)
    out.add_uint64("a.last", 2**60)
    if split:
        out.add_uint16("split.no", split[0])
        out.add_uint16("split.count", split[1])
        out.add_int32("split.tensors.count", 2)
    for name, x in tensors.items():
        out.add_tensor(name, x, raw_dtype=(kind or {}).get(name))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def test_a_file_keeps_its_keys_and_gets_new_matrices(tmp_path) -> None:
    rng = np.random.default_rng(5)
    tensors = {"blk.0.attn_norm.weight": rng.standard_normal(64).astype(np.float32),
               "blk.0.attn_q.weight": rng.standard_normal((96, 64)).astype(np.float16),
               "blk.0.ffn_up_exps.weight": rng.standard_normal((3, 5, 64)).astype(np.float32),
               "blk.0.odd.weight": rng.standard_normal((7, 33)).astype(np.float32),
               "blk.0.ids": np.arange(6, dtype=np.int32).reshape(2, 3)}
    source, target = write(tmp_path / "in.gguf", tensors), tmp_path / "out.gguf"
    quantize_file(source, target, "q5_0", n_threads=2)
    with GGUFFile(source) as a, GGUFFile(target) as b:
        assert list(b.tensors) == list(tensors)
        assert [*b.metadata] == [*a.metadata, "general.quantization_version"]
        for key in a.metadata:
            if key != "general.file_type":
                assert a.metadata.encoded(key) == b.metadata.encoded(key)
        assert (b.metadata["general.file_type"], b.metadata["general.quantization_version"]) == (8, 2)
        assert all(t.offset % 64 == 0 for t in b.tensors.values())
        for name, kind in zip(tensors, ("F32", "Q5_0", "Q5_0", "F16", "I32")):
            found, x = b.tensors[name], tensors[name]
            assert (found.shape, found.dtype.name) == (x.shape, kind)
            want = x.view(np.uint8) if kind in ("F32", "I32") else quantize(x.astype(np.float32), found.dtype)
            assert b.view(name).tobytes() == want.tobytes()
    assert gguf.GGUFReader(target).tensors[1].name == "blk.0.attn_q.weight"             # gguf-py reads it too


def test_parts_become_one_file(tmp_path) -> None:
    x = np.random.default_rng(6).standard_normal((8, 32)).astype(np.float32)
    for i in range(2):
        write(tmp_path / f"m-0000{i + 1}-of-00002.gguf", {f"blk.{i}.w.weight": x + i}, split=(i, 2))
    target = tmp_path / "m.gguf"
    assert main([str(tmp_path / "m-00001-of-00002.gguf"), str(target), "Q8_0"]) == 0
    with GGUFFile(target) as file:
        assert not any(key.startswith("split.") for key in file.metadata)
        for i in range(2):
            assert file.view(f"blk.{i}.w.weight").tobytes() == quantize(x + i, dtype("Q8_0")).tobytes()


def test_quantized_files_are_read_with_a_warning(tmp_path, capsys) -> None:
    x = np.random.default_rng(7).standard_normal((8, 256)).astype(np.float32)
    raw = gguf.quants.quantize(x, Q.Q8_0)
    source = write(tmp_path / "in.gguf", {"a.weight": raw}, kind={"a.weight": Q.Q8_0})
    assert main([str(source), str(tmp_path / "out.gguf"), "Q4_K_M", "--verbose"]) == 0
    said = capsys.readouterr()
    assert "Q8_0 -> Q4_K" in said.out and "quantized before (Q8_0)" in said.err
    with GGUFFile(tmp_path / "out.gguf") as file:
        assert file.view("a.weight").tobytes() == quantize(gguf.quants.dequantize(raw, Q.Q8_0), dtype("Q4_K")).tobytes()
    assert main([str(source), str(tmp_path / "same.gguf"), "Q8_0"]) == 0            # nothing to do: the bytes are copied
    assert "warning" not in capsys.readouterr().err
    with GGUFFile(tmp_path / "same.gguf") as file:
        assert file.view("a.weight").tobytes() == raw.tobytes()


def test_what_is_said_while_a_file_is_quantized(tmp_path, capsys, monkeypatch) -> None:
    """The warning comes with the first matrix, not after hours; a file that is going to be replaced is named; a terminal sees how far it is."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    x = np.random.default_rng(8).standard_normal((8, 256)).astype(np.float32)
    raw = gguf.quants.quantize(x, Q.Q8_0)
    source = write(tmp_path / "in.gguf", {"a.weight": raw, "b.weight": raw}, kind={"a.weight": Q.Q8_0, "b.weight": Q.Q8_0})
    (tmp_path / "out.gguf").write_bytes(b"old")
    assert main([str(source), str(tmp_path / "out.gguf"), "Q4_K_M"]) == 0
    err = capsys.readouterr().err
    assert err.count("quantized before") == 1 and err.index("is replaced") < err.index("quantized before (Q8_0)") < err.index("out.gguf: 0.00 of 0.00 GiB (50%)")
    assert err.endswith("\r\x1b[K")


def test_errors_are_one_line_and_leave_no_file(tmp_path, capsys) -> None:
    x = np.ones((4, 64), np.float32)
    good = write(tmp_path / "good.gguf", {"a.weight": x})
    x[2, 5] = np.nan
    bad = write(tmp_path / "bad.gguf", {"b.weight": x})
    (tmp_path / "text.gguf").write_text("this is no model at all, and longer than a header")
    out = tmp_path / "out.gguf"
    for arguments, says in (
        ((bad, out, "Q4_0"), "'b.weight', rows from 0: element [2, 5] is nan"), ((good, out, "Q9_X"), "'Q9_X' is no file type"),
        ((good, good, "Q8_0"), "is the file that is read"), ((good, tmp_path / "m-00001-of-00003.gguf", "Q8_0"), "part of several"),
        ((tmp_path / "text.gguf", out, "Q8_0"), "not a GGUF file"), ((tmp_path / "none.gguf", out, "Q8_0"), "no such file"),
        ((good, tmp_path / "no" / "out.gguf", "Q8_0"), "No such file"),
        ((good, out, "Q8_0", "--vision", "Q9"), "'Q9' is no format"),
        ((good, out, "Q8_0", "--threads", "0"), "at least 1"),
    ):
        before = sorted(tmp_path.iterdir())
        assert main([str(a) for a in arguments]) == 2
        said = capsys.readouterr()
        assert says in said.err and said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out
        assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(InvalidModelError, match="b.weight"):
        quantize_file(bad, out, "Q6_K", vision="F16")


def test_what_is_no_file_is_not_replaced_and_a_link_stays_one(tmp_path) -> None:
    source = write(tmp_path / "in.gguf", {"blk.0.attn_q.weight": np.ones((8, 64), np.float32)})
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RequestError, match="pipe or a device"):
        quantize_file(source, tmp_path / "pipe", "Q8_0")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/out.gguf")
    quantize_file(source, tmp_path / "link", "Q8_0")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "folder") == ["out.gguf"]


def test_a_source_that_is_cut_meanwhile(tmp_path) -> None:
    rng = np.random.default_rng(1)
    source = write(tmp_path / "in.gguf", {f"blk.{i}.attn_q.weight": rng.standard_normal((64, 1024)).astype(np.float32) for i in range(4)})
    with pytest.raises(InvalidModelError, match="was cut|since it was opened"):
        quantize_file(source, tmp_path / "out.gguf", "Q8_0", progress=lambda w: os.truncate(source, 4096))
    assert sorted(os.listdir(tmp_path)) == ["in.gguf"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_stays_below_twice_the_largest_tensor(tmp_path) -> None:
    """Four matrices of 128 MB, written as holes: all of them in memory would break the limit."""
    source, shape = tmp_path / "in.gguf", (8192, 4096)
    out = gguf.GGUFWriter(source, "llama")
    for i in range(4):
        out.add_tensor_info(f"blk.{i}.x.weight", shape, np.dtype(np.float32), 4 * shape[0] * shape[1])
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    out.close()
    largest = 4 * shape[0] * shape[1]
    with source.open("r+b") as file:
        file.truncate(-(-source.stat().st_size // 32) * 32 + 4 * largest)
    code = ("import sys\nfrom converters.quantize.__main__ import main\nstatus = main(sys.argv[1:])\n"
            "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\nsys.exit(status)")
    done = subprocess.run([sys.executable, "-c", code, str(source), str(tmp_path / "out.gguf"), "Q4_0", "-t", "2"], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    peak = int(done.stdout.splitlines()[-1]) * 1024
    # far below two tensors and 200 MB
    assert peak < 200e6, f"{peak / 1e6:.0f} MB; measured 122 MB, most of it Python, NumPy and gguf-py"


def test_a_quantized_model_answers_nearly_as_before(wide, tmp_path) -> None:
    import pyengine as pe

    ids = np.random.default_rng(8).integers(0, 400, 40).tolist()
    want = pe.load(wide, n_ctx=64).logits(ids)
    error = {}
    for mixture in ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q2_K"):
        quantize_file(wide, tmp_path / "q.gguf", mixture)
        error[mixture] = float(np.sqrt(np.mean((pe.load(tmp_path / "q.gguf", n_ctx=64).logits(ids) - want) ** 2)) / want.std())
    assert list(error.values()) == sorted(error.values()) and error["Q8_0"] < 0.15, error      # measured 0.09 to 1.1
