"""The command line: what it prints and where, its exit codes, the conversation at a real (pseudo) terminal.

Most tests give it a model of this file, which answers with what it was asked; the last ones run tiny random models and,
where they are there, real ones beside llama.cpp.
"""

from __future__ import annotations

import gc
import io
import json
import math
import os
import pydoc
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import pyengine
from pyengine.cli import answer, screen
from pyengine.cli.command import execute
from pyengine.cli.report.planned import parse_adapters
from pyengine.cli.talk import chat, settings
from pyengine.chat.reply.deltas import Delta
from pyengine.engine.request import Report
from pyengine.errors import ContextOverflowError, RequestError
from pyengine.measure import speed
from pyengine.memory.plan import MemoryPlan, PlanItem
from pyengine.measure.perplexity import nll, perplexity

ROOT = Path(__file__).resolve().parents[2]
# The command line in a process of its own, with this file's model
FAKE = [
    sys.executable,
    "-c",
    "import sys; sys.path.insert(0, 'tests/cli'); import test_cli; test_cli.main_with_fake_model()",
]


class Pieces:
    """What Model.stream returns: pieces with their kinds, and a report. Plain texts are content."""

    progress = None

    def __init__(self, pieces):
        self.pieces, self.closed = pieces, False

    def deltas(self):
        for piece in self.pieces:
            yield Delta("text", piece) if isinstance(piece, str) else piece

    def close(self):
        self.closed = True


