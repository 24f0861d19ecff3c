"""EmbeddingGemma: Gemma 3 in both directions with windows, a sentence-transformers folder with two layers behind the mean, and prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_towers
from cases import Tokens
from tiny_towers import alone_and_beside, compare_states, loaded, make, reference

from converters.writer import convert
from pyengine.errors import RequestError, UnsupportedModelError


def checkpoint(folder: Path, **more: Any) -> Path:
    import transformers

    folder.mkdir()
    ids = tiny.save_tokenizer("spm", folder, Tokens())
    fast = json.loads((folder / "tokenizer.json").read_text())
    end = {"SpecialToken": {"id": "<|stop|>", "type_id": 0}}
    fast["post_processor"]["single"].append(end)
    fast["post_processor"]["special_tokens"]["<|stop|>"] = {"id": "<|stop|>", "ids": [ids["eos_token_id"]], "tokens": ["<|stop|>"]}
    (folder / "tokenizer.json").write_text(json.dumps(fast))
    sizes = {"vocab_size": 512, "hidden_size": 96, "intermediate_size": 104, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
             "head_dim": 16, "max_position_embeddings": 300, "sliding_window": 14, "query_pre_attn_scalar": 20, "use_bidirectional_attention": True,
             "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"], **ids}
    return make("Gemma3TextModel", transformers.Gemma3TextConfig(**{**sizes, **more}), folder)


TINY = {"gemma_embedding": lambda folder: checkpoint(folder)}


def test_it_sees_in_both_directions(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "hf")
    with loaded(folder) as model:
        compare_states(model, reference("Gemma3TextModel", folder), folder)
        alone_and_beside(model)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_bidirectional_attention": False}))
    with pytest.raises(UnsupportedModelError, match="use_bidirectional_attention"):
        convert(folder, tmp_path / "no.gguf", "f32")


def test_the_folder_of_sentence_transformers(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "hf")
    theirs = reference("Gemma3TextModel", folder)
    prompts = {"query": "task: search result | query: ", "document": "title: none | text: "}
    layers = tiny_towers.save_modules(folder, 96, "mean", dense=((120, "Identity", False), (64, "Identity", False)), prompts=prompts)
    with loaded(folder) as model:
        for text in tiny_towers.TEXTS:
            for name, before in (*prompts.items(), (None, ""), ("", "")):
                with np.errstate(all="ignore"):
                    want = tiny_towers.pooled(theirs, folder, before + text, "mean", layers)
                tiny_towers.close(model.embed(text, prompt=name, normalize=False), want)
            assert np.array_equal(model.embed(text, pooling="head"), model.embed(text))
            assert model.embed(text, pooling="mean").shape == (96,) and model.embed(text).shape == (64,)
        with pytest.raises(RequestError, match="'query', 'document'"):
            model.embed("a", prompt="no such")
