"""nomic-embed-text: hidden states, heads, checkpoints and configs of transformers and of the authors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_towers
from tiny_towers import alone_and_beside, compare_logits, compare_ranks, compare_states, loaded, make, reference

from converters.nomic_bert import AUTHORS
from converters.writer import convert
from pyengine.errors import UnsupportedModelError


def checkpoint(head: str, folder: Path, **more: Any) -> Path:
    import transformers

    folder.mkdir()
    tiny_towers.save_word_piece(folder)
    sizes = {"vocab_size": 160, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 104, "layer_norm_eps": 1e-6,
             "max_position_embeddings": 300}
    return make(f"NomicBert{head}", transformers.NomicBertConfig(**{**sizes, **more}), folder)


TINY = {"nomic_bert": lambda folder: checkpoint("Model", folder)}


def test_a_plain_encoder_in_both_forms(tmp_path: Path) -> None:
    folder = checkpoint("Model", tmp_path / "hf", rope_parameters={"rope_type": "default", "rope_theta": 70.0})
    theirs = reference("NomicBertModel", folder)
    with loaded(folder) as model:
        compare_states(model, theirs, folder)
        alone_and_beside(model)
    config = json.loads((folder / "config.json").read_text())
    authors = {old: config.pop(new) for old, new in AUTHORS.items() if new in config}
    rope = config.pop("rope_parameters")
    config |= {**authors, "rotary_emb_base": rope["rope_theta"], "activation_function": "swiglu", "causal": False, "prenorm": False, "rotary_emb_fraction": 1.0,
               "qkv_proj_bias": False, "max_trained_positions": 140}
    del config["hidden_act"]
    (folder / "config.json").write_text(json.dumps(config))
    with loaded(folder) as model:
        compare_states(model, theirs, folder)
        assert model.n_ctx == 140
    for wrong in ({"prenorm": True}, {"activation_function": "gelu"}, {"rotary_emb_interleaved": True}):
        (folder / "config.json").write_text(json.dumps({**config, **wrong}))
        with pytest.raises(UnsupportedModelError):
            convert(folder, tmp_path / "no.gguf", "f32")


def test_separate_projections(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = checkpoint("Model", tmp_path / "hf")
    theirs = reference("NomicBertModel", folder)
    save_file({name: t.contiguous() for name, t in theirs.state_dict().items()}, folder / "model.safetensors", {"format": "pt"})
    assert "layers.0.self_attn.q_proj.weight" in load_file(folder / "model.safetensors")
    with loaded(folder) as model:
        compare_states(model, theirs, folder)


def test_heads(tmp_path: Path) -> None:
    folder = checkpoint("ForMaskedLM", tmp_path / "masked")
    with loaded(folder) as model:
        compare_logits(model, reference("NomicBertForMaskedLM", folder), folder)
    folder = checkpoint("ForSequenceClassification", tmp_path / "one", num_labels=1)
    with loaded(folder) as model:
        compare_ranks(model, reference("NomicBertForSequenceClassification", folder), folder, 300)
