"""Connections and requests that mean no good, against the real server on a socket: each is bounded, answered in words, and shows nothing."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from servers import Page, Server

from pyengine.server import allowed, app, fetching, protocol, replies
from pyengine.server.models import load

httpx = pytest.importorskip("httpx")

MESSAGES = [{"role": "user", "content": "Hi there"}]
ENDLESS = {"max_tokens": 200, "temperature": 0}


@pytest.fixture(scope="module")
def served(tiny_gguf) -> Iterator[Any]:
    found = load(str(tiny_gguf("gemma3")[0]), n_ctx=256, n_threads=1, n_seq=4, speculate=False)     # tests count steps
    yield found
    found.model.close()


class Running:
    """A server on a port of this machine, until it is left."""

    def __init__(self, served: Any, **settings: Any):
        self.model = served.model
        self.server = app.server(app.application([served], **settings))
        self.taken = app.listen("127.0.0.1", 0)
        self.address = self.taken.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.taken]}, daemon=True)

    def __enter__(self) -> Running:
        self.thread.start()
        wait(lambda: self.server.started)
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    def connect(self, *sent: bytes) -> socket.socket:
        s = socket.create_connection(self.address, timeout=20)
        for part in sent:
            s.sendall(part)
        return s

    @property
    def idle(self) -> bool:
        return not self.model.loop.n_running and not self.model.loop.n_waiting and not self.model._scheduler.active


def wait(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not come about in time"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def running(served) -> Iterator[Running]:
    with Running(served) as found:
        yield found


def endless(model: Any, **more: Any) -> dict[str, Any]:
    """A request whose answer goes on to its last token."""
    return {"messages": MESSAGES, **ENDLESS, "logit_bias": {str(t): -100 for t in model.tokenizer.eog_ids}, **more}


def post(path: str, body: bytes | dict[str, Any], *headers: str) -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *(headers or (f"Content-Length: {len(raw)}",))]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + raw


def all_of(s: socket.socket) -> bytes:
    """Everything until the connection ends."""
    found = b""
    try:
        while part := s.recv(65536):
            found += part
    except ConnectionError:
        pass
    return found


def answer(raw: bytes) -> tuple[int, bytes]:
    """Status and body of the last answer, interim ones left out."""
    while raw.startswith(b"HTTP/1.1 1"):
        raw = raw.partition(b"\r\n\r\n")[2]
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def well(text: str) -> None:
    assert "Traceback" not in text and "root:" not in text and "/pyengine/" not in text and "an error of the server" not in text


# -- slow, half and idle --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ", b"POST /v1/models HTTP/1.1\r\n"])
def test_a_request_that_does_not_come_is_not_waited_for(served, monkeypatch, sent: bytes) -> None:
    monkeypatch.setattr(protocol, "REQUEST_SECONDS", 0.6)
    with Running(served) as running, closing(running.connect(sent)) as s:
        began = time.monotonic()
        try:
            while time.monotonic() - began < 5:
                s.settimeout(0.1)
                try:
                    if s.recv(1) == b"":
                        break
                except TimeoutError:
                    s.sendall(b"a" if sent else b"")         # slowloris: a byte now and then
        except ConnectionError:
            pass
        assert 0.3 < time.monotonic() - began < 4


def test_a_connection_that_asks_nothing_more_ends(served, monkeypatch) -> None:
    monkeypatch.setattr(protocol, "REQUEST_SECONDS", 0.6)
    with Running(served) as running, closing(running.connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")) as s:
        began = time.monotonic()
        assert b'{"status":"ok"}' in all_of(s) and time.monotonic() - began < 4


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/nothing/here"])
def test_a_slow_body_has_a_limit(served, monkeypatch, path: str) -> None:
    monkeypatch.setattr(replies, "BODY_SECONDS", 0.6)
    monkeypatch.setattr(protocol, "REQUEST_SECONDS", 0.6)
    with Running(served) as running, closing(running.connect(post(path, b"{", "Content-Length: 100000"))) as s:
        began, found = time.monotonic(), b""
        s.settimeout(0.05)
        while time.monotonic() - began < 8:
            try:
                part = s.recv(65536)
                if not part:
                    break
                found += part
            except TimeoutError:
                try:
                    s.sendall(b" ")
                except ConnectionError:
                    break
            except ConnectionError:
                break
        assert answer(found)[0] == (408 if "v1" in path else 404) and time.monotonic() - began < 6


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_ends_its_side_gets_its_answer(running, stream: bool) -> None:
    asked = endless(running.model, max_tokens=60, stream=stream)
    want = httpx.post(running.url + "/v1/chat/completions", json={**asked, "stream": False}, timeout=20).json()["choices"][0]["message"]["content"]
    with closing(running.connect(post("/v1/chat/completions", asked))) as s:
        s.shutdown(socket.SHUT_WR)
        status, body = answer(all_of(s))
    assert status == 200
    if stream:
        body = body.replace(b"\r\n", b"\n")
        events = [json.loads(line[6:]) for line in body.split(b"\n") if line.startswith(b"data: {")]
        assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == want
    else:
        assert json.loads(body)["choices"][0]["message"]["content"] == want


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_vanishes_is_no_longer_worked_for(running, stream: bool, reset: bool, monkeypatch) -> None:
    advance = running.model._scheduler.advance
    monkeypatch.setattr(running.model._scheduler, "advance", lambda: (time.sleep(0.02), advance())[1])         # else it has ended before
    with running.connect(post("/v1/chat/completions", endless(running.model, stream=stream))) as s:
        wait(lambda: running.model.loop.n_running == 1)
        if reset:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    began = time.monotonic()
    wait(lambda: running.idle)
    assert time.monotonic() - began < 2.0                    # of 4 seconds


def test_idle_connections_have_a_limit(served, monkeypatch) -> None:
    monkeypatch.setattr(protocol, "MOST_CONNECTIONS", 20)
    with Running(served) as running:
        held = [running.connect() for _ in range(20)]
        with closing(running.connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")) as s:
            status, body = answer(all_of(s))
        assert status == 503 and "too many connections" in json.loads(body)["error"]["message"]
        for s in held:
            s.close()
        wait(lambda: httpx.get(running.url + "/health").status_code == 200)


def test_a_client_that_takes_nothing_is_let_go(served, monkeypatch) -> None:
    monkeypatch.setattr(protocol, "TAKE_SECONDS", 0.3)
    with Running(served) as running:
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.settimeout(20)
        s.connect(running.address)
        ask = post("/tokenize", {"content": "a b " * 200_000, "with_pieces": True})          # some tens of megabytes
        s.sendall(ask)
        wait(lambda: any(c.paused for c in running.server.server_state.connections))
        wait(lambda: not running.server.server_state.connections)
        s.close()


def test_an_answer_has_a_limit_of_time(served) -> None:
    with Running(served, allowed=allowed.Allowed(answer_seconds=0.3)) as running:
        advance = running.model._scheduler.advance
        running.model._scheduler.advance = lambda: (time.sleep(0.02), advance())[1]
        try:
            began = time.monotonic()
            whole = httpx.post(running.url + "/v1/chat/completions", json=endless(running.model), timeout=20)
            assert whole.status_code == 408 and "--timeout" in whole.json()["error"]["message"] and time.monotonic() - began < 3
            streamed = httpx.post(running.url + "/v1/chat/completions", json=endless(running.model, stream=True), timeout=20).text
            assert '"content"' in streamed and "--timeout" in streamed and "data: [DONE]" in streamed
            lines = httpx.post(running.url + "/api/chat", json={"messages": MESSAGES, "options": {"num_predict": 200}}, timeout=20).text.splitlines()
            assert running.idle and json.loads(lines[-1])
        finally:
            running.model._scheduler.advance = advance
        assert httpx.post(running.url + "/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=20).status_code == 200


# -- HTTP that is none, or odd --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent, status", [
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", 431),
    (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000 + b"\r\n", 431),
    (b"\x16\x03\x01\x02\x00\x01\x00", 400), (b"\0" * 50 + b"\r\n\r\n", 400), (b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", 200),
    (b"GET / HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n", 400), (b"GET / HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 200),
    (post("/v1/completions", b"{}", "Content-Length: -1"), 400), (post("/v1/completions", b"{}", "Content-Length: 2, 3"), 400),
    (post("/v1/completions", b"{}", "Content-Length: 99999999999999999999999"), 400),
    (post("/v1/completions", b"{}", "Content-Length: 2", "Transfer-Encoding: chunked"), 400),
    (post("/v1/completions", b"zz\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked"), 400),
    (post("/v1/completions", b"2\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked", "Connection: close"), 400),
    (post("/v1/completions", b"{}", "Transfer-Encoding: gzip"), 501),
])
def test_odd_http(running, capfd, sent: bytes, status: int) -> None:
    try:
        s = running.connect(sent)
    except ConnectionError:                                  # it was refused before all of it was sent
        return
    with closing(s):
        s.shutdown(socket.SHUT_WR)
        found = all_of(s)
    if found:                                                # nothing where the client's side ended within its request
        assert answer(found)[0] in (status, 400) and b"Traceback" not in found
    assert "Traceback" not in capfd.readouterr().err
    assert httpx.get(running.url + "/health").status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_has_a_limit(running, monkeypatch, chunked: bool) -> None:
    monkeypatch.setattr(replies, "BODY_BYTES", 100_000)
    headers = ("Transfer-Encoding: chunked",) if chunked else ("Content-Length: 50000000",)
    part = b"%x\r\n%s\r\n" % (10_000, b" " * 10_000) if chunked else b" " * 10_000
    began, found = time.monotonic(), b""
    with closing(running.connect(post("/v1/completions", b"", *headers))) as s:
        s.settimeout(0.2)
        try:
            while time.monotonic() - began < 10:             # it goes on sending, whatever comes
                s.sendall(part)
                time.sleep(0.005)
        except OSError:
            pass
        found = all_of(s)
    assert time.monotonic() - began < 5 and (not found or answer(found)[0] == 413)


def test_a_length_that_lies(running) -> None:
    for more, less in ((50, True), (-3, False)):
        body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
        with closing(running.connect(post("/v1/completions", body, f"Content-Length: {len(body) + more}"))) as s:
            s.shutdown(socket.SHUT_WR)
            found = all_of(s)
        assert not found if less else answer(found)[0] == 400


def test_requests_one_behind_the_other(running) -> None:
    one, other = (post("/v1/completions", {"prompt": p, "max_tokens": 3, "temperature": 0}) for p in ("a", "Once upon"))
    want = [httpx.post(running.url + "/v1/completions", json={"prompt": p, "max_tokens": 3, "temperature": 0}).json()["choices"][0]["text"] for p in ("a", "Once upon")]
    with closing(running.connect((one + other) * 3, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")) as s:
        found = all_of(s)
    bodies = [json.loads(part.partition(b"\r\n\r\n")[2]) for part in found.split(b"HTTP/1.1 200 OK\r\n")[1:]]
    assert [b["choices"][0]["text"] for b in bodies[:-1]] == want * 3 and bodies[-1] == {"status": "ok"}


def test_what_stands_behind_a_request_does_not_take_its_answer(running) -> None:
    """Nor is its head waited for: what is no request ends the connection after what was asked before it."""
    asked = post("/v1/completions", {"prompt": "a", "max_tokens": 3, "temperature": 0})
    for behind, more in ((b"no request\r\n\r\n", 0), (b"X" * 100_000, 0), (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 0),
                         (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100, protocol.MOST_AHEAD)):
        with closing(running.connect(asked + behind)) as s:
            found = all_of(s)
        assert found.count(b"HTTP/1.1 200 OK") == 1 + more and b'"choices"' in found


def test_offers_of_other_protocols_are_declined(running) -> None:
    """Java's own client offers HTTP/2 with each request (RFC 9110, 7.8); the connection goes on."""
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAB")
    body = json.dumps({"prompt": "a", "max_tokens": 2}).encode()
    one = post("/v1/completions", body, *offer, f"Content-Length: {len(body)}")
    health = "\r\n".join(("GET /health HTTP/1.1", "Host: localhost", *offer)).encode() + b"\r\n\r\n"
    with closing(running.connect(one + health + one, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")) as s:
        found = all_of(s)
    assert found.count(b"HTTP/1.1 200 OK") == 4 and found.count(b'"choices"') == 2 and found.count(b'{"status":"ok"}') == 2


def test_a_body_that_is_expected_first(running) -> None:
    """curl asks before it sends a large body (RFC 9110, 10.1.1)."""
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    with closing(running.connect(post("/v1/completions", b"", f"Content-Length: {len(body)}", "Expect: 100-continue", "Connection: close"))) as s:
        assert s.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        s.sendall(body)
        assert answer(all_of(s))[0] == 200


@pytest.mark.parametrize("sent", [
    post("/v1/completions", b"2\r\n{}\r\n0\r\nX: ", "Transfer-Encoding: chunked"), post("/v1/completions", b"2;x=", "Transfer-Encoding: chunked"),
    b"\r\n", post("/v1/completions", b"0" * 20, "Transfer-Encoding: chunked"), b"POST / HTTP/1.1\r\nX"])
def test_nothing_that_is_no_body_grows_without_end(running, sent: bytes) -> None:
    with closing(running.connect(sent)) as s:
        with pytest.raises(OSError):                         # it is refused, and no longer read
            for _ in range(100):
                s.sendall(b"0" * 5000 if b"chunked" in sent or b"X" in sent else b"\r\n" * 2500)
                time.sleep(0.005)
        found = all_of(s)
    assert not found or answer(found)[0] in (400, 431)


def test_old_http(running) -> None:
    """HTTP/1.0 knows no chunks: the end of the connection ends the answer."""
    body = json.dumps(endless(running.model, stream=True, max_tokens=5)).encode()
    for more in (b"", b"Connection: keep-alive\r\n"):
        with closing(running.connect(b"POST /v1/chat/completions HTTP/1.0\r\nHost: localhost\r\n" + more + b"Content-Length: %d\r\n\r\n" % len(body) + body)) as s:
            status, found = answer(all_of(s))
        assert status == 200 and found.startswith(b"data: {") and found.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("method, path, status", [
    ("HEAD", "/", 200), ("HEAD", "/v1/models", 200), ("HEAD", "/v1/chat/completions", 405), ("OPTIONS", "/v1/chat/completions", 405), ("TRACE", "/", 405),
    ("CONNECT", "example.com:443", 404), ("DELETE", "/v1/models", 405), ("GET", "http://example.com/", 404), ("GET", "/../../etc/passwd", 404),
    ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404), ("GET", "/v1/models/../../../etc/passwd", 404), ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
    ("GET", "/v1/models/%00", 404), ("GET", "/v1/models/%ff", 404), ("GET", "//etc/passwd", 404), ("GET", "/v1/models/%ed%a0%80", 404), ("GET", "*", 404)])
def test_paths_and_methods(running, method: str, path: str, status: int) -> None:
    with closing(running.connect(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())) as s:
        found = all_of(s)
    assert answer(found)[0] == status
    well(found.decode())


# -- bodies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body, status", [
    (b"", 400), (b"\xff\xfe{\0}\0", 400), ("{}".encode("utf-16"), 400), (b"\xef\xbb\xbf{}", 400), (b"[" * 1_000_000, 400), (b'{"a":' * 99 + b"1" + b"}" * 99, 400),
    (b'{"prompt": "a", "max_tokens": NaN}', 400), (b'{"prompt": "a", "max_tokens": 1e999}', 400), (b'{"prompt": "a", "temperature": -Infinity}', 400),
    (b'{"prompt": "a", "temperature": 1e999}', 400), (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", 400),
    (b'{"prompt": "a", "seed": ' + b"9" * 4000 + b', "max_tokens": 1}', 200), (b'{"prompt": "\\ud800x\\udc00", "max_tokens": 1, "echo": true}', 200),
    (b'{"prompt": "a", "model": "\\ud800"}', 404), (b'{"prompt": "a\\u0000b", "max_tokens": 1, "echo": true}', 200), (b'{"prompt": "a\xed\xa0\x80"}', 400),
    (b'{"prompt": 5, "prompt": "a", "max_tokens": 1}', 200), (b'{"prompt": "a", "max_tokens": 1, "\\ud800": "\\udfff"}', 200), (b'{"prompt": "a", "stop": "\\ud800", "max_tokens": 1}', 200),
    (b'{"prompt": "a", "logit_bias": {"\\ud800": 1}}', 400), (b'{"prompt": "a", "logit_bias": {"' + b"9" * 5000 + b'": 1}}', 400), (b'{"prompt": "a"}garbage', 400),
    (b'{"prompt": [99999999999999999999]}', 400), (b'{"prompt": [-1]}', 400), (b'{"prompt": [], "max_tokens": 1}', 400), (b'{"prompt": [[]], "max_tokens": 1}', 400)])
