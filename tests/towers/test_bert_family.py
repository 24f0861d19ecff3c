"""Encoders of BERT's shape, RoBERTa, XLM-R, MPNet, DistilBERT: hidden states, heads of masked models and of classes, pairs, against transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_towers
from tiny_towers import alone_and_beside, compare_logits, compare_ranks, compare_scores, compare_states, loaded, make, reference

import pyengine as pe
from converters.writer import convert
from pyengine.errors import InvalidModelError, RequestError, UnsupportedModelError

SIZES = {"hidden_size": 72, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 200, "max_position_embeddings": 140}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("save_word_piece", {"vocab_size": 160, "type_vocab_size": 2, "layer_norm_eps": 1e-7, **SIZES}),
    "Roberta": ("save_byte_level", {"vocab_size": 330, "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5, **SIZES}),
    "XLMRoberta": ("save_unigram", {"vocab_size": 170, "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5, **SIZES}),
    "MPNet": ("save_mpnet", {"vocab_size": 160, "layer_norm_eps": 1e-7, **SIZES, "max_position_embeddings": 142}),
    "DistilBert": ("save_word_piece", {"vocab_size": 160, "dim": 72, "n_layers": 3, "n_heads": 6, "hidden_dim": 200, "max_position_embeddings": 140}),
}


def checkpoint(kind: str, head: str, folder: Path, **more: Any) -> Path:
    import transformers

    tokenizer, sizes = KINDS[kind]
    folder.mkdir(exist_ok=True)
    getattr(tiny_towers, tokenizer)(folder)
    return make(f"{kind}{head}", getattr(transformers, f"{kind}Config")(**{**sizes, **more}), folder)


TINY = {"bert": lambda folder: checkpoint("Bert", "Model", folder), "mpnet": lambda folder: checkpoint("MPNet", "Model", folder)}


def resaved(folder: Path, rename: Any) -> None:
    """Rename the tensors of a checkpoint, or leave out those that become None."""
    from safetensors.torch import load_file, save_file

    found = load_file(folder / "model.safetensors")
    save_file({new: t.contiguous() for name, t in found.items() if (new := rename(name))}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_encoder(kind: str, tmp_path: Path) -> None:
    folder = checkpoint(kind, "Model", tmp_path / "hf")
    with loaded(folder) as model:
        compare_states(model, reference(f"{kind}Model", folder), folder)
        alone_and_beside(model)
        for what in (lambda: model.logits("a"), lambda: model.rerank("a", ["b"]), lambda: model.classify("a")):
            with pytest.raises(UnsupportedModelError):
                what()


def test_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    """XLM-R's older checkpoints have no other file of a tokenizer."""
    import transformers

    folder = checkpoint("XLMRoberta", "Model", tmp_path / "hf")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    tiny_towers.save_unigram(folder, alone=True)
    words = transformers.XLMRobertaTokenizer.from_pretrained(folder)
    with loaded(folder) as model:
        for text in (*tiny_towers.TEXTS, *tiny_towers.HARD, "a <mask> dog", "x</s>y"):
            assert model.tokenize(text) == words(text)["input_ids"], text
        ids = words("a", "b")["input_ids"]
        assert list(model._pair(model.tokenize("a", add_special=False), model.tokenize("b", add_special=False)).ids) == ids
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "camembert", "architectures": ["CamembertModel"]}))
    with pytest.raises(UnsupportedModelError, match="known of XLM-R only, not of camembert"):
        convert(folder, tmp_path / "m.gguf", "f32")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_model(kind: str, tied: bool, tmp_path: Path) -> None:
    folder = checkpoint(kind, "ForMaskedLM", tmp_path / "hf", tie_word_embeddings=tied)
    theirs = reference(f"{kind}ForMaskedLM", folder)
    with loaded(folder) as model:
        compare_logits(model, theirs, folder)
        compare_states(model, theirs.base_model, folder)
        assert model.embed("a dog").shape == (72,)


@pytest.mark.parametrize("kind", KINDS)
def test_classes_of_texts(kind: str, tmp_path: Path) -> None:
    names = {i: f"kind {i}" for i in range(11)}
    folder = checkpoint(kind, "ForSequenceClassification", tmp_path / "hf", id2label=names, label2id={v: k for k, v in names.items()})
    theirs = reference(f"{kind}ForSequenceClassification", folder)
    with loaded(folder) as model:
        compare_scores(model, theirs, folder)
        compare_states(model, theirs.base_model, folder)
        with pytest.raises(UnsupportedModelError, match="gives scores and no vectors"):
            model.embed("a")
        assert model.embed("a", pooling="mean").shape == (72,)
        with pytest.raises(UnsupportedModelError, match="gives 11 scores"):
            model.rerank("a", ["b"])


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_of_texts_are_ranked(kind: str, tmp_path: Path) -> None:
    folder = checkpoint(kind, "ForSequenceClassification", tmp_path / "hf", num_labels=1)
    most = 140 - 2 * ("oberta" in kind)
    with loaded(folder) as model:
        compare_ranks(model, reference(f"{kind}ForSequenceClassification", folder), folder, most)
        assert model.towers.scores == "sigmoid"
        for wrong in (("a", "b"), (3, ["b"]), ("a", [3]), ("a", None)):
            with pytest.raises(RequestError, match="rerank"):
                model.rerank(*wrong)
    with loaded(folder, n_ctx=40) as model:
        compare_ranks(model, reference(f"{kind}ForSequenceClassification", folder), folder, 40)


