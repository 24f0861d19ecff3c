"""Real models are kept only if they are those that were tested."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from conftest import real_path
from converters.weights import __main__ as weights


def test_the_digests_are_those_of_the_models_that_tests_use() -> None:
    for name, path in (("qwen", weights.MODELS[0]), ("gemma", weights.MODELS[1]), ("smollm2", weights.MORE[0]), ("minilm", weights.MORE[1])):
        with real_path(name).open("rb") as f:
            assert weights.digest(f) == path.digest, path.name


def test_a_file_of_another_content_is_not_kept(tmp_path, monkeypatch, capsys) -> None:
    def unpack(packages: list[str], folder: Path) -> None:
        (folder / "a").write_bytes(b"GG")
        (folder / "b").write_bytes(b"UF")

    def model(digest: str) -> weights.Model:
        return weights.Model("m.gguf", digest, ["made-up==1"], lambda folder, out: weights.join([folder / "a", folder / "b"], out))

    monkeypatch.setattr(weights, "unpack", unpack)
    monkeypatch.setattr(weights, "MORE", [])
    monkeypatch.setattr(weights, "MODELS", [model("0" * 64)])
    with pytest.raises(SystemExit, match="m.gguf: what made-up==1 hold has the SHA-256 .* it is not kept"):
        weights.fetch(tmp_path, False)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(weights, "MODELS", [model(hashlib.sha256(b"GGUF").hexdigest())])
    weights.fetch(tmp_path, False)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"] and (tmp_path / "m.gguf").read_bytes() == b"GGUF"
