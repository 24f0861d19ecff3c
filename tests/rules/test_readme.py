"""The README's Python examples run, from top to bottom."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT, WEIGHTS, real_path

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example(number: int, capsys, monkeypatch, tmp_path) -> None:
    real_path("qwen")
    monkeypatch.chdir(tmp_path)
    code = BLOCKS[number].replace('"models/', f'"{WEIGHTS}/')
    exec(compile(code, f"README.md, example {number + 1}", "exec"), {})
    assert capsys.readouterr().out.strip()
