"""all-MiniLM-L6-v2, the real one: what sentence-transformers' README says of it, transformers' hidden states and ids, and narrow weights."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_towers
from conftest import real_path
from tiny_towers import loaded

README = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
SHORT = ["dog", "hi there", "a red car"]
LONGER = [*README, "This is an example sentence", "Each sentence is converted", "How big is London?", "A man is eating food.", "The girl is carrying a baby.",
          "A man is riding a white horse on an enclosed ground, and she walks home to her parents through the snow.", "def add(a, b): return a + b",
          "Texts of any lengths go side by side into runs of the encoder, none of them padded, and each has the bits that it has alone."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(real_path("minilm")) as packed:
        packed.extractall(made)
    return next(made.rglob("modules.json")).parent


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    with loaded(folder) as found:
        yield found


def test_similarities_are_those_of_the_readme(model: Any) -> None:
    vectors = model.embed(README)
    assert vectors.shape == (3, 384)
    assert np.allclose(vectors @ vectors.T, [[1, 0.6660, 0.1046], [0.6660, 1, 0.1411], [0.1046, 0.1411, 1]], atol=5e-5)


def test_it_is_transformers(model: Any, folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer

    theirs, words = tiny_towers.reference("BertModel", folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    words.no_padding()
    words.no_truncation()
    for text in (*LONGER, *SHORT, *tiny_towers.TEXTS, "\u0939\u093f\u0928\u094d\u0926\u0940 a" + "x" * 101):
        ids = words.encode(text).ids
        assert model.tokenize(text) == ids
        with torch.no_grad():
            want = theirs(torch.tensor([ids])).last_hidden_state[0]
        tiny_towers.close(model.hidden(text), want)
        tiny_towers.close(model.embed(text, normalize=False), want.mean(0))
    long = "the weather is lovely " * 200
    assert model.hidden(long).shape == (256, 384) and model.hidden(model.tokenize(long)[:512]).shape == (512, 384)


def test_narrow_weights_stay_near(model: Any, folder: Path) -> None:
    exact = {text: row for text, row in zip((*LONGER, *SHORT), model.embed([*LONGER, *SHORT]))}
    for outtype, near, nearer in (("f16", 0.99999, 0.99999), ("q8_0", 0.999, 0.995)):
        with loaded(folder, outtype) as narrow:
            for text, row in exact.items():
                cosine = float(row @ narrow.embed(text))
                assert cosine >= (nearer if text in SHORT else near), f"{outtype}: {text!r} {cosine}"
