"""One answer as people ask for it: what is piped in, other programs' words and options, notes, progress, completion, closed pipes."""

from __future__ import annotations

import ast
import importlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import fields
from types import SimpleNamespace

import pytest
import typer
from PIL import Image
from test_cli import FAKE, FakeModel, model, one_line, ROOT, run_process, Terminal, type_in  # noqa: F401

import pyengine
from pyengine.cli import answer, asked, pictures, words
from pyengine.cli.beforehand import ANSWERING, beside
from pyengine.cli.command import execute, main_form
from pyengine.cli.talk.conversation import Chat
from pyengine.errors import ModelWarning, RequestError

POSIX = pytest.mark.skipif(os.name == "nt", reason="pseudo terminals and signals are POSIX")


def content(model, call: int = -1):  # noqa: F811
    """What the model was asked: the content of the last message of a call."""
    return model.calls[call][1][-1]["content"]


# --- standard input, files, words -------------------------------------------------------------------------------------


def test_standard_input_comes_before_the_prompt(model, monkeypatch, capsys) -> None:  # noqa: F811
    type_in(monkeypatch, "Paris is the capital of France.\r\nIt is large.\n\n")
    assert execute(["m", "What is the text above about?"]) == 0
    assert content(model) == "Paris is the capital of France.\nIt is large.\n\nWhat is the text above about?"
    assert capsys.readouterr().err == ""


def test_standard_input_alone_is_one_prompt(model, monkeypatch) -> None:  # noqa: F811
    for arguments in (["m"], ["m", "-"], ["m", "-f", "-"], ["run", "m"]):
        type_in(monkeypatch, "\ufeffSum this up.\n/bye\nTwo lines.\n")
        assert execute(arguments) == 0
        assert content(model) == "Sum this up.\n/bye\nTwo lines.\n"
    assert len(model.calls) == 4


def test_files_come_before_it(model, monkeypatch, tmp_path, capsys) -> None:  # noqa: F811
    (tmp_path / "a.txt").write_text("from a\n")
    type_in(monkeypatch, "from stdin\n")
    assert execute(["m", "Q", "-f", str(tmp_path / "a.txt")]) == 0
    assert content(model) == "from a\n\nfrom stdin\n\nQ"
    type_in(monkeypatch, "")
    assert execute(["m", "--file", str(tmp_path / "a.txt")]) == 0
    assert content(model) == "from a\n"
    assert execute(["m", "-f", "/no/such.txt"]) == 2
    assert "--file /no/such.txt: No such file" in one_line(capsys.readouterr().err)


def test_what_cannot_be_a_prompt_is_said(model, monkeypatch, tmp_path, capsys) -> None:  # noqa: F811
    put = tmp_path / "m.gguf"
    put.write_bytes(b"")
    for arguments, message in (([str(put)], "standard input is empty"), ([str(put), "-"], "standard input is empty"),
                               (["/no/model.gguf"], "/no/model.gguf"),
                               (["m", "--lines", "Q"], "--lines reads the questions"), (["m", "Q", "--json", "--jsonl"], "one of them"),
                               (["-v"], "MODEL is missing")):
        type_in(monkeypatch, "")
        assert execute(arguments) == 2
        assert message in one_line(capsys.readouterr().err)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert execute(["m", "Q"]) == 2
    assert "byte 2 is no UTF-8 text" in one_line(capsys.readouterr().err)
    assert model.calls == []
    monkeypatch.setattr(sys, "stdin", None)                  # closed by the shell: <&-
    assert execute(["m", "Q"]) == 0 and content(model) == "Q"


