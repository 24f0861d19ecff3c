"""A conversation with a server's model: what pyengine's own server answers, and what others may send."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings as limits, strategies as st
from running import idle, running
from test_cli import type_in

import pyengine as pe
from pyengine.chat.boxes import Box, Point
from pyengine.chat.reply.deltas import Delta
from pyengine.cli import answer
from pyengine.cli.command import execute
from pyengine.cli.talk import chat, editor, remote
from pyengine.cli.talk.conversation import Chat
from pyengine.errors import BusyError, ContextOverflowError, RequestError

ROOT = Path(__file__).resolve().parents[2]
HELLO = [{"role": "user", "content": "Hi there"}]
KEY = "secret"


@pytest.fixture(scope="module")
def served(tiny_gguf) -> Any:
    """pyengine's server with a model of text and one that sees, at a port: (address, text model, seeing model)."""
    pytest.importorskip("uvicorn")
    from pyengine.server.app import application
    from pyengine.server.models import load, Models

    found = Models([load(str(tiny_gguf(kind)[0]), n_ctx=256, n_threads=1, n_seq=4) for kind in ("llama", "qwen2_5_vl")]).all
    with running(application(found, [KEY])) as url:
        yield url, found[0], found[1]
    for s in found:
        s.model.loop.close()


# -- pyengine's server ----------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_model(served) -> None:
    url, text, _ = served
    there = remote.connect(url, text.name, KEY)
    assert there.n_ctx == 256 and there.media is None and there.plan.model == text.name
    here = text.model.chat(HELLO, max_tokens=12, temperature=0)
    found = answer.stream(there, answer.Question(HELLO), answer.Settings({"temperature": 0}, 12), lambda delta, report: None)
    assert str(found.answer) == str(here) and found.answer.finish == here.finish and found.n_prompt == here.n_prompt
    assert found.n_generated == len(here.tokens)


def test_a_conversation_at_a_server(served, monkeypatch, capsys) -> None:
    url, text, _ = served
    monkeypatch.setenv("PYENGINE_API_KEY", KEY)
    type_in(monkeypatch, "Hi there\n/undo\n/set seed 3\nA\n/retry\n/show\n/show memory\n/show template\n")
    assert execute(["chat", "--server", url, text.name, "--lines", "--temperature", "0", "-n", "8"]) == 0
    out, err = capsys.readouterr()
    expected = [str(text.model.chat([{"role": "user", "content": q}], max_tokens=8, temperature=0)) for q in ("Hi there", "A")]
    assert out.startswith(f"{expected[0]}\n{expected[1]}\n{expected[1]}\n")
    assert f"of the server, {url}" in out and "of 256 tokens used" in out and text.model.template.source in out and "taken back" in err


def test_one_answer_of_a_server(served, capsys) -> None:
    url, text, _ = served
    options = ["--server", url, "--api-key", KEY, "-m", text.name, "-p", "Hi there", "--temperature", "0", "-n", "8", "--json", "-v"]
    assert execute(options) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == str(text.model.chat(HELLO, max_tokens=8, temperature=0)) and found["model"] == text.name and "memory" not in found


def test_pictures_are_sent_as_they_are_seen_here(served, tmp_path, monkeypatch, capsys) -> None:
    url, _, seeing = served
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    there = remote.connect(url, seeing.name, KEY)
    talk = Chat(there, answer.Settings({"temperature": 0}, 8), options={"image": {"max_pixels": 12544}, "video": {}})
    type_in(monkeypatch, "cat.png what is it?\n/retry\n")
    chat.run(talk)
    said = capsys.readouterr().out
    picture = pe.open_image(tmp_path / "cat.png", max_pixels=12544)
    first = seeing.model.chat([{"role": "user", "content": [picture, "what is it?"]}], max_tokens=8, temperature=0)
    assert said == f"{first}\n" * 2 and talk.last[0].n_prompt == first.n_prompt and [p.name for p in talk.last[1]] == ["cat.png"]


def test_a_server_that_stops_being_listened_to_stops(served) -> None:
    url, text, _ = served
    there = remote.connect(url, text.name, KEY)
    bias = {str(t): -100 for t in text.model.tokenizer.eog_ids}
    with_end = answer.Question([{"role": "user", "content": "Count"}]).stream(there, answer.Settings({"logit_bias": bias}))
    deltas = with_end.deltas()
    assert next(deltas).kind == "text"
    with_end.close()
    assert idle(text.model)


