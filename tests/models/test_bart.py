"""BART: what all encoder-decoders must do is in tests/contract/test_sources.py; this file declares what it does it with."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_sources
from cases import SourceCase

import pyengine as pe
from converters.writer import convert
from pyengine.errors import RequestError

BART = SourceCase(
    "bart", "bart", "BartConfig", "BartForConditionalGeneration", "byte level",
    {"d_model": 60, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 3, "decoder_attention_heads": 5, "encoder_ffn_dim": 88,
     "decoder_ffn_dim": 100, "max_position_embeddings": 150, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
     "forced_eos_token_id": None},
    {"bart": {}, "scaled": {"scale_embedding": True, "activation_function": "relu"}},
    also=("Florence2ForConditionalGeneration",))         # its text model; test_florence2.py has what it sees
SOURCES = (BART,)


def test_positions_end_where_the_file_says(tmp_path: Path) -> None:
    path = convert(tiny_sources.make(BART, tmp_path / "hf"), tmp_path / "bart.gguf")
    with pytest.raises(RequestError, match="embeddings of 150 positions"):
        pe.load(path, n_ctx=200)
