"""Imports point down, and nothing imports in a circle: docs/layout.md draws the packages, this test holds the code to them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pyengine"

# In the order in which data flows, from what needs nothing to the front doors: an import names an earlier one, inside functions too.
ORDER = ("errors", "dtype", "graph", "ops", "compiler", "native", "files", "media", "text", "chat", "hardware", "backends", "cache", "nn",
         "models", "programs", "memory", "engine", "measure", "cli")
MODELS_MAY_IMPORT = {"ops", "nn", "graph", "files.weights", "files.hparams", "cache.policy", "media", "errors", "models"}


def modules(top: str) -> dict[str, Path]:
    """Dotted names of a package's modules."""
    files = [p for p in (ROOT / top).rglob("*.py") if p.name != "_abi.py"]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of `known` that a module imports, inside functions and relatively too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            base = [*here[: len(here) - node.level + 1], *([node.module] if node.module else [])] if node.level else [node.module or ""]
            for alias in node.names:
                full = ".".join([*base, alias.name])
                found.add(full if full in known else ".".join(base))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {f for f in found if f in known and f != name}


def arrows(top: str) -> dict[str, set[str]]:
    known = modules(top)
    return {name: imported(name, path, known) for name, path in known.items()}


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules from which imports lead back to themselves."""
    found = []
    for start in graph:
        seen, left = set(), list(graph[start])
        while left:
            name = left.pop()
            if name not in seen:
                seen.add(name)
                left += graph[name]
        if start in seen:
            found.append(start)
    return found


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports of `pyengine` from a package to a later one."""
    place = {name: i for i, name in enumerate(ORDER)}
    pairs = [(a.split("."), b.split(".")) for a, targets in graph.items() for b in targets]
    return [f"{'.'.join(a)} imports {'.'.join(b)}" for a, b in pairs
            if len(a) > 1 and len(b) > 1 and a[1] != b[1] and place[b[1]] >= place[a[1]]]


def test_every_package_has_its_place() -> None:
    there = {name.split(".")[1] for name in modules("pyengine") if "." in name}
    assert there == set(ORDER), "add it to ORDER and to docs/layout.md"


def test_imports_point_down() -> None:
    assert upward(arrows("pyengine")) == []


@pytest.mark.parametrize("top", ["pyengine", "converters", "bench"])
def test_there_is_no_circle(top: str) -> None:
    assert circles(arrows(top)) == []


def test_models_import_what_models_need() -> None:
    for name, targets in arrows("pyengine").items():
        if name.startswith("pyengine.models."):
            for target in (t.removeprefix("pyengine.") for t in targets):
                assert any(target == may or target.startswith(may + ".") for may in MODELS_MAY_IMPORT), f"{name} imports {target}"


def test_outside_packages_are_the_declared_ones() -> None:
    """torch and transformers are for converters and tests only."""
    for path in modules("pyengine").values():
        text = path.read_text()
        for forbidden in ("torch", "transformers", "safetensors", "diffusers"):
            assert f"import {forbidden}" not in text and f"from {forbidden}" not in text, path
