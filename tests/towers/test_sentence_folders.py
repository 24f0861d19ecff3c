"""Folders of sentence-transformers: poolings in both forms, layers behind them, the longest text, prompts, models in a folder of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_towers
from tiny_towers import loaded, make, pooled, reference, save_modules, TEXTS

from converters.writer import convert
from pyengine.errors import InvalidModelError, RequestError, UnsupportedModelError

LONG = "the quick brown fox jumps " * 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    import transformers

    made = tmp_path / "hf"
    made.mkdir()
    tiny_towers.save_word_piece(made)
    return make("BertModel", transformers.BertConfig(vocab_size=160, hidden_size=72, num_hidden_layers=2, num_attention_heads=6, intermediate_size=200,
                                                     max_position_embeddings=140), made)


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("dense", [(), ((40, "Tanh", True),), ((64, "Identity", True), (33, "GELU", False))])
def test_vectors(pooling: str, old: bool, dense: Any, folder: Path) -> None:
    layers, theirs = save_modules(folder, 72, pooling, dense=dense, most=30, old=old, normalize=old), reference("BertModel", folder)
    with loaded(folder) as model:
        for text in (*TEXTS, LONG):
            want = pooled(theirs, folder, text, pooling, layers, 30)
            tiny_towers.close(model.embed(text, normalize=False), want)
            assert np.isclose(np.linalg.norm(model.embed(text)), 1)
        assert model.hidden(LONG).shape == (30, 72) and model.hidden(model.tokenize(LONG)).shape == (102, 72)
        assert np.array_equal(model.embed([LONG, "a"])[0], model.embed(LONG))


def test_texts_end_where_positions_do_without_another_word(folder: Path) -> None:
    theirs = reference("BertModel", folder)
    for settings, most in (({}, 140), ({"model_max_length": 50}, 50), ({"model_max_length": 10**30}, 140)):
        layers = save_modules(folder, 72, "mean")
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, **settings}))
        with loaded(folder) as model:
            tiny_towers.close(model.embed(LONG * 3, normalize=False), pooled(theirs, folder, LONG * 3, "mean", layers, most))
            assert model.hidden(LONG * 3).shape[0] == most
        with loaded(folder, n_ctx=20) as model:
            assert model.hidden(LONG).shape[0] == 20


def test_prompts(folder: Path) -> None:
    prompts = {"query": "the quick query: ", "document": "", "clustering": "a fox "}
    for default in (None, "query"):
        layers, theirs = save_modules(folder, 72, "mean", prompts=prompts, default=default), reference("BertModel", folder)
        with loaded(folder) as model:
            for name, before in (*prompts.items(), (None, prompts[default] if default else ""), ("", "")):
                got = model.embed([*TEXTS, "a"], prompt=name, normalize=False)
                for row, text in zip(got, (*TEXTS, "a")):
                    tiny_towers.close(row, pooled(theirs, folder, before + text, "mean", layers))
            ids = model.tokenize("a dog")
            assert np.array_equal(model.embed([ids], prompt="query")[0], model.embed("a dog", prompt=""))
            for wrong in ("no such", 3, ["query"]):
                with pytest.raises(RequestError, match="'query', 'document', 'clustering'"):
                    model.embed("a", prompt=wrong)
    save_modules(folder, 72, "mean")
    with loaded(folder) as model, pytest.raises(RequestError, match="of which there are none"):
        model.embed("a", prompt="query")


def test_a_model_in_a_folder_of_its_own(folder: Path, tmp_path: Path) -> None:
    layers, theirs = save_modules(folder, 72, "cls", most=24), reference("BertModel", folder)
    with loaded(folder) as model:
        want = model.embed([*TEXTS, LONG])
    outer = tmp_path / "outer"
    shutil.copytree(folder, outer / "0_Transformer", ignore=lambda folder, names: [n for n in names if n[0].isdigit() or n.startswith(("modules", "config_"))])
    for name in ("1_Pooling", "2_Normalize"):
        shutil.copytree(folder / name, outer / name)
    shutil.copy(folder / "config_sentence_transformers.json", outer)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (outer / "modules.json").write_text(json.dumps(modules))
    with loaded(outer) as model:
        assert np.array_equal(model.embed([*TEXTS, LONG]), want)
        tiny_towers.close(model.embed(LONG, normalize=False), pooled(theirs, folder, LONG, "cls", layers, 24))


def test_what_is_not_supported_is_said(folder: Path, tmp_path: Path) -> None:
    def refused(match: str, error: type = UnsupportedModelError) -> None:
        with pytest.raises(error, match=match):
            convert(folder, tmp_path / "no.gguf", "f32")

    save_modules(folder, 72, "max")
    refused("pooling_mode_max_tokens")
    save_modules(folder, 72, "weightedmean", old=False)
    refused("weightedmean")
    save_modules(folder, 72, "mean", dense=((40, "Softplus", True),))
    refused("Softplus")
    save_modules(folder, 72, "mean")
    said = json.loads((folder / "1_Pooling" / "config.json").read_text())
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({**said, "include_prompt": False}))
    refused("include_prompt")
    save_modules(folder, 72, "mean")
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*modules, {**modules[-1], "type": "sentence_transformers.models.CNN"}]))
    refused("CNN")
    save_modules(folder, 72, "mean", default="no such")
    refused("default_prompt_name", InvalidModelError)