def test_what_sentence_transformers_does_with_scores_is_kept(tmp_path: Path) -> None:
    folder = checkpoint("Bert", "ForSequenceClassification", tmp_path / "hf", num_labels=1)
    config = json.loads((folder / "config.json").read_text())
    for said, kept in (({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, "none"),
                       ({"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"}, "sigmoid"),
                       ({"problem_type": "multi_label_classification"}, "sigmoid")):
        (folder / "config.json").write_text(json.dumps({**config, **said}))
        with loaded(folder) as model:
            assert model.towers.scores == kept
            raw = model.classify("a", activation="none")["LABEL_0"]
            assert model.classify("a")["LABEL_0"] == pytest.approx(raw if kept == "none" else 1 / (1 + np.exp(-raw)))


def test_old_checkpoints(tmp_path: Path) -> None:
    """Norms with gamma and beta, a second copy of the tied matrix and its bias, the head of next sentences, buffers of positions."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = checkpoint("Bert", "ForPreTraining", tmp_path / "hf")
    theirs = reference("BertForPreTraining", folder)
    want = [theirs(torch.tensor([[7, 9, 12, 3]])).prediction_logits[0].detach().numpy(), theirs.bert(torch.tensor([[7, 9, 3]])).last_hidden_state[0]]
    found = load_file(folder / "model.safetensors")
    old = {re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", name)): t for name, t in found.items()}
    old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"].clone()
    old["cls.predictions.decoder.bias"] = old["cls.predictions.bias"].clone()
    old["bert.embeddings.position_ids"] = torch.arange(140)[None]
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    with loaded(folder) as model:
        tiny_towers.close(model.logits([7, 9, 12, 3]), want[0])
        tiny_towers.close(model.hidden([7, 9, 3]), want[1])


def test_a_checkpoint_whose_class_names_more_than_it_holds(tmp_path: Path) -> None:
    folder = checkpoint("Bert", "ForMaskedLM", tmp_path / "hf")
    resaved(folder, lambda name: None if name.startswith("cls") else name.removeprefix("bert."))
    with loaded(folder) as model:
        assert model.embed("a dog").shape == (72,)
        with pytest.raises(UnsupportedModelError, match="no head"):
            model.logits("a dog")


def test_vocab_txt_alone(tmp_path: Path) -> None:
    folder = checkpoint("Bert", "Model", tmp_path / "hf")
    fast = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    with loaded(folder) as model:
        want = {text: model.tokenize(text) for text in (*tiny_towers.TEXTS, "a [MASK] dog")}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "vocab.txt").write_text("\n".join(sorted(fast, key=fast.get)) + "\n", encoding="utf-8")
    with loaded(folder) as model:
        assert {text: model.tokenize(text) for text in want} == want
    (folder / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(InvalidModelError):
        convert(folder, tmp_path / "no.gguf", "f32")


def test_vocab_json_and_merges_alone(tmp_path: Path) -> None:
    folder = checkpoint("Roberta", "Model", tmp_path / "hf")
    texts = (*tiny_towers.TEXTS, "a  <mask> dog</s>")
    with loaded(folder) as model:
        want = {text: model.tokenize(text) for text in texts}
    fast = json.loads((folder / "tokenizer.json").read_text())
    vocab = {**fast["model"]["vocab"], **{t["content"]: t["id"] for t in fast["added_tokens"]}}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    merges = [m if isinstance(m, str) else " ".join(m) for m in fast["model"]["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    with loaded(folder) as model:
        assert {text: model.tokenize(text) for text in texts} == want


def as_llama_cpp(path: Path, out: Path, types: int) -> Path:
    """Write a file as llama.cpp's converters have: q, k and v in one matrix, some rows of parts only, and none of our own keys."""
    import gguf

    reader, writer = gguf.GGUFReader(path), gguf.GGUFWriter(out, "bert")
    own = "embedding.", "longest", "max_input_chars", "lstrip_tokens", "classifier.activation", "classifier.hidden_act"
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture" or any(part in field.name for part in own):
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(field.name, field.contents())
        else:
            writer.add_key_value(field.name, field.contents(), field.types[0])
    tensors = {t.name: np.array(t.data, np.float32) for t in reader.tensors}
    for name in [n for n in tensors if ".attn_q." in n]:
        parts = [tensors.pop(name.replace("attn_q", f"attn_{part}")) for part in "qkv"]
        tensors[name.replace("attn_q", "attn_qkv")] = np.concatenate(parts)
    tensors["token_types.weight"] = tensors["token_types.weight"][:types]
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize("types", [1, 2])
def test_files_of_llama_cpp(types: int, tmp_path: Path) -> None:
    folder = checkpoint("Bert", "ForSequenceClassification", tmp_path / "hf", num_labels=1)
    with loaded(folder) as model:
        want, ranks = [model.hidden(text) for text in tiny_towers.TEXTS[:2]], model.rerank("a dog", ["fox", "the quick brown fox"])
    with pe.load(as_llama_cpp(folder / "f32.gguf", tmp_path / "theirs.gguf", types)) as model:
        for text, states in zip(tiny_towers.TEXTS[:2], want):
            assert np.allclose(model.hidden(text), states, atol=1e-5)
        found = model.rerank("a dog", ["fox", "the quick brown fox"])
        assert np.allclose(found, ranks, atol=1e-5) == (types == 2)            # with one row the second part is read as the first, as llama.cpp does
