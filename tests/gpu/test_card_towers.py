"""Models of encoders on a card: the CPU's bits in F32, and the plan of its memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_towers

import pyengine as pe
from converters.writer import convert

TEXTS = ["a dog and a fox", "the lazy dog", "x", "snow and snow and snow. " * 4]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("bert")
    tiny_towers.save_word_piece(folder)
    config = transformers.BertConfig(vocab_size=160, hidden_size=96, num_hidden_layers=2, num_attention_heads=6, intermediate_size=128,
                                     max_position_embeddings=64)
    return convert(tiny_towers.make("BertModel", config, folder), folder / "words.gguf", "f32")


@pytest.mark.parametrize("kind", ["cuda", "metal"])
def test_vectors_have_the_cpus_bits(kind: str, file: Path, request: pytest.FixtureRequest) -> None:
    device = request.getfixturevalue(f"{kind}_device")
    with pe.load(file) as host, pe.load(file, device=device) as card:
        want, got = host.embed(TEXTS), card.embed(TEXTS)
        assert np.array_equal(got, want) if "emulated" in device else np.abs(got - want).max() < 1e-5
        assert card.plan.of("weights", f"{device}:0") + card.plan.of("mapped") > 0 and card.plan.fits
