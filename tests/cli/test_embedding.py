"""`pyengine-run embed`: vectors as the library's, of any model."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

import pyengine as pe
from pyengine.cli.command import execute


@pytest.fixture
def file(tiny_gguf) -> str:
    return str(tiny_gguf("llama")[0])


def test_vectors_are_lines_of_json(file, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "texts").write_text("a fox\n\n  \nthe dog\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"snow\n")))
    assert execute(["embed", file, "a cat", "-", "--file", str(tmp_path / "texts"), "--ctx", "64"]) == 0
    got = np.array([json.loads(line) for line in capsys.readouterr().out.splitlines()], np.float32)
    with pe.load(file, n_ctx=64) as model:
        assert np.array_equal(got, model.embed(["a cat", "snow", "a fox", "the dog"]))
        assert execute(["embed", file, "a cat", "--pooling", "mean", "--no-normalize", "--json", "--ctx", "64"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["size"] == 96 and np.array_equal(np.array(found["vectors"][0]["vector"], np.float32), model.embed("a cat", False, "mean"))


def test_cosines_of_each_two(file, capsys) -> None:
    assert execute(["embed", file, "a cat", "a dog", "--compare", "--ctx", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].startswith("0 a cat") and lines[1].split()[-2] == "1.000" and lines[1].split()[-1] == lines[2].split()[-2]
    assert execute(["embed", file, "a cat", "a dog", "--compare", "--no-normalize", "--json", "--ctx", "64"]) == 0
    assert abs(json.loads(capsys.readouterr().out)["cosines"][1][1] - 1) < 1e-5


def test_what_is_wrong_is_one_line(file, capsys) -> None:
    for arguments, said in (([], "give a TEXT"), (["a", "--pooling", "max"], "pooling must be one of"), (["--file", "nowhere"], "nowhere"),
                            (["--image", "nowhere.png"], "nowhere.png")):
        assert execute(["embed", file, *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
