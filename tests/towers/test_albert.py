"""ALBERT: groups and layers that are used again, narrow tokens, its tokenizer's normalizer, heads, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_towers
from tiny_towers import alone_and_beside, compare_logits, compare_ranks, compare_scores, compare_states, loaded, make, reference


# differs: `tokenizers` does not put Hangul together again that its first steps took apart; SentencePiece's map, which the model was trained with, does
TEXTS = tuple(text for text in tiny_towers.TEXTS if "\ud55c" not in text)


def checkpoint(head: str, folder: Path, **more: Any) -> Path:
    import transformers

    folder.mkdir()
    tiny_towers.save_unigram(folder, begin="[CLS]", end="[SEP]", mask="[MASK]", albert=True)
    sizes = {"vocab_size": 170, "embedding_size": 40, "hidden_size": 96, "num_hidden_layers": 5, "num_hidden_groups": 2, "num_attention_heads": 6,
             "intermediate_size": 136, "max_position_embeddings": 300, "layer_norm_eps": 1e-6}
    return make(f"Albert{head}", transformers.AlbertConfig(**{**sizes, **more}), folder)


TINY = {"albert": lambda folder: checkpoint("Model", folder)}


@pytest.mark.parametrize("more", [{}, {"inner_group_num": 2, "num_hidden_groups": 3}, {"num_hidden_groups": 1, "hidden_act": "gelu"}])
def test_a_plain_encoder(more: dict[str, Any], tmp_path: Path) -> None:
    folder = checkpoint("Model", tmp_path / "hf", **more)
    with loaded(folder) as model:
        compare_states(model, reference("AlbertModel", folder), folder,
                       (*TEXTS, "``Quoted'' CAF\u00c9, \ufb01ne \u2460\u00bd na\u00efve  \u3000 \u1e9e \u0130", "[CLS] A  [MASK] b"))
        alone_and_beside(model)


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForPreTraining"])
def test_masked_models(head: str, tmp_path: Path) -> None:
    folder = checkpoint(head, tmp_path / "hf")
    theirs = reference(f"Albert{head}", folder)
    if head == "ForPreTraining":
        theirs.forward = lambda ids, whole=theirs.forward: type("Seen", (), {"logits": whole(ids).prediction_logits})
    with loaded(folder) as model:
        compare_logits(model, theirs, folder)


def test_classes_and_ranks(tmp_path: Path) -> None:
    folder = checkpoint("ForSequenceClassification", tmp_path / "four", num_labels=4)
    with loaded(folder) as model:
        compare_scores(model, reference("AlbertForSequenceClassification", folder), folder, TEXTS)
    folder = checkpoint("ForSequenceClassification", tmp_path / "one", num_labels=1)
    assert json.loads((folder / "config.json").read_text())["type_vocab_size"] == 2
    with loaded(folder) as model:
        compare_ranks(model, reference("AlbertForSequenceClassification", folder), folder, 300, TEXTS)