class FakeModel:
    """A model without an image encoder. Answers with what it was asked, in three pieces; "count" goes on for ever, "slow" takes its time before it does.

    "overflow" fails after a piece, "silent" gives no text; "long" is a prompt that takes a while to be read.
    """

    media = None
    sampling_defaults: dict = {}
    stop_defaults: tuple[str, ...] = ()
    system_default = ""

    def __init__(self, metadata: dict | None = None, delay: float = 0.0, name: str = "fake.gguf"):
        self.file = SimpleNamespace(
            metadata={"tokenizer.chat_template": "..."} if metadata is None else metadata, path=Path(name)
        )
        self.plan = MemoryPlan(name, 64, 8, "f16", (PlanItem("cpu", "weights", "resident", 3 << 20),), {"cpu": 1 << 30})
        self.stats = {"prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0, "steps": 0}
        self.n_ctx, self.config = 64, SimpleNamespace(n_ctx_train=64)
        self.delay, self.calls, self.n_resets = delay, [], 0

    def reset(self) -> None:
        self.n_resets += 1

    def chat(self, messages, tools=None, stream=False, max_tokens=512, stop=None, **sampling):
        self.calls.append(("chat", [dict(m) for m in messages], max_tokens, stop, sampling))
        said = "|".join(f"{m['role']}:{m['content']}" for m in messages)
        return self._stream(said, messages[-1]["content"], max_tokens)

    def stream(self, prompt, images=(), max_tokens=512, stop=None, **sampling):
        self.calls.append(("stream", prompt, max_tokens, stop, sampling))
        return self._stream(prompt, prompt, max_tokens)

    def _stream(self, said: str, asked: str, max_tokens):
        pieces = Pieces(self._pieces(said, asked))
        if asked == "long":
            pieces.pieces = chain(self._reads(pieces), pieces.pieces)
        finish = "length" if max_tokens == 3 else "stop"
        pieces.report = Report(tokens=[5, 6, 7], finish=finish, n_prompt=9, n_cached=4, prompt_seconds=0.5, seconds=0.25)
        return pieces

    def _reads(self, pieces):
        for done in (0, 512, 1024):
            pieces.progress(done, 2048)
            time.sleep(0.4)
        return
        yield

    def _pieces(self, said: str, asked: str):
        if "slow" in asked:
            time.sleep(30)
        self.stats["prompt_tokens"] += 10
        self.stats["cached_tokens"] += 4
        parts = iter(["<", said, ">"]) if asked not in ("count", "twenty") else (f"{n} " for n in iter(int, 1))
        parts = islice(parts, 20) if asked == "twenty" else parts
        for part in parts if asked != "silent" else ():
            time.sleep(self.delay)
            self.stats["generated_tokens"] += 1
            yield part
            if asked == "overflow":
                raise ContextOverflowError("the context of 64 tokens is full")

    def chat_ids(self, messages) -> list[int]:
        return [0] * sum(2 + len(m["content"].split()) for m in messages)

    def tokenize(self, text: str) -> list[int]:
        return [0] * len(text.split())


@pytest.fixture
def model(monkeypatch):
    """A FakeModel that pyengine.load gives for any name; `loaded` are the arguments of load."""
    fake = FakeModel()
    fake.loaded = []

    def load(name, progress=None, **settings):
        fake.loaded.append((name, progress, settings))
        return fake

    monkeypatch.setitem(vars(pyengine), "load", load)
    return fake


def type_in(monkeypatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def main_with_fake_model() -> None:
    from pyengine.cli import main

    if sys.stdin.isatty():  # Terminal gave it a session without a controlling terminal: Ctrl-C needs one
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    vars(pyengine)["load"] = lambda name, progress=None, **settings: FakeModel(delay=0.02)
    main()


def run_process(*arguments, **settings) -> subprocess.CompletedProcess:
    return subprocess.run([*FAKE, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120, **settings)


# --- one answer -------------------------------------------------------------------------------------------------------


def test_only_the_answer_goes_to_standard_output(model, capsys) -> None:
    assert execute(["any.gguf", "What?"]) == 0
    assert capsys.readouterr() == ("<user:What?>\n", "")
    assert model.calls == [("chat", [{"role": "user", "content": "What?"}], None, None, {})]
    (name, progress, settings), = model.loaded
    assert name == "any.gguf" and callable(progress)         # imports what an answer needs
    assert settings == {"n_ctx": None, "kv_dtype": "f16", "n_threads": None, "n_batch": 512, "mmproj": None, "images": None, "device": "auto",
                        "encoder_device": None, "expert_device": None, "mmap": False, "adapters": None, "compress": None, "speculate": None, "draft": None}
    assert execute(["any.gguf", "What?", "--raw"]) == 0 and model.loaded[1][1] is None           # no template, no terminal


def test_options_reach_the_model(model) -> None:
    execute(
        [
            "--temp",
            "0",
            "m",
            "Q",
            "--top-k",
            "3",
            "--top-p",
            "0.5",
            "--min-p",
            "0.1",
            "--typical",
            "0.9",
            "--repeat-penalty",
            "1.1",
            "--repeat-last-n",
            "-1",
            "--presence-penalty",
            "0.2",
            "--frequency-penalty",
            "0.3",
            *"--top-n-sigma 1.5 --xtc-probability 0.5 --xtc-threshold 0.2 --dynatemp-range 0.4 --dynatemp-exponent 2 --mirostat 2".split(),
            *"--mirostat-tau 4 --mirostat-lr 0.3 --dry-multiplier 0.8 --dry-base 2 --dry-allowed-length 3 --dry-penalty-last-n -1".split(),
            *("--dry-sequence-breaker", "\\n", "--dry-sequence-breaker", "END"),
            "--seed",
            "7",
            "--stop",
            "a",
            "--stop",
            "b",
            "-n",
            "5",
            "--system",
            "S",
            "--ctx",
            "99",
            "--kv-dtype",
            "q8_0",
            "-t",
            "2",
            "-b",
            "32",
        ]
    )
    kind, messages, max_tokens, stop, sampling = model.calls[0]
    assert messages == [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    assert (kind, max_tokens, stop) == ("chat", 5, ["a", "b"])
    assert sampling == {
        "temperature": 0,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.1,
        "typical_p": 0.9,
        "repeat_penalty": 1.1,
        "repeat_last_n": -1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "seed": 7,
        "top_n_sigma": 1.5,
        "xtc_probability": 0.5,
        "xtc_threshold": 0.2,
        "dynatemp_range": 0.4,
        "dynatemp_exponent": 2,
        "mirostat": 2,
        "mirostat_tau": 4,
        "mirostat_eta": 0.3,
        "dry_multiplier": 0.8,
        "dry_base": 2,
        "dry_allowed_length": 3,
        "dry_penalty_last_n": -1,
        "dry_sequence_breakers": ("\n", "END"),
    }
    assert model.loaded[0][2] == {"n_ctx": 99, "kv_dtype": "q8_0", "n_threads": 2, "n_batch": 32, "mmproj": None, "images": None, "device": "auto",
                                  "encoder_device": None, "expert_device": None, "mmap": False, "adapters": None, "compress": None, "speculate": None, "draft": None}
    execute(["m", "Q", "-n", "-1"])
    assert model.calls[1][2] is None
    execute(["m", "Q", "--mmap", "-md", "small"])
    assert model.loaded[-1][2]["mmap"] is True and model.loaded[-1][2]["draft"] == "small"


def test_devices_and_their_sizes(model, capsys) -> None:
    parts = ["--device", "cpu:0=6GiB", "--device", "cpu:1=1.5mib", "--device", "cpu:2=700"]
    execute(["m", "Q", *parts, "--encoder-device", "cpu:1", "--expert-device", "cpu:2"])
    assert model.loaded[0][2]["device"] == {"cpu:0": 6 << 30, "cpu:1": 3 << 19, "cpu:2": 700}
    assert (model.loaded[0][2]["encoder_device"], model.loaded[0][2]["expert_device"]) == ("cpu:1", "cpu:2")
    execute(["m", "Q", "--device", "cpu"])
    assert model.loaded[1][2]["device"] == "cpu"
    capsys.readouterr()
    for wrong in (["cpu:0=6XB"], ["cpu:0="], ["cpu:0=1MiB", "cpu:0=2MiB"], ["cpu", "cpu:0=1MiB"], ["cpu:0=-1"],
                  ["cpu:0=9999999999999999"]):
        assert execute(["m", "Q", *(a for part in wrong for a in ("--device", part))]) == 2
        assert "as cpu:0=6GiB" in one_line(capsys.readouterr().err)
    assert len(model.loaded) == 2


def test_what_can_be_set_are_fields_of_the_sampling_parameters() -> None:
    from pyengine.text.sampling import SamplingParams

    assert set(settings.SAMPLING) == {f.name for f in fields(SamplingParams)} - {"logprobs", "logit_bias"}


def test_a_dash_reads_the_prompt_from_standard_input(model, monkeypatch, capsys) -> None:
    type_in(monkeypatch, "two\nlines")
    assert execute(["m", "-"]) == 0
    assert capsys.readouterr().out == "<user:two\nlines>\n"


@pytest.mark.parametrize(
    "metadata, arguments, expected",
    [
        ({"tokenizer.chat_template": "x"}, [], "chat"),
        ({"tokenizer.chat_template": "x"}, ["--raw"], "stream"),
        ({"general.name": "Gemma 3 270m"}, [], "stream"),
        ({"general.name": "Gemma 3 270m it"}, [], "chat"),
        ({"general.name": "X", "general.finetune": "Instruct-AWQ"}, [], "chat"),
        ({"general.name": "Italian Chatelaine"}, [], "stream"),
        ({}, [], "stream"),
    ],
)
def test_the_chat_template_is_for_models_that_have_one_or_were_trained_to_answer(
    model, capsys, metadata, arguments, expected
) -> None:
    model.file.metadata = metadata
    assert execute(["m", "Once", "--verbose", *arguments]) == 0
    out, err = capsys.readouterr()
    assert model.calls[0][0] == expected
    assert out == ("<user:Once>\n" if expected == "chat" else "<Once>\n")
    assert ("through the chat template" in err) == (expected == "chat") and ("as it is" in err or "plain text" in err) == (
        expected == "stream"
    )


def test_verbose_tells_speed_and_memory(model, capsys) -> None:
    model.delay = 0.01
    assert execute(["m", "Q", "-v"]) == 0
    err = capsys.readouterr().err
    assert "prompt 10 tokens (4 cached); answer 3 tokens; first" in err  # too few to speak of tokens per second
    assert execute(["m", "twenty", "-v"]) == 0
    after_first = float(re.search(r"answer 20 tokens, ([\d.]+) tokens/s", capsys.readouterr().err)[1])
    assert 20 < after_first < 110  # 19 pieces in 0.19 s and a little more
    assert re.search(r"memory: planned 3\.0 MiB and 0 bytes mapped, resident \d+\.\d [MG]iB\n", err)
    model.plan = replace(model.plan, decoding=1 << 30)
    model.stats["image_misses"] = 1
    model.stats |= {"image_hits": 0, "image_cache_bytes": 0}
    assert execute(["m", "Q", "-v"]) == 0
    assert re.search(r"iB \(reading a picture may take up to 1\.0+ GiB more for a moment\)\n", capsys.readouterr().err)


def test_a_folder_of_models_that_is_not_there_is_named(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    for name in ("OLLAMA_MODELS", "HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pyengine.files.stores._OLLAMA_SERVICE", str(tmp_path / "none"))
    monkeypatch.setenv("PYENGINE_MODELS", "/nonexistent")
    for command in (["list"], ["show", "x"]):
        execute(command)
        err = capsys.readouterr().err
        assert "PYENGINE_MODELS=/nonexistent: no such folder" in err and "set PYENGINE_MODELS" not in err
    monkeypatch.delenv("PYENGINE_MODELS")
    assert execute(["list"]) == 0 and "or set PYENGINE_MODELS to a folder" in capsys.readouterr().err
    assert execute(["show", "x"]) == 2
    err = capsys.readouterr().err
    assert "no model folders found (looked for Ollama, Hugging Face," in err and "; set PYENGINE_MODELS to a folder" in err


def test_json_answer(model, capsys) -> None:
    assert execute(["m", "Q", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == "<user:Q>" and found["tokens"] == [5, 6, 7] and found["finish"] == "stop"
    assert (
        found["prompt_tokens_per_second"] == 10.0 and found["generation_tokens_per_second"] == 8.0
    )  # 5 in 0.5 s, 2 in 0.25 s
    assert found["memory"]["planned_bytes"] == 3 << 20 and found["memory"]["resident_bytes"] > 1 << 20
    execute(["m", "Q", "--json", "--raw"])
    assert json.loads(capsys.readouterr().out)["text"] == "<Q>" and model.calls[1][0] == "stream"


# --- errors: one line, exit code 2 -----------------------------------------------------------------------------------


def one_line(err: str) -> str:
    assert err.startswith("pyengine-run: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["/no/such.gguf", "Q"], "/no/such.gguf"),
        (["plan", "/no/such.gguf"], "/no/such.gguf"),
        (["show", "/no/such.gguf"], "/no/such.gguf"),
        (["plan"], "MODEL"),
        (["m", "--nonsense"], "--nonsense"),
        (["m", "Q", "--temp", "warm"], "--temp"),
        (["m", "Q", "--temp", "-1"], "temperature"),
        (["m", "Q", "--top-p", "nan"], "top_p"),
        (["m", "Q", "-t", "0"], "--threads"),
        (["m", "--json"], "--json needs a PROMPT"),
        (["m", "--draw", "x.png"], "--draw needs a PROMPT"),
        (["m", "Q", "--raw", "--system", "S"], "--system"),
        (["bench", "m", "-p", "0", "-n", "0"], "nothing to measure"),
        (["perplexity", "m", "-f", "/no/such.txt"], "/no/such.txt"),
        (["perplexity", "m"], "--file"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, message, capsys) -> None:
    assert execute(arguments) == 2
    out, err = capsys.readouterr()
    assert message in one_line(err) and out == ""


def test_errors_of_files_are_one_line_too(tmp_path, capsys) -> None:
    (tmp_path / "text.gguf").write_text("This is no model, but long enough to have a header.")
    assert execute([str(tmp_path / "text.gguf"), "Q"]) == 2
    assert "not a GGUF file" in one_line(capsys.readouterr().err)
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "perceptron")
    writer.add_context_length(8)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    for arguments in (["Q"], ["--json", "Q"], ["--lines"]):
        assert execute([str(tmp_path / "other.gguf"), *arguments]) == 2
        assert "perceptron" in one_line(capsys.readouterr().err)


def test_debug_shows_the_traceback(monkeypatch, capsys) -> None:
    monkeypatch.setenv("PYENGINE_DEBUG", "1")
    assert execute(["show", "/no/such.gguf"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_full_context_shows_the_text_and_fails(model, capsys) -> None:
    assert execute(["m", "overflow"]) == 2
    out, err = capsys.readouterr()
    assert out == "<\n" and "context of 64 tokens is full" in one_line(err)


def test_a_system_message_needs_a_template(model, capsys) -> None:
    model.file.metadata = {}
    assert execute(["m", "Q", "--system", "S"]) == 2
    assert "no chat template" in one_line(capsys.readouterr().err)


# --- names, help, start-up -------------------------------------------------------------------------------------------


def test_a_command_comes_first_and_anything_else_is_a_model(model, capsys) -> None:
    execute(["./list", "Q"])
    execute(["lists", "Q"])
    assert [name for name, *_ in model.loaded] == ["./list", "lists"]
    capsys.readouterr()
    assert execute(["list", "--json"]) == 0 and isinstance(json.loads(capsys.readouterr().out), list)
    for arguments in ([], ["--help"]):
        assert execute(arguments) == 0
        shown = capsys.readouterr().out
        assert all(
            name in shown
            for name in ("MODEL", "plan", "bench", "perplexity", "show", "list", "hardware", "--image", "--temp")
        )
    for name in ("plan", "bench", "perplexity", "show", "list", "hardware"):
        assert execute([name, "--help"]) == 0 and f"pyengine-run {name}" in capsys.readouterr().out


def test_help_imports_little() -> None:
    heavy = {"numpy", "prompt_toolkit", "PIL", "jinja2", "tokenizers", "psutil", "pyengine.engine", "pyengine.native"}
    code = (
        f"import sys; from pyengine.cli.command import execute; assert execute(['--help']) == 0; "
        f"assert not {heavy!r} & set(sys.modules), {heavy!r} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_an_answer_imports_no_network_and_no_grammars() -> None:
    heavy = {"ssl", "http.client", "asyncio", "prompt_toolkit", "llguidance", "jsonschema", "starlette", "prometheus_client", "pyengine.cli.talk.remote",
             "pyengine.cli.subcommands", "pyengine.backends.building", "pyengine.backends.metal.device"}
    sees = ROOT / "converters" / "demo" / "weights" / "demo-q8_0.gguf"
    code = (
        f"import sys; from pyengine.cli.command import execute; assert execute([{str(sees)!r}, 'Hi', '--max-tokens', '1']) == 0; "
        f"assert not {heavy!r} & set(sys.modules), {heavy!r} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("busy", [False, True])
def test_the_end_of_a_process(busy: bool) -> None:
    """What is to be done at its end is done, what was written arrives, and the code is the command's, though the interpreter takes nothing apart."""
    code = ("import atexit, sys, threading; from pyengine.cli import main; atexit.register(print, 'bye')\n"
            f"if {busy}: threading.Thread(target=lambda: (threading.main_thread().join(), print('thread'))).start()\n"
            "sys.argv = ['pyengine-run', *sys.argv[1:]]; main()")
    done = subprocess.run([sys.executable, "-c", code, "help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.endswith("thread\nbye\n" if busy else "bye\n") and "MODEL" in done.stdout
    done = subprocess.run([sys.executable, "-c", code.replace("print, 'bye'", "lambda: print(gc.get_threshold()[0])").replace("atexit,", "atexit, gc,"),
                           "list"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and int(done.stdout.splitlines()[-1]) == gc.get_threshold()[0]           # but for one answer
    done = subprocess.run([sys.executable, "-c", code, "nothing.gguf", "Hi"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "nothing.gguf" in done.stderr and "bye" in done.stdout


# --- the screen ------------------------------------------------------------------------------------------------------


def test_control_characters_are_shown_and_not_obeyed() -> None:
    assert screen.printable("a\x1b[2Jb\x9b\r\x07\tc\n\u2028é") == "a\\x1b[2Jb\\x9b\\x0d\\x07\tc\n\u2028é"


def test_sizes() -> None:
    assert [screen.size(n) for n in (0, 1023, 1024, 3 << 19, 5 << 30, 3 << 40)] == [
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "1.5 MiB",
        "5.0 GiB",
        "3072.0 GiB",
    ]


def test_the_loading_bar_comes_late_and_goes(monkeypatch) -> None:
    shown = io.StringIO()
    shown.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", shown)
    with screen.LoadingBar("/a/m.gguf") as bar:
        bar(1, 10)
        assert shown.getvalue() == ""
        monkeypatch.setattr(screen, "BAR_AFTER_SECONDS", 0)
        bar(5, 10)
        assert "m.gguf" in shown.getvalue()
    with screen.LoadingBar("m.gguf") as bar:
        bar(10, 10)
        assert bar._bar is None  # done: nothing to show


# --- the conversation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "typed, messages",
    [
        ("a\nb\n", ["a", "b"]),
        ("a", ["a"]),
        ("a\\\nb\\\nc\nd\n", ["a\nb\nc", "d"]),
        ("a\\", ["a"]),
        ('"""one\n\n  two"""\nthree\n', ["one\n\n  two", "three"]),
        ('"""\none\ntwo\n"""\n', ["one\ntwo"]),
        ('"""one line"""\n', ["one line"]),
        ('"""open\nend', ["open\nend"]),
        ('""\n"x"\n', ['""', '"x"']),
    ],
)
def test_messages_of_several_lines(monkeypatch, typed, messages) -> None:
    type_in(monkeypatch, typed)
    found = []
    with pytest.raises(EOFError):
        while True:
            found.append(chat.read_message(chat._read_stdin_line))
    assert found == messages


def test_without_a_terminal_each_line_is_a_turn(model, monkeypatch, capsys) -> None:
    type_in(monkeypatch, '/system S\none\n\n"""two\n/two"""\n/clear\nthree\n/bye\nfour\n')
    assert execute(["m", "--lines"]) == 0
    out, err = capsys.readouterr()
    assert out.split(">\n") == [
        "<system:S|user:one",
        "<system:S|user:one|assistant:<system:S|user:one>|user:two\n/two",
        "<system:S|user:three",
        "",
    ]
    assert err == "" and model.n_resets == 1


def test_raw_turns_are_one_text(model, monkeypatch, capsys) -> None:
    type_in(monkeypatch, "Once\nThen\n")
    assert execute(["m", "--raw", "--lines"]) == 0
    assert [call[1] for call in model.calls] == ["Once", "Once\n<Once>\nThen"]


def test_without_a_terminal_errors_end_the_program(model, monkeypatch, capsys) -> None:
    for line, message in (
        ("/nonsense", "no command /nonsense"),
        ("/set heat 3", "/set heat"),
        ("/set top_k x", "whole number"),
        ("/set temperature x", "a number"),
        ("/set temperature -1", "temperature"),
        ("overflow", "is full"),
    ):
        type_in(monkeypatch, f"{line}\nnever\n")
        assert execute(["m", "--lines"]) == 2
        assert message in one_line(capsys.readouterr().err)
    assert all(call[1][-1]["content"] != "never" for call in model.calls)


def test_set_and_show(model, monkeypatch, capsys) -> None:
    type_in(
        monkeypatch,
        "/set temperature 0.5\n/set top_k 4\n/set stop X Y\n/set max_tokens 3\none\n"
        "/set\n/set temperature\n/set max_tokens -1\n/set stop\ntwo\n/set max_tokens\n/show\n/show messages\nthree\n",
    )
    assert execute(["m", "--lines"]) == 0
    out, err = capsys.readouterr()
    assert [call[2:] for call in model.calls] == [
        (3, ["X Y"], {"temperature": 0.5, "top_k": 4}),
        (None, None, {"top_k": 4}),
        (None, None, {"top_k": 4}),
    ]
    assert re.search(r"temperature +0\.5 +set: .*\ntop_k +4 +set: (.*\n)+max_tokens +3 +set: .*\nstop +\"X Y\" +set: ", out)
    assert re.search(r"model +fake\.gguf\n(.*\n)+context +\d+ of 64 tokens", out) and "through its chat template" in out and "user: two" in out
    assert "(cut after 3 tokens" in err


def test_a_question_without_an_answer_is_not_kept(model) -> None:
    talk = chat.Chat(model, answer.Settings())
    talk.say(["silent"])
    assert talk.turns == []
    with pytest.raises(ContextOverflowError):
        talk.say(["overflow"])
    assert talk.turns == [{"role": "user", "content": "overflow"}, {"role": "assistant", "content": "<"}]


def press_ctrl_c(after: float) -> None:
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, after)


def test_ctrl_c_between_pieces_keeps_the_text_and_the_cache(model, capsys) -> None:
    talk, model.delay = chat.Chat(model, answer.Settings()), 0.02
    handler = signal.getsignal(signal.SIGINT)
    press_ctrl_c(0.2)
    talk.say(["count"])
    said = talk.turns[1]["content"]
    assert said.startswith("0 0 ") and model.n_resets == 0 and signal.getsignal(signal.SIGINT) is handler
    assert capsys.readouterr() == (said + "\n", "(stopped)\n")


def test_ctrl_c_before_the_first_piece_forgets_the_cache(model) -> None:
    talk = chat.Chat(model, answer.Settings())
    started = time.perf_counter()
    press_ctrl_c(0.2)
    talk.say(["slow"])
    assert time.perf_counter() - started < 10 and talk.turns == [] and model.n_resets == 1


# --- at a terminal ---------------------------------------------------------------------------------------------------

pty = pytest.importorskip("pty", reason="pseudo terminals are POSIX") if os.name != "nt" else None


class Terminal:
    """The command line at a pseudo terminal of its own; `program` runs it, else with this file's model."""

    def __init__(self, state: Path, *arguments: str, program: list[str] | None = None):
        import fcntl
        import termios

        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, b"\x28\x00\xa0\x00\x00\x00\x00\x00")  # 40 rows of 160 columns
        env = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": str(state)}
        self.process = subprocess.Popen(
            [*(program or FAKE), *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=ROOT,
            env=env,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def expect(self, text: str, timeout: float = 30.0) -> str:
        """Wait for a text after what was seen; returns what came until its end, without escape sequences."""
        deadline = time.monotonic() + timeout
        while True:
            clean = re.sub(r"\x1b(?:\[[0-9;?]*[A-Za-z]|[=>])", "", self.seen)
            if text in clean:
                found, self.seen = clean[: clean.index(text) + len(text)], clean[clean.index(text) + len(text) :]
                return found
            ready = select.select([self.master], [], [], max(0, deadline - time.monotonic()))[0]
            if not ready:
                raise AssertionError(f"no {text!r} within {timeout} s, but {clean!r}")
            try:
                self.seen += os.read(self.master, 65536).decode("utf-8", "replace")
            except OSError:  # Linux: the other side is closed
                raise AssertionError(f"the program ended without {text!r}, but {clean!r}") from None

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> int:
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()
            os.close(self.master)


@pytest.mark.skipif(os.name == "nt", reason="pseudo terminals are POSIX")
def test_a_conversation_at_a_terminal(tmp_path) -> None:
    t = Terminal(tmp_path / "state", "m")
    t.expect("Chatting with fake.gguf. /help for commands, Ctrl-D to quit.")
    t.expect(">>>")
    t.send("hello\r")
    t.expect("<user:hello>")
    t.expect(">>>")
    t.send("count\r")
    t.expect("0 0 0 ")
    t.send("\x03")  # the terminal makes SIGINT of it
    t.expect("(stopped)")
    t.expect(">>>")
    t.send("typed in vain\x03")
    t.expect("(Ctrl-D or /bye ends)")
    t.expect(">>>")
    t.send("slow\r")
    t.expect("slow")
    time.sleep(0.5)
    t.send("\x03")
    t.expect("(stopped)")
    t.expect(">>>")
    t.send("top\x1b\rbottom\r")  # Alt-Enter
    said = t.expect("|user:top\r\nbottom>").split("<user", 1)[1]  # a line is drawn twice, and the prompt's > may follow the first
    assert said.startswith(":hello|assistant:<user:hello>|user:count|assistant:0 0 0 ")
    assert "slow" not in said and "vain" not in said
    t.expect(">>>")
    t.send("/nonsense\r")
    t.expect("pyengine-run: there is no command /nonsense")
    t.expect(">>>")
    t.send("overflow\r")
    t.expect("pyengine-run: the context of 64 tokens is full")
    t.expect(">>>")
    t.send("\x04")
    assert t.close() == 0
    history = (tmp_path / "state/pyengine/history").read_text()
    assert all(line in history for line in ("+hello", "+count", "+top", "+bottom"))
    assert (tmp_path / "state/pyengine/history").stat().st_mode & 0o077 == 0


@pytest.mark.skipif(os.name == "nt", reason="pseudo terminals are POSIX")
def test_history_comes_back_and_its_loss_is_said(tmp_path) -> None:
    t = Terminal(tmp_path, "m")
    t.expect(">>>")
    t.send("remember me\r")
    t.expect("<user:remember me>")
    t.expect(">>>")
    t.send("/bye\r")
    assert t.close() == 0
    t = Terminal(tmp_path, "m")
    t.expect(">>>")
    t.send("\x1b[A\x1b[A\r")  # up, over /bye
    t.expect("<user:remember me>")
    t.expect(">>>")
    t.send("\x04")
    assert t.close() == 0
    (tmp_path / "file").write_text("")
    t = Terminal(tmp_path / "file", "m")  # a file where the folder should be
    t.expect("(the history is not kept")
    t.expect(">>>")
    t.send("\x04")
    assert t.close() == 0


@pytest.mark.skipif(os.name == "nt", reason="pseudo terminals are POSIX")
def test_ctrl_c_ends_one_answer_with_130(tmp_path) -> None:
    t = Terminal(tmp_path, "m", "count")
    t.expect("0 0 0 ")
    t.send("\x03")
    assert t.close() == 130
    t = Terminal(tmp_path, "m", "\x1b[2J\x07")
    t.expect("\\x1b[2J\\x07")  # shown, not obeyed
    assert t.close() == 0


def test_without_a_terminal_there_is_no_decoration() -> None:
    done = run_process("m", "\x1b[2J")
    assert (done.returncode, done.stdout, done.stderr) == (0, "<user:\x1b[2J>\n", "")
    done = run_process("m", "--lines", input="one\ntwo\n")
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        "<user:one>\n<user:one|assistant:<user:one>|user:two>\n",
        "",
    )


@pytest.mark.skipif(os.name == "nt", reason="a closed pipe is told otherwise there")
def test_a_reader_that_leaves_ends_the_program_quietly() -> None:
    process = subprocess.Popen([*FAKE, "m", "count"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stdout.read(4) == b"0 0 "
    process.stdout.close()
    assert process.wait(30) == 141 and b"Traceback" not in process.stderr.read()
    process.stderr.close()


# --- bench and perplexity, with arithmetic of our own ----------------------------------------------------------------


class StepModel:
    """Counts steps, and gives random logits that depend on position and token."""

    n_vocab, n_batch = 50, 8

    def __init__(self, add_bos: bool = True):
        self.tokenizer = SimpleNamespace(add_bos=add_bos, bos_id=2)
        self.steps: list[list[int]] = []
        self.logits = np.random.default_rng(3).normal(0, 3, (64, 50, 50)).astype(np.float32)  # [position, token, vocab]

    def reset(self) -> None:
        self.steps.append([])

    def feed(self, ids, n_batch):
        self.steps[-1] += [ids[i : i + n_batch] for i in range(0, len(ids), n_batch)]

    def tokenize(self, text):
        return ([2] if self.tokenizer.add_bos else []) + [ord(c) % 50 for c in text]

    def logit_blocks(self, ids, first=0):
        rows = self.logits[np.arange(len(ids)), ids]
        for start in range(first, len(ids), 5):
            block = rows[start : start + 5].copy()
            yield start, block
            block[:] = np.nan  # valid until the next is asked for


def test_bench_runs_what_llama_bench_runs() -> None:
    model = StepModel()
    results = speed.measure(model, 20, 6, 3)
    assert [(r.test, r.n_tokens, len(r.samples)) for r in results] == [("pp20", 20, 3), ("tg6", 6, 3)]
    assert len(model.steps) == 8  # each from an empty cache: one to warm up, three that count
    assert [[len(s) for s in run] for run in model.steps] == [[8, 8, 4]] * 4 + [[1] * 6] * 4
    assert all(run[0][0] == 2 for run in model.steps)  # BOS first
    found = results[0].to_json()
    assert found["tokens_per_second"] == pytest.approx(sum(found["samples"]) / 3)
    assert found["stddev"] == pytest.approx(np.std(found["samples"], ddof=1))
    assert [r.test for r in speed.measure(model, 4, 0, 1)] == ["pp4"] and [
        r.test for r in speed.measure(model, 0, 4, 1)
    ] == ["tg4"]


def test_bench_behind_a_context_and_told_of_each_run() -> None:
    model, told = StepModel(), []
    results = speed.measure(model, 12, 3, 2, depth=10, progress=lambda *a: told.append(a))
    assert [(r.test, r.n_tokens, r.depth, len(r.samples)) for r in results] == [("pp12 @ d10", 12, 10, 2), ("tg3 @ d10", 3, 10, 2)]
    assert [[len(s) for s in run] for run in model.steps] == [[8, 2, 8, 4]] * 3 + [[8, 2, 1, 1, 1]] * 3
    assert all(run[0][0] == 2 for run in model.steps) and all(s[0] != 2 or s is run[0] for run in model.steps[3:] for s in run)
    assert told == [("pp12 @ d10", 0), ("pp12 @ d10", 1), ("pp12 @ d10", 2), ("tg3 @ d10", 0), ("tg3 @ d10", 1), ("tg3 @ d10", 2)]


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("n_ctx", [16, 17])
def test_perplexity_is_llama_perplexitys(add_bos, n_ctx) -> None:
    model, text = StepModel(add_bos), "The quick brown fox jumps over the lazy dog, and nobody knows why it does so."
    told: list[tuple[int, int, float]] = []
    found = perplexity(model, text, n_ctx, progress=lambda *a: told.append(a))
    ids, losses = model.tokenize(text), []
    for c in range(len(ids) // n_ctx):
        chunk = ids[c * n_ctx : (c + 1) * n_ctx]
        for j in range(n_ctx // 2, n_ctx - 1):  # the definition, token by token in float64
            row = model.logits[j, chunk[j]].astype(float)
            losses.append(math.log(sum(math.exp(v) for v in row)) - row[chunk[j + 1]])
    mean = sum(losses) / len(losses)
    square = sum(v * v for v in losses) / len(losses)
    assert found.n_tokens == len(losses) == len(ids) // n_ctx * (n_ctx - 1 - n_ctx // 2)
    assert found.value == pytest.approx(math.exp(mean), rel=1e-6)
    assert found.stderr == pytest.approx(
        math.exp(mean) * math.sqrt((square - mean * mean) / (len(losses) - 1)), rel=1e-5
    )
    assert [t[:2] for t in told] == [(i + 1, len(told)) for i in range(len(told))] and told[-1][2] == pytest.approx(
        found.value
    )
    assert math.exp(np.log(found.chunk_values).mean()) == pytest.approx(found.value)
    assert perplexity(model, text, n_ctx, chunks=2).chunk_values == found.chunk_values[:2]


def test_perplexity_replaces_the_first_token_of_a_chunk_by_bos() -> None:
    class Spy(StepModel):
        def logit_blocks(self, ids, first=0):
            seen.append(ids[0])
            return super().logit_blocks(ids, first)

    seen: list[int] = []
    perplexity(Spy(), "x" * 40, 10)
    perplexity(Spy(add_bos=False), "x" * 40, 10)
    assert seen == [2] * 4 + [ord("x") % 50] * 4


def test_perplexity_refuses_what_has_no_meaning() -> None:
    for text, n_ctx, chunks, message in (
        ("short", 16, None, "a chunk of 16"),
        ("x" * 99, 3, None, "at least 4"),
        ("x" * 99, 8, 0, "chunks=0"),
    ):
        with pytest.raises(RequestError, match=message):
            perplexity(StepModel(), text, n_ctx, chunks)


def test_the_loss_of_a_row_is_exact_enough_for_large_vocabularies() -> None:
    rows = np.random.default_rng(1).normal(0, 6, (4, 262144)).astype(np.float32)
    rows[1] += 500  # where exp alone would overflow
    rows[2, :] = -np.inf
    rows[2, 9] = 3
    for row, target in zip(rows, (7, 8, 9, int(rows[3].argmax()))):
        wide = row.astype(float)
        exact = np.log(np.exp(wide - wide.max()).sum()) + wide.max() - wide[target]
        assert nll(row, target) == pytest.approx(exact, abs=5e-6)


# --- tiny models, through the whole program --------------------------------------------------------------------------


def test_the_whole_command_on_a_tiny_model(tiny_gguf, capsys) -> None:
    path = str(tiny_gguf("llama")[0])
    assert execute([path, "The quick", "-n", "8", "--temp", "0", "--ctx", "128", "-t", "1"]) == 0
    text = capsys.readouterr().out
    assert execute([path, "The quick", "-n", "8", "--temp", "0", "--ctx", "128", "-t", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert text == found["text"] + "\n" * (not found["text"].endswith("\n")) and 1 <= len(found["tokens"]) <= 8
    assert execute([path, "word " * 200, "--ctx", "64"]) == 2
    assert "context holds 64" in one_line(capsys.readouterr().err)
    assert execute([path, "Q", "--kv-dtype", "q3"]) == 2
    assert "--kv-dtype" in one_line(capsys.readouterr().err)


def test_plan_of_a_tiny_model(tiny_gguf, capsys) -> None:
    path = str(tiny_gguf("llama")[0])
    assert execute(["plan", path, "--ctx", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["n_ctx"] == 64
        and found["fits"]
        and found["total"] == sum(i["nbytes"] for i in found["items"] if i["purpose"] != "mapped")
    )
    kv = sum(i["nbytes"] for i in found["items"] if i["purpose"] == "kv" and "tables" not in i["detail"])
    assert kv == 3 * 2 * 64 * 2 * 16 * 2  # layers, k and v, cells, heads, head_dim, bytes
    assert execute(["plan", path, "--ctx", "64", "--json", "--device", "cpu:0=300KiB", "--device", "cpu:1=0.3MiB"]) == 1
    assert {i["device"] for i in json.loads(capsys.readouterr().out)["items"]} == {"cpu:0", "cpu:1"}
    for wrong, message in ((["--device", "gpu:0=1GiB"], "is no part of main memory"),
                           (["--encoder-device", "cpu:1"], "is none of cpu"), (["--expert-device", "cpu:1"], "is none of cpu")):
        assert execute(["plan", path, *wrong]) == 2
        assert message in one_line(capsys.readouterr().err)
    assert execute(["plan", path, "--ctx", "64"]) == 0
    out = capsys.readouterr().out
    heading, verdict, *_ = out.splitlines()
    assert "context 64" in heading and verdict.startswith("fits: ") and verdict.endswith(" available")


def test_bench_of_a_tiny_model(tiny_gguf, capsys) -> None:
    path = str(tiny_gguf("llama")[0])
    assert execute(["bench", path, "-p", "16", "-n", "4", "-t", "1", "-r", "2", "--json", "--profile"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [r["test"] for r in found] == ["pp16", "tg4"]
    for r in found:
        assert (
            len(r["samples"]) == 2
            and min(r["samples"]) > 0
            and r["n_threads"] == 1
            and r["isa"]
            and r["model"].endswith(".gguf")
        )
        spent = sum(t["seconds"] for t in r["profile"])
        assert 0 < spent <= r["profile_wall_seconds"]
        assert {"linear", "attention"} <= {t["op"].split("_")[0] for t in r["profile"]}
        assert any(t["weights"] == "F32" for t in r["profile"])
    assert execute(["bench", path, "-p", "0", "-n", "4", "-r", "1", "--profile"]) == 0
    out = capsys.readouterr().out
    assert "| tg4 " in out and "| pp" not in out and "ms in ops" in out


def test_bench_of_several_tests_is_a_markdown_table(tiny_gguf, capsys, monkeypatch) -> None:
    path = tiny_gguf("llama")[0]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert execute(["bench", str(path), "-p", "8,16", "-n", "0", "-t", "1,2", "-d", "0,4", "-r", "1", "--device", "cpu:0=1GiB"]) == 0
    out, err = capsys.readouterr()
    head, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    assert head == ["model", "size", "params", "kernels", "threads", "batch", "kv", "test", "t/s"] and all(set(c) <= set("-:") for c in rule)
    assert [(row[0], row[4], row[7]) for row in rows] == [
        (path.name, t, test) for t in "12" for test in ("pp8", "pp16", "pp8 @ d4", "pp16 @ d4")]
    assert re.fullmatch(r"\d+\.\d\d ± 0\.00", rows[0][-1]) and rows[0][2].endswith(" M")
    assert "pp8 @ d4: warming up (25%)" in err and "pp16 @ d4: run 1 of 1 (93%)" in err and err.endswith("\r\x1b[K")
    monkeypatch.undo()
    for wrong in (["-p", "8,"], ["-n", "-1"], ["-t", "0"], ["-d", "x"]):
        assert execute(["bench", str(path), *wrong]) == 2
        assert "whole number" in one_line(capsys.readouterr().err)
    assert execute(["bench", str(path), "-t", "1,9999"]) == 2
    assert "only wait for each other" in one_line(capsys.readouterr().err)
    assert execute(["bench", str(path), "--profile", "--device", "cpu:0=1GiB"]) == 2
    assert "--profile" in one_line(capsys.readouterr().err)


def test_perplexity_of_a_tiny_model(tiny_gguf, tmp_path, capsys) -> None:
    import tiny

    path, folder = tiny_gguf("llama")
    (tmp_path / "text.txt").write_text(" ".join(tiny.TEXTS))
    assert (
        execute(
            [
                "perplexity",
                str(path),
                "-f",
                str(tmp_path / "text.txt"),
                "--ctx",
                "32",
                "--chunks",
                "3",
                "--kv-dtype",
                "f32",
                "--json",
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    ids, losses = pyengine.load_tokenizer(path).tokenize(" ".join(tiny.TEXTS)), []
    for c in range(3):
        chunk = [ids[0], *ids[c * 32 + 1 : (c + 1) * 32]]  # the model adds BOS
        logits = tiny.hf_logits(folder, chunk).astype(float)
        losses += [np.log(np.exp(logits[j]).sum()) - logits[j, chunk[j + 1]] for j in range(16, 31)]
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert found["n_chunks"] == 3 and found["n_tokens"] == 45
    assert execute(["perplexity", str(path), "-f", str(tmp_path / "text.txt"), "--ctx", "32", "--chunks", "3"]) == 0
    assert capsys.readouterr().out.startswith("perplexity ")


def test_show_and_list(tiny_gguf, monkeypatch, capsys) -> None:
    path = tiny_gguf("llama")[0]
    assert execute(["show", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["architecture"], found["n_ctx"], found["tokenizer"], found["chat_template"]) == (
        "llama",
        256,
        "gpt2",
        True,
    )
    assert found["n_tokens"] == 512 and found["metadata"]["tokenizer.ggml.tokens"]["type"] == "array[string, 512]"
    assert sum(t["parameters"] for t in found["tensors"].values()) == found["n_parameters"]
    assert sum(t["bytes"] for t in found["tensors"].values()) < found["file_bytes"] == path.stat().st_size
    assert execute(["show", str(path)]) == 0
    out = capsys.readouterr().out
    assert "llama.block_count" in out and "chat template  yes" in out and max(map(len, out.splitlines())) < 600
    assert execute(["show", str(path), "--template"]) == 0
    assert "<|turn|>" in capsys.readouterr().out
    monkeypatch.setenv("PYENGINE_MODELS", str(path.parent))
    assert execute(["list", "--json"]) == 0
    assert {
        "name": path.stem,
        "bytes": path.stat().st_size,
        "source": "PYENGINE_MODELS",
        "path": str(path),
        "projector": None,
        "architecture": "llama",
        "sees": False,
        "adapter": False,
        "runs": True,
        "modified": int(path.stat().st_mtime),
    } in json.loads(capsys.readouterr().out)
    assert execute(["list"]) == 0
    out = capsys.readouterr().out
    assert str(path) not in out and all(len(line) <= 80 for line in out.splitlines() if line.startswith(f"{path.stem} "))
    assert re.search(rf"(?m)^{path.stem} .* llama +- +\d{{4}}-\d\d-\d\d$", out)
    assert execute(["list", "-v"]) == 0
    assert str(path) in capsys.readouterr().out


def test_show_says_what_a_model_can_do_and_whether_it_runs(tiny_gguf, tmp_path, capsys) -> None:
    pictures = r"several pictures \({} of 448 x 448 pixels\)"
    for kind, can, said in (
        ("llama", ["text", "tools", "adapters"], "text, tools \\(told in words\\), adapters"),
        ("gemma3", ["text", "pictures", "several pictures", "tools", "adapters"], f"text, {pictures.format(128)}, tools \\(told in words\\), adapters"),
        ("qwen2_5_vl", ["text", "pictures", "several pictures", "videos", "boxes", "tools", "adapters"], "text, .*, videos, boxes, .*, adapters"),
        ("molmo", ["text", "pictures", "several pictures", "points", "tools", "adapters"], "text, .*, points, .*, adapters"),
        ("fuyu", ["text", "pictures", "tools", "adapters"], "text, pictures, tools .*, adapters"),
    ):
        path = str(tiny_gguf(kind)[0])
        assert execute(["show", path, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["can"] == can and found["runs"] and found["plan"]["bytes"] == pyengine.plan(path).total
        assert execute(["show", path]) == 0
        assert re.search(rf"\ncan +{said}\nruns here +yes, in [\d.]+ MiB of ", capsys.readouterr().out)
    for part in ("system", "parameters", "license"):
        assert execute(["show", path, f"--{part}"]) == 2
        assert re.search(rf"no .*{part}.* comes? with this model", one_line(capsys.readouterr().err))
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "perceptron")
    writer.add_context_length(8)
    writer.add_bool("perceptron.layers.odd", True)
    writer.add_array("perceptron.layers.kinds", [2, 7, 7, 0])
    writer.add_string("perceptron.motto", "it's so\neasy")
    writer.add_string("general.license", "mit")
    writer.add_chat_template("{{ tools }}{% if enable_thinking %}{% endif %}")
    for key, value in (("temp", 0.6), ("top_p", 0.95)):
        writer.add_float32(f"general.sampling.{key}", value)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    path = str(tmp_path / "other.gguf")
    assert execute(["show", path]) == 0
    out = capsys.readouterr().out
    for pattern in (r"runs here +no: architecture 'perceptron' is not supported", r"sampling +temperature 0.6, top_p 0.95", r"layers.odd +true",
                    r"layers.kinds +2, 7, 7, 0", r"motto +it's so\\neasy", r"chat template +yes, with tools and thinking"):
        assert re.search(pattern, out), (pattern, out)
    for part, text in (("--parameters", "temperature 0.6\ntop_p 0.95\n"), ("--license", "mit\n")):
        assert execute(["show", path, part]) == 0
        assert capsys.readouterr().out == text
    assert execute(["show", path, "--system"]) == 2 and "no system message comes with this model" in one_line(capsys.readouterr().err)
    assert execute(["show", path, "--system", "--license"]) == 2 and "printed alone" in one_line(capsys.readouterr().err)


def test_an_adapter_is_shown_listed_and_used(tiny_gguf, tmp_path, monkeypatch, capsys) -> None:
    import lora
    from converters.adapters import convert_adapter

    path, hf = tiny_gguf("llama")
    files = [str(convert_adapter(lora.make_adapter(tmp_path / name, hf, seed=i), hf, tmp_path / f"{name}.gguf")) for i, name in enumerate(("one", "two"))]
    assert execute(["show", files[0]]) == 0
    out = capsys.readouterr().out
    assert re.search(r"adapter +LoRA for llama: rank 4, alpha 8\n", out) and re.search(r"changes +3 attn_q, .*3 ffn_down\n", out)
    assert f"MODEL --lora {files[0]}\n" in out
    assert execute(["show", files[0], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["adapter"]["ranks"] == [4] and found["adapter"]["changes"]["attn_v"] == 3 and found["metadata"]["adapter.lora.alpha"] == 8.0
    monkeypatch.setenv("PYENGINE_MODELS", str(tmp_path))
    assert execute(["list"]) == 0 and re.search(r"one .* llama \(adapter\) ", capsys.readouterr().out)
    with pyengine.load(path, n_ctx=64, adapters=[files[0], (files[1], -0.5)]) as model:
        want = str(model.generate("Once", max_tokens=6, temperature=0))
    asked = [str(path), "Once", "--raw", "-n", "6", "--temp", "0", "--ctx", "64"]
    for options in (["--lora", files[0], "--lora-scaled", f"{files[1]}:-0.5"], ["--lora-scaled", f"{files[0]}:1,{files[1]}:-0.5"]):
        assert execute([*asked, *options]) == 0
        assert capsys.readouterr().out.rstrip("\n") == want.rstrip("\n")
    assert execute(["plan", str(path), "--lora", files[0], "--json"]) == 0
    assert any("adapters" in i["detail"] for i in json.loads(capsys.readouterr().out)["items"])
    (tmp_path / "b").mkdir()
    again = str(shutil.copy(files[1], tmp_path / "b" / "one.gguf"))                          # two files of one name
    assert execute([*asked, "--lora", files[0], "--lora-scaled", f"{again}:-0.5"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == want.rstrip("\n")
    assert parse_adapters([files[0], again], [f"{again}:2"]) == {"one": (files[0], 1.0), "one-2": (again, 1.0), "one-3": (again, 2.0)}
    assert execute([*asked, "--lora-scaled", files[0]]) == 2 and "FILE:SCALE" in capsys.readouterr().err
    assert execute([files[0], "Once"]) == 2 and "is an adapter" in one_line(capsys.readouterr().err)


def test_list_marks_what_does_not_run(tmp_path, monkeypatch, capsys) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "perceptron")
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3")
    monkeypatch.setenv("PYENGINE_MODELS", str(tmp_path))
    assert execute(["list"]) == 0
    out = capsys.readouterr().out
    assert out.split()[:5] == ["NAME", "SIZE", "ARCHITECTURE", "SEES", "MODIFIED"]
    assert re.search(r"other .* perceptron \(does not run\) ", out) and re.search(r"cut .* unreadable ", out)


def test_show_lists_what_ollama_keeps_beside_a_model(tiny_gguf, tmp_path, monkeypatch, capsys) -> None:
    import hashlib

    import lora
    from converters.adapters import convert_adapter

    path, hf = tiny_gguf("llama")
    adapter = convert_adapter(lora.make_adapter(tmp_path / "low", hf), hf, tmp_path / "low.gguf")
    layers, model = [], path.read_bytes()
    blobs = tmp_path / ".ollama/models/blobs"
    blobs.mkdir(parents=True)
    for kind, content in (("model", model), ("system", b"You are a pirate."), ("params", b'{"temperature": 0.5, "stop": ["x", "y"], "num_ctx": 64}'),
                          ("template", b"{{ .Prompt }}"), ("license", b"A license\nof two lines"), ("messages", b'[{"role": "user", "content": "Ho"}]'),
                          ("adapter", adapter.read_bytes())):
        digest = hashlib.sha256(content).hexdigest()
        (blobs / f"sha256-{digest}").write_bytes(content)
        layers.append({"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}"})

    def keep(name: str, *kinds: str) -> None:
        path = tmp_path / f".ollama/models/manifests/registry.ollama.ai/library/{name}/latest"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"layers": [x for x in layers if x["mediaType"].rpartition(".")[2] in kinds]}))

    keep("pirate", "model", "system", "params", "template", "license", "messages")
    keep("tuned", "model", "adapter")
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / ".ollama/models"))
    assert execute(["show", "pirate"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^name +pirate:latest", out) and re.search(r"runs here +yes, .* with a context of 64\n", out)
    assert execute(["plan", "pirate"]) == 0
    assert (planned := capsys.readouterr().out).startswith("pirate:latest: context 64,") and "sha256" not in planned
    section = out[out.index("\nModelfile (Ollama)\n") : out.index("\nTensors\n")]
    for words in ("  system     You are a pirate.", "  parameter  temperature 0.5", "  parameter  stop x, y", "  parameter  num_ctx 64",
                  "  template   13 characters of Go's syntax", "  message    user: Ho", "  license    A license\n"):
        assert words in section, (words, section)
    for part, text in (("--system", "You are a pirate.\n"), ("--license", "A license\nof two lines\n"),
                       ("--parameters", "temperature 0.5\nstop x, y\nnum_ctx 64\n")):
        assert execute(["show", "pirate", part]) == 0
        assert capsys.readouterr().out == text
    assert execute(["show", "pirate", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["modelfile"]["system"] == "You are a pirate." and found["sampling"] == {"temperature": 0.5} and found["runs"]
    assert execute(["show", "tuned"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"adapter +/.*/sha256-\w+ \(LoRA\)\n", out) and re.search(r"runs here +yes, ", out)
    answers = []
    for name in ("tuned", "pirate"):
        with pyengine.load(name, n_ctx=64) as loaded:
            answers.append(loaded.logits([3, 4, 5]))
            assert loaded.adapters == ({"adapter": 1.0} if name == "tuned" else {})
    with pyengine.load(path, n_ctx=64, adapters=adapter) as loaded:
        assert np.array_equal(loaded.logits([3, 4, 5]), answers[0]) and not np.array_equal(*answers)
    assert execute(["list"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"tuned:latest .* llama  ", out) and re.search(r"pirate:latest .* llama  ", out)


# --- real models beside llama.cpp ------------------------------------------------------------------------------------


def plain_text() -> str:
    """Prose that every machine has: what Python's own modules say about themselves."""
    import argparse
    import decimal
    import pickle
    import random
    import statistics
    import textwrap

    modules = (random, statistics, textwrap, argparse, decimal, pickle)
    return "\n\n".join(
        doc
        for m in modules
        for doc in (pydoc.getdoc(m), *(pydoc.getdoc(v) for _, v in sorted(vars(m).items()) if callable(v)))
        if doc
    )


def llama_perplexity(path: Path, text: str, n_ctx: int, chunks: int) -> float:
    """llama-perplexity's number, by llama-cpp-python."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="`make peers` builds it")
    llm = llama_cpp.Llama(str(path), n_ctx=n_ctx, n_batch=n_ctx, n_threads=2, logits_all=True, verbose=False)
    add_bos = bool(llama_cpp.llama_vocab_get_add_bos(llm._model.vocab))
    ids, losses = llm.tokenize(text.encode(), add_bos=add_bos, special=True), []
    for c in range(chunks):
        chunk = ids[c * n_ctx : (c + 1) * n_ctx]
        first = [llm.token_bos()] if add_bos else chunk[:1]
        llm.reset()
        llm.eval([*first, *chunk[1:]])
        for j in range(n_ctx // 2, n_ctx - 1):
            row = llm.scores[j].astype(float)
            losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[chunk[j + 1]])
    return math.exp(np.mean(losses))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma", "qwen"])
def test_perplexity_is_llama_cpps(name) -> None:
    from conftest import real_path

    path, text = real_path(name), plain_text()
    theirs = llama_perplexity(path, text, 512, 4)
    ours = perplexity(pyengine.load(path, n_ctx=512), text, 512, 4).value
    assert ours == pytest.approx(theirs, rel=0.005)
