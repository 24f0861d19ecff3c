"""`pyengine-run pull`: what it says before it fetches, what it asks at a terminal, and what happens to a model that is not there."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from servers import COMMIT, cut, Page

from pyengine.cli import pulling
from pyengine.cli.command import execute
from pyengine.files.gguf import GGUFFile
from pyengine.files.stores import find_model, list_models
from pyengine.pull import download, find, offer

DEMO = ROOT / "converters/demo/weights/demo-q8_0.gguf"
REPO = "org/demo-GGUF"


@pytest.fixture
def server(remote):
    return remote


class Typed(io.StringIO):
    """What somebody types."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    """terminal("y") -> somebody sits there and gives this answer."""
    def sit(answer: str) -> None:
        monkeypatch.setattr(pulling, "_at_terminal", lambda: True)
        monkeypatch.setattr(sys, "stdin", Typed(answer + "\n"))
    return sit


@pytest.fixture(scope="module")
def unknown(tmp_path_factory) -> bytes:
    """A file of an architecture that nobody has written."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("unknown") / "x.gguf"
    writer = gguf.GGUFWriter(path, "nobody")
    writer.add_tensor("x.weight", np.zeros((64, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def everything(home: Path) -> set[str]:
    """Names of all files below the stores."""
    return {p.name for folder in (".cache", ".ollama") for p in (home / folder).rglob("*") if not p.is_dir()}


def test_standard_output_is_the_name_and_nothing_else_is_said(server, capsys):
    server.repository(REPO, {"demo-Q8_0.gguf": DEMO.read_bytes()})
    assert execute(["pull", f"hf.co/{REPO}:Q8_0"]) == 0
    assert capsys.readouterr() == (f"{REPO}:Q8_0\n", "")
    assert execute(["list", "--json"]) == 0
    assert [m["name"] for m in json.loads(capsys.readouterr().out)] == [f"{REPO}:Q8_0"]
    assert execute(["pull", REPO]) == 0 and capsys.readouterr() == (f"{REPO}:Q8_0\n", "")     # there already


def test_a_fetched_model_answers(server, capsys):
    server.model("library/demo", {"model": DEMO.read_bytes()}, "tiny")
    assert execute(["pull", "demo:tiny"]) == 0
    picture = str(ROOT / "converters/demo/samples/word.png")
    assert execute(["demo:tiny", "What does it say?", "--image", picture, "--temperature", "0", "--ctx", "512"]) == 0
    assert capsys.readouterr().out == "demo:tiny\nSPEAKING\n"


def test_whether_it_fits_is_said_at_a_terminal_by_its_header_alone(server, capsys, terminal, monkeypatch):
    server.repository(REPO, {"demo-Q8_0.gguf": DEMO.read_bytes()})
    monkeypatch.setattr(offer, "BEGINNINGS", (1000, 1 << 20, 2 << 20))
    path, asked = f"/{REPO}/resolve/{COMMIT}/demo-Q8_0.gguf", []
    judge = pulling.judge
    monkeypatch.setattr(pulling, "judge", lambda found: (judge(found), asked.extend(s.headers["Range"] for s in server.asked(path)))[0])
    terminal("")
    assert execute(["pull", REPO]) == 0
    assert asked == ["bytes=0-999", "bytes=1000-1048575"]                      # and what came is the beginning of the download
    assert server.asked(path)[-1].headers["Range"].startswith("bytes=1048576-")
    said = capsys.readouterr().err
    assert f"{REPO}:Q8_0: 4.6 MiB; into the Hugging Face cache" in said and "it fits: " in said and "with a context of" in said


def test_what_does_not_fit_is_asked_about_at_a_terminal_and_said_elsewhere(server, capsys, terminal, tmp_path, monkeypatch):
    server.repository(REPO, {"demo-Q8_0.gguf": DEMO.read_bytes()})
    monkeypatch.setattr(pulling, "judge", lambda found: pulling.Verdict(True, False, "it does not fit: so much"))
    terminal("n")
    assert execute(["pull", REPO]) == pulling.DECLINED
    assert "it does not fit: so much. Fetch it all the same? [y/N]" in capsys.readouterr().err and everything(tmp_path) == set()
    monkeypatch.undo()


def test_what_does_not_fit_is_fetched_by_a_script(server, capsys, monkeypatch):
    server.repository(REPO, {"demo-Q8_0.gguf": DEMO.read_bytes()})
    monkeypatch.setattr(pulling, "judge", lambda found: pulling.Verdict(True, False, "it does not fit: so much"))
    assert execute(["pull", REPO]) == 0
    assert capsys.readouterr() == (f"{REPO}:Q8_0\n", "it does not fit: so much\n")


@pytest.mark.parametrize("content, says", [("unknown", "nobody"), (b"GGUF" * 100, "version"), (b"<html>" * 100, "this is not a GGUF file")])
def test_what_cannot_be_run_is_not_fetched_unless_that_is_wanted(server, capsys, tmp_path, unknown, content, says):
    server.repository(REPO, {"m-Q8_0.gguf": unknown if content == "unknown" else content})
    assert execute(["pull", REPO]) == 2
    said = capsys.readouterr().err
    assert "it cannot be run here" in said and says in said and "--yes fetches it all the same" in said and "/tmp" not in said
    assert everything(tmp_path) == set()
    assert execute(["pull", REPO, "--yes"]) == 0 and find_model(REPO)


def test_headers_of_all_parts_are_looked_at(server, tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "big-Q8_0.gguf", "nobody", split_max_tensors=1)
    for i in range(3):
        writer.add_tensor(f"x.{i}.weight", np.ones((64, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = {p.name: p.read_bytes() for p in sorted(tmp_path.glob("*-of-*.gguf"))}
    server.repository(REPO, parts)
    monkeypatch.setattr(offer, "BEGINNINGS", (100, 4000))
    with offer.headers(find(REPO)) as (model, projector):
        with GGUFFile(model) as file:
            assert len(file.tensors) == 3 and len(file.paths) == 3 and projector is None
            assert not file.array("x.2.weight")[-1].any()                      # there are no weights in it
    assert not model.parent.exists()


def test_an_interrupt_says_how_to_go_on(server, capsys, monkeypatch):
    server.repository(REPO, {"demo-Q8_0.gguf": DEMO.read_bytes()})

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(offer, "fetch", interrupted)
    assert execute(["pull", REPO]) == 130
    assert f"stopped: `pyengine-run pull {REPO}` goes on from here" in capsys.readouterr().err


def test_errors_are_one_line(server, capsys):
    assert execute(["pull", "./x.gguf"]) == 2
    assert execute(["pull", "absent:1b"]) == 2
    assert execute(["pull", "org/absent"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all(line.startswith("pyengine-run: ") for line in said)


# -- a model that is not there --------------------------------------------------------------------------------------------


def test_without_a_terminal_the_command_is_said_that_would_fetch_it(server, capsys):
    for name, whose in (("demo:tiny", "Ollama's registry"), (REPO, "Hugging Face")):
        for arguments in ([name, "Hello"], ["plan", name], ["show", name]):
            assert execute(arguments) == 2
            assert capsys.readouterr().err.endswith(f"If {whose} has it, `pyengine-run pull {name}` fetches it\n")
    assert server.seen == []
    for path in ("./absent.gguf", "models/absent.gguf", "../x"):
        assert execute([path, "Hello"]) == 2
        assert "pull" not in capsys.readouterr().err


def test_at_a_terminal_it_is_offered_and_then_asked_what_was_to_be_asked(server, capsys, terminal):
    server.repository(REPO, {"demo-Q8_0.gguf": DEMO.read_bytes()})
    terminal("no")
    assert execute(["show", REPO]) == 2 and list_models() == []
    assert "Fetch it from Hugging Face? [y/N]" in capsys.readouterr().err
    terminal("y")
    assert execute(["show", REPO, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["architecture"] == "qwen2vl"    # and nothing else is on standard output


def test_a_command_that_is_misspelt_is_no_model_to_fetch(server, capsys, terminal):
    terminal("y")
    assert execute(["plna", "Hello"]) == 2
    said = capsys.readouterr().err
    assert "the command is called `plan`" in said and "Fetch" not in said and server.seen == []
    terminal("n")
    assert execute(["plan", "absent"]) == 2 and "the command is called" not in capsys.readouterr().err


def test_what_cannot_be_fetched_when_it_is_offered_is_said(server, capsys, terminal, monkeypatch):
    terminal("y")
    assert execute(["show", REPO]) == 2
    assert "there is no such repository" in capsys.readouterr().err
    server.repository(REPO, {"demo-Q8_0.gguf": DEMO.read_bytes()})
    monkeypatch.setattr(download, "RETRIES", 0)
    server.faults[f"/{REPO}/resolve/{COMMIT}/demo-Q8_0.gguf"] = [cut(10)]
    terminal("y")
    assert execute(["show", REPO]) == 2
    assert "10 of" in capsys.readouterr().err
    server.pages[f"/api/models/{REPO}"] = Page(b"{}")
