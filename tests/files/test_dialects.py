"""Files of other programs in llama.cpp's names: every table, what such files leave out, and rope's scaling under old keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import pyengine as pe
from pyengine.errors import InvalidModelError, UnsupportedModelError
from pyengine.files.dialects import translate
from pyengine.files.gguf import GGUFFile
from pyengine.files.hparams import Hparams
from pyengine.files.model_files import open_files
from pyengine.files.weights import Weights

pytest.importorskip("transformers", reason="pip install transformers torch")

import cases  # noqa: E402
import foreign  # noqa: E402
import tiny  # noqa: E402
from pyengine.models.mllama import MEAN, STD  # noqa: E402


def write(path: Path, arch: str, keys: dict[str, Any], tensors: dict[str, tuple[int, ...]] | None = None) -> GGUFFile:
    """A file of these keys, below the architecture's name, and of tensors of zeros."""
    w = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        add = {int: w.add_uint32, float: w.add_float32, str: w.add_string, bool: w.add_bool, list: w.add_array}[type(value)]
        add(f"{arch}.{key}", value)
    for name, shape in (tensors or {}).items():
        w.add_tensor(name, np.zeros(shape, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return GGUFFile(path)


def rewritten(source: Path, path: Path, drop: tuple[str, ...] = (), keys: dict[str, float | int | str] | None = None,
              tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None) -> Path:
    """A copy of a file without some keys, with others, and with tensors replaced."""
    reader, new = gguf.GGUFReader(source), tensors or {}
    w = gguf.GGUFWriter(path, pe.GGUFFile(source).metadata["general.architecture"])
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in (*drop, "general.architecture"):
            w.add_key_value(key, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None)
    for key, value in (keys or {}).items():
        add = w.add_string if isinstance(value, str) else w.add_float32 if isinstance(value, float) else w.add_int32 if value < 0 else w.add_uint32
        add(key, value)
    for t in reader.tensors:
        if t.name not in new:
            w.add_tensor(t.name, np.array(t.data).reshape(tuple(int(n) for n in reversed(t.shape))))
    for name, (array, kind) in new.items():
        w.add_tensor(name, array, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


# ---- what is llama.cpp's already ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", cases.quick(c.kind for c in cases.every().values() if c.converted))
def test_our_files_pass_as_they_are(kind, tiny_gguf) -> None:
    file = GGUFFile(tiny_gguf(kind)[0])
    assert translate(file) is file


@pytest.mark.parametrize("kind", cases.quick(c.kind for c in cases.every().values() if c.llama_cpp and c.dialect and "now" in c.dialect.converters))
def test_llama_cpps_files_pass_as_they_are(kind, tmp_path) -> None:
    folder = tiny.make_checkpoint(kind, tmp_path / "c", **cases.find(kind).assumed)
    files = open_files(*foreign.llama_cpp_files(folder, tmp_path / "m.gguf"))
    assert (files.model, files.mmproj) == files.opened


def test_what_no_table_has_stays(tmp_path) -> None:
    other = write(tmp_path / "a.gguf", "gemma9", {"vision.block_count": 2, "rope.local.freq_base": 1.0}, {"v.patch_embedding.weight": (3,)})
    assert translate(other) is other
    ours = write(tmp_path / "b.gguf", "gemma3", {"vision.block_count": 2, "vision.new": 5, "new": 6},
                 {"v.patch_embedding.weight": (2, 3), "v.blk.11.layer_norm1.bias": (4,), "v.blk.11.layer_norm3.bias": (4,), "mm.new": (1,)})
    file = translate(ours)
    assert set(file.tensors) == {"v.patch_embd.weight", "v.blk.11.ln1.bias", "v.blk.11.layer_norm3.bias", "mm.new"}
    assert file.metadata["clip.vision.new"] == 5 and file.metadata["gemma3.new"] == 6 and "gemma3.vision.new" not in file.metadata
    assert set(ours.tensors) == {"v.patch_embedding.weight", "v.blk.11.layer_norm1.bias", "v.blk.11.layer_norm3.bias", "mm.new"}
    assert list(file.metadata).count("gemma3.new") == 1 and len(file.metadata) == len(list(file.metadata))
    assert file.array("v.blk.11.ln1.bias").shape == (4,) and file.view("v.patch_embd.weight").nbytes == 24


def test_errors_name_what_stands_in_the_file(tmp_path) -> None:
    keys = {"vision.block_count": 2, "vision.image_size": "large", "vision.patch_size": 0}
    file = translate(write(tmp_path / "m.gguf", "gemma3", keys, {"v.patch_embedding.weight": (2, 3), "mm.mm_soft_emb_norm.weight": (1,)}))
    v, w = Hparams(file.metadata, "clip"), Weights(file)
    with pytest.raises(InvalidModelError, match=r"m\.gguf: 'gemma3\.vision\.image_size' must be"):
        v.size("vision.image_size")
    with pytest.raises(InvalidModelError, match=r"gemma3\.vision\.patch_size is 0"):
        v.size("vision.patch_size")
    with pytest.raises(InvalidModelError, match=r"'clip\.vision\.embedding_length' is missing"):
        v.size("vision.embedding_length")
    with pytest.raises(InvalidModelError, match=r"'v\.patch_embedding\.weight': has shape \(2, 3\)"):
        w["v", "patch_embd"].tensor("weight", (3, 2))
    w["v", "patch_embd"].tensor("weight", (2, 3))
    with pytest.raises(UnsupportedModelError, match=r"'mm\.mm_soft_emb_norm\.weight'"):
        w.finish()


def test_two_names_of_one_tensor_are_refused(tmp_path) -> None:
    file = write(tmp_path / "m.gguf", "gemma3", {"vision.block_count": 2}, {"v.post_ln.bias": (1,), "v.post_layernorm.bias": (1,)})
    with pytest.raises(InvalidModelError, match=r"'v\.post_layernorm\.bias': 'v\.post_ln\.bias' is there too"):
        translate(file)


def test_a_key_that_has_llama_cpps_name_is_believed(tmp_path) -> None:
    keys = {"rope.freq_base": 5.0, "rope.global.freq_base": 7.0, "rope.local.freq_base": 3.0}
    meta = translate(write(tmp_path / "m.gguf", "gemma3", keys)).metadata
    assert meta["gemma3.rope.freq_base"] == 5.0 and meta["gemma3.rope.freq_base_swa"] == 3.0


def test_other_kinds_of_values_are_left_to_the_model(tmp_path) -> None:
    """Whoever needs a key says what is wrong with it; opening does not."""
    translate(write(tmp_path / "a.gguf", "gemma3", {"block_count": "62", "context_length": [1, 2], "vision.block_count": "x"}))
    translate(write(tmp_path / "b.gguf", "gemma3", {"block_count": 62, "embedding_length": 0, "attention.head_count": 0}))
    w = gguf.GGUFWriter(tmp_path / "c.gguf", "gemma3")
    w.kv_data[0].pop("general.architecture")
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()
    file = GGUFFile(tmp_path / "c.gguf")
    assert translate(file) is file


# ---- Ollama's files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", cases.quick(c.kind for c in cases.every().values() if c.llama_cpp and c.dialect and c.dialect.ollama_arch))
def test_ollamas_names_become_those_of_gguf_py(kind, tmp_path) -> None:
    """The same checkpoint by both programs' converters: the same names, shapes and numbers."""
    folder = tiny.make_checkpoint(kind, tmp_path / "c", dtype="float16", **cases.find(kind).assumed)
    text, mmproj = (GGUFFile(p) for p in foreign.llama_cpp_files(folder, tmp_path / "l.gguf"))
    file = open_files(foreign.ollama_file(folder, tmp_path / "o.gguf", "f32")).model
    want = {name: f for f in (text, mmproj) for name in f.tensors if name != "v.token_embd.img_break"}
    made = {name: file.array(name) for name in file.tensors}
    for name in [name for name in want if name not in made]:                   # of one tensor in the one and several in the other
        if ".attn_qkv." in name:
            made[name] = np.concatenate([made.pop(name.replace("attn_qkv", f"attn_{part}")) for part in "qkv"])
        elif name == "v.patch_embd.weight.1":
            made["v.patch_embd.weight"], made[name] = (made["v.patch_embd.weight"][:, :, i] for i in range(2))
    assert set(made) == set(want)
    for name, f in want.items():
        got, expected = made[name], f.array(name)
        if kind == "mistral3" and name.endswith(("attn_q.weight", "attn_k.weight")) and name.startswith("v."):
            got = foreign.turned(got, f.metadata["clip.vision.attention.head_count"])          # a key says that these are in halves
        assert np.array_equal(got.reshape(-1), expected.reshape(-1)), name
    assert file.metadata["general.architecture"] == text.metadata["general.architecture"]
    for key in ("block_count", "embedding_length", "attention.head_count", "patch_size"):
        assert file.metadata[f"clip.vision.{key}"] == mmproj.metadata[f"clip.vision.{key}"]
    if kind != "gemma3":
        assert file.metadata["clip.projector_type"] == mmproj.metadata["clip.projector_type"]
    assert not any(".vision." in key for key in file.metadata if not key.startswith("clip."))


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen3_5_moe"])
def test_one_file_of_ollama_gives_the_bits_of_llama_cpps_pair(kind, tmp_path) -> None:
    folder = tiny.make_checkpoint(kind, tmp_path / "c", dtype="float16", **cases.find(kind).assumed)
    text, mmproj = foreign.llama_cpp_files(folder, tmp_path / "l.gguf", "f16")
    pixels = np.random.default_rng(1).integers(0, 256, (90, 150, 3), np.uint8)
    want, got = (pe.load(path, mmproj=other, n_ctx=256).logits([5, "a dog", pe.open_image(pixels), "What is it?"])
                 for path, other in ((text, mmproj), (foreign.ollama_file(folder, tmp_path / "o.gguf", "f16"), None)))
    assert np.array_equal(got, want)


def test_qwen3_vl_by_ollamas_later_names_and_without_the_sections(tmp_path) -> None:
    """Features for the first layers are counted in both; a file in which they are not has another name for the merger, or two files."""
    keys = {"vision.block_count": 5, "vision.embedding_length": 4, "vision.deepstack_visual_indexes": [1, 4], "vision.longest_edge": 999}
    file = translate(write(tmp_path / "m.gguf", "qwen3vl", keys, {
        "v.patch_embd.weight": (12, 2, 3, 3), "v.merger.norm.weight": (4,), "v.deepstack.0.norm.bias": (2,), "v.deepstack.1.linear_fc2.weight": (3,),
        "v.blk.3.ln1.weight": (4,)}))
    assert {name: info.shape for name, info in file.tensors.items()} == {
        "v.patch_embd.weight": (4, 3, 2, 9), "v.post_ln.weight": (4,), "v.deepstack.1.norm.bias": (2,), "v.deepstack.4.fc2.weight": (3,), "v.blk.3.ln1.weight": (4,)}
    meta = file.metadata
    assert list(meta["qwen3vl.rope.dimension_sections"]) == [24, 20, 20] and meta["qwen3vl.n_deepstack_layers"] == 2
    assert meta["clip.vision.image_max_pixels"] == 999 and meta["clip.vision.is_deepstack_layers"].tolist() == [False, True, False, False, True]
    odd = translate(write(tmp_path / "o.gguf", "qwen3vl", {"vision.block_count": 2}, {"v.patch_embed.weight": (13, 2, 3, 3)}))
    assert odd.tensors["v.patch_embed.weight"].shape == (13, 2, 3, 3) and len(odd.metadata.get("clip.vision.is_deepstack_layers")) == 0


def test_bounds_of_gemma_4_in_one_tensor(tmp_path) -> None:
    """Four of each product, seven products a layer, then those of the projection; where they are there one by one too, these are taken."""
    w = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma4")
    w.add_uint32("gemma4.vision.block_count", 2)
    w.add_tensor("v.clamp_data", np.arange(60, dtype=np.float32))
    w.add_tensor("v.std_bias", np.zeros(3, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    file = translate(GGUFFile(tmp_path / "m.gguf"))
    assert len(file.tensors) == 61 and "v.clamp_data" not in file.tensors
    for name, value in (("v.blk.0.attn_q.input_min", 0), ("v.blk.0.attn_k.output_max", 7), ("v.blk.1.attn_q.input_max", 29), ("mm.input_projection.output_min", 58)):
        assert file.array(name).tolist() == [value]
    single = translate(write(tmp_path / "s.gguf", "gemma4", {"vision.block_count": 2}, {"v.clamp_data": (60,), "v.blk.0.attn_q.input_min": (1,)}))
    assert set(single.tensors) == {"v.blk.0.attn_q.input_min"}
    short = write(tmp_path / "t.gguf", "gemma4", {"vision.block_count": 3}, {"v.clamp_data": (60,), "a": (1,), "b": (1,)})
    with pytest.raises(InvalidModelError, match=r"'v\.clamp_data'"):
        translate(short)


def test_gemma_3n_of_ollama_has_rows_that_only_pictures_need(tiny_gguf, tmp_path) -> None:
    """More tokens and rows of the one table than of the other; keys of the heads and of the second rotation have other names."""
    path, ids = tiny_gguf("gemma3n")[0], list(range(3, 60))
    table, base = GGUFFile(path).array("token_embd.weight"), "gemma3n.rope.freq_base"
    more = np.concatenate([table, np.ones((4, table.shape[1]), np.float32)])
    theirs = rewritten(path, tmp_path / "o.gguf", ("gemma3n.attention.key_length", "gemma3n.attention.value_length", f"{base}_swa"),
                       {"gemma3n.head_dim": 32, f"{base}_local": 1e4}, {"token_embd.weight": (more, gguf.GGMLQuantizationType.F32)})
    assert np.array_equal(pe.load(theirs, n_ctx=64).logits(ids), pe.load(path, n_ctx=64).logits(ids))


def test_qwen3_next_of_ollama(tiny_gguf, tmp_path) -> None:
    """Layers without heads of keys keep a state, and a bias lacks the end of its name."""
    path, ids = tiny_gguf("qwen3_next")[0], list(range(3, 60))
    recurrent, heads = (GGUFFile(path).metadata[f"qwen3next.attention.{name}"] for name in ("recurrent_layers", "head_count_kv"))
    theirs = foreign.copied(path, tmp_path / "o.gguf", {"qwen3next.attention.recurrent_layers": None,
                                                        "qwen3next.attention.head_count_kv": [0 if keeps else int(heads) for keeps in recurrent]},
                            lambda name, data: [(name.replace("ssm_dt.bias", "ssm_dt"), data)])
    assert np.array_equal(pe.load(theirs, n_ctx=64).logits(ids), pe.load(path, n_ctx=64).logits(ids))


def test_llavas_first_projectors_do_not_name_themselves(tmp_path) -> None:
    def projector(**keys: Any) -> str | None:
        return translate(write(tmp_path / "m.gguf", "clip", keys)).metadata.get("clip.projector_type")

    assert projector(has_llava_projector=True) == "mlp" and projector(has_llava_projector=True, projector_type="ldp") == "ldp"
    assert projector(has_llava_projector=False) is None and projector(has_vision_encoder=True) is None


def test_names_of_both_of_ollamas_files_of_llama_3_2_vision(tmp_path) -> None:
    folder = tiny.make_checkpoint("mllama", tmp_path / "c", processor={"image_mean": MEAN, "image_std": STD})
    from converters import convert

    ours = GGUFFile(convert(folder, tmp_path / "m.gguf", "f32"))
    for extra, interleaved in ((0, True), (3, False)):
        file = open_files(foreign.ollama_file(folder, tmp_path / f"o{extra}.gguf", "f32", extra_tokens=extra)).model
        assert set(file.tensors) == set(ours.tensors)
        assert {n: t.shape for n, t in file.tensors.items() if ".ffn_" in n} == {n: t.shape for n, t in ours.tensors.items() if ".ffn_" in n}
        assert file.metadata.get("mllama.attention.cross_interleaved", False) is interleaved
        assert list(file.metadata["clip.vision.feature_layer"]) == list(ours.metadata["clip.vision.feature_layer"])


def test_what_ollamas_gemma_files_leave_out(tmp_path) -> None:
    """Long contexts are scaled by 8, unless the file says how; the checkpoint of 62 layers scales attention by d_model / n_heads."""
    def meta(**keys: Any):
        named = {name.replace("__", "."): value for name, value in keys.items()}
        return translate(write(tmp_path / "m.gguf", "gemma3", named)).metadata

    small = meta(vision__block_count=2, context_length=131071)
    assert small["gemma3.attention.layer_norm_rms_epsilon"] == 1e-6 and small["gemma3.rope.freq_base"] == 1e6
    assert "gemma3.rope.scaling.type" not in small and "gemma3.attention.scale" not in small
    large = meta(vision__block_count=2, context_length=131072, mm__tokens_per_image=49)
    assert (large["gemma3.rope.scaling.type"], large["gemma3.rope.scaling.factor"]) == ("linear", 8.0)
    assert large["clip.vision.tokens_per_image"] == 49
    assert "gemma3.rope.scaling.type" not in meta(context_length=131072)               # no encoder: llama.cpp's, or 1B
    assert meta(vision__block_count=2, context_length=131072, rope__scaling__type="none")["gemma3.rope.scaling.type"] == "none"
    assert meta(vision__block_count=2, context_length=131072, rope__scaling__factor=2.0)["gemma3.rope.scaling.factor"] == 2.0
    assert meta(block_count=62, embedding_length=5376, attention__head_count=32)["gemma3.attention.scale"] == 168**-0.5
    said = meta(block_count=62, embedding_length=5376, attention__head_count=32, attention__scale=0.25)
    assert said["gemma3.attention.scale"] == 0.25 and "gemma3.attention.scale" not in meta(block_count=48, embedding_length=8)


def test_what_other_files_of_ollama_leave_out(tmp_path) -> None:
    def meta(arch: str, **keys: Any):
        named = {name.replace("__", "."): value for name, value in keys.items()}
        return translate(write(tmp_path / "m.gguf", arch, named)).metadata

    mistral = meta("mistral3", vision__block_count=2)
    assert [mistral[f"clip.{k}"] for k in ("projector_type", "vision.hidden_act", "vision.spatial_merge_size", "vision.rope.interleaved")] \
        == ["pixtral", "silu", 2, False]
    assert meta("mistral3", vision__block_count=2, spatial_merge_size=3)["clip.vision.spatial_merge_size"] == 3
    assert meta("mistral3", vision__block_count=2, mm__projector_hidden_act="silu")["clip.vision.projector.hidden_act"] == "silu"
    qwen = meta("qwen25vl", vision__block_count=32, vision__max_pixels=999, rope__mrope_section=[2, 3, 3], block_count=5)
    assert qwen["general.architecture"] == "qwen2vl" and qwen["qwen2vl.block_count"] == 5
    assert list(qwen["clip.vision.wa_layer_indexes"]) == [7, 15, 23, 31] and qwen["clip.vision.image_max_pixels"] == 999
    assert list(qwen["qwen2vl.rope.dimension_sections"]) == [2, 3, 3] and qwen["clip.vision.hidden_act"] == "silu"
    assert list(meta("qwen25vl", vision__fullatt_block_indexes=[1])["clip.vision.wa_layer_indexes"]) == [1]
    for ratio, group in ((0.5, 2), (0.25, 4), (1.0, 1)):
        assert meta("llama4", vision__block_count=2, vision__pixel_shuffle_ratio=ratio)["clip.vision.projector.scale_factor"] == group
    for ratio in (0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(InvalidModelError, match="pixel_shuffle_ratio"):
            meta("llama4", vision__block_count=2, vision__pixel_shuffle_ratio=ratio)
    widths = meta("llama4", vision__block_count=2, feed_forward_length=7, intermediate_size=9, intermediate_size_moe=7)
    assert widths["llama4.feed_forward_length"] == 9 and widths["llama4.expert_feed_forward_length"] == 7
    assert meta("llama4", expert_count=128)["llama4.use_qk_norm"] is False and "llama4.use_qk_norm" not in meta("llama4", expert_count=16)


def test_a_session_s_fingerprint_is_of_the_file_as_it_lies_on_disk(tmp_path) -> None:
    folder = tiny.make_checkpoint("gemma3", tmp_path / "c")
    files = open_files(foreign.ollama_file(folder, tmp_path / "m.gguf"))
    assert "v.patch_embd.weight" in files.model.tensors and files.model is not files.opened[0]
    assert "v.patch_embedding.weight" in files.opened[0].tensors and len(files.opened) == 1


# ---- first converters -----------------------------------------------------------------------------------------------------------


def test_exchanged_matrices_are_put_right(tmp_path) -> None:
    """By their shapes, in each layer of an encoder, with their biases; where both sides are as wide, nothing can be said."""
    w = gguf.GGUFWriter(tmp_path / "m.gguf", "clip")
    w.add_uint32("clip.vision.embedding_length", 4)
    shapes = {"v.blk.0": (4, 6), "v.blk.1": (6, 4), "v.global.blk.0": (4, 6), "v.blk.2": (4, 4), "blk.0": (4, 6)}
    for scope, (up, width) in shapes.items():
        w.add_tensor(f"{scope}.ffn_up.weight", np.full((up, width), 1, np.float32))
        w.add_tensor(f"{scope}.ffn_down.weight", np.full((width, up), 2, np.float32))
        w.add_tensor(f"{scope}.ffn_down.bias", np.full(width, 2, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    file = translate(GGUFFile(tmp_path / "m.gguf"))
    for scope, exchanged in (("v.blk.0", True), ("v.blk.1", False), ("v.global.blk.0", True), ("v.blk.2", False), ("blk.0", False)):
        up, down = (file.array(f"{scope}.ffn_{n}.weight") for n in ("up", "down"))
        assert (up[0, 0], down[0, 0]) == ((2, 1) if exchanged else (1, 2))
        assert (f"{scope}.ffn_up.bias" in file.tensors) is exchanged and (f"{scope}.ffn_down.bias" in file.tensors) is not exchanged


def test_llama_4s_second_norm_by_its_later_name_and_nobody_elses(tmp_path) -> None:
    for projector, name in (("llama4", "v.blk.3.ln2.weight"), ("gemma4", "v.blk.3.attn_post_norm.weight")):
        w = gguf.GGUFWriter(tmp_path / "m.gguf", "clip")
        w.add_string("clip.projector_type", projector)
        w.add_tensor("v.blk.3.attn_post_norm.weight", np.zeros(4, np.float32))
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
        assert set(translate(GGUFFile(tmp_path / "m.gguf")).tensors) == {name}


# ---- rope's scaling -------------------------------------------------------------------------------------------------------------

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
KIND, FACTOR = "llama.rope.scaling.type", "llama.rope.scaling.factor"


@pytest.mark.parametrize("keys", [{"llama.rope.scale_linear": 4.0}, {FACTOR: 4.0}, {FACTOR: 4.0, "llama.rope.scale_linear": 2.0},
                                  {KIND: "linear", "llama.rope.scale_linear": 4.0}])
def test_linear_scaling_of_older_files_is_transformers(keys, tiny_gguf, tmp_path) -> None:
    """Under the key that it had first, and without the kind, which is linear then (llama.cpp, load_hparams)."""
    path, folder = tiny_gguf("llama", rope_parameters=LINEAR)
    old = rewritten(path, tmp_path / "old.gguf", (KIND, FACTOR), keys)
    ids = np.random.default_rng(0).integers(0, 512, 60).tolist()
    want, got = tiny.hf_logits(folder, ids), pe.load(old, n_ctx=64, kv_dtype="f32").logits(ids)
    assert np.abs(got - want).max() < 1e-5 * np.ptp(want)
    plain = pe.load(rewritten(path, tmp_path / "plain.gguf", (KIND, FACTOR)), n_ctx=64, kv_dtype="f32").logits(ids)
    assert np.abs(plain - want).max() > 0.01 * np.ptp(want)                            # it matters here


@pytest.mark.parametrize("keys", [{FACTOR: 0.0}, {KIND: "none", FACTOR: 4.0}, {KIND: "default", FACTOR: 0.0}, {KIND: ""},
                                  {"llama.rope.scale_linear": 0.0}, {KIND: "none", "llama.rope.scale_linear": 4.0}])
def test_what_is_no_scaling(keys, tiny_gguf, tmp_path) -> None:
    path = tiny_gguf("llama")[0]
    ids = list(range(3, 40))
    got = pe.load(rewritten(path, tmp_path / "m.gguf", keys=keys), n_ctx=64).logits(ids)
    assert np.array_equal(got, pe.load(path, n_ctx=64).logits(ids))


def test_a_negative_factor_is_refused_by_its_name(tiny_gguf, tmp_path) -> None:
    path = rewritten(tiny_gguf("llama")[0], tmp_path / "m.gguf", keys={"llama.rope.scale_linear": -4.0})
    with pytest.raises(InvalidModelError, match=r"llama\.rope\.scale_linear is -4"):
        pe.plan(path, n_ctx=64)


def test_bounds_of_yarn_by_ollamas_names(tiny_gguf, tmp_path) -> None:
    """Which hold 0 where a checkpoint says nothing."""
    rope = {**tiny.ROPES["yarn"], "beta_fast": 20.0, "beta_slow": 2.0}
    path, ids = tiny_gguf("llama", rope_parameters=rope)[0], list(range(3, 60))
    ours, theirs = ([f"llama.rope.scaling.{start}beta_{n}" for n in ("fast", "slow")] for start in ("yarn_", ""))
    want = pe.load(path, n_ctx=64).logits(ids)
    renamed = pe.load(rewritten(path, tmp_path / "a.gguf", ours, dict(zip(theirs, (20.0, 2.0)))), n_ctx=64).logits(ids)
    usual, zeros = (pe.load(rewritten(path, tmp_path / f"{len(k)}.gguf", ours, k), n_ctx=64).logits(ids) for k in ({}, dict.fromkeys(theirs, 0.0)))
    assert np.array_equal(renamed, want) and np.array_equal(usual, zeros) and not np.array_equal(usual, want)


@pytest.mark.parametrize("kind, names", [("llama3", ("rope_freqs",)), ("longrope", ("rope_factors_long", "rope_factors_short"))])
def test_factors_of_frequencies_in_any_format(kind, names, tiny_gguf, tmp_path) -> None:
    """Powers of two, which F16 and BF16 hold exactly; BF16 in NumPy is its bits."""
    path, ids = tiny_gguf("llama", rope_parameters=dict(tiny.ROPES[kind]))[0], list(range(3, 60))
    n = GGUFFile(path).tensors[f"{names[0]}.weight"].n_elements
    factors = np.exp2(np.arange(n) % 3).astype(np.float32)
    types = gguf.GGMLQuantizationType
    forms = {"f32": (factors, types.F32), "f16": (factors.astype(np.float16), types.F16),
             "bf16": ((factors.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8), types.BF16)}
    made = {form: rewritten(path, tmp_path / f"{form}.gguf", tensors={f"{name}.weight": tensor for name in names}) for form, tensor in forms.items()}
    got = {form: pe.load(p, n_ctx=64).logits(ids) for form, p in made.items()}
    assert np.array_equal(got["f16"], got["f32"]) and np.array_equal(got["bf16"], got["f32"])
    assert not np.array_equal(got["f32"], pe.load(path, n_ctx=64).logits(ids))


@pytest.mark.parametrize("window", [0, -1, 2**31 - 1, 2**32 - 1])
@pytest.mark.parametrize("kind", cases.quick(c.kind for c in cases.every().values() if c.converted and not c.sees))
def test_windows_that_are_none(kind: str, window: int, tiny_gguf, tmp_path) -> None:
    """Writers say in several ways that there is no window; right are the logits of one that is wider than the context."""
    path, ids = tiny_gguf(kind)[0], list(range(3, 60))
    key = f"{GGUFFile(path).metadata['general.architecture']}.attention.sliding_window"
    try:
        want = pe.load(rewritten(path, tmp_path / "wide.gguf", (key,), {key: 1 << 20}), n_ctx=64).logits(ids)
    except UnsupportedModelError:                            # of an architecture without windows
        want = pe.load(path, n_ctx=64).logits(ids)
    got = pe.load(rewritten(path, tmp_path / "none.gguf", (key,), {key: window}), n_ctx=64).logits(ids)
    assert np.array_equal(got, want)