@POSIX
def test_waiting_for_standard_input_is_said() -> None:
    code = f"from pyengine.cli import asked; asked.WAIT_SECONDS = 0.1; {FAKE[2]}"
    process = subprocess.Popen([sys.executable, "-c", code, "m", "Q"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               cwd=ROOT, text=True)
    assert "waiting for the end of standard input" in process.stderr.readline()
    out, err = process.communicate("at last", timeout=60)
    assert (out, err) == ("<user:at last\n\nQ>\n", "")


def test_words_are_joined(model, capsys) -> None:  # noqa: F811
    assert execute(["m", "why", "is", "the", "sky", "blue", "--temp", "0"]) == 0
    assert content(model) == "why is the sky blue"
    assert execute(["m", "5", "-", "3"]) == 0
    assert content(model) == "5 - 3"
    assert execute(["m", "Once ", " upon "]) == 0
    assert content(model) == "Once   upon "
    assert execute(["m", "--", "-5", "+", "3"]) == 0
    assert content(model) == "-5 + 3"


# --- pictures in the prompt -------------------------------------------------------------------------------------------


@pytest.fixture
def seeing(model, tmp_path, monkeypatch):  # noqa: F811
    """A model with an encoder, in a folder with a.png and "my b.png"."""
    for name in ("a.png", "my b.png"):
        Image.new("RGB", (8, 6)).save(tmp_path / name)
    (tmp_path / "bad.png").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    model.media = object()
    return model


def shape(found) -> list[str]:
    return [part["text"] if part["type"] == "text" else f"<{part['name']}>" for part in found] if isinstance(found, list) else [found]


@pytest.mark.parametrize("arguments, parts", [
    (["What does it say? a.png"], ["<a.png>", "What does it say?"]),
    (["What does it say?", "{}/my b.png"], ["<my b.png>", "What does it say?"]),
    (["What is in a.png?"], ["What is in ", "<a.png>", "?"]),
    (["a.png", "what?"], ["<a.png>", "what?"]),
    (["a.png", "which is larger?", "my b.png"], ["<a.png>", "<my b.png>", "which is larger?"]),
    (["what is more in a.png than in 'my b.png'"], ["what is more in ", "<a.png>", " than in ", "<my b.png>"]),
    (["Which", "--image", "a.png", "my b.png", "is", "larger?"], ["<a.png>", "Which ", "<my b.png>", " is larger?"]),
    (["--image", "a.png", "my b.png", "Which", "is", "larger?"], ["<a.png>", "<my b.png>", "Which is larger?"]),
    (["Which is larger?", "--image", "a.png,my b.png"], ["<a.png>", "<my b.png>", "Which is larger?"]),
    (["'my b.png' and more"], ["<my b.png>", "and more"]),
    (["what does it say 'file://{}/my b.png' please"], ["what does it say ", "<my b.png>", " please"]),
])
def test_pictures_in_the_prompt(seeing, tmp_path, arguments, parts, capsys) -> None:
    assert execute(["m", *(a.replace("{}", str(tmp_path)) for a in arguments)]) == 0
    assert shape(content(seeing)) == parts


@pytest.mark.parametrize("text", ["What does it say? {}/a.png", "a.png what?", "What is in a.png?", "what does it say 'file://{}/my b.png' please",
                                  "a.png which is larger? 'my b.png'", "what is more in a.png than in 'my b.png'", " two  words ",
                                  "what is it file://{}/my%20b.png"])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_conversation_asks_as_one_answer_does(seeing, tmp_path, monkeypatch, capsys, text, terminal) -> None:
    text = text.replace("{}", str(tmp_path))
    assert execute(["m", text]) == 0
    one = shape(content(seeing))
    type_in(monkeypatch, text + "\n")
    if terminal:
        Chat(seeing, answer.Settings()).read(text)
    else:
        assert execute(["m", "--lines"]) == 0
    assert len(seeing.calls) == 2 and shape(content(seeing)) == one


@pytest.mark.parametrize("words, message", [(["What is in none.png?"], "none.png: there is no such file"), (["what", "is", "bad.png"], "not an image"),
                                            (["a.png and https://example.org/b.png"], "nothing is fetched")])
def test_a_picture_that_is_not_there_is_no_question(seeing, monkeypatch, capsys, words, message) -> None:
    assert execute(["m", *words]) == 2 and not seeing.calls
    assert message in one_line(capsys.readouterr().err)
    type_in(monkeypatch, " ".join(words))
    assert execute(["m", "-"]) == 0 and content(seeing) == " ".join(words)


def test_a_model_without_encoder_gets_the_words(seeing, capsys) -> None:
    seeing.media = None
    assert execute(["m", "What is in a.png?"]) == 0
    assert content(seeing) == "What is in a.png?"
    assert "(fake.gguf has no image encoder: a.png stays text)" in capsys.readouterr().err
    assert execute(["m", "Is it in none.png?"]) == 0 and capsys.readouterr().err == ""


def test_nothing_that_is_piped_in_is_opened(seeing, monkeypatch, capsys) -> None:
    type_in(monkeypatch, "see a.png, bad.png and none.png\n")
    assert execute(["m", "What is there?"]) == 0
    assert content(seeing) == "see a.png, bad.png and none.png\n\nWhat is there?"
    err = capsys.readouterr().err
    assert "(a.png is text here" in err and "(bad.png is text here" in err and "none.png" not in err
    started = time.perf_counter()
    assert pictures.mentioned("a/b it's (c. " * 50_000) == [] and time.perf_counter() - started < 20


def test_boxes_are_drawn_on_a_picture_of_the_prompt(seeing, monkeypatch, capsys) -> None:
    drawn = []
    monkeypatch.setattr(pictures, "draw", lambda found, shown, out: drawn.append([p.name for p in shown]) or True)
    assert execute(["m", "Where is it? a.png", "--draw", "out.png"]) == 0
    assert drawn == [["a.png"]]
    assert execute(["m", "Where is it?", "--draw", "out.png"]) == 2
    assert "needs a picture" in one_line(capsys.readouterr().err)


# --- how an answer ends -----------------------------------------------------------------------------------------------


def test_a_base_model_says_at_a_terminal_that_it_continues(model, monkeypatch, capsys) -> None:  # noqa: F811
    model.file.metadata = {}
    assert execute(["m", "Once"]) == 0 and capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert execute(["m", "Once"]) == 0
    out, err = capsys.readouterr()
    assert out == "<Once>\n" and " ".join(err.split()).startswith("(base model: the file has no chat template, so the prompt is not answered")
    assert execute(["m", "Once", "--raw"]) == 0 and "base" not in capsys.readouterr().err
    model.file.metadata = {"tokenizer.chat_template": "..."}
    assert execute(["m", "Once"]) == 0 and "base" not in capsys.readouterr().err


def test_an_answer_that_is_cut_says_so(model, capsys) -> None:  # noqa: F811
    assert execute(["m", "Q", "-n", "3"]) == 0
    assert capsys.readouterr().err == "(cut after 3 tokens; --max-tokens N, or -n N, allows more)\n"
    assert execute(["m", "Q", "-n", "4"]) == 0 and capsys.readouterr().err == ""


def test_a_full_context_cuts_the_answer_and_keeps_it(tiny_gguf, capsys) -> None:
    path = str(tiny_gguf("llama")[0])
    assert execute([path, "The quick", "--raw", "--seed", "1", "--ctx", "24"]) == 0
    out, err = capsys.readouterr()
    assert out.strip() and re.fullmatch(r"\(cut after \d+ tokens: the context of 24 tokens is full; --ctx N makes a larger one\)\n", err)
    assert execute([path, "The quick", "--raw", "--seed", "1", "--ctx", "24", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["finish"] == "length" and found["n_prompt"] + len(found["tokens"]) in (24, 25)


def test_jsonl_streams(model, capsys) -> None:  # noqa: F811
    assert execute(["m", "Q", "--jsonl"]) == 0
    *pieces, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert pieces == [{"piece": "<"}, {"piece": "user:Q"}, {"piece": ">"}]
    execute(["m", "Q", "--json"])
    assert {**last, "memory": None} == {**json.loads(capsys.readouterr().out), "memory": None} and last["text"] == "<user:Q>"


@POSIX
def test_json_after_ctrl_c_is_whole(tmp_path) -> None:
    process = subprocess.Popen([*FAKE, "m", "count", "--jsonl"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert json.loads(process.stdout.readline()) == {"piece": "0 "}
    process.send_signal(2)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and json.loads(out.splitlines()[-1])["finish"] == "interrupted"


# --- progress of a prompt ---------------------------------------------------------------------------------------------


def test_a_stream_tells_how_much_of_its_prompt_is_read(tiny_gguf) -> None:
    loaded = pyengine.load(tiny_gguf("llama")[0], n_ctx=128, n_batch=16)
    told: list[tuple[int, int]] = []
    pieces = loaded.stream([5] * 40, max_tokens=4, seed=1)
    pieces.progress = lambda *counts: told.append(counts)
    pieces.answer()
    assert told == [(0, 40), (16, 40), (32, 40)]
    pieces = loaded.stream([5] * 40, max_tokens=2, seed=1)
    pieces.progress = lambda *counts: told.append(counts)
    assert len(pieces.answer().tokens) == 2 and told[3:] == [(0, 40)]    # then one step reads the last token again


def test_the_line_comes_late_and_goes(monkeypatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(answer, "READING_AFTER_SECONDS", 0.05)
    for terminal in (False, True):
        shown.isatty = lambda terminal=terminal: terminal
        reading = answer.Reading()
        reading(0, 7478)
        assert shown.getvalue() == ""
        time.sleep(0.3)
        reading(3072, 7478)
        reading.leave()
        reading(4000, 7478)
    assert shown.getvalue() == "\rreading prompt 0/7,478\rreading prompt 3,072/7,478\r" + " " * 26 + "\r"


@POSIX
def test_a_long_prompt_at_a_terminal(tmp_path) -> None:
    t = Terminal(tmp_path, "m", "long")
    t.expect("reading prompt 512/2,048")
    assert t.expect("<user:long>").endswith("\r" + " " * 26 + "\r<user:long>")
    assert t.close() == 0
    done = run_process("m", "long", stdin=subprocess.DEVNULL)
    assert (done.stdout, done.stderr) == ("<user:long>\n", "")


# --- other programs' words --------------------------------------------------------------------------------------------


def test_options_of_llama_cpp_and_ollama(model, monkeypatch, capsys) -> None:  # noqa: F811
    assert execute(["-m", "x.gguf", "-p", "hi there", "-sys", "Be brief.", "--n-predict", "4", "--ctx-size=48", "-s", "7",
                    "-ctk", "q8_0", "-ctv", "q4_0", "--batch-size", "32", "-r", "END", "--typical-p", "0.5"]) == 0
    kind, messages, max_tokens, stop, sampling = model.calls[0]
    assert [m["content"] for m in messages] == ["Be brief.", "hi there"] and (max_tokens, stop) == (4, ["END"])
    assert sampling == {"seed": 7, "typical_p": 0.5}
    name, _, loaded = model.loaded[0]
    assert (name, loaded["n_ctx"], loaded["kv_dtype"], loaded["n_batch"]) == ("x.gguf", 48, "q8_0/q4_0", 32)
    assert execute(["m", "Q", "--stop", "-ngl", "--system", "--ctx-size"]) == 0                  # values are no options
    assert model.calls[1][3] == ["-ngl"] and model.calls[1][1][0]["content"] == "--ctx-size"
    assert execute(["m", "--", "-ngl", "--ctx-size"]) == 0 and content(model) == "-ngl --ctx-size"
    assert execute(["m", "Q", "--cache-type-v=q8_0"]) == 0 and model.loaded[-1][2]["kv_dtype"] == "f16/q8_0"
    assert capsys.readouterr().err == ""


def test_every_alias_leads_to_an_option_and_every_hint_is_one_line(model, capsys) -> None:  # noqa: F811
    form = typer.main.get_command(main_form)
    own = {name for p in form.params for name in p.opts}
    assert set(words.ALIASES.values()) <= own and not own & {*words.ALIASES, *words.HINTS}
    for name in (*words.HINTS, "-ctk"):
        assert execute(["m", "Q", name]) == 2
        assert name in one_line(capsys.readouterr().err)
    assert execute(["m", "Q", "-ngl", "20"]) == 2
    assert "--device cuda:0=6GiB --device cpu" in one_line(capsys.readouterr().err)
    assert model.loaded == []


def test_numbers_of_layers_and_cards_are_devices() -> None:
    def said(*arguments: str) -> list[str]:
        return words.translated(arguments, {"--device": True})

    assert said("-ngl", "0") == ["--device", "cpu"]
    assert said("--n-gpu-layers=99") == said("-ngl", "all") == said("-ngl", "-1") == ["--device", "cuda"]
    assert said("-ngl", "auto") == [] and said("-mg", "1") == ["--device", "cuda:1"]


def test_commands_of_others(model, capsys) -> None:  # noqa: F811
    for name in words.COMMANDS:
        assert execute([name, "x"]) == 2
        assert f"there is no command {name}: " in one_line(capsys.readouterr().err)
    for mode in ("run", "chat"):
        assert execute([mode, "m", "hi"]) == 0 and model.loaded[-1][0] == "m" and content(model) == "hi"
    capsys.readouterr()
    assert execute(["lsit", "Q"]) == 0                         # any other word may be a model
    capsys.readouterr()
    for arguments, expected in ((["help"], "PROMPT"), (["help", "plan"], "pyengine-run plan"), (["run"], "PROMPT"), (["plan", "-h"], "plan"),
                                (["-h"], "PROMPT"), (["ls", "-h"], "pyengine-run list")):
        assert execute(arguments) == 0 and expected in capsys.readouterr().out


def test_a_command_that_is_written_wrong_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setenv("PYENGINE_MODELS", "")
    assert execute(["hardwear", "Q"]) == 2
    assert "the command is called `hardware`" in one_line(capsys.readouterr().err)


def test_the_version(capsys) -> None:
    for name in ("--version", "-V", "version"):
        assert execute([name]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"pyengine-run {pyengine.__version__} (kernels here: ") and "generic" in out and out.count("\n") == 1


def test_help_names_defaults() -> None:
    from pyengine.text.sampling import SamplingParams

    helps = {name: p.help for p in typer.main.get_command(main_form).params for name in p.opts}
    options = {"temperature": "--temperature", "typical_p": "--typical"}
    for f in fields(SamplingParams):
        name = options.get(f.name, "--" + f.name.replace("_", "-"))
        if f.default is not None and name in helps:
            assert f"(default: {f.default:g})" in helps[name]
    for name in ("--ctx", "--threads", "--system", "--max-tokens", "--stop", "--seed", "--device", "--picture", "--mmproj"):
        assert "default" in helps[name], name


# --- messages in the command's words ----------------------------------------------------------------------------------


def raised(file) -> list[str]:
    """Texts of the errors that a module raises; numbers stand where they have values."""
    calls = [n.exc for n in ast.walk(file.tree) if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call)]
    found = []
    for argument in (a for call in calls for a in call.args):
        parts = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
        found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "7" for p in parts))
    return found


def test_errors_name_options_and_not_arguments_of_the_library() -> None:
    sys.path.insert(0, str(ROOT / "tests/rules"))
    try:
        from sources import package
    finally:
        sys.path.pop(0)
    library = re.compile(r"\b(n_ctx|kv_dtype|n_batch|n_threads|n_seq|encoder_device|expert_device)\b|\b(mmproj|images|device)=|load with")
    texts = [t for f in package() if not f.path.startswith("pyengine/cli/") for t in raised(f) if "in a prompt in parts" not in t]
    assert len([t for t in texts if library.search(t)]) > 15
    assert [t for t in texts if library.search(words.told(t))] == []
    assert words.told("the context holds 8; load with a larger n_ctx") == "the context holds 8; use a larger --ctx"
    assert words.told("or load with images=(640, 480)") == "or use --picture 640x480"
    assert words.told("/models/n_ctx/my-kv_dtype.gguf: no such file") == "/models/n_ctx/my-kv_dtype.gguf: no such file"


def test_a_device_that_is_none(tiny_gguf, capsys) -> None:
    assert execute([str(tiny_gguf("llama")[0]), "Q", "--device", "cuda:99"]) == 2
    assert "cuda" in one_line(capsys.readouterr().err)       # no library, no driver, or no card of this number
    assert execute([str(tiny_gguf("llama")[0]), "Q", "--device", "tpu:0"]) == 2
    assert "--device" in one_line(capsys.readouterr().err)


# --- threads and contexts beyond use ----------------------------------------------------------------------------------


def test_threads_beyond_the_processors(model, monkeypatch, capsys) -> None:  # noqa: F811
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr("pyengine.hardware.most_threads", lambda: 2)
    assert execute(["m", "Q", "-t", "2"]) == 0 and capsys.readouterr().err == ""
    assert execute(["m", "Q", "-t", "3"]) == 0
    assert capsys.readouterr().err == "note: 3 threads on 2 usable processors are slower than 2\n"
    for command in ([], ["plan"], ["bench"]):
        assert execute([*command, "m", "-t", "999"]) == 2
        assert "--threads 999: this machine has 2 processors" in one_line(capsys.readouterr().err)


def test_usable_processors() -> None:
    from pyengine.hardware import default_threads, most_threads

    assert 1 <= default_threads() <= most_threads() <= os.cpu_count()


def test_a_context_beyond_the_trained_one(model, capsys) -> None:  # noqa: F811
    assert execute(["m", "Q", "--ctx", "64"]) == 0 and capsys.readouterr().err == ""
    assert execute(["m", "Q", "--ctx", "1000"]) == 0
    assert "note: --ctx 1,000 is more than the 64 tokens that the model was trained for" in capsys.readouterr().err


# --- what the model's files say ---------------------------------------------------------------------------------------


def test_warnings_are_notes_of_one_line(model, monkeypatch, capsys) -> None:  # noqa: F811
    def chat(*arguments, **settings):
        for _ in range(2):
            warnings.warn("the file\nsays kv_dtype=q9", ModelWarning)
        return FakeModel.chat(model, *arguments, **settings)

    monkeypatch.setattr(model, "chat", chat)
    for _ in range(2):
        assert execute(["m", "Q"]) == 0
        assert capsys.readouterr().err == "note: the file says --kv-dtype q9\n"
    with pytest.warns(ModelWarning):
        warnings.warn("as ever", ModelWarning)


def ollama_model(home, parameters: dict) -> None:
    """Put a model with parameters into a store of Ollama's below `home`."""
    layers = []
    for digit, kind, data in (("a", "model", b"G"), ("b", "params", json.dumps(parameters).encode())):
        blob = home / "blobs" / f"sha256-{digit * 64}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        layers.append({"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digit * 64}"})
    manifest = home / "manifests/registry.ollama.ai/library/pirate/latest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"layers": layers}))


def test_parameters_of_a_modelfile_are_defaults(model, tmp_path, monkeypatch, capsys) -> None:  # noqa: F811
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    ollama_model(tmp_path, {"num_ctx": 48, "num_predict": 17, "stop": ["X"], "temperature": 0.1})
    assert execute(["pirate", "Q"]) == 0
    assert model.loaded[-1][2]["n_ctx"] == 48 and model.calls[-1][2:] == (17, None, {})
    assert execute(["pir", "Q", "--ctx", "32", "-n", "-1"]) == 0
    assert model.loaded[-1][2]["n_ctx"] == 32 and model.calls[-1][2] is None
    assert execute(["pirate", "Q", "-c", "0"]) == 0 and model.loaded[-1][2]["n_ctx"] == 48       # from the model, as in llama.cpp
    assert capsys.readouterr().err == "(pirate:latest)\n"
    asked_for: list[int | None] = []
    monkeypatch.setattr("pyengine.memory.fit.plan", lambda name, n_ctx=None, **more: asked_for.append(n_ctx) or (_ for _ in ()).throw(
        RequestError("enough")))
    assert execute(["plan", "pirate"]) == execute(["plan", "pirate", "--ctx", "9"]) == 2 and asked_for == [48, 9]
    assert execute(["plan", "pirate", "-c", "0"]) == 2 and asked_for[-1] == 48
    capsys.readouterr()
    (tmp_path / "blobs" / f"sha256-{'b' * 64}").write_text('{"num_ctx": "large", "num_predict": -2}')
    assert execute(["pirate", "Q"]) == 0
    assert model.loaded[-1][2]["n_ctx"] is None and model.calls[-1][2] is None
    assert "note: Ollama's parameter num_ctx is ignored: 'large' is no whole number" in capsys.readouterr().err


# --- completion, pipes, -m --------------------------------------------------------------------------------------------


def completed(line: str, tmp_path, shell: str = "bash") -> list[str]:
    """What a shell would be offered for the last word of a line."""
    asks = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)} if shell == "bash" else {"_TYPER_COMPLETE_ARGS": line}
    env = {**os.environ, "PYENGINE_MODELS": str(tmp_path), "_PYENGINE_RUN_COMPLETE": f"complete_{shell}", **asks}
    done = subprocess.run([sys.executable, "-m", "pyengine"], capture_output=True, text=True, cwd=ROOT, env=env, timeout=60)
    assert done.stderr == ""
    return done.stdout.split()


