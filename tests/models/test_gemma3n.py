"""Gemma 3n: residual streams, sparse gates, caches that later layers share; MobileNet-V5 against a reference in torch.

What all models must do is in tests/contract; this file declares what it does it with, and has what is special here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import tiny
import pyengine as pe
from cases import Case, Converted, Tokens
from converters import convert
from oracle import encoder_of
from pictures import A, same
from pyengine.errors import InvalidModelError, RequestError, UnsupportedModelError
from pyengine.media.image import Image
from sight import of_any_backend, Run, Sight
from test_gemma3 import TEMPLATE
from tiny import COMMON

try:
    import reference_mobilenetv5
    reference_mobilenetv5.register()
except ImportError:         # the cases are found without transformers and torch
    reference_mobilenetv5 = None

LAYERS = ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
TEXT_CONFIG = {**COMMON, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 6,
               "layer_types": LAYERS, "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 32, "num_kv_shared_layers": 2,
               "laurel_rank": 32, "activation_sparsity_pattern": [0.95, 0.6, 0.0, 0.0, 0.0], "altup_num_inputs": 4}

TEXT = Case(
    "gemma3n", "gemma3n", "Gemma3nTextConfig", "Gemma3nForCausalLM", "spm", TEXT_CONFIG, ring=True, cached_as="gemma4_text",
    variants={"gemma3n": {}, "gemma3n-streams": {"altup_num_inputs": 3, "altup_active_idx": 1, "num_kv_shared_layers": 0, "final_logit_softcapping": 5.0,
                                                 "activation_sparsity_pattern": [0.0, 0.3, 0.9, 0.0, 0.5]}},
    converted=Converted(
        {"block_count": 5, "context_length": 256, "embedding_length": 96, "feed_forward_length": 160, "vocab_size": 512, "attention.head_count": 4,
         "attention.head_count_kv": 2, "attention.key_length": 32, "attention.value_length": 32, "attention.layer_norm_rms_epsilon": np.float32(1e-6),
         "attention.sliding_window": 6, "attention.shared_kv_layers": 2, "attention.sliding_window_pattern": [False, True, False, True, False],
         "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "embedding_length_per_layer_input": 32, "final_logit_softcapping": 30.0,
         "altup.active_idx": 0, "altup.num_inputs": 4,
         "activation_sparsity_scale": [np.float32(1.6448536), np.float32(0.2533471), *[np.float32(-np.inf)] * 3]},
        names="GEMMA3N", tensors={},
        # llama.cpp makes the first ten layers of all models sparse, by one number and another measure of deviation: nothing can be compared
        runs={}))

SOUND = "<audio_soft_token>", "<start_of_audio>", "<end_of_audio>"
# tokens of pictures are the last: those that end them have no rows of their own among the text's
TOKENS = Tokens(
    ("<eos>", "<bos>", "<start_of_turn>", "<pad>", "<start_of_image>", "<end_of_turn>", *SOUND), "<bos>", "<eos>", "<pad>",
    TEMPLATE.replace("<start_of_image>", "<image_soft_token>"),
    {"boi_token_id": "<start_of_image>", "eoi_token_id": "<end_of_image>", "image_token_id": "<image_soft_token>", "audio_token_id": SOUND[0],
     "vision_config.vocab_offset": "<another_picture>"}, ("\n\n", "\n\n\n", "<another_picture>", "<end_of_image>", "<image_soft_token>"),
    {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>", "audio_token": SOUND[0],
     "boa_token": SOUND[1], "eoa_token": SOUND[2]})
N_TEXT = 405                         # tokens before those: TOKENS says which


class Gemma3nSight(Sight):
    """A picture is one square, whatever its shape; behind its soft tokens one row more, its end."""

    model_types, marker = ("gemma3n_here",), "<image_soft_token>"

    def images(self, config: Any, settings: dict[str, Any]) -> Any:
        from transformers import SiglipImageProcessorPil

        return SiglipImageProcessorPil(**{"size": {"height": 64, "width": 64}, "resample": 2, "do_normalize": False, **settings})

    def processor(self, folder: Path, config: Any, tokenizer: Any) -> Any:
        from transformers import Gemma3nProcessor, SiglipImageProcessorPil

        made = of_any_backend(Gemma3nProcessor)(None, SiglipImageProcessorPil.from_pretrained(folder), tokenizer,
                                                image_seq_length=config.vision_soft_tokens_per_image)
        made.end = config.eoi_token_id
        return made

    def chat(self, processor: Any, text: str, pictures: Any) -> list[int]:
        """The end is a row of the picture here."""
        return [processor.image_token_id if i == processor.end else i for i in super().chat(processor, text, pictures)]

    def run(self, model: Any, tokens: Any, made: list[dict[str, Any]], fps: float | None) -> Run:
        import torch

        if not made:
            return Run({}, [], [], [])
        pixels = torch.cat([m["pixel_values"] for m in made])
        end = model.model.embed_vision(input_ids=torch.tensor([model.config.eoi_token_id]))
        return Run({"pixel_values": pixels}, [torch.cat([f, end]) for f in model.model.get_image_features(pixels).pooler_output], list(pixels), [])


SOUND_CONFIG = {"hidden_size": 32, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 2, "vocab_offset": 512, "vocab_size": 4,
                "sscp_conv_channel_size": [8, 4]}
SEEING = Case(
    "gemma3n_seeing", "gemma3n", "SeeingConfig", "Gemma3nForConditionalGeneration", "spm",
    {"vision_soft_tokens_per_image": 4, "audio_config": SOUND_CONFIG}, {**TEXT_CONFIG, "max_position_embeddings": 512, "vocab_size_per_layer_input": N_TEXT},
    {"hidden_size": 80, "vocab_size": 12}, TOKENS, Gemma3nSight(), ring=True, cached_as="gemma4_text",
    converted=Converted(
        {"general.architecture": "gemma3n", "gemma3n.altup.num_inputs": 4},
        clip={"has_vision_encoder": True, "projector_type": "gemma3nv", "use_silu": False, "use_gelu": True, "hidden_act": "gelu_pytorch_tanh",
              "image_size": 64, "patch_size": 16, "embedding_length": 80, "feed_forward_length": 320, "block_count": 128, "attention.head_count": 8,
              "projection_dim": 96, "attention.layer_norm_epsilon": np.float32(1e-6), "image_mean": [0.0] * 3, "image_std": [1.0] * 3, "resample": 2,
              "tokens_per_image": 4, "image_end_row": 1},
        clip_tokens={"image_token_id": "<image_soft_token>", "image_start_token_id": "<start_of_image>"}))

CASES = (TEXT, SEEING)

NAMES = {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm"}


def test_every_tensor_is_there(tiny_gguf) -> None:
    """Under llama.cpp's names; matrices of all streams but the first are one tensor, and the table of tokens without rows ends in zeros."""
    from safetensors.numpy import load_file

    path, folder = tiny_gguf("gemma3n", vocab_size_per_layer_input=500)
    names, want = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3N, 5), {}
    for source, value in load_file(folder / "model.safetensors").items():
        name = next((f"blk.{source.split('.')[2]}.{ours}.weight" for theirs, ours in NAMES.items() if theirs in source), None)
        if "altup_projections" in source or "altup_unembed" in source:
            name, i = ("altup_unembd_proj.weight" if "unembed" in source else "altup_proj.weight"), int(source.split(".")[2])
            want.setdefault(name, np.zeros((3, 96, 96), np.float32))[i] = value
            continue
        name = f"blk.{source.split('.')[2]}.altup_correct_scale.weight" if "correct_output_scale" in source else name
        want[name or names.get_name(source, try_suffixes=(".weight",))] = value
    want["per_layer_token_embd.weight"] = np.pad(want["per_layer_token_embd.weight"], ((0, 12), (0, 0)))
    found = {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}
    assert sorted(found) == sorted(want) and all(np.array_equal(found[name].reshape(value.shape), value) for name, value in want.items())


