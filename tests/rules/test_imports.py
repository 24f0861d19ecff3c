"""Imports point down, and nothing imports in a circle: docs/layout.md draws the packages, this test holds the code to them."""

from __future__ import annotations

import ast
from collections.abc import Sequence

import pytest
from sources import read, Source

# In the order in which data flows, from what needs nothing to the front doors: an import names an earlier one, inside functions too.
ORDER = ("records", "errors", "arguments", "dtype", "graph", "ops", "compiler", "native", "files", "pull", "media", "text", "chat", "hardware", "backends",
         "cache", "nn", "models", "programs", "memory", "engine", "measure", "search", "lm_eval", "server", "agents", "cli", "__main__")
MODELS_MAY_IMPORT = ("records", "dtype", "ops", "nn", "graph", "files.weights", "files.hparams", "cache.policy", "media", "errors", "models")
ONLY = {"models": ("programs", "memory", "engine"), "backends": ("memory", "engine")}        # who imports them
CONTRACTS = ("backends.base", "models.architecture")                   # but for these, which lower floors may know
FOREIGN = ("torch", "transformers", "safetensors", "diffusers")        # for converters and tests

Arrows = dict[str, set[str]]


def dotted(path: str) -> str:
    """The name of a module by its path."""
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imported(file: Source) -> set[str]:
    """What a module imports, names of modules and of what is in them, inside functions and relatively too."""
    found, here = set(), dotted(file.path).split(".")
    package = here if file.path.endswith("/__init__.py") else here[:-1]
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *([node.module] if node.module else [])] if node.level else [node.module or ""]
            found |= {".".join([*base, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def arrows(files: Sequence[Source]) -> Arrows:
    """Each module's imports among the modules of these files."""
    known = {dotted(f.path) for f in files}
    names = {dotted(f.path): imported(f) for f in files}
    return {a: {n if n in known else n.rpartition(".")[0] for n in found} & known - {a} for a, found in names.items()}


def circles(graph: Arrows) -> list[str]:
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


def between(graph: Arrows) -> list[tuple[list[str], list[str]]]:
    """Imports of `pyengine` from one package to another, as parts of names below it."""
    pairs = [(a.split(".")[1:], b.split(".")[1:]) for a, targets in graph.items() for b in targets]
    return [(a, b) for a, b in pairs if a and b and a[0] != b[0]]


def upward(graph: Arrows) -> list[str]:
    """Imports from a package to a later one."""
    place = {name: i for i, name in enumerate(ORDER)}
    return [f"{'.'.join(a)} imports {'.'.join(b)}" for a, b in between(graph) if place[b[0]] >= place[a[0]]]


def of_models(graph: Arrows) -> list[str]:
    """Imports of models that they have no use for."""
    return [f"{'.'.join(a)} imports {'.'.join(b)}" for a, b in between(graph)
            if a[0] == "models" and not (".".join(b) + ".").startswith(tuple(f"{may}." for may in MODELS_MAY_IMPORT))]


def by_strangers(graph: Arrows) -> list[str]:
    """Imports of models and backends by those that should not know them."""
    return [f"{'.'.join(a)} imports {'.'.join(b)}" for a, b in between(graph)
            if b[0] in ONLY and a[0] not in ONLY[b[0]] and ".".join(b) not in CONTRACTS]


def foreign(files: Sequence[Source]) -> list[str]:
    """Imports of packages that the library does not need."""
    return [f"{f.path} imports {name}" for f in files for name in sorted(imported(f)) if name.split(".")[0] in FOREIGN]


# -- this repository ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files() -> list[Source]:
    return read("pyengine/**/*.py")


def test_every_package_has_its_place(files) -> None:
    there = {dotted(f.path).split(".")[1] for f in files if "." in dotted(f.path)}
    assert there == set(ORDER), "add it to ORDER and to docs/layout.md"


def test_imports_point_down(files) -> None:
    assert upward(arrows(files)) == []


@pytest.mark.parametrize("top", ["pyengine", "converters", "bench"])
def test_there_is_no_circle(top: str) -> None:
    assert circles(arrows(read(f"{top}/**/*.py"))) == []


def test_models_import_what_models_need(files) -> None:
    assert of_models(arrows(files)) == []


def test_few_import_models_and_backends(files) -> None:
    assert by_strangers(arrows(files)) == []


def test_outside_packages_are_the_declared_ones(files) -> None:
    assert foreign(files) == []


# -- planted violations ---------------------------------------------------------------------------------------------------


def planted(*texts: tuple[str, str]) -> list[Source]:
    """Modules of these texts, and empty ones that they may import."""
    there = ["errors", "ops/linear", "nn/layers", "models/llama", "programs/step", "engine/model", "backends/base", "backends/cpu",
             "cache/policy", "cache/store"]
    return [*(Source(f"pyengine/{name}.py", "") for name in there), *(Source(f"pyengine/{path}.py", text) for path, text in texts)]


def test_what_points_up_is_found() -> None:
    within = planted(("graph/graph", "def f():\n    from pyengine.engine.model import Model\n"), ("nn/rope", "import pyengine.ops.linear\n"))
    assert upward(arrows(within)) == ["graph.graph imports engine.model"]
    assert upward(arrows(planted(("ops/other", "from ..nn import layers\n")))) == ["ops.other imports nn.layers"]


def test_circles_are_found() -> None:
    graph = arrows(planted(("cache/a", "from pyengine.cache import b\n"), ("cache/b", "from .c import X\n"),
                           ("cache/c", "def f():\n    import pyengine.cache.a\n"), ("cache/d", "from . import a\n")))
    assert circles(graph) == ["pyengine.cache.a", "pyengine.cache.b", "pyengine.cache.c"]


def test_what_models_have_no_use_for_is_found() -> None:
    found = of_models(arrows(planted(("models/new", "from pyengine.cache import policy, store\nfrom pyengine.models import llama\n"))))
    assert found == ["models.new imports cache.store"]


def test_strangers_of_models_and_backends_are_found() -> None:
    graph = arrows(planted(("measure/speed", "from pyengine.models.llama import Model\n"), ("cli/run", "import pyengine.backends.cpu\n"),
                           ("memory/fit", "from pyengine.backends import cpu\n"), ("cache/x", "from pyengine.backends.base import State\n")))
    assert by_strangers(graph) == ["measure.speed imports models.llama", "cli.run imports backends.cpu"]


def test_foreign_packages_are_found() -> None:
    assert foreign([Source("pyengine/nn/x.py", "def f():\n    from torch.nn import Linear\n")]) == ["pyengine/nn/x.py imports torch.nn.Linear"]
