"""`pyengine-run attention`: what it prints and draws."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pyengine as pe
from pyengine.cli.command import execute


@pytest.fixture
def cat(tmp_path, monkeypatch) -> Path:
    """A picture in the current folder."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)).save("cat.png")
    return tmp_path / "cat.png"


def test_a_panel_for_each_query(cat, tiny_gguf, capsys) -> None:
    path = str(tiny_gguf("blip2")[0])
    assert execute(["attention", path, "--image", "cat.png", "--png", "out.png"]) == 0
    said = capsys.readouterr()
    assert "qformer.4 of qformer.0, qformer.2, qformer.4: 5 heads, 5 queries, a class token and 9 patches" in said.out
    assert said.out.count("\nquery ") == 5 and "of 64 x 48 pixels, class token" in said.out and "5 maps over cat.png: out.png" in said.err
    assert Image.open("out.png").size == (5 * 196 - 4, 144)


def test_chosen_queries_of_a_layer_as_json(cat, tiny_gguf, capsys) -> None:
    path = str(tiny_gguf("blip2")[0])
    assert execute(["attention", path, "--image", "cat.png", "--query", "3", "--query", "1", "--layer", "2", "--png", "out.jpg", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layer"] == "qformer.2" and found["layers"]["qformer.0"] == [5, 5, 10] and found["picture"] == [64, 48] and found["png"] == "out.jpg"
    mean = pe.load(path, n_ctx=256).attention("cat.png")["qformer.2"].mean(0)
    assert [q["query"] for q in found["queries"]] == [3, 1]
    assert np.allclose([q["most"] for q in found["queries"]], mean[[3, 1], 1:].max(-1)) and Image.open("out.jpg").size == (2 * 196 - 4, 144)


def test_queries_that_read_the_prompt(cat, tiny_gguf, capsys) -> None:
    path, found = str(tiny_gguf("instructblip")[0]), []
    for prompt in ([], ["--prompt", "a fox"], ["--prompt", "a dog"]):
        assert execute(["attention", path, "--image", "cat.png", *prompt, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["queries"][0]["most"])
    assert len(set(found)) == 3


@pytest.mark.parametrize("arguments, words", [
    (["--prompt", "a fox"], "reads no text"),
    (["--layer", "1"], "--layer 1: layers 0, 2, 4 attend to the picture"), (["--query", "5"], "query 5: there are 5, from 0 to 4"),
    (["--png", "nowhere/out.png"], "there is no such folder"), (["--png", "cat.png"], "give the drawing another name"), (["--png", "out.txt"], "ends in .png")])
def test_what_is_refused(cat, tiny_gguf, capsys, arguments: list[str], words: str) -> None:
    assert execute(["attention", str(tiny_gguf("blip2")[0]), "--image", "cat.png", *arguments]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_model_that_shows_no_maps(cat, tiny_gguf, capsys) -> None:
    assert execute(["attention", str(tiny_gguf("llava")[0]), "--image", "cat.png"]) == 2
    assert "no maps of attention" in " ".join(capsys.readouterr().err.split())


def test_an_empty_prompt_is_a_caption(cat, tiny_gguf, capsys, monkeypatch) -> None:
    """The picture's rows and BOS, no text; without a PROMPT there is nothing to answer."""
    path = str(tiny_gguf("blip2")[0])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    assert execute([path, "", "--image", "cat.png", "--temperature", "0", "-n", "4", "--ctx", "128", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    want = pe.load(path, n_ctx=128).generate("", images=["cat.png"], max_tokens=4, temperature=0)
    assert found["text"] == str(want) and want.n_prompt == 5 + 1
    assert execute([path, "--image", "cat.png", "--ctx", "128"]) == 2 and "no PROMPT" in capsys.readouterr().err