def test_bodies(running, body: bytes, status: int) -> None:
    for path in ("/v1/completions", "/completion", "/v1/chat/completions", "/api/chat", "/v1/messages", "/tokenize", "/infill"):
        response = httpx.post(running.url + path, content=body, timeout=20)
        assert response.status_code < 500
        well(response.text)
        if path == "/v1/completions":
            assert response.status_code == status, response.text
            if status == 200:
                assert "\ufffd" in response.text or b"\\ud800x" not in body


# -- pictures -------------------------------------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes, whose header says how large it is; its rows are missing."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(1 << 20), 9))
            + chunk(b"IEND", b""))


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def seen(url: str, n: int = 1) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}] * n}], "max_tokens": 1}


def picture() -> bytes:
    from PIL import Image

    Image.new("RGB", (40, 30), (200, 30, 30)).save(out := io.BytesIO(), "PNG")
    return out.getvalue()


@pytest.mark.parametrize("size", [(65_000, 65_000), (2**31 - 1, 2**31 - 1), (1, 2**30), (0, 5)])
def test_bombs_are_refused_by_their_headers(running, size: tuple[int, int]) -> None:
    began = time.process_time()
    response = httpx.post(running.url + "/v1/chat/completions", json=seen(data_url(bomb(*size))), timeout=20)
    assert response.status_code == 400 and time.process_time() - began < 2
    well(response.text)


