"""`pyengine-run serve`: a process of its own, asked over its port, ended by Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyengine.cli import execute

httpx = pytest.importorskip("httpx")
ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_it_serves_until_it_is_interrupted(tiny_gguf) -> None:
    port = free_port()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYENGINE_API_KEY": "secret"}
    command = [sys.executable, "-m", "pyengine", "serve", str(tiny_gguf("llama")[0]), "--port", str(port), "-c", "128", "--seq", "2"]
    server = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                assert httpx.get(url + "/health").json() == {"status": "ok"}
                break
            except httpx.TransportError:
                assert server.poll() is None, server.stderr.read()
                time.sleep(0.1)
        body = {"model": "f32", "prompt": "a", "max_tokens": 3}
        assert httpx.post(url + "/v1/completions", json=body).status_code == 401
        done = httpx.post(url + "/v1/completions", json=body, headers={"Authorization": "Bearer secret"})
        assert done.json()["usage"]["completion_tokens"] <= 3
        server.send_signal(signal.SIGINT)
        _, said = server.communicate(timeout=30)
    finally:
        server.kill()
    assert "context 128, 2 at once" in said and f"serving at {url}" in said and "Traceback" not in said


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
    (["serve", "/nothing/there.gguf", "--port", "0"], "no such file"), (["serve"], "Missing argument")])
def test_what_cannot_be_served_is_refused(arguments: list[str], part: str, capsys) -> None:
    assert execute(arguments) == 2
    assert part in capsys.readouterr().err


def test_a_processor_is_left_to_the_connections(monkeypatch) -> None:
    from pyengine import hardware
    from pyengine.cli.serving import default_threads

    for usual, served in ((1, 1), (2, 1), (8, 7)):
        monkeypatch.setattr(hardware, "default_threads", lambda usual=usual: usual)
        assert default_threads() == served
