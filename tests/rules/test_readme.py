"""The pages' Python examples run: each of the README's by itself, those of docs/library.md and docs/graphs.md from top to bottom.

The first of these pages names everything public.
"""

from __future__ import annotations

import re

import pytest
from conftest import REAL, real_path, ROOT, WEIGHTS

import pyengine as pe
from pyengine import errors
from pyengine.engine.answer import Answer, Reported, Stream, Streams
from pyengine.engine.loop import Handle
from pyengine.engine.model import Model

LIBRARY, GRAPHS = ROOT / "docs" / "library.md", ROOT / "docs" / "graphs.md"


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


README = blocks((ROOT / "README.md").read_text())


def here(code: str) -> str:
    """An example with the paths of this checkout."""
    return code.replace('"models/', f'"{WEIGHTS}/').replace('"converters/', f'"{ROOT}/converters/')


@pytest.mark.parametrize("number", range(len(README)))
def test_example(number: int, capsys, monkeypatch, tmp_path) -> None:
    real_path("qwen")
    monkeypatch.chdir(tmp_path)
    exec(compile(here(README[number]), f"README.md, example {number + 1}", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_what_streams_ends_its_line() -> None:
    for code in (*README, *blocks(LIBRARY.read_text())):
        assert len(re.findall(r'\n    print\(piece, end="".*', code)) == len(re.findall(r'\n    print\(piece, end="".*\nprint\(\)\n', code)), code


def test_the_library_page(capsys, monkeypatch, tmp_path) -> None:
    real_path("smollm2")
    monkeypatch.chdir(tmp_path)
    text = LIBRARY.read_text()
    assert all(name in (*REAL.values(), "...") for name in re.findall(r"models/([\w.-]+)", text))
    names: dict[str, object] = {}
    for number, code in enumerate(blocks(text)):
        exec(compile(here(code), f"docs/library.md, example {number + 1}", "exec"), names)
        assert capsys.readouterr().out.strip(), code


FULL = "WIDTH, HIDDEN, CLASSES, SIZE = 64, 4096, 1000, 224"


@pytest.mark.parametrize("sizes", [FULL.replace("64, 4096, 1000, 224", "4, 48, 10, 64"), pytest.param(FULL, marks=pytest.mark.slow)])
def test_the_graphs_page(sizes: str, capsys) -> None:
    text, names = GRAPHS.read_text(), {}
    assert text.count(FULL) == 1 and text.count("138,357,544") == 1
    said = []
    for number, code in enumerate(blocks(text.replace(FULL, sizes))):
        exec(compile(code, f"docs/graphs.md, example {number + 1}", "exec"), names)
        said.append(capsys.readouterr().out)
        assert bool(said[-1]) == ("print(" in code), code
    assert any(out.startswith("138,357,544 numbers in 16 layers") for out in said)
    if sizes == FULL:                                            # the drawn plan is of two threads, whose working memory counts in the arena
        want, got = ([re.sub("arena.*", "", line) for line in plan.split("\n")[:3]] for plan in (text[text.index("Plan(25 steps") :], said[5]))
        assert want == got and "61,893,360,400 operations" in said[5]


def public(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


def test_the_library_page_names_everything() -> None:
    text = LIBRARY.read_text()
    names = {name for name in pe.__all__ if not name.startswith("_")} | public(Model) | public(Answer) | public(Reported) | public(Stream)
    names |= public(Streams) | public(Handle) - {"client", "done", "error"} | set(pe.SamplingParams.__dataclass_fields__)
    names |= {n for n, v in vars(errors).items() if isinstance(v, type) and v.__module__ == errors.__name__}
    inner = {"advance", "annotations"}                       # what the engine's own parts use
    assert sorted(n for n in names - inner if not re.search(rf"\b{n}\b", text)) == []