def test_completion(tmp_path) -> None:
    (tmp_path / "planet-Q4_0.gguf").write_bytes(b"G")
    assert completed("pyengine-run pla", tmp_path) == ["plan", "planet-Q4_0"]
    assert completed("pyengine-run plan pla", tmp_path) == ["planet-Q4_0"]
    assert "planet-Q4_0" in completed("pyengine-run run pla", tmp_path) and completed("pyengine-run -m plane", tmp_path) == ["planet-Q4_0"]
    assert completed("pyengine-run plan planet-Q4_0 --pi", tmp_path) == ["--picture", "--pictures"]
    assert completed("pyengine-run run planet-Q4_0 --te", tmp_path) == ["--temperature", "--temp"]
    assert completed("pyengine-run embed x", tmp_path) == []
    assert "planet-Q4_0" in "".join(completed("pyengine-run plan pla", tmp_path, "zsh"))
    done = subprocess.run([sys.executable, "-m", "pyengine", "--show-completion", "bash"], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}, timeout=60)
    assert "_PYENGINE_RUN_COMPLETE=complete_bash" in done.stdout


@POSIX
@pytest.mark.parametrize("arguments", [["hardware"], ["list", "--json"], ["--version"]])
def test_a_closed_pipe_ends_every_command_quietly(arguments) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "pyengine", *arguments], stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60)
    os.close(write)
    assert done.stderr == "" and done.returncode in (1, 141), done


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "pyengine", "--version"], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("pyengine-run ")