@pytest.mark.skipif(os.name == "nt", reason="SIGINT is POSIX")
def test_ctrl_c_closes_the_connection(served) -> None:
    url, text, _ = served
    command = [sys.executable, "-m", "pyengine", "--server", url, "-m", text.name, "-p", "Count", "--jsonl", "-n", "100000"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYENGINE_API_KEY": KEY}
    with Fake([sse({"content": "more "}, wait=0.05)] * 400) as fake:
        env["NO_PROXY"] = "*"
        command[command.index(url)], command[command.index(text.name)] = fake.url, "m"
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert json.loads(process.stdout.readline()) == {"piece": "more "}
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 130 and json.loads(out.splitlines()[-1])["finish"] == "interrupted" and not err
        assert fake.left.wait(20)


def test_what_a_server_refuses_is_told(served) -> None:
    url, text, _ = served
    with pytest.raises(RequestError, match="--api-key KEY, or PYENGINE_API_KEY"):
        remote.connect(url, None, None)
    with pytest.raises(RequestError, match=f"several models, name one: {text.name}"):
        remote.connect(url, None, KEY)
    with pytest.raises(RequestError, match="it serves no model xyz"):
        remote.connect(url, "xyz", KEY)
    there = remote.connect(url, text.name, KEY)
    with pytest.raises(ContextOverflowError):
        there.chat([{"role": "user", "content": "many words " * 500}])
    with pytest.raises(RequestError, match="temperature"):
        there.chat(HELLO, temperature=-1)


@pytest.mark.parametrize("arguments, part", [
    (["--server", "http://127.0.0.1:1", "-p", "x"], "nothing listens there; `pyengine-run serve MODEL`"), (["m", "x", "--api-key", "k"], "--api-key is for --server"),
    (["--server", "http://x", "m", "--ctx", "5"], "--ctx is about a model in this process"), (["--server", "ftp://x", "m", "x"], "an address is expected"),
    (["--server", "http://x:99999", "m", "x"], "the port"), (["--server", "http://x", "m", "x", "--api-key", "a\nb"], "printable"),
    (["chat", "--server", "http://x"], "no PROMPT")])
def test_what_the_command_refuses(arguments: list[str], part: str, monkeypatch, capsys) -> None:
    type_in(monkeypatch, "")
    assert execute(arguments) == 2 and part in capsys.readouterr().err


# -- other servers --------------------------------------------------------------------------------------------------------


def sse(delta: dict[str, Any] | None = None, finish: str | None = None, wait: float = 0.0, **more: Any) -> tuple[bytes, float]:
    value = {"choices": [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}], **more}
    return b"data: " + json.dumps(value).encode() + b"\n\n", wait


class Fake:
    """A server that answers chat completions with prepared bytes, and lists `models`; `asked` are the bodies that came."""

    def __init__(self, answers: list[Any], models: list[dict[str, Any]] | None = None, kind: str = "text/event-stream", status: int = 200,
                 pages: dict[str, Any] | None = None):
        fake, self.asked, self.left = self, [], threading.Event()
        listed = [{"id": "m"}] if models is None else models

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                page = {"/v1/models": {"data": listed}, **({} if pages is None else pages)}.get(self.path)
                self.send_response(404 if page is None else 200)
                content = json.dumps(page).encode()
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path != "/v1/chat/completions":
                    self.send_error(404)
                    return
                fake.asked.append(body)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Connection", "close")
                self.end_headers()
                self.close_connection = True
                try:
                    for content, wait in answers:
                        self.wfile.write(content)
                        self.wfile.flush()
                        time.sleep(wait)
                except OSError:
                    fake.left.set()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Fake:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()


DONE = (b"data: [DONE]\n\n", 0.0)


def asked(fake: Fake, messages: list[dict[str, Any]] = HELLO, **settings: Any) -> tuple[list[Delta], Any]:
    stream = remote.connect(fake.url, None, None).chat(messages, **settings)
    return list(stream.deltas()), stream.report


