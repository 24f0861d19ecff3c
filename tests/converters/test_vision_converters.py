"""Converted models that see: read back with gguf-py beside their checkpoints, and run by llama.cpp beside transformers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_converters import JUNK, edit, nodes, read, retensor, stored

from converters import convert, gemma3, llama4, mistral3, pixtral, qwen2_vl
from converters.__main__ import main
from converters.writer import mmproj_path
from pyengine.errors import InvalidModelError, PyEngineError, UnsupportedModelError

transformers = pytest.importorskip("transformers", reason="pip install transformers torch")

import cases  # noqa: E402
import foreign  # noqa: E402
import tiny  # noqa: E402
from foreign import llama_cpp_logits  # noqa: E402
from tiny import make_checkpoint  # noqa: E402

SEEING = cases.kinds(sees=True)
LLAMA_CPP = [case.kind for case in cases.select(sees=True) if case.llama_cpp]        # those that see there
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One checkpoint of each kind, shared by tests that do not change it."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = make_checkpoint(kind, tmp_path_factory.mktemp("checkpoints") / kind, **cases.find(kind).assumed)
        return made[kind]
    return get


def picture(width, height, seed=0):
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def clip_keys(path):
    """Return the keys "clip.*" of a file, without clip.vision."""
    return {k.removeprefix("clip.").removeprefix("vision."): v for k, v in read(path)[0].items() if k.startswith("clip.")}


# --- one file and two -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [c.kind for c in cases.select(sees=True) if c.llama_cpp and c.dialect and "now" in c.dialect.converters])
def test_every_tensor_is_where_llama_cpp_has_it(kind, checkpoints, tmp_path):
    convert(checkpoints(kind), tmp_path / "m.gguf", "f32", split_mmproj=True)
    theirs = foreign.llama_cpp_files(checkpoints(kind), tmp_path / "theirs.gguf")
    for ours, their in zip((tmp_path / "m.gguf", tmp_path / "mmproj-m.gguf"), theirs):
        _, values, types = read(ours)
        their_keys, expected, _ = read(their)
        assert sorted(values) == sorted(expected) and set(types.values()) == {"F32"}
        for name, value in expected.items():
            assert np.array_equal(values[name], value), name
        keys = read(ours)[0]
        for key, value in their_keys.items():       # whatever llama.cpp's converter says, ours says too
            if key != "clip.vision.feed_forward_length" or kind != "qwen2_vl":
                assert keys[key] == value, key


@pytest.mark.parametrize("kind", SEEING)
def test_splitting_only_divides(kind, checkpoints, tmp_path, capsys):
    whole = tmp_path / "whole.gguf"
    capsys.readouterr()
    assert main([str(checkpoints(kind)), "-o", str(whole), "--outtype", "f16"]) == 0
    assert main([str(checkpoints(kind)), "-o", str(tmp_path / "m.gguf"), "--outtype", "f16", "--split-mmproj"]) == 0
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == [
        str(whole), str(tmp_path / "m.gguf"), str(tmp_path / "mmproj-m.gguf")]
    keys, values, types = read(whole)
    text_keys, text_values, text_types = read(tmp_path / "m.gguf")
    clip, clip_values, clip_types = read(mmproj_path(tmp_path / "m.gguf"))
    assert {k: clip[k] for k in ("general.architecture", "general.type", "general.file_type")} == {
        "general.architecture": "clip", "general.type": "mmproj", "general.file_type": 1}
    assert {**clip, **text_keys} == keys and {**text_types, **clip_types} == types
    assert not any(k.startswith("clip.") for k in text_keys)
    assert all(name.startswith(("v.", "mm.", "model.image_newline")) for name in clip_values)
    assert not any(name.startswith(("v.", "mm.")) for name in text_values)
    both = {**text_values, **clip_values}
    assert sorted(both) == sorted(values) and all(np.array_equal(both[n], values[n]) for n in values)


# --- keys -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", SEEING)
def test_keys(kind, checkpoints, tmp_path):
    path = convert(checkpoints(kind), tmp_path / "m.gguf")
    case, keys = cases.find(kind), read(path)[0]
    tokens = keys["tokenizer.ggml.tokens"]
    special = {name: tokens.index(text) for name, text in case.converted.clip_tokens.items()}
    assert clip_keys(path) == {**case.converted.clip, **special}
    assert keys["clip.vision.projector_type"] == keys["clip.projector_type"]
    assert keys["general.architecture"] == case.arch and keys[f"{case.arch}.vocab_size"] == len(tokens)
    assert {key: keys[key] for key in case.converted.keys} == case.converted.keys
    assert not set(case.converted.absent) & set(keys)


@pytest.mark.parametrize("defaults, name", [
    (gemma3.DEFAULTS, "Gemma3Config"), (gemma3.VISION, "SiglipVisionConfig"),
    (gemma3.IMAGES, "Gemma3ImageProcessorPil"), (mistral3.DEFAULTS, "Mistral3Config"),
    (pixtral.VISION, "PixtralVisionConfig"), (pixtral.IMAGES, "PixtralImageProcessorPil"),
    (qwen2_vl.DEFAULTS, "Qwen2_5_VLConfig"),
    (qwen2_vl.DEFAULTS, "Qwen2VLConfig"), (qwen2_vl.VISION, "models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig"),
    (qwen2_vl.VISION_25, "models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig"),
    (qwen2_vl.TEXT, "models.qwen2_vl.configuration_qwen2_vl.Qwen2VLTextConfig"),
    (qwen2_vl.TEXT, "models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLTextConfig"),
    (qwen2_vl.IMAGES, "Qwen2VLImageProcessorPil"), (llama4.DEFAULTS, "Llama4Config"), (llama4.VISION, "Llama4VisionConfig")])
def test_defaults_are_those_of_transformers(defaults, name):
    import importlib

    module, _, name = name.rpartition(".")
    owner = getattr(importlib.import_module(f"transformers.{module}") if module else transformers, name)
    assert {key: getattr(owner, key) for key in defaults} == defaults
    if defaults is qwen2_vl.TEXT:
        assert owner.default_theta == qwen2_vl.ROPE_BASE


def test_pan_and_scan_defaults_are_those_of_transformers():
    assert gemma3.PAN_AND_SCAN.items() <= transformers.Gemma3Processor.images_kwargs.items()


def test_video_defaults_are_those_of_transformers():
    module = pytest.importorskip("transformers.models.qwen2_vl.video_processing_qwen2_vl",
                                 reason="its video processors need torchvision")
    owner = module.Qwen2VLVideoProcessor
    assert {key: getattr(owner, key) for key in qwen2_vl.VIDEOS} == qwen2_vl.VIDEOS and owner.fps is None


# --- forms of a checkpoint --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, form", [(kind, i) for kind in SEEING for i in range(len(cases.find(kind).converted.renames))])
def test_tensors_under_other_names_give_the_same_file(kind, form, tmp_path):
    folder = make_checkpoint(kind, tmp_path / "c")
    expected = convert(folder, tmp_path / "a.gguf").read_bytes()
    n_renamed = 0

    def rename(tensors):
        nonlocal n_renamed
        for name in list(tensors):
            for old, new in cases.find(kind).converted.renames[form]:
                if name.startswith(old):
                    tensors[new + name.removeprefix(old)] = tensors.pop(name)
                    n_renamed += 1
                    break
    retensor(rename)(folder)
    assert n_renamed > 20
    assert convert(folder, tmp_path / "a.gguf").read_bytes() == expected


def test_a_sparse_gemma_config_takes_the_defaults(tmp_path):
    """Released Gemma 3 files leave out what equals the class defaults, head counts too."""
    folder = make_checkpoint("gemma3", tmp_path / "c", text_config={
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
        "max_position_embeddings": 131072, "num_hidden_layers": 2})
    expected = convert(folder, tmp_path / "a.gguf").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    keep = ("hidden_size", "intermediate_size", "num_hidden_layers", "sliding_window", "vocab_size", "pad_token_id",
            "bos_token_id", "eos_token_id")
    config["text_config"] = {k: v for k, v in config["text_config"].items() if k in keep}
    config["vision_config"] = {k: v for k, v in config["vision_config"].items() if k not in ("hidden_act", "num_channels")}
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    assert convert(folder, tmp_path / "a.gguf").read_bytes() == expected


def test_shards_give_the_same_file(checkpoints, tmp_path):
    folder = tmp_path / "qwen2_vl"
    make_checkpoint("qwen2_vl", folder, max_shard_size="300KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    expected = convert(checkpoints("qwen2_vl"), tmp_path / "a.gguf").read_bytes()
    assert convert(folder, tmp_path / "b.gguf").read_bytes() == expected


def test_row_chunks_do_not_show(checkpoints, tmp_path, monkeypatch):
    """Parts of a tensor and frames of a convolution are read a few rows at a time."""
    kinds = cases.kinds(sees=True, own_cache=True)
    expected = [convert(checkpoints(kind), tmp_path / "a.gguf", "q8_0").read_bytes() for kind in kinds]
    monkeypatch.setattr("converters.writer.CHUNK", 7 * 80 + 5)
    assert [convert(checkpoints(kind), tmp_path / "a.gguf", "q8_0").read_bytes() for kind in kinds] == expected


VARIANTS = {
    "gemma-untied": ("gemma3", {"tie_word_embeddings": False}),
    "gemma-head": ("gemma3", {"vision_config": {"vision_use_head": True}}),     # not used by the model
    "gemma-sizes": ("gemma3", {"mm_tokens_per_image": 9, "vision_config": {"image_size": 100, "patch_size": 11}}),
    "qwen-merge-3": ("qwen2_5_vl", {"vision_config": {"spatial_merge_size": 3, "window_size": 84}}),
    "qwen-frames": ("qwen2_5_vl", {"vision_config": {"temporal_patch_size": 3, "patch_size": 6}}),
    "qwen-one-frame": ("qwen2_vl", {"vision_config": {"temporal_patch_size": 1, "mlp_ratio": 3}}),
    "qwen-untied": ("qwen2_vl", {"tie_word_embeddings": False}),
    "mistral-tied": ("mistral3", {"tie_word_embeddings": True}),
    "mistral-sizes": ("mistral3", {"spatial_merge_size": 3, "multimodal_projector_bias": True, "vision_config": {"patch_size": 6}}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_odd_sizes(variant, tmp_path):
    """Every value of the checkpoint is in the file, once."""
    kind, overrides = VARIANTS[variant]
    folder = make_checkpoint(kind, tmp_path / "c", **overrides)
    _, values, _ = read(convert(folder, tmp_path / "m.gguf", "f32"))
    skipped = sum(v.size for n, v in stored(folder).items() if ".head." in n)
    assert (skipped > 0) == (variant == "gemma-head")
    twice = values.pop("v.token_embd.img_break", np.empty(0))           # a row of the embedding
    assert sum(v.size for v in values.values()) == sum(v.size for v in stored(folder).values()) - skipped
    assert ("output.weight" in values) == ("untied" in variant or kind == "qwen2_5_vl" or variant == "mistral-sizes")
    if kind == "mistral3":
        assert np.array_equal(twice, values["token_embd.weight"][clip_keys(tmp_path / "m.gguf")["image_break_token_id"]])
    if variant == "gemma-sizes":
        assert values["v.patch_embd.weight"].shape == (72, 3, 11, 11) and values["v.position_embd.weight"].shape == (81, 72)
        assert clip_keys(tmp_path / "m.gguf")["projector.scale_factor"] == 3
    if variant == "qwen-frames":
        conv = stored(folder)["visual.patch_embed.proj.weight"]
        for t, name in enumerate(("", ".1", ".2")):
            assert np.array_equal(values[f"v.patch_embd.weight{name}"], conv[:, :, t])


@pytest.mark.parametrize("kind, key, value", [
    ("gemma3", "hidden_act", "gelu"), ("gemma3", "hidden_act", "silu"), ("gemma3", "layer_norm_eps", 1e-3),
    ("qwen2_vl", "hidden_act", "gelu_pytorch_tanh"), ("qwen2_5_vl", "hidden_act", "gelu"),
    ("qwen2_5_vl", "window_size", 84), ("qwen2_5_vl", "tokens_per_second", 25),
    ("qwen2_5_vl", "rope_parameters", {"rope_type": "axial", "rope_theta": 500.0}), ("mistral3", "hidden_act", "gelu"),
    ("mistral3", "rope_parameters", {"rope_type": "axial", "rope_theta": 500.0}), ("mistral3", "image_size", 420)])
def test_values_of_the_encoder_reach_the_file(kind, key, value, tmp_path):
    folder = make_checkpoint(kind, tmp_path / "c", vision_config={key: value})
    keys = clip_keys(convert(folder, tmp_path / "m.gguf"))
    if key == "hidden_act":
        assert keys[key] == value
        assert (keys["use_gelu"], keys["use_silu"]) == ("gelu" in value, value == "silu")
    else:
        name, value = {"layer_norm_eps": ("attention.layer_norm_epsilon", np.float32(1e-3)),
                       "rope_parameters": ("rope.freq_base", 500.0)}.get(key, (key, value))
        assert keys[name] == value


@pytest.mark.parametrize("full, period", [
    ([0, 3], None), ([1, 3], 2), ([3], 4), ([], 5), ([2], 3), ([0, 1, 2, 3], 1), ([1], None), ([3, 1, 9], 2)])
def test_layers_with_full_attention(full, period, tmp_path):
    folder = make_checkpoint("qwen2_5_vl", tmp_path / "c", vision_config={"fullatt_block_indexes": full})
    keys = clip_keys(convert(folder, tmp_path / "m.gguf"))
    assert keys.get("wa_layer_indexes", []) == sorted(i for i in full if i < 4)
    assert keys.get("n_wa_pattern") == period


@pytest.mark.parametrize("rope, keys", [
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, {"type": "yarn", "factor": 4.0}),
    ({"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}), ({"rope_type": "default"}, {})])
def test_rope_scaling_beside_sections(rope, keys, tmp_path):
    folder = make_checkpoint("qwen2_5_vl", tmp_path / "c", text_config={"rope_parameters": {**ROPE, **rope}})
    found = read(convert(folder, tmp_path / "m.gguf"))[0]
    assert {k: v for k, v in found.items() if k.startswith("qwen2vl.rope.scaling.")}.items() >= {
        f"qwen2vl.rope.scaling.{k}": v for k, v in keys.items()}.items()
    assert any(".rope.scaling." in k for k in found) == bool(keys)
    assert found["qwen2vl.rope.dimension_sections"] == [2, 3, 3, 0] and found["qwen2vl.rope.freq_base"] == 1e6


# --- settings of the processors ---------------------------------------------------------------------------------------

def limits(keys):
    return [keys[f"{kind}_{end}_pixels"] for kind in ("image", "video") for end in ("min", "max")]


@pytest.mark.parametrize("files, expected", [
    ({}, [3136, 28 * 28 * 1280, 128 * 28 * 28, 28 * 28 * 768]),
    ({"preprocessor_config.json": {"min_pixels": 3136, "max_pixels": 12845056}}, [3136, 12845056] * 2),
    ({"preprocessor_config.json": {"size": {"min_pixels": 400, "max_pixels": 50000}}}, [400, 50000] * 2),
    ({"preprocessor_config.json": {"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 7}}, [7, 2] * 2),
    ({"preprocessor_config.json": {"min_pixels": 100}, "video_preprocessor_config.json": {"max_pixels": 999}},
     [100, 28 * 28 * 1280, 128 * 28 * 28, 999]),
    ({"preprocessor_config.json": {"min_pixels": 100}, "processor_config.json": {
        "image_processor": {"size": {"shortest_edge": 5, "longest_edge": 6}},
        "video_processor": {"size": {"shortest_edge": 8, "longest_edge": 9}}}}, [5, 6, 8, 9]),
    ({"preprocessor_config.json": {"max_pixels": 100}, "processor_config.json": {"processor_class": "x"}},
     [3136, 100, 128 * 28 * 28, 100])])
def test_pixel_limits(files, expected, checkpoints, tmp_path):
    import shutil

    folder = shutil.copytree(checkpoints("qwen2_vl"), tmp_path / "c")
    (folder / "preprocessor_config.json").unlink()
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    assert limits(clip_keys(convert(folder, tmp_path / "m.gguf"))) == expected


def test_processor_settings_reach_the_file(tmp_path):
    folder = make_checkpoint("gemma3", tmp_path / "g", processor={
        "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3, "do_pan_and_scan": True,
        "pan_and_scan_max_num_crops": 6, "pan_and_scan_min_ratio_to_activate": 1.5, "pan_and_scan_min_crop_size": 32})
    keys = clip_keys(convert(folder, tmp_path / "m.gguf"))
    assert keys["image_mean"] == [np.float32(x) for x in (0.1, 0.2, 0.3)] and keys["resample"] == 3
    assert keys["image_std"] == [np.float32(x) for x in (0.4, 0.5, 0.6)]
    assert [keys[f"pan_and_scan{k}"] for k in ("", "_max_num_crops", "_min_ratio_to_activate", "_min_crop_size")] == [
        True, 6, 1.5, 32]
    edit(folder / "preprocessor_config.json", do_pan_and_scan=False, pan_and_scan_max_num_crops=None, image_mean=None)
    keys = clip_keys(convert(folder, tmp_path / "m.gguf"))
    assert not keys["pan_and_scan"] and keys["pan_and_scan_max_num_crops"] == 4 and keys["image_mean"] == [0.5] * 3
    folder = make_checkpoint("qwen2_5_vl", tmp_path / "q")
    (folder / "video_preprocessor_config.json").write_text(json.dumps({
        "fps": 2.0, "min_frames": 2, "max_frames": 20, "do_sample_frames": True, "cap_pixels_per_frame": False}))
    keys = clip_keys(convert(folder, tmp_path / "m.gguf"))
    assert [keys[f"video_{k}"] for k in ("fps", "min_frames", "max_frames", "sample_frames")] == [2.0, 2, 20, True]


def test_gemma_ids_under_either_name(tmp_path):
    folder = make_checkpoint("gemma3", tmp_path / "c")
    expected = convert(folder, tmp_path / "m.gguf").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", boi_token_index=None, boi_token_id=config["boi_token_index"], image_token_index=None,
         image_token_id=config["image_token_index"], eoi_token_index=None, eoi_token_id=config["eoi_token_index"])
    assert convert(folder, tmp_path / "m.gguf").read_bytes() == expected


# --- types ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", cases.quick(SEEING))
@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
def test_types(kind, outtype, checkpoints, tmp_path):
    exact = read(convert(checkpoints(kind), tmp_path / "m.gguf", "f32"))[1]
    _, values, types = read(convert(checkpoints(kind), tmp_path / "m.gguf", outtype))
    error = {"F32": 0, "F16": 2 ** -11, "BF16": 2 ** -8, "Q8_0": 1 / 127}
    for name, value in exact.items():
        wanted = outtype.upper()
        f32 = ("v.class_embd", "v.position_embd", "v.patch_embd", "v.pre_tile_position_embd", "v.post_tile_position_embd", "mm.pad_embd", "mm.position_embd", "mm.proj_query", "v.conv_stem")
        if value.ndim < 2 or name.startswith(f32) or ".ffn_gate_inp" in name or ".ssm_conv1d." in name or name.endswith((".conv2.weight", ".bias")):
            wanted = "F32"
        elif name == "v.tile_position_embd.weight":          # as many as a layer has weights, never in blocks
            wanted = "F16" if outtype == "q8_0" else wanted
        elif name == "mm.input_projection.weight" and kind == "gemma3":            # whose rows are inputs
            wanted = "F32" if outtype == "bf16" else "F16"
        elif outtype == "q8_0" and value.shape[-1] % 32 and not name.endswith("ffn_down.weight"):
            wanted = "F16"
        assert types[name] == wanted, name
        found, stored = values[name], values[name].shape
        if outtype == "q8_0" and name.startswith(("v.blk.", "v.global.blk.")) and ".ffn_" in name and stored != value.shape:
            assert all(n % 32 == 0 for n, m in zip(stored, value.shape) if n != m)      # units of zeros fill the last block
            found = found[tuple(slice(n) for n in value.shape)]
            assert not np.any(np.delete(values[name].reshape(-1), np.arange(values[name].size).reshape(stored)[
                tuple(slice(n) for n in value.shape)].reshape(-1)))
        scale = abs(value).max() if wanted == "Q8_0" else abs(value)
        assert (abs(found - value) <= error[wanted] * scale + 1e-7).all(), name
    assert {"F32", "F16" if outtype != "bf16" else "BF16"} <= set(types.values())


def test_peak_memory(tmp_path):
    """Parts of tensors stream too: 210 MB, of which a merger of 100 MB and a fused q/k/v of 20 MB."""
    from test_converters import peak_memory
    from safetensors.numpy import save_file

    folder, (v, d, f, w) = tmp_path / "c", (512, 1024, 256, 1280)
    folder.mkdir()
    config = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "vocab_size": v, "hidden_size": d,
              "intermediate_size": f, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8,
              "tie_word_embeddings": True,
              "vision_config": {"depth": 2, "hidden_size": w, "intermediate_size": 512, "out_hidden_size": d}}
    (folder / "config.json").write_text(json.dumps(config))
    m = "model.layers.0"
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,), f"{m}.input_layernorm.weight": (d,),
              f"{m}.post_attention_layernorm.weight": (d,), f"{m}.self_attn.o_proj.weight": (d, d),
              **{f"{m}.self_attn.{p}_proj.{end}": shape for p in "qkv" for end, shape in (("weight", (d, d)), ("bias", (d,)))},
              f"{m}.mlp.gate_proj.weight": (f, d), f"{m}.mlp.up_proj.weight": (f, d), f"{m}.mlp.down_proj.weight": (d, f)}
    def linear(name, n_out, n_in):
        return {f"visual.{name}.weight": (n_out, n_in), f"visual.{name}.bias": (n_out,)}
    for i in range(2):
        b = f"blocks.{i}"
        shapes |= {f"visual.{b}.norm1.weight": (w,), f"visual.{b}.norm2.weight": (w,), **linear(f"{b}.attn.qkv", 3 * w, w),
                   **linear(f"{b}.attn.proj", w, w), **linear(f"{b}.mlp.gate_proj", 512, w),
                   **linear(f"{b}.mlp.up_proj", 512, w), **linear(f"{b}.mlp.down_proj", w, 512)}
    shapes |= {"visual.patch_embed.proj.weight": (w, 3, 2, 14, 14), "visual.merger.ln_q.weight": (w,),
               **linear("merger.mlp.0", 4 * w, 4 * w), **linear("merger.mlp.2", d, 4 * w)}
    save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, folder / "model.safetensors")
    assert (folder / "model.safetensors").stat().st_size > 205e6
    peak = peak_memory(folder, "-o", tmp_path / "m.gguf", "--outtype", "f16", "--split-mmproj", "--no-tokenizer")
    assert peak < 2 * (4 * w) ** 2 * 4 + 200e6
    assert mmproj_path(tmp_path / "m.gguf").stat().st_size > 95e6


# --- what is refused --------------------------------------------------------------------------------------------------

def text(**changes):
    return lambda folder: change_part(folder, "text_config", changes)


def vision(**changes):
    return lambda folder: change_part(folder, "vision_config", changes)


def change_part(folder, part, changes):
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", **{part: {**config[part], **changes}})


def processor(**changes):
    return lambda folder: edit(folder / "preprocessor_config.json", **changes)


REFUSED = {
    "activation": ("gemma3", vision(hidden_act="relu"), UnsupportedModelError, "'hidden_act' is 'relu'"),
    "channels": ("gemma3", vision(num_channels=1), UnsupportedModelError, "'num_channels' is 1"),
    "channels of Qwen": ("qwen2_vl", vision(in_channels=4), UnsupportedModelError, "'in_channels' is 4"),
    "pooling": ("gemma3", lambda f: edit(f / "config.json", mm_tokens_per_image=5), InvalidModelError,
                "4 x 4 patches cannot be pooled to 5 tokens"),
    "more tokens than patches": ("gemma3", lambda f: edit(f / "config.json", mm_tokens_per_image=64), InvalidModelError,
                                 "cannot be pooled to 64"),
    "token id": ("gemma3", lambda f: edit(f / "config.json", boi_token_index="<x>"), InvalidModelError,
                 "'boi_token_index' is '<x>'; a token id"),
    "patches as pairs": ("qwen2_vl", vision(patch_size=[14, 14]), InvalidModelError, "'patch_size' is"),
    "mean": ("gemma3", processor(image_mean=[0.5]), InvalidModelError, "'image_mean' has 1 values"),
    "scale": ("gemma3", processor(rescale_factor=0.5), UnsupportedModelError, "'rescale_factor' is 0.5"),
    "no resizing": ("qwen2_vl", processor(do_resize=False), UnsupportedModelError, "'do_resize' is False"),
    "pixels": ("qwen2_vl", processor(size={"shortest_edge": -3, "longest_edge": 9}), InvalidModelError, "'min_pixels' is -3"),
    "frames": ("qwen2_vl", lambda f: (f / "video_preprocessor_config.json").write_text('{"num_frames": 8}'),
               UnsupportedModelError, "'num_frames' is 8"),
    "capped frames": ("qwen2_5_vl", lambda f: (f / "video_preprocessor_config.json").write_text(
        '{"cap_pixels_per_frame": true}'), UnsupportedModelError, "'cap_pixels_per_frame' is True"),
    "sections": ("qwen2_5_vl", text(rope_parameters={**ROPE, "mrope_section": [4, 4]}), InvalidModelError,
                 r"'mrope_section' is \[4, 4\]"),
    "sections of other heads": ("qwen2_5_vl", text(rope_parameters={**ROPE, "mrope_section": [16, 24, 24]}),
                                InvalidModelError, "half of a head's 16"),
    "width": ("qwen2_5_vl", vision(out_hidden_size=80), InvalidModelError, "gives 80 values a token, the text model has 96"),
    "rope of the encoder": ("qwen2_5_vl", vision(rope_parameters={"rope_type": "yarn"}), UnsupportedModelError,
                            "rope 'yarn' of the encoder"),
    "text rope": ("qwen2_5_vl", text(rope_parameters={**ROPE, "rope_type": "dynamic", "factor": 2.0}),
                  UnsupportedModelError, "'dynamic'"),
    "lost tensor": ("qwen2_vl", retensor(lambda t: t.pop("visual.blocks.1.attn.qkv.bias")), InvalidModelError,
                    "tensor 'visual.blocks.1.attn.qkv.bias' missing"),
    "more layers": ("gemma3", vision(num_hidden_layers=2), UnsupportedModelError, "no place for tensors 'vision_tower"),
    "wrong part": ("qwen2_vl", vision(embed_dim=64), InvalidModelError, r"config.json asks for \(64, 3, 2, 14, 14\)"),
    "two names": ("qwen2_vl", retensor(lambda t: t.update({"model.visual.merger.ln_q.bias": t["visual.merger.ln_q.bias"]})),
                  InvalidModelError, "two tensors are 'visual.merger.ln_q.bias'"),
    "processor": ("qwen2_vl", lambda f: (f / "processor_config.json").write_text('{"image_processor": 3}'),
                  InvalidModelError, "'image_processor' is not a JSON object"),
    "text of Mistral": ("mistral3", text(model_type="mistral4"), UnsupportedModelError, "'model_type' is 'mistral4'"),
    "rope of Ministral": ("mistral3_ministral", text(rope_parameters={**ROPE, "rope_type": "default"}), UnsupportedModelError,
                          "rope 'default' with 'llama_4_scaling_beta' None"),
    "no text": ("mistral3", lambda f: edit(f / "config.json", text_config=None), InvalidModelError, "'text_config' is missing"),
    "other layers": ("mistral3", lambda f: edit(f / "config.json", vision_feature_layer=-2), UnsupportedModelError,
                     "'vision_feature_layer' is -2"),
    "heads of the encoder": ("mistral3", vision(num_attention_heads=8), InvalidModelError, "a multiple of 4 elements"),
    "rope of Pixtral": ("mistral3", vision(rope_parameters={"rope_type": "yarn"}), UnsupportedModelError,
                        "rope 'yarn' of the encoder"),
    "two edges": ("mistral3", processor(size={"height": 5, "width": 6}), UnsupportedModelError, "'size' is"),
    "another patch": ("mistral3", lambda f: (f / "processor_config.json").write_text('{"patch_size": 16}'), UnsupportedModelError,
                      "'patch_size' is 16"),
    "no such token": ("mistral3", lambda f: (f / "processor_config.json").write_text('{"image_end_token": "<end>"}'),
                      InvalidModelError, "no token '<end>'"),
    "activation of the projector": ("mistral3", lambda f: edit(f / "config.json", projector_hidden_act="relu"),
                                    UnsupportedModelError, "'projector_hidden_act' is 'relu'"),
    "no object": ("qwen2_vl", lambda f: edit(f / "config.json", text_config=[1]), InvalidModelError, "wrong kind"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    kind, change, error, words = REFUSED[case]
    folder = make_checkpoint(kind, tmp_path / "c")
    change(folder)
    with pytest.raises(error, match=words):
        convert(folder, tmp_path / "m.gguf", "f16", split_mmproj=True)
    assert not list(tmp_path.glob("*.gguf*")), "nothing half-written stays behind"


def test_splitting_a_text_model_is_refused(tmp_path, capsys):
    folder = make_checkpoint("qwen2", tmp_path / "c")
    capsys.readouterr()
    assert main([str(folder), "-o", str(tmp_path / "m.gguf"), "--split-mmproj"]) == 2
    assert capsys.readouterr().err == f"error: {folder}: 'qwen2' has no image encoder to split off\n"
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize("kind, name", [(k, f) for k in cases.kinds(sees=True, own_cache=True)
                                        for f in ("config.json", "preprocessor_config.json")])
def test_damaged_files_never_crash(kind, name, tmp_path):
    folder = make_checkpoint(kind, tmp_path / "c")
    data = (folder / name).read_text()
    random, outcomes = np.random.default_rng(5), set()
    for _ in range(40):
        value = json.loads(data)
        places = list(nodes(value))
        container, key = places[random.integers(len(places))]
        container[key] = JUNK[random.integers(len(JUNK))]
        (folder / name).write_text(json.dumps(value))
        try:
            convert(folder, tmp_path / "m.gguf")
            outcomes.add("converted")
        except PyEngineError:
            outcomes.add("refused")
    assert "refused" in outcomes


# --- llama.cpp runs what we write -------------------------------------------------------------------------------------

RUNS = {name: (kind, config) for kind in LLAMA_CPP for name, config in cases.find(kind).llama_cpp_runs.items()}


@pytest.mark.parametrize("run", RUNS)
def test_llama_cpp_gives_the_logits_of_transformers(run, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="make peers")
    kind, overrides = RUNS[run]
    folder = make_checkpoint(kind, tmp_path / "c", **overrides)
    ids = np.random.default_rng(1).integers(0, 390, 100).tolist()       # no special token, far beyond Gemma's window
    expected = tiny.hf_seen(folder, ids).logits
    found = llama_cpp_logits(llama_cpp, convert(folder, tmp_path / "m.gguf", "f32", split_mmproj=True), ids)
    error = abs(found - expected) / np.ptp(expected)
    assert error.max() < 2e-4       # measured: Gemma 3e-5 (llama.cpp's GELU is a table of float16), Qwen 1e-5
    assert (found.argmax(1) == expected.argmax(1)).all()


@pytest.mark.parametrize("kind, outtype", [(kind, outtype) for kind in LLAMA_CPP for outtype in cases.find(kind).llama_cpp.outtypes])
def test_llama_cpp_encodes_pictures_as_transformers_does(kind, outtype, checkpoints, tmp_path):
    pytest.importorskip("llama_cpp", reason="make peers")
    text_file = convert(checkpoints(kind), tmp_path / "m.gguf", outtype, split_mmproj=True)
    theirs = cases.find(kind).llama_cpp
    image = picture(*theirs.picture)
    seen = tiny.hf_seen(checkpoints(kind), [image])
    theirs.adapt(mmproj_path(text_file))
    ids, rows = foreign.mtmd_rows(text_file, mmproj_path(text_file), image)
    assert ids == theirs.ids(seen, clip_keys(mmproj_path(text_file)).get("image_token_id"))
    embedded, tokens = theirs.between(rows, seen)
    assert np.allclose(embedded, read(text_file)[1]["token_embd.weight"][tokens])
    rows = theirs.rows(rows, seen)
    # measured 5e-4 in F32: llama.cpp's GELU is the tanh one where Qwen's merger has the exact one, from a table of float16
    want = theirs.wanted(seen)
    assert abs(rows - want).max() < (theirs.error if outtype == "f32" else 1e-2) * np.ptp(want)


def test_llama_cpp_refuses_layers_that_its_key_cannot_list(tmp_path):
    """Better than running them with full attention elsewhere."""
    pytest.importorskip("llama_cpp", reason="make peers")
    folder = make_checkpoint("qwen2_5_vl", tmp_path / "c", vision_config={"fullatt_block_indexes": [0, 3]})
    text_file = convert(folder, tmp_path / "m.gguf", split_mmproj=True)
    with pytest.raises(ValueError, match="does not load"):
        foreign.mtmd_rows(text_file, mmproj_path(text_file), picture(56, 56))