def test_pictures_have_a_limit_of_number(running) -> None:
    url = data_url(picture())
    response = httpx.post(running.url + "/v1/chat/completions", json=seen(url, 65), timeout=20)
    assert response.status_code == 400 and "65 pictures and frames, where 64 are taken" in response.json()["error"]["message"]
    frames = {"messages": [{"role": "user", "content": [{"type": "video", "video": [url] * 100}]}], "max_tokens": 1}
    assert "100 pictures and frames" in httpx.post(running.url + "/v1/chat/completions", json=frames, timeout=20).json()["error"]["message"]
    assert "65 pictures" in httpx.post(running.url + "/api/chat", json={"messages": [{"role": "user", "content": "a", "images": [url] * 65}]}, timeout=20).json()["error"]


# -- pictures by their addresses ------------------------------------------------------------------------------------------


@pytest.fixture
def fetching_server(served) -> Iterator[Running]:
    from dataclasses import replace

    with Running(served, allowed=allowed.Allowed(replace(allowed.REMOTE, fetch=fetching.fetch))) as found:
        yield found


@pytest.fixture
def elsewhere(monkeypatch) -> Iterator[Server]:
    """A server of pictures, at the one address of this machine that passes for public."""
    real = fetching.is_public
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1" or real(address))
    with Server() as server:
        server.pages["/a.png"] = Page(picture())
        yield server


