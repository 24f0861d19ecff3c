"""Imports point down: docs/layout.md draws the layers, this test holds the code to them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "pyengine"

# Layer of each module; a module may import modules of lower layers and of its own.
LAYERS = {
    "errors": 0, "dtype": 0, "tensor": 0,
    "op": 1, "ops": 1,
    "codegen": 2, "native": 2, "codebooks": 2, "quantize": 2, "gguf": 2, "weights": 2, "hparams": 2, "graph": 2, "passes": 2, "stages": 2, "planner": 2,
    "backends": 2, "hardware": 2, "locate": 2,
    "nn": 3, "kvcache": 3, "cells": 3, "batch": 3, "tokenizer": 3, "template": 3, "sampling": 3, "memory": 3,
    "image": 3, "grounding": 3,
    "models": 4,
    "media": 5, "prompt": 5, "schedule": 5, "sessions": 5, "planning": 5, "engine": 5,
    "perplexity": 6, "cli": 6,
}
MODELS_MAY_IMPORT = {"ops", "nn", "kvcache", "batch", "weights", "hparams", "tensor", "graph", "errors", "models", "image"}
LATE = {("graph", "planning"), ("graph", "passes"), ("ops", "errors")}     # inside a function: `python -m pyengine.graph` only


def modules() -> list[Path]:
    return sorted(p for p in ROOT.rglob("*.py") if p not in (ROOT / "__init__.py", ROOT / "_abi.py"))


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pyengine":
            rest = node.module.split(".")[1:]
            names |= {rest[0]} if rest else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("pyengine.")}
    return names - {"_engine", "_abi", "__version__"}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = part(path)
    assert own in LAYERS, f"{own} has no layer: add it to LAYERS and to docs/layout.md"
    for name in imported(path):
        assert name in LAYERS, f"{path}: imports {name}, which has no layer"
        assert LAYERS[name] <= LAYERS[own] or (own, name) in LATE, f"{path}: {own} must not import {name}"
        if own == "models":
            assert name in MODELS_MAY_IMPORT, f"{path}: models may not import {name}"


def test_no_model_is_named_outside_its_module() -> None:
    names = [p.stem for p in (ROOT / "models").glob("*.py") if p.stem != "__init__"]
    for path in modules():
        if part(path) in ("models", "tokenizer", "template"):              # tokenizers' and templates' kinds share names
            continue
        strings = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        code = {s for s in strings if s in names}
        assert not code, f"{path}: names the architecture {code}"


def test_outside_packages_are_the_declared_ones() -> None:
    """torch and transformers are for converters and tests only."""
    for path in modules():
        text = path.read_text()
        for forbidden in ("torch", "transformers", "safetensors", "diffusers"):
            assert f"import {forbidden}" not in text and f"from {forbidden}" not in text, path
