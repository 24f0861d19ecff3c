"""ModernBERT: windows and whole texts, two bases of rope, no biases, heads, configs of two generations, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_towers
from tiny_towers import alone_and_beside, compare_logits, compare_ranks, compare_scores, compare_states, loaded, make, reference

from converters.writer import convert
from pyengine.errors import UnsupportedModelError

SPECIAL = "[CLS]", "[PAD]", "[SEP]", "[UNK]"


def checkpoint(head: str, folder: Path, **more: Any) -> Path:
    import transformers

    folder.mkdir()
    tiny_towers.save_byte_level(folder, SPECIAL, "[MASK]")
    sizes = {"vocab_size": 330, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 104, "norm_eps": 1e-4,
             "max_position_embeddings": 300, "local_attention": 14, "cls_token_id": 0, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return make(f"ModernBert{head}", transformers.ModernBertConfig(**{**sizes, **more}), folder)


TINY = {"modern_bert": lambda folder: checkpoint("Model", folder)}


@pytest.mark.parametrize("more", [{}, {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]},
                                  {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 900.0},
                                                       "sliding_attention": {"rope_type": "default", "rope_theta": 40.0}}},
                                  {"attention_bias": True, "mlp_bias": True, "hidden_activation": "silu"}])
def test_a_plain_encoder(more: dict[str, Any], tmp_path: Path) -> None:
    folder = checkpoint("Model", tmp_path / "hf", **more)
    with loaded(folder) as model:
        compare_states(model, reference("ModernBertModel", folder), folder)
        alone_and_beside(model)
    with loaded(folder, n_ctx=200, n_batch=64) as model:
        alone_and_beside(model)


def test_old_configs_say_the_same(tmp_path: Path) -> None:
    folder = checkpoint("Model", tmp_path / "hf", rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 900.0},
                                                                   "sliding_attention": {"rope_type": "default", "rope_theta": 40.0}})
    config = json.loads((folder / "config.json").read_text())
    for name in ("rope_parameters", "layer_types"):
        del config[name]
    config |= {"global_rope_theta": 900.0, "local_rope_theta": 40.0, "global_attn_every_n_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    with loaded(folder) as model:
        compare_states(model, reference("ModernBertModel", folder), folder)


@pytest.mark.parametrize("tied", [True, False])
def test_a_masked_model(tied: bool, tmp_path: Path) -> None:
    folder = checkpoint("ForMaskedLM", tmp_path / "hf", tie_word_embeddings=tied)
    with loaded(folder) as model:
        compare_logits(model, reference("ModernBertForMaskedLM", folder), folder)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_classes_and_ranks(pooling: str, tmp_path: Path) -> None:
    folder = checkpoint("ForSequenceClassification", tmp_path / "five", classifier_pooling=pooling, num_labels=5)
    with loaded(folder) as model:
        compare_scores(model, reference("ModernBertForSequenceClassification", folder), folder)
    folder = checkpoint("ForSequenceClassification", tmp_path / "one", classifier_pooling=pooling, num_labels=1)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"]["type"] = "BertProcessing"                     # one token between the parts
    for name in ("trim_offsets", "add_prefix_space"):
        del tokenizer["post_processor"][name]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with loaded(folder) as model:
        compare_ranks(model, reference("ModernBertForSequenceClassification", folder), folder, 300)


def test_what_it_does_not_do_is_said(tmp_path: Path) -> None:
    folder = checkpoint("Model", tmp_path / "hf")
    for wrong in ({"norm_bias": True}, {"hidden_activation": "relu"}, {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **wrong}))
        with pytest.raises(UnsupportedModelError):
            convert(folder, tmp_path / "no.gguf", "f32")
        (folder / "config.json").write_text(json.dumps(config))


def test_narrow_weights_stay_near(tmp_path: Path) -> None:
    folder = checkpoint("Model", tmp_path / "hf")
    with loaded(folder) as exact, loaded(folder, "q8_0") as narrow, loaded(folder, "f16") as half:
        for text in tiny_towers.TEXTS:
            assert exact.embed(text) @ half.embed(text) > 0.99999 and exact.embed(text) @ narrow.embed(text) > 0.99
        assert np.array_equal(narrow.embed(["a", "dog " * 40])[1], narrow.embed("dog " * 40))