def asked(running: Running, url: str) -> Any:
    response = httpx.post(running.url + "/v1/chat/completions", json=seen(url), timeout=30)
    well(response.text)
    return response


def test_a_picture_is_fetched_where_that_is_allowed(fetching_server, running, elsewhere) -> None:
    url = elsewhere.url + "/a.png"
    want = asked(running, data_url(picture())).json()["choices"][0]["message"]["content"]
    got = asked(fetching_server, url)
    assert got.status_code == 200 and got.json()["choices"][0]["message"]["content"] == want
    assert elsewhere.seen[0].headers["Host"] == url.split("/")[2] and "Authorization" not in elsewhere.seen[0].headers
    refused = asked(running, url)
    assert refused.status_code == 400 and "fetches nothing" in refused.json()["error"]["message"]


@pytest.mark.parametrize("to", ["http://127.0.0.2/a.png", "http://169.254.169.254/latest/meta-data/", "http://[::1]/", "file:///etc/passwd", "ftp://a/b", "http://10.0.0.1/"])
def test_redirects_are_looked_at_anew(fetching_server, elsewhere, to: str) -> None:
    elsewhere.pages["/r"] = Page(status=302, headers={"Location": to})
    response = asked(fetching_server, elsewhere.url + "/r")
    assert response.status_code == 400
    elsewhere.pages["/r"] = Page(status=302, headers={"Location": "/a.png"})
    assert asked(fetching_server, elsewhere.url + "/r").status_code == 200
    elsewhere.pages["/r"] = Page(status=302, headers={"Location": "/r"})
    assert "more than 4 redirects" in asked(fetching_server, elsewhere.url + "/r").json()["error"]["message"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1", "0x7f000001", "2130706433", "localhost", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]",
                                  "[fe80::1]", "[fd00::1]", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "224.0.0.1", "[2002:7f00:1::]"])
