"""Gemma 3n: residual streams, sparse gates, caches that later layers share.

What all models must do is in tests/contract; this file declares what it does it with, and has what is special here.
"""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest

import tiny
from cases import Case, Converted
from converters import convert
from pyengine.errors import UnsupportedModelError
from tiny import COMMON

LAYERS = ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
TEXT_CONFIG = {**COMMON, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 6,
               "layer_types": LAYERS, "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 32, "num_kv_shared_layers": 2,
               "laurel_rank": 32, "activation_sparsity_pattern": [0.95, 0.6, 0.0, 0.0, 0.0], "altup_num_inputs": 4}

TEXT = Case(
    "gemma3n", "gemma3n", "Gemma3nTextConfig", "Gemma3nForCausalLM", "spm", TEXT_CONFIG, ring=True, also=("Gemma3nForConditionalGeneration",),
    cached_as="gemma4_text",
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

CASES = (TEXT,)

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


def test_encoders_are_left_out_and_said_to_be(tmp_path, capsys) -> None:
    """Of a whole checkpoint the text model is converted."""
    from safetensors.numpy import load_file, save_file

    folder = tiny.make_checkpoint("gemma3n", tmp_path / "c")
    want = convert(folder, tmp_path / "text.gguf", "f32").read_bytes()
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["Gemma3nForConditionalGeneration"], "model_type": "gemma3n", "text_config": config}))
    renamed = {name.replace("model.", "model.language_model.", 1): value for name, value in tensors.items()}
    save_file({**renamed, "model.vision_tower.timm_model.x": np.zeros(3, np.float32)}, folder / "model.safetensors")
    assert convert(folder, tmp_path / "whole.gguf", "f32").read_bytes() == want
    assert "left out" in capsys.readouterr().err


def test_widths_that_differ_are_refused(tmp_path) -> None:
    folder = tiny.make_checkpoint("gemma3n", tmp_path / "c", intermediate_size=[160, 160, 160, 160, 192])
    with pytest.raises(UnsupportedModelError, match="intermediate_size"):
        convert(folder, tmp_path / "m.gguf")
