"""BERT: hidden states and vectors against transformers, for texts alone and side by side."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_towers

import pyengine as pe
from converters.writer import convert
from pyengine.errors import ContextOverflowError, RequestError, UnsupportedModelError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    import transformers

    made = tmp_path_factory.mktemp("bert")
    tiny_towers.save_word_piece(made)
    config = transformers.BertConfig(vocab_size=160, hidden_size=96, num_hidden_layers=3, num_attention_heads=6, intermediate_size=200,
                                     max_position_embeddings=140, type_vocab_size=3, layer_norm_eps=1e-7)
    return tiny_towers.make("BertModel", config, made)


@pytest.fixture(scope="module")
def model(folder: Path, tmp_path_factory):
    with pe.load(convert(folder, tmp_path_factory.mktemp("gguf") / "bert.gguf", "f32")) as loaded:
        yield loaded


def test_ids_and_hidden_states_are_those_of_transformers(model, folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    theirs, words = tiny_towers.reference("BertModel", folder), AutoTokenizer.from_pretrained(folder)
    for text in tiny_towers.TEXTS:
        ids = words(text)["input_ids"]
        assert model.tokenize(text) == ids
        want = theirs(torch.tensor([ids])).last_hidden_state[0].detach().numpy()
        tiny_towers.close(model.hidden(text), want)
        assert np.array_equal(model.hidden(ids), model.hidden(text))
        tiny_towers.close(model.embed(text, normalize=False), want.mean(0))
        tiny_towers.close(model.embed(text, pooling="cls", normalize=False), want[0])
        tiny_towers.close(model.embed(text, pooling="last"), want[-1] / np.linalg.norm(want[-1]))


def test_a_text_has_the_same_bits_alone_and_beside_others(model) -> None:
    texts = [*tiny_towers.TEXTS, *tiny_towers.TEXTS] * 3
    together = model.embed(texts)
    assert together.shape == (len(texts), 96) and together.dtype == np.float32
    assert all(np.array_equal(row, model.embed(text)) for row, text in zip(together, texts))
    assert np.array_equal(model.embed([model.tokenize(t) for t in texts]), together)
    assert model.embed([]).shape == (0, 96)


def test_what_sentence_transformers_says_of_pooling_is_kept(folder: Path, tmp_path: Path) -> None:
    pools = folder / "1_Pooling"
    pools.mkdir()
    (pools / "config.json").write_text(json.dumps({"word_embedding_dimension": 96, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    with pe.load(convert(folder, tmp_path / "cls.gguf", "f32")) as cls:
        assert np.array_equal(cls.embed("a dog"), cls.embed("a dog", pooling="cls")) and not np.array_equal(cls.embed("a dog"), cls.embed("a dog", pooling="mean"))
    (pools / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(UnsupportedModelError, match="pooling_mode_max_tokens"):
        convert(folder, tmp_path / "max.gguf", "f32")
    (pools / "config.json").unlink()
    pools.rmdir()


def test_the_plan_counts_what_is_loaded(model, tmp_path: Path) -> None:
    plan = pe.plan(model.file.path)
    assert plan.fits and plan.n_ctx == 140 and plan.of("kv") == plan.of("sampler") == 0 and "texts of up to 140 tokens" in plan.table()
    assert pe.plan(model.file.path, n_ctx=32).of("arena") < plan.of("arena")
    assert model.plan.total == plan.total
    with pytest.raises(RequestError, match="at most 140 tokens"):
        pe.plan(model.file.path, n_ctx=141)


def test_what_it_does_not_do_is_said(model) -> None:
    with pytest.raises(ContextOverflowError, match="141 tokens is longer than the 140"):
        model.embed([20] * 141)
    for wrong in ([1.5], {"a": 1}, None, 3):
        with pytest.raises(RequestError):
            model.embed(wrong)
    with pytest.raises(UnsupportedModelError, match="writes no text"):
        model.generate("a")
    with pytest.raises(UnsupportedModelError, match="does not compare pictures"):
        model.similarity([np.zeros((4, 4, 3), np.uint8)], ["a"])
    with pytest.raises(UnsupportedModelError, match="no head"):
        model.logits([1, 2])
    with pytest.raises(RequestError, match="token id 160 is outside"):
        model.hidden([160])
    assert not hasattr(model, "no_such_thing")