def test_addresses_that_are_not_public_are_refused(fetching_server, host: str) -> None:
    response = asked(fetching_server, f"http://{host}:1/a.png")
    assert response.status_code == 400 and ("no address of the public internet" in response.text or "cannot be fetched" in response.text)


def test_a_name_means_one_address(fetching_server, elsewhere, monkeypatch) -> None:
    """What was looked at is what is connected to, also where the name means something else the next time (DNS rebinding)."""
    times: list[str] = []

    def resolve(host: str, port: int, **more: Any) -> list[Any]:
        times.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1" if len(times) == 1 else "127.0.0.9", port))]

    monkeypatch.setattr(fetching.socket, "getaddrinfo", resolve)
    assert fetching.fetch(f"http://name.example:{elsewhere.server_address[1]}/a.png") == picture()
    assert times == ["name.example"] and elsewhere.seen[-1].headers["Host"].startswith("name.example:")
    monkeypatch.setattr(fetching.socket, "getaddrinfo", lambda host, port, **more: [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in ("127.0.0.1", "10.0.0.1")])
    with pytest.raises(Exception, match="no address of the public internet"):
        fetching.fetch("http://name.example/a.png")


def test_fetching_has_limits(elsewhere, monkeypatch) -> None:
    monkeypatch.setattr(fetching, "MOST_BYTES", 100_000)
    elsewhere.pages["/big"] = Page(bytes(200_000))
    with pytest.raises(Exception, match="more than 100000 bytes"):
        fetching.fetch(elsewhere.url + "/big")
    monkeypatch.setattr(fetching, "SECONDS", 0.5)

    def drip(handler: Any, page: Page) -> bool:
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(100):
                handler.wfile.write(b"x")
                handler.wfile.flush()
                time.sleep(0.1)
        except OSError:
            pass
        return True

    elsewhere.pages["/slow"], elsewhere.faults["/slow"] = Page(), [drip]
    began = time.monotonic()
    with pytest.raises(Exception, match="cannot be fetched|takes too long"):
        fetching.fetch(elsewhere.url + "/slow")
    assert time.monotonic() - began < 3