def test_a_whole_checkpoint_without_a_tower_is_its_text_model(tmp_path, capsys) -> None:
    """Sounds are left out, and said to be."""
    from safetensors.numpy import load_file, save_file

    folder = tiny.make_checkpoint("gemma3n", tmp_path / "c")
    want = convert(folder, tmp_path / "text.gguf", "f32").read_bytes()
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["Gemma3nForConditionalGeneration"], "model_type": "gemma3n", "text_config": config}))
    renamed = {name.replace("model.", "model.language_model.", 1): value for name, value in tensors.items()}
    save_file({**renamed, "model.audio_tower.x": np.zeros(3, np.float32)}, folder / "model.safetensors")
    assert convert(folder, tmp_path / "whole.gguf", "f32").read_bytes() == want
    assert "sounds is left out" in capsys.readouterr().err


def test_widths_that_differ_are_refused(tmp_path) -> None:
    folder = tiny.make_checkpoint("gemma3n", tmp_path / "c", intermediate_size=[160, 160, 160, 160, 192])
    with pytest.raises(UnsupportedModelError, match="intermediate_size"):
        convert(folder, tmp_path / "m.gguf")


# -- pictures -------------------------------------------------------------------------------------------------------------------

needs_torch = pytest.mark.skipif(reference_mobilenetv5 is None, reason="needs transformers and torch: pip install -r requirements/test.txt")


