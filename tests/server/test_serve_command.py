"""`pyengine-run serve`: a process of its own, asked over its port, ended by Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import pytest

from pyengine.cli.command import execute
from pyengine.cli.running import left

httpx = pytest.importorskip("httpx")
ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def serving(*arguments: str, env: dict[str, str], cwd: Path | None = None) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server in a process of its own, once it answers: its address, and the process."""
    port = free_port()
    command = [sys.executable, "-m", "pyengine", "serve", *arguments, "--port", str(port)]
    server = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT), **env}, stderr=subprocess.PIPE, text=True, cwd=cwd)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                assert httpx.get(url + "/health").json() == {"status": "ok"}
                break
            except httpx.TransportError:
                assert server.poll() is None, server.stderr.read()
                time.sleep(0.1)
        yield url, server
    finally:
        server.kill()


def test_it_serves_until_it_is_interrupted(tiny_gguf) -> None:
    env = {"PYENGINE_API_KEY": "secret"}
    with serving(str(tiny_gguf("llama")[0]), "-c", "128", "--seq", "2", env=env) as (url, server):
        body = {"model": "f32", "prompt": "a", "max_tokens": 3}
        assert httpx.post(url + "/v1/completions", json=body).status_code == 401
        done = httpx.post(url + "/v1/completions", json=body, headers={"Authorization": "Bearer secret"})
        assert done.json()["usage"]["completion_tokens"] <= 3
        server.send_signal(signal.SIGINT)
        _, said = server.communicate(timeout=30)
    assert "context 128, 2 at once" in said and f"serving at {url}" in said and "Traceback" not in said


def test_any_model_of_this_machine_by_name_and_what_is_in_memory(tiny_gguf, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "models").mkdir()
    for name, outtype in (("one", "f32"), ("two", "f16")):
        shutil.copy(tiny_gguf("llama", outtype)[0], tmp_path / "models" / f"{name}.gguf")
    env = {"PYENGINE_MODELS": str(tmp_path / "models"), "HOME": str(tmp_path), "PYENGINE_API_KEY": "secret"}
    monkeypatch.setenv("PYENGINE_API_KEY", "secret")
    with serving("--ctx", "128", "--keep-alive", "1h", env=env, cwd=tmp_path) as (url, server):
        monkeypatch.setenv("PYENGINE_SERVER", url)
        assert execute(["ps"]) == 0 and "no model is in memory" in capsys.readouterr().err
        head = {"Authorization": "Bearer secret"}
        assert [m["id"] for m in httpx.get(url + "/v1/models", headers=head).json()["data"]] == ["one", "two"]
        asked = {"model": "two", "prompt": "a", "max_tokens": 2}
        assert httpx.post(url + "/v1/completions", json=asked, headers=head, timeout=60).json()["model"] == "two"
        assert execute(["ps"]) == 0
        rows = capsys.readouterr().out.splitlines()
        assert rows[0].split() == ["NAME", "SIZE", "CONTEXT", "UNTIL"] and rows[1].split()[0] == "two" and "128" in rows[1] and len(rows) == 2
        assert re.search(r"(1 h|60 min)$", rows[1])
        assert execute(["ps", "--json"]) == 0 and json.loads(capsys.readouterr().out)[0]["name"] == "two"
        assert execute(["stop", "tw", "--server", url.removeprefix("http://")]) == 0
        assert capsys.readouterr().out == "two is not in memory any more\n"
        assert execute(["ps"]) == 0 and capsys.readouterr().out == ""
        assert execute(["stop", "three"]) == 2 and "there is no model 'three' here" in capsys.readouterr().err
        monkeypatch.setenv("PYENGINE_API_KEY", "another")
        assert execute(["ps"]) == 2 and "an API key is needed" in capsys.readouterr().err
        server.send_signal(signal.SIGINT)
        _, said = server.communicate(timeout=30)
    assert "2 models of `pyengine-run list`, each loaded when it is asked for" in said and "Traceback" not in said


@pytest.mark.parametrize("server, part", [("http://127.0.0.1:9", "no server answers"), ("ftp://a", "give an address"), ("http://", "give an address"),
                                          ("http://a:b", "give an address")])
def test_a_server_that_is_not_there(server: str, part: str, capsys) -> None:
    assert execute(["ps", "--server", server]) == 2 and part in capsys.readouterr().err


def test_times_that_are_left() -> None:
    now = datetime(2030, 1, 1, tzinfo=timezone.utc).timestamp()
    for time_, said in (("2030-01-01T00:04:31Z", "5 min"), ("2030-01-01T01:00:29+00:00", "1 h"), ("2030-01-01T00:00:20.123456789Z", "20 s"),
                        ("2030-01-03T00:00:00Z", "2 d"), ("2322-04-11T23:47:16Z", "for ever"), ("0001-01-01T00:00:00Z", "going"), ("soon", "soon")):
        assert left(time_, now) == said


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(capsys) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        assert execute(["serve", "/nothing/there.gguf", "--port", str(port)]) == 2
    err = capsys.readouterr().err
    assert f"port {port} is in use; give another one with --port" in err and "loading" not in err


def test_a_server_for_everybody_says_so(capsys) -> None:
    assert execute(["serve", "/nothing/there.gguf", "--port", "0", "--host", "0.0.0.0"]) == 2
    assert "it asks for no key" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, part", [
    (["serve", "a", "--tls-cert", "x.pem"], "--tls-cert and --tls-key go together"), (["serve", "a", "b", "--mmproj", "c"], "one model"),
    (["serve", "/nothing/there.gguf", "--port", "0"], "no such file"), (["serve", "--mmproj", "c"], "one model"),
    (["serve", "--keep-alive", "soon"], "--keep-alive soon: must be seconds")])
def test_what_cannot_be_served_is_refused(arguments: list[str], part: str, capsys) -> None:
    assert execute(arguments) == 2
    assert part in capsys.readouterr().err


def test_a_processor_is_left_to_the_connections(monkeypatch) -> None:
    from pyengine import hardware
    from pyengine.cli.serving import default_threads

    for usual, served in ((1, 1), (2, 1), (8, 7)):
        monkeypatch.setattr(hardware, "default_threads", lambda usual=usual: usual)
        assert default_threads() == served
