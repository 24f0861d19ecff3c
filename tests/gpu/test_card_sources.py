"""Encoder-decoders on emulated cards: encoder, decoder and beams give what the CPU gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import tiny_sources

import pyengine as pe
from converters.writer import convert


@pytest.fixture(scope="module", params=list(cases.sources()))
def path(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return convert(tiny_sources.make(cases.sources()[request.param], folder / "hf"), folder / "model.gguf", "f32")


def check(path: Path, device: str) -> None:
    """Compare a device with the CPU, in float32."""
    rng = np.random.default_rng(4)
    source = rng.integers(5, 180, 60).tolist()
    with pe.load(path, kv_dtype="f32", device="cpu") as cpu, pe.load(path, kv_dtype="f32", device=device) as card:
        ids = [cpu.sources.encoder.start, *rng.integers(5, 180, 30).tolist()]
        for theirs, ours in ((cpu.hidden(source), card.hidden(source)), (cpu.logits(ids, source=source), card.logits(ids, source=source))):
            assert np.abs(theirs - ours).max() <= 1e-5 * np.ptp(theirs)
        for how in ({"temperature": 0}, {"n_beams": 3}):
            assert card.generate(source, max_tokens=8, **how).tokens == cpu.generate(source, max_tokens=8, **how).tokens


def test_on_cuda(path: Path, cuda_device: str) -> None:
    check(path, cuda_device)


def test_on_metal(path: Path, metal_device: str) -> None:
    check(path, metal_device)
