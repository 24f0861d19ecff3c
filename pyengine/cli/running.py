"""`pyengine-run ps` and `stop`: what a running server has in memory, asked by Ollama's interface."""

from __future__ import annotations

import json
import os
import re
import time
from datetime import datetime
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request

from pyengine.cli.screen import note, PROGRAM, show, show_columns, show_json
from pyengine.errors import ModelNotFoundError, RequestError

DEFAULT_SERVER = "http://127.0.0.1:8080"
SECONDS = 60.0                       # until the server answers: unloading takes a moment
MOST_BYTES = 16 << 20                # of an answer
_FOR_EVER = 10 * 365 * 86400         # seconds: nobody says this of a time that ends


class _NoRedirect(HTTPRedirectHandler):
    """A key is for the server that was named, so no other one is asked."""

    def redirect_request(self, *args: Any) -> None:
        """Refuse to follow."""


def ask(server: str | None, path: str, body: Any = None) -> Any:
    """Ask a server: by GET, or by POST with a body. Raises: RequestError naming the server and what it said; ModelNotFoundError for a 404."""
    import urllib.request

    url = server or os.environ.get("PYENGINE_SERVER") or DEFAULT_SERVER
    url = (url if "://" in url else f"http://{url}").rstrip("/")
    try:
        host, scheme, _ = (parts := urlsplit(url)).hostname, parts.scheme, parts.port
    except ValueError:
        host = scheme = None
    if scheme not in ("http", "https") or not host:
        raise RequestError(f"--server {url}: give an address as {DEFAULT_SERVER}")
    key = os.environ.get("PYENGINE_API_KEY")
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    local = [ProxyHandler({})] if host in ("localhost", "127.0.0.1", "::1") else []
    asked = Request(url + path, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.build_opener(_NoRedirect, *local).open(asked, timeout=SECONDS) as answer:
            found = json.loads(answer.read(MOST_BYTES))
    except HTTPError as error:
        said = _message(error.read(MOST_BYTES)) or f"{error.code} {error.reason}"
        raise (ModelNotFoundError if error.code == 404 else RequestError)(f"{url}: {said}") from None
    except (URLError, OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise RequestError(f"{url}: no server answers ({getattr(reason, 'strerror', None) or reason}); `{PROGRAM} serve` starts one, "
                           "--server URL names another one") from None
    except ValueError:
        raise RequestError(f"{url}{path}: answers, but not as a server of models does") from None
    if not isinstance(found, dict):
        raise RequestError(f"{url}{path}: answers, but not as a server of models does")
    return found


def _message(body: bytes) -> str:
    """Return what an error of one of the interfaces says; "" where it says nothing."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return ""


def models(server: str | None) -> list[dict[str, Any]]:
    """Return the models that a server has in memory. Raises as `ask`."""
    found = ask(server, "/api/ps").get("models")
    if not isinstance(found, list) or not all(isinstance(m, dict) for m in found):
        raise RequestError("/api/ps: answers, but not as a server of models does")
    return found


def ps(server: str | None, as_json: bool = False) -> None:
    """Print the models that a server has in memory: name, size, context, and how long they stay unless they are used. Raises as `ask`."""
    found = models(server)
    if as_json:
        show_json(found)
        return
    from pyengine.memory.plan import amount

    rows = [("NAME", "SIZE", "CONTEXT", "UNTIL")]
    for m in found:
        size, context = m.get("size"), m.get("context_length")
        rows.append((str(m.get("name", "")), amount(size) if isinstance(size, int) else "", f"{context:,}" if isinstance(context, int) else "",
                     left(str(m.get("expires_at", "")))))
    if len(rows) > 1:
        show_columns(rows, right=(1, 2))
    else:
        note("no model is in memory")


def left(expires_at: str, now: float | None = None) -> str:
    """Say in how long a time of Ollama's form comes: "4 min"; "for ever" for one that is years away."""
    whole = re.sub(r"(\.\d{6})\d+", r"\1", expires_at.replace("Z", "+00:00"))          # Go writes nanoseconds
    try:
        seconds = datetime.fromisoformat(whole).timestamp() - (time.time() if now is None else now)
    except (ValueError, OverflowError):
        return expires_at
    if seconds > _FOR_EVER:
        return "for ever"
    if seconds <= 0:
        return "going"
    size, unit = next((n, u) for n, u in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")) if seconds >= n or n == 1)
    return f"{max(1, round(seconds / size))} {unit}"


def stop(name: str, server: str | None) -> None:
    """Let a server unload a model, and say what became of it. Raises as `ask`."""
    found = ask(server, "/api/generate", {"model": name, "keep_alive": 0})
    known = str(found.get("model") or name)
    if any(m.get("name") == known for m in models(server)):
        note(f"{known} goes when its requests have ended")
    else:
        show(f"{known} is not in memory any more")
