"""Scopes over tensor names: every weight is bound with its shape, and none is left over."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from pyengine.dtype import F32, Q8_0
from pyengine.errors import InvalidModelError, UnsupportedModelError
from pyengine.files.gguf import GGUFFile
from pyengine.files.weights import Weights

RNG = np.random.default_rng(7)
ARRAYS = {
    "token_embd.weight": RNG.random((6, 4), np.float32),
    "blk.0.attn_q.weight": RNG.random((3, 4), np.float32),
    "blk.0.attn_q.bias": RNG.random(3, np.float32),
    "blk.1.attn_q.weight": RNG.random((3, 4), np.float32),
    "blk.10.attn_q.weight": RNG.random((3, 4), np.float32),
    "v.patch_embd.bias": RNG.random((1, 5), np.float32),
    "rope_freqs.weight": RNG.random(2, np.float32),
}


def write(path, arrays):
    writer = gguf.GGUFWriter(path, "llama")
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


@pytest.fixture
def weights(tmp_path):
    with write(tmp_path / "m.gguf", ARRAYS) as file:
        yield Weights(file)


def test_scopes_reach_tensors(weights):
    ref = weights["blk", 0]["attn_q"].tensor("weight", shape=(3, 4))
    assert (ref.name, ref.shape, ref.dtype, ref.nbytes) == ("blk.0.attn_q.weight", (3, 4), F32, 48)
    np.testing.assert_array_equal(ref.floats(), ARRAYS["blk.0.attn_q.weight"])
    assert ref.view().tobytes() == ARRAYS["blk.0.attn_q.weight"].tobytes()
    same = weights["blk"][0, "attn_q"].tensor("weight", shape=(3, 4))
    assert same == ref and hash(same) == hash(ref)
    with pytest.raises(AttributeError):
        ref.shape = (4, 3)


def test_shape_is_the_files_and_binds_nothing(weights):
    assert weights["blk", 0].shape("attn_q.weight") == (3, 4) and weights.shape("blk.0.attn_k.weight") is None
    with pytest.raises(UnsupportedModelError, match="blk.0.attn_q.weight"):
        weights.finish()


def test_contains_takes_whole_components(weights):
    assert "v" in weights and "blk" in weights and ("blk", 10) in weights and "token_embd" in weights
    assert "attn_q" in weights["blk", 1] and "weight" in weights["blk", 1]["attn_q"]
    assert "token" not in weights and ("blk", 2) not in weights and "attn" not in weights["blk", 0]


def test_first_takes_the_first_that_exists(weights):
    assert weights.first("output", "token_embd").prefix == "token_embd."
    assert weights.first("token_embd", "output").prefix == "token_embd."
    assert weights.first(("blk", 5), ("blk", 1)).prefix == "blk.1."
    with pytest.raises(InvalidModelError, match="'output', 'lm_head'"):
        weights.first("output", "lm_head")


def test_optional(weights):
    assert weights["blk", 0]["attn_q"].optional("bias", shape=(3,)).name == "blk.0.attn_q.bias"
    assert weights["blk", 1]["attn_q"].optional("bias", shape=(3,)) is None
    with pytest.raises(InvalidModelError, match=r"has shape \(3,\), and the model needs \(4,\)"):
        weights["blk", 0]["attn_q"].optional("bias", shape=(4,))


def test_missing_names_the_tensor_the_file_and_what_is_near(weights):
    with pytest.raises(InvalidModelError) as error:
        weights["blk", 0]["attn_k"].tensor("weight", shape=(3, 4))
    message = str(error.value)
    assert "m.gguf" in message and "'blk.0.attn_k.weight'" in message and "near: blk.0.attn_q.weight" in message


@pytest.mark.parametrize("shape", [(4, 3), (12,), (3, 4, 1), (3,), ()])
def test_wrong_shape_names_both(weights, shape):
    with pytest.raises(InvalidModelError) as error:
        weights["blk", 0]["attn_q"].tensor("weight", shape=shape)
    assert f"has shape (3, 4), and the model needs {shape}" in str(error.value)


def test_leading_axes_of_one_do_not_count_and_the_model_s_shape_holds(weights):
    for shape in ((5,), (1, 5), (1, 1, 5)):
        ref = weights["v", "patch_embd"].tensor("bias", shape=shape)
        assert ref.shape == ref.floats().shape == shape


def test_finish_lists_what_was_never_bound(weights):
    weights["token_embd"].tensor("weight", shape=(6, 4))
    with pytest.raises(UnsupportedModelError) as error:
        weights.finish()
    assert "'blk.0.attn_q.weight'" in str(error.value) and "and 1 more" in str(error.value)
    assert "token_embd" not in str(error.value)
    with pytest.raises(UnsupportedModelError, match="use: 'blk.10.attn_q.weight'$"):
        weights.finish(ignore=("blk.0", "blk.1", "v", "rope_freqs"))
    weights.finish(ignore=("blk", "v.patch_embd.bias", "rope_freqs"))
    for i in (0, 1, 10):
        weights["blk", i]["attn_q"].tensor("weight", shape=(3, 4))
    weights["blk", 0]["attn_q"].optional("bias", shape=(3,))
    weights["v"]["patch_embd"].tensor("bias", shape=(5,))
    weights["blk", 3].finish(ignore=["rope_freqs"])                   # a scope answers for the whole


def test_two_files_and_names_in_both(tmp_path):
    text = write(tmp_path / "text.gguf", {"token_embd.weight": ARRAYS["token_embd.weight"]})
    vision = write(tmp_path / "mmproj.gguf", {"v.patch_embd.bias": ARRAYS["v.patch_embd.bias"]})
    both = Weights(text, vision)
    assert both["v"]["patch_embd"].tensor("bias", shape=(5,)).source is vision
    assert both["token_embd"].tensor("weight", shape=(6, 4)).source is text
    both.finish()
    with pytest.raises(InvalidModelError, match="is in .*text.gguf too"):
        Weights(text, write(tmp_path / "again.gguf", {"token_embd.weight": ARRAYS["token_embd.weight"]}))


def test_block_formats_keep_their_logical_shape(tmp_path):
    rows = gguf.quants.quantize(RNG.random((2, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_tensor("w.weight", rows, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(tmp_path / "q.gguf") as file:
        ref = Weights(file)["w"].tensor("weight", shape=(2, 64))
        assert (ref.dtype, ref.nbytes) == (Q8_0, 2 * 2 * 34)
        assert ref.view().tobytes() == rows.tobytes()