@needs_torch
@pytest.mark.parametrize("resample", [2, 3])
def test_pixels_are_those_of_the_processor(tiny_gguf, resample: int) -> None:
    from transformers import SiglipImageProcessorPil

    path, folder = tiny_gguf("gemma3n_seeing", processor={"resample": resample})
    ours, theirs = encoder_of(path), SiglipImageProcessorPil.from_pretrained(folder)
    for width, height in ((61, 47), (30, 300), (300, 17), (9, 11), (400, 500), (64, 64), (1, 1)):
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        (view,) = ours.process(Image(pixels)).views
        want = theirs(pixels, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
        assert np.array_equal(view.inputs["pixels"], want.transpose(1, 2, 0)) and ours.n_rows(width, height) == view.positions.shape[1] == 5


@needs_torch
@pytest.mark.parametrize("side, tokens", [(64, 16), (96, 4), (80, 4), (72, 9), (70, 4)])
def test_sides_and_numbers_of_soft_tokens(tiny_gguf, side: int, tokens: int) -> None:
    """What a stride does not divide is padded unevenly; means of squares, or the bilinear filter, or neither."""
    path, folder = tiny_gguf("gemma3n_seeing", processor={"size": {"height": side, "width": side}}, vision_soft_tokens_per_image=tokens,
                             vision_config={"tokens": round(tokens**0.5)})
    want = tiny.hf_seen(folder, ["see", A])
    model = pe.load(path, n_ctx=128, kv_dtype="f32")
    same(model.encode_image(A), want.features[0])
    same(model.logits(["see", A]), want.logits)


@needs_torch
def test_names_and_shapes_are_those_of_llama_cpp(tiny_gguf) -> None:
    """Blocks have timm's names and shapes; the stem's numbers lie on the channel's axis. A file without our own keys is read, where
    llama.cpp's constants are the checkpoint's."""
    path, folder = tiny_gguf("gemma3n_seeing", "f16")
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors if t.name.startswith(("v.", "mm."))}
    assert tensors["v.conv_stem.conv.bias"].shape.tolist() == [1, 1, 16, 1] and tensors["v.conv_stem.conv.weight"].tensor_type.name == "F32"
    assert tensors["v.blk.2.2.attn.key.down_conv.weight"].shape.tolist() == [3, 3, 1, 48] and "v.blk.3.1.attn.key.down_conv.weight" not in tensors
    assert tensors["v.blk.1.0.layer_scale.gamma"].shape.tolist() == [32] and tensors["v.blk.1.0.layer_scale.gamma"].tensor_type.name == "F32"
    assert tensors["v.blk.0.0.conv_exp.weight"].shape.tolist() == [3, 3, 16, 64] and tensors["v.blk.0.0.conv_exp.weight"].tensor_type.name == "F16"
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 128)
    for name in tensors:
        source = {"mm": "model.embed_vision.", "v": "model.vision_tower.timm_model."}[name.split(".")[0]]
        theirs = re.sub(r"^(mm|v)\.", source, name)
        for ours, known in (("hard_emb_norm", "hard_embedding_norm"), ("soft_emb_norm", "soft_embedding_norm"),
                            ("input_projection", "embedding_projection")):
            theirs = theirs.replace(ours, known)
        assert ".blk." in name or names.get_name(theirs, try_suffixes=(".weight", ".bias")) == name


@needs_torch
def test_what_cannot_be_is_refused(tiny_gguf, tmp_path) -> None:
    path, _ = tiny_gguf("gemma3n_seeing")
    with pytest.raises(RequestError, match="videos"):
        pe.load(path, n_ctx=128).logits([[A, A]])
    for change, error, words in (({"eoi_token_id": 3}, InvalidModelError, "eoi_token_id"),
                                 ({"vision_config": {"architecture": "resnet50"}}, UnsupportedModelError, "resnet50"),
                                 ({"processor": {"do_normalize": True}}, UnsupportedModelError, "do_normalize"),
                                 ({"processor": {"size": {"height": 64, "width": 96}}}, UnsupportedModelError, "square")):
        folder = tiny.make_checkpoint("gemma3n_seeing", tmp_path / next(iter(change)) / words, **change)
        with pytest.raises(error, match=words):
            convert(folder, tmp_path / "m.gguf")
