"""Small servers that play Hugging Face's hub and Ollama's registry on this machine, and misbehave as they are told."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LAYER = "application/vnd.ollama.image."


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Page:
    """What a path answers."""

    content: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    ranges: bool = True              # whether it honours Range
    head: Mapping[str, str] = field(default_factory=dict)        # more headers of an answer to HEAD


@dataclass
class Seen:
    """A request that came."""

    method: str
    path: str
    headers: dict[str, str]


Fault = Callable[["Handler", Page], bool]        # says whether it has answered


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.seen.append(Seen(self.command, path, dict(self.headers)))
        page = self.server.pages.get(path, Page(status=404, headers={"X-Error-Code": "RepoNotFound"}))
        faults = self.server.faults.get(path, [])
        if self.command == "GET" and faults and faults.pop(0)(self, page):
            self.close_connection = True
            return
        self.send(page)

    def send(self, page: Page, cut: int | None = None, length: int | None = None) -> None:
        """Answer with a page; `cut` ends its body too early, `length` is a false Content-Length."""
        start, status, content, headers = 0, page.status, page.content, dict(page.headers)
        asked = self.headers.get("Range", "")
        if page.ranges and status == 200 and asked.startswith("bytes="):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(content)) + 1, len(content))
            if start >= len(content) > 0:
                status, content = 416, b""
            else:
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
                status, content = 206, content[start:end]
        if self.command == "HEAD":
            headers |= page.head
        self.send_response(status)
        headers.setdefault("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:cut])
            self.close_connection |= cut is not None


def cut(n_bytes: int) -> Fault:
    """Let the connection end after so many bytes of a body."""
    def fault(handler: Handler, page: Page) -> bool:
        handler.send(page, cut=n_bytes)
        return True
    return fault


def trickle(n_bytes: int, seconds: float) -> Fault:
    """Send so many bytes of a body and then nothing for some time."""
    def fault(handler: Handler, page: Page) -> bool:
        handler.send(page, cut=n_bytes)
        handler.wfile.flush()
        time.sleep(seconds)
        return True
    return fault


def status(code: int) -> Fault:
    """Answer with a status instead."""
    def fault(handler: Handler, page: Page) -> bool:
        handler.send(Page(status=code))
        return True
    return fault


class Server(ThreadingHTTPServer):
    """Pages by path, what was asked for, and faults of the next GETs of a path. Ends when it is left."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict[str, Page] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.seen: list[Seen] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Server:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass                         # a client that has enough hangs up

    def asked(self, path: str, method: str = "GET") -> list[Seen]:
        """Return the requests for a path."""
        return [s for s in self.seen if s.path == path and s.method == method]

    def repository(self, repo: str, files: Mapping[str, bytes], **more: Any) -> None:
        """Serve a repository as Hugging Face does; `more` is in its description."""
        siblings = []
        for name, content in files.items():
            digest = sha256(content)
            siblings.append({"rfilename": name, "size": len(content), "blobId": "b" * 40,
                             "lfs": {"sha256": digest, "size": len(content), "pointerSize": 134}})
            page = Page(content, head={"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(content))})
            for revision in ("main", COMMIT):
                self.pages[f"/{repo}/resolve/{revision}/{name}"] = page
        self.pages[f"/api/models/{repo}"] = Page(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings, **more}).encode())

    def model(self, name: str, layers: Mapping[str, bytes], tag: str = "latest", **more: Any) -> dict[str, str]:
        """Serve a model as Ollama's registry does. Returns the path of each layer's blob; `more` is in the manifest."""
        entries, paths = [], {}
        for kind, content in {**layers, "config": b'{"model_format":"gguf"}'}.items():
            digest = sha256(content)
            paths[kind] = f"/v2/{name}/blobs/sha256:{digest}"
            self.pages[paths[kind]] = Page(content)
            entries.append({"mediaType": LAYER + kind, "digest": f"sha256:{digest}", "size": len(content)})
        config = entries.pop()
        manifest = {"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
                    "config": {**config, "mediaType": "application/vnd.docker.container.image.v1+json"}, "layers": entries, **more}
        self.pages[f"/v2/{name}/manifests/{tag}"] = Page(json.dumps(manifest).encode())
        return paths
