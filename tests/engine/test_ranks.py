"""Decoders that embed and rank as their folders say: Qwen3-Embedding's pooling, prompts and end token, Qwen3-Reranker's two answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_towers
from tiny_towers import loaded, save_modules, TEXTS

import pyengine as pe
from converters.qwen3 import RERANK
from converters.writer import convert
from pyengine.errors import InvalidModelError, RequestError, UnsupportedModelError


def checkpoint(folder: Path, tied: bool, plain: bool) -> Path:
    """A qwen3 checkpoint whose vocabulary has "yes" and "no" and an end token of its own behind each text. plain: without its output head."""
    from safetensors.torch import load_file, save_file

    tiny.make_checkpoint("qwen3", folder, tie_word_embeddings=tied, max_position_embeddings=600)
    fast = json.loads((folder / "tokenizer.json").read_text())
    vocab = fast["model"]["vocab"]
    for old, new in (("\u00c0", "yes"), ("\u00c1", "no")):                     # bytes that no text has
        vocab[new] = vocab.pop(old)
    end = next(t["id"] for t in fast["added_tokens"] if t["content"] == "<|fill|>")
    fast["post_processor"] = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|fill|>", "type_id": 0}}],
                              "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                              "special_tokens": {"<|fill|>": {"id": "<|fill|>", "ids": [end], "tokens": ["<|fill|>"]}}} if plain else None
    (folder / "tokenizer.json").write_text(json.dumps(fast))
    if plain:
        found = load_file(folder / "model.safetensors")
        save_file({name.removeprefix("model."): t.contiguous() for name, t in found.items() if not name.startswith("lm_head")}, folder / "model.safetensors",
                  {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3Model"], "tie_word_embeddings": True}))
    return folder


def scored(folder: Path, labels: int = 1, **more: Any) -> Path:
    """Make such a checkpoint one with a head of scores in the place of its output head."""
    import torch
    from safetensors.torch import load_file, save_file

    checkpoint(folder, True, False)
    found = {name: t for name, t in load_file(folder / "model.safetensors").items() if not name.startswith("lm_head")}
    found["score.weight"] = torch.randn(labels, 96, generator=torch.Generator().manual_seed(4)) / 10
    save_file({name: t.contiguous() for name, t in found.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    named = {"id2label": {str(i): f"LABEL_{i}" for i in range(labels)}, "label2id": {f"LABEL_{i}": i for i in range(labels)}}
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3ForSequenceClassification"], **named}))
    said = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**said, **more}))
    (folder / "chat_template.jinja").unlink()                # which counts before what the settings say
    return folder


@pytest.mark.parametrize("name, template", [("Qwen3-Reranker-seq-cls", RERANK), ("other", "Q: {query}\nA: {document}\n")])
def test_a_decoder_with_a_head_of_one_score(tmp_path: Path, name: str, template: str) -> None:
    import torch
    import transformers

    own = {"chat_template": [{"name": "rerank", "template": template}]} if name == "other" else {}
    folder = scored(tmp_path / name, **own)
    words = tiny_towers.words_of(folder)
    theirs = transformers.Qwen3ForSequenceClassification.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    query, documents, want = "What is in the picture?", [*TEXTS[:4], "", "a"], []
    with loaded(folder, n_ctx=600, kv_dtype="f32") as model:
        for document in documents:
            ids = words(template.replace("{query}", query).replace("{document}", document), add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                want.append(float(theirs(torch.tensor([ids])).logits[0, 0]))
        tiny_towers.close(model.rerank(query, documents), np.array(want, np.float32))
        with pytest.raises(RequestError, match="scores pairs of texts"):
            model.embed("a")


def test_heads_that_do_not_rank_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="a head of 3 classes"):
        convert(scored(tmp_path / "Qwen3-Reranker-a", 3), tmp_path / "m.gguf", "f32")
    with pytest.raises(UnsupportedModelError, match="how a query and a document are put together"):
        convert(scored(tmp_path / "other"), tmp_path / "m.gguf", "f32")


def test_a_decoder_that_embeds(tmp_path: Path) -> None:
    import torch
    import transformers

    folder = checkpoint(tmp_path / "hf", True, True)
    prompts = {"query": "Instruct: find\nQuery:", "document": ""}
    save_modules(folder, 96, "lasttoken", prompts=prompts, most=20)
    theirs = transformers.Qwen3Model.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with loaded(folder, n_ctx=256, kv_dtype="f32") as model:
        for text in (*TEXTS[:4], "a"):
            for name, before in (*prompts.items(), (None, "")):
                want = tiny_towers.pooled(theirs, folder, before + text, "lasttoken", [], 20)
                tiny_towers.close(model.embed(text, prompt=name, normalize=False), want)
                assert np.array_equal(model.embed([text], prompt=name)[0], model.embed(text, prompt=name))
        assert model.tokenize("a")[-1:] == tiny_towers.words_of(folder)("a")["input_ids"][-1:]
        with pytest.raises(RequestError, match="'query', 'document'"):
            model.embed("a", prompt="no such")
        with pytest.raises(UnsupportedModelError, match="not made to rank"):
            model.rerank("a", ["b"])


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_that_ranks(tied: bool, tmp_path: Path) -> None:
    import torch
    import transformers

    folder = checkpoint(tmp_path / "Tiny-Qwen3-Reranker", tied, False)
    words = tiny_towers.words_of(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    yes, no = (words.get_vocab()[answer] for answer in ("yes", "no"))
    query, documents = "What is in the picture?", [*TEXTS[:4], "", "a"]
    with loaded(folder, n_ctx=600, kv_dtype="f32") as model:
        got, want = model.rerank(query, documents), []
        for document in documents:
            ids = words(RERANK.replace("{query}", query).replace("{document}", document), add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = theirs(torch.tensor([ids])).logits[0, -1]
            want.append(float(logits[yes] - logits[no]))
        tiny_towers.close(got, np.array(want, np.float32))
        before = model.stats["prompt_tokens"]
        assert model.ranked(query, documents).n_tokens == model.stats["prompt_tokens"] - before > 0
        assert model.rerank(query, []).shape == (0,) and got.dtype == np.float32
        assert np.array_equal(model.rerank(query, documents[:2]), got[:2])
        marked = "<|turn|> {query} <|stop|>"                                  # of a user: text
        assert model.rerank(query, [marked])[0] != pytest.approx(model.rerank(query, ["<|stop|>"])[0])
        with pytest.raises(RequestError, match="rerank"):
            model.rerank(query, "a text")
        assert pe.plan(model.file.path, n_ctx=64).fits
    fast: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    fast["model"]["vocab"]["yess"] = fast["model"]["vocab"].pop("yes")
    (folder / "tokenizer.json").write_text(json.dumps(fast))
    with pytest.raises(InvalidModelError, match="'yes'"):
        convert(folder, tmp_path / "no.gguf", "f32")