def test_a_standard_input_that_nothing_comes_from(monkeypatch) -> None:
    def refuses():
        raise OSError("a notebook has none")

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, buffer=SimpleNamespace(read=refuses), fileno=lambda: -1))
    assert asked.read_stdin() == ""
    broken = OSError(5, "Input/output error")
    monkeypatch.setattr(sys.stdin.buffer, "read", lambda: (_ for _ in ()).throw(broken))
    with pytest.raises(RequestError, match="standard input: Input/output error"):
        asked.read_stdin()


def test_plain_arguments_are_read_without_pydantic() -> None:
    """It takes longer to import than NumPy, and is loaded for what is wrong or no plain text or number."""
    code = ("import sys; from pyengine.cli.command import execute\n"
            "code = execute(sys.argv[1:]); print('pydantic' in sys.modules, 'PIL' in sys.modules, code)")

    def run(*arguments: str) -> tuple[str, str]:
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
        return done.stdout.splitlines()[-1], done.stderr

    assert run("plan", "no-such-model", "--ctx", "64", "-b", "32")[0] == "False False 2"
    assert run("no-such-model", "Hi", "-n", "1", "--top-k", "3", "--stop", "x", "--stop", "y")[0] == "False False 2"
    assert run("no-such-model", "Hi", "--temperature", "0", "--top-p", ".9", "--min-p", "0.05")[0] == "False False 2"
    for wrong, said in (("x", "valid integer"), ("1.5", "valid integer"), ("-2", "-1")):
        found, error = run("no-such-model", "Hi", "-n", wrong)
        assert found == "True False 2" and said in error and "-n" in error
    found, error = run("no-such-model", "Hi", "--temp", "warm")
    assert found == "True False 2" and "valid number" in error and "--temp" in error


# --- imports beside packing -------------------------------------------------------------------------------------------


def test_modules_are_imported_in_a_thread_from_the_first_call_on(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "imported_beside.py").write_text("import threading\nTHREAD = threading.current_thread().name\n")
    told = []
    progress = beside(("there_is_no_such_module", "imported_beside"), lambda *counts: told.append(counts))
    assert "imported_beside" not in sys.modules
    progress(1, 2)
    progress(2, 2)
    for thread in threading.enumerate():
        if thread.name == "pyengine imports":
            thread.join(60)
    assert sys.modules.pop("imported_beside").THREAD == "pyengine imports" and told == [(1, 2), (2, 2)]


def test_without_modules_the_progress_is_the_same() -> None:
    assert beside((), None) is None and beside((), print) is print


def test_modules_of_an_answer_exist() -> None:
    for name in ANSWERING:
        assert importlib.import_module(name)