def test_thinking_and_calls_of_other_servers_are_read() -> None:
    first = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a"'}}
    whole = {"id": "c2", "function": {"name": "g", "arguments": {"b": 2}}}                     # as some send it: no number, no text
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "prompt_tokens_details": None, "completion_tokens_details": {"reasoning_tokens": 3}}
    with Fake([(b": a comment\r\n\r\nevent: x\r\n", 0), sse({"role": "assistant", "content": None}), sse({"reasoning_content": "hm"}), sse({"reasoning": "!"}),
               sse({"content": "so"}), sse({"tool_calls": [first]}), sse({"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]}),
               sse({"tool_calls": [whole]}), sse({}, "tool_calls"), sse(None, usage=usage), DONE]) as fake:
        deltas, report = asked(fake, think=False, tools=[{"type": "function"}], format={"type": "object"}, max_tokens=3)
    assert deltas == [Delta("thinking", "hm"), Delta("thinking", "!"), Delta("text", "so"), Delta("call", "f"), Delta("arguments", '{"a"'),
                      Delta("arguments", ": 1}"), Delta("call", "g", 1), Delta("arguments", '{"b": 2}', 1)]
    assert [(c.id, c.name, c.arguments) for c in report.calls] == [("c1", "f", '{"a": 1}'), ("c2", "g", '{"b": 2}')]
    assert (report.finish, report.n_prompt, report.n_thinking, report.thinking) == ("tool_calls", 5, 3, "hm!")
    assert fake.asked[0] == {"model": "m", "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 3,
                             "tools": [{"type": "function"}], "think": False, "reasoning_effort": "none", "response_format": {
                                 "type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}}


def test_a_server_that_does_not_stream() -> None:
    whole = {"choices": [{"message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 4, "completion_tokens": 1}}
    with Fake([(json.dumps(whole).encode(), 0)], kind="application/json") as fake:
        deltas, report = asked(fake)
    assert deltas == [Delta("text", "Hello")] and report.finish == "stop" and report.n_prompt == 4


def test_an_answer_whose_end_has_no_reason() -> None:
    with Fake([sse({"content": "a"}), DONE]) as fake:
        deltas, report = asked(fake)
    assert deltas == [Delta("text", "a")] and report.finish == "stop"


@pytest.mark.parametrize("answers, status, error, part", [
    ([sse({"content": "a"}), (b'data: {"error": {"message": "out of memory", "code": 500}}\n\n', 0)], 200, RequestError, "out of memory"),
    ([sse({"content": "a"})], 200, RequestError, "ended before the answer was whole"), ([(b"data: {x\n\n", 0)], 200, RequestError, "no JSON"),
    ([(b'data: ["a"]\n\n', 0)], 200, RequestError, "an answer is an object"), ([(b'{"error": {"message": "busy"}}', 0)], 503, BusyError, "busy"),
    ([(b'{"error": {"message": "too long", "type": "exceed_context_size_error", "code": 400}}', 0)], 400, ContextOverflowError, "too long"),
    ([(b'{"error": "no such thing"}', 0)], 400, RequestError, r"no such thing \(400\)"), ([(b"<html>" + b"x" * 9999, 0)], 502, RequestError, r"Bad Gateway \(502\)"),
    ([(b'{"detail": "who?"}', 0)], 401, RequestError, "who\\?; a key is given by"), ([(b"", 0)], 302, RequestError, r"Found \(302\)"),
    ([(b"[" * 99999, 0)], 500, RequestError, "Internal Server Error")])
def test_faults_are_told_in_words(answers: list[Any], status: int, error: type[Exception], part: str) -> None:
    with Fake(answers, status=status) as fake, pytest.raises(error, match=part):
        asked(fake)


def test_boxes_of_the_server_are_drawn(tmp_path, monkeypatch, capsys) -> None:
    PIL.Image.new("RGB", (64, 48), "white").save(tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    boxes = [{"label": "cat", "x1": 4, "y1": 5, "x2": 30, "y2": 40, "image": 0}, {"label": "nose", "x": 9, "y": 9.5, "image": 0}]
    with Fake([sse({"content": "There."}), sse({"boxes": boxes}, "stop"), DONE]) as fake:
        talk = Chat(remote.connect(fake.url, None, None), answer.Settings())
        type_in(monkeypatch, "cat.png where?\n/draw out.png\n")
        chat.run(talk)
    err = capsys.readouterr().err
    assert "(in pixels of cat.png, 64x48; /draw FILE draws it)\n  cat: 4,5 to 30,40\n  nose: 9,10\n" in err and "(2 marks on cat.png: out.png)" in err
    assert talk.last[0].answer.boxes == [Box("cat", 4, 5, 30, 40), Point("nose", 9, 9.5)]
    kinds = [part["type"] for part in fake.asked[0]["messages"][0]["content"]]
    url = fake.asked[0]["messages"][0]["content"][kinds.index("image_url")]["image_url"]["url"]
    sent = PIL.Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert kinds == ["image_url", "text"] and sent.size == (64, 48) and PIL.Image.open("out.png").size == (64, 48)


@pytest.mark.parametrize("model, pages, n_ctx", [
    ({"id": "m", "max_model_len": 4096}, {}, 4096), ({"id": "m"}, {"/api/ps": {"models": [{"name": "m", "context_length": 512}]}}, 512),
    ({"id": "m"}, {"/props": {"default_generation_settings": {"n_ctx": 2048}}}, 2048), ({"id": "m"}, {"/api/ps": {"models": [{"name": "x"}]}}, None)])
def test_the_context_is_what_the_server_says(model: dict[str, Any], pages: dict[str, Any], n_ctx: int | None) -> None:
    usage = {"prompt_tokens": 40, "completion_tokens": 2}
    with Fake([sse({"content": "Hi"}, "stop"), sse(None, usage=usage), DONE], [model], pages=pages) as fake:
        there = remote.connect(fake.url, None, None)
        talk = Chat(there, answer.Settings())
        assert there.n_ctx == n_ctx
        talk.read("Hello")
    shown = "".join(text for _, text in editor.status(talk))
    assert shown == ("ctx 42 tokens" if n_ctx is None else f"ctx {round(100 * 42 / n_ctx)} %  42 of {n_ctx:,} tokens")


def test_the_context_of_a_model_that_is_loaded_by_the_first_question() -> None:
    pages: dict[str, Any] = {}
    with Fake([sse({"content": "Hi"}, "stop"), DONE], pages=pages) as fake:
        talk = Chat(remote.connect(fake.url, None, None), answer.Settings())
        assert talk.model.n_ctx is None
        pages["/api/ps"] = {"models": [{"name": "m", "context_length": 512}]}
        talk.read("Hello")
        assert talk.model.n_ctx == 512


def test_what_only_a_model_of_this_process_has(tmp_path) -> None:
    with Fake([sse({"content": "Hi"}, "stop"), DONE]) as fake:
        talk = Chat(remote.connect(fake.url, None, None), answer.Settings())
        talk.read("Hello")
        assert talk.used() is None                               # this one does not say how many tokens there are
        for do, part in ((lambda: talk.save(tmp_path / "x"), "/save .*: what is computed .* is on the server"),
                         (lambda: talk.model.restore("x"), "/load x: a server takes no"), (lambda: talk.model.stream("x"), "--raw"),
                         (lambda: talk.model.template, "does not show its chat template"), (lambda: talk.model.chat_ids([]), "keep latest")):
            with pytest.raises(RequestError, match=part):
                do()


@pytest.mark.parametrize("url, shown", [
    ("localhost:8080", "http://localhost:8080"), ("https://x.org/api/v1/", "https://x.org/api"), ("http://[::1]:80/v1", "http://[::1]:80"), ("x", "http://x")])
def test_addresses(url: str, shown: str) -> None:
    assert remote.Server(url).url == shown


def test_a_port_that_speaks_something_else() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        threading.Thread(target=lambda: other.accept()[0].sendall(b"220 mail\r\n"), daemon=True).start()
        with pytest.raises(RequestError, match="does not speak HTTP|ended before"):
            remote.connect(f"127.0.0.1:{other.getsockname()[1]}", None, None)


@limits(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["data: ", "data:", ": ", "event: ", "id: ", "retry: ", "data", ""]), st.text("a{}: \u6f22", max_size=6)), max_size=8),
       st.sampled_from(["\n", "\r\n"]))
def test_events_are_those_of_the_standard(fields: list[tuple[str, str]], end: str) -> None:
    """Any fields between events: data alone is taken, lines of one event together."""
    text = "".join(f"data: {i}{end}{name}{value.lstrip() if name == 'data: ' else value}{end}{end}" for i, (name, value) in enumerate(fields))
    found = list(remote.events(line.rstrip(b"\r\n") for line in io.BytesIO(text.encode())))
    for i, (event, (name, value)) in enumerate(zip(found, fields, strict=True)):
        if name == "data: ":
            assert event == f"{i}\n{value.lstrip()}"
        elif name.strip() in (":", "event:", "id:", "retry:"):
            assert event == str(i)
        else:
            assert event.startswith(str(i))
