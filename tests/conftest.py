"""Shared fixtures: tiny converted checkpoints, and the real models that `make weights` fetches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = Path(os.environ.get("PYENGINE_TEST_WEIGHTS", ROOT / "models"))
REAL = {"gemma": "gemma3-270m-q4_k_m.gguf", "smollm2": "smollm2-135m-q4_1.gguf", "qwen": "qwen2.5-coder-0.5b-q4_k_m.gguf"}


def real_path(name: str) -> Path:
    """Path of a real model, or skip."""
    path = WEIGHTS / REAL[name]
    if not path.exists():
        pytest.skip(f"{path.name} is not in {WEIGHTS}: `make weights` fetches it")
    return path


@pytest.fixture(scope="session")
def real_model():
    """real_model("smollm2", n_ctx=..) -> loaded model; each combination is loaded once."""
    import pyengine as pe

    loaded: dict[Any, Any] = {}

    def get(name: str, **settings: Any):
        key = (name, tuple(sorted(settings.items())))
        if key not in loaded:
            loaded[key] = pe.load(real_path(name), **{"n_ctx": 1024, **settings})
        return loaded[key]

    return get


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory):
    """tiny_gguf("llama", outtype="f32", **config) -> (GGUF path, checkpoint folder) of a seeded random model."""
    pytest.importorskip("transformers", reason="needs transformers and torch: pip install -r requirements/test.txt")
    import tiny
    from converters import convert

    made: dict[Any, Any] = {}

    def get(kind: str, outtype: str = "f32", **config: Any) -> tuple[Path, Path]:
        key = (kind, repr(sorted(config.items())))
        folder = tmp_path_factory.mktemp(kind) if key not in made else made[key]
        if key not in made:
            tiny.make_checkpoint(kind, folder / "hf", seed=1, **config)
            made[key] = folder
        out = folder / f"{outtype}.gguf"
        if not out.exists():
            convert(folder / "hf", out, outtype)
        return out, folder / "hf"

    return get
