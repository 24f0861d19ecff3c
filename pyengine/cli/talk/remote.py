"""A model behind a server: what the chat uses of a Model, asked for through OpenAI's chat completions.

Of pyengine's own server and of others that have it, more is asked for: how large the context is (`max_model_len` of vLLM's list, Ollama's
/api/ps, llama.cpp's /props), the template and whether pictures are seen (Ollama's /api/show). Boxes are those that the server names.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple, TYPE_CHECKING
from urllib.parse import urlsplit

from pyengine.chat.boxes import Box, Point, Polygon
from pyengine.chat.reply.deltas import Delta, new_call_id, ToolCall
from pyengine.cli.talk.place import RemotePlan
from pyengine.engine.answer import Answer
from pyengine.engine.request import Report
from pyengine.errors import BusyError, ContextOverflowError, nearest, RequestError, shown

if TYPE_CHECKING:
    from pyengine.media.image import Image

CONNECT_SECONDS = 10.0
SILENT_SECONDS = 600.0               # a long prompt may be read for so long before anything comes
MOST_BYTES = 64 << 20                # of one event, and of one whole answer
TOLD = 300                           # characters of a server's own words in an error
KEYS = "--api-key KEY, or PYENGINE_API_KEY"


class Server:
    """Where a server is, and how it is asked. Raises: RequestError for an address that is none."""

    def __init__(self, url: str, key: str | None = None):
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            raise RequestError(f"--server {url}: the port must be a number in 0..65535") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username is not None:
            raise RequestError(f"--server {url}: an address is expected, as http://127.0.0.1:8080")
        self.host, self.port, self.tls = parts.hostname, port, parts.scheme == "https"
        self.base = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self.base}"
        self._key = key
        if key is not None and not (key.isascii() and key.isprintable()):
            raise RequestError("--api-key: a key consists of printable ASCII characters")

    def open(self, path: str, body: Mapping[str, Any] | None = None) -> Reply:
        """Send a request, a POST where there is a body. Raises: RequestError in words, and what `failure` makes of a refusal."""
        kind = http.client.HTTPSConnection if self.tls else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=CONNECT_SECONDS)
        headers = {"Accept": "application/json, text/event-stream", **({"Authorization": f"Bearer {self._key}"} if self._key else {})}
        try:
            connection.connect()
            connection.sock.settimeout(SILENT_SECONDS)
            if body is None:
                connection.request("GET", self.base + path, headers=headers)
            else:
                connection.request("POST", self.base + path, json.dumps(body).encode(), {**headers, "Content-Type": "application/json"})
            reply = Reply(self.url, connection, connection.getresponse())
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise RequestError(f"{self.url}: {_why(error)}") from None
        except BaseException:                                # Ctrl-C: the server sees the connection end
            connection.close()
            raise
        if reply.status != 200:
            with reply:
                raise failure(self.url + path, reply.status, reply.read())
        return reply

    def json(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Return the value that a request gives. Raises as `open`."""
        with self.open(path, body) as reply:
            return parsed(reply.read(), self.url + path)

    def asked(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the object of a request that only some servers know; {} of those that do not."""
        try:
            found = self.json(path, body)
        except RequestError:
            return {}
        return found if isinstance(found, dict) else {}


class Reply:
    """One answer of a server, whole or line by line. Closing it ends the connection."""

    def __init__(self, url: str, connection: http.client.HTTPConnection, response: http.client.HTTPResponse):
        self._url, self._connection, self._response = url, connection, response
        self.status, self.kind = response.status, (response.getheader("Content-Type") or "").partition(";")[0].strip().lower()

    def read(self) -> bytes:
        """Read all of it. Raises: RequestError."""
        try:
            return self._response.read(MOST_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise RequestError(f"{self._url}: {_why(error)}") from None

    def lines(self) -> Iterator[bytes]:
        """Yield its lines as they come, without their ends. Raises: RequestError."""
        try:
            while line := self._response.readline(MOST_BYTES):
                yield line.rstrip(b"\r\n")
        except (OSError, http.client.HTTPException) as error:
            raise RequestError(f"{self._url}: {_why(error)}") from None

    def close(self) -> None:
        """End the connection: a server stops working for a client that has left."""
        self._response.close()
        self._connection.close()

    def __enter__(self) -> Reply:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _why(error: Exception) -> str:
    """Say why a request has no answer."""
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there; `pyengine-run serve MODEL` starts a server"
    if isinstance(error, TimeoutError):
        return "it does not answer"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted here: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return "it does not speak TLS; an address without it begins with http://"
    if isinstance(error, (http.client.IncompleteRead, ConnectionError)):
        return "the connection ended before the answer was whole"
    if isinstance(error, http.client.HTTPException):
        return "it does not speak HTTP; an address with TLS begins with https://"
    return str(getattr(error, "strerror", None) or error)


def parsed(content: bytes, where: str) -> Any:
    """Read JSON. Raises: RequestError."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise RequestError(f"{where}: what came is no JSON: {shown(content.decode('utf-8', 'replace')[:TOLD])}") from None


def failure(where: str, status: int, content: bytes) -> RequestError | ContextOverflowError | BusyError:
    """Return the error that a refusal means, with the server's own words, in OpenAI's form or another."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    error = value.get("error", value) if isinstance(value, dict) else None
    said = next((error[key] for key in ("message", "detail", "error") if isinstance(error.get(key), str)), "") if isinstance(error, dict) else error
    said = said if isinstance(said, str) and said else http.client.responses.get(status, "")
    said = said if len(said) <= TOLD else said[:TOLD] + " ..."
    if status in (401, 403):
        return RequestError(f"{where}: {said or 'refused'}; a key is given by {KEYS}")
    if isinstance(error, dict) and (error.get("code") == "context_length_exceeded" or error.get("type") == "exceed_context_size_error"):
        return ContextOverflowError(f"{where}: {said}")
    kind = BusyError if status in (429, 503) else RequestError
    return kind(f"{where}: {said} ({status})")


# -- answers --------------------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """A picture that was sent, as far as it is known here."""

    kind: str
    size: tuple[int, int]


@dataclass
class RemoteReport(Report):
    """How an answer came about, as far as the server says. `seen`: what was sent; `boxes`: those that the server found in the answer, points and polygons too."""

    seen: list[Seen] = field(default_factory=list)
    boxes: list[Any] = field(default_factory=list)


class RemoteAnswer(Answer):
    """An answer of a server."""

    report: RemoteReport

    @property
    def media(self) -> list[Any]:
        """The pictures that were sent."""
        return self.report.seen

    @property
    def boxes(self) -> list[Any]:
        """Boxes and points that the server found, in pixels of the picture that was sent."""
        return self.report.boxes

    def marks_in(self, number: int, name: str = "marks_in") -> list[Any]:
        """Return those of one picture."""
        return [box for box in self.report.boxes if box.image == number]


class RemoteStream:
    """Pieces of an answer as a server sends them, in events or at once; `stats` of the model grow with it."""

    progress: Any = None             # a server does not tell how far it has read

    def __init__(self, reply: Reply, where: str, stats: dict[str, int], seen: Sequence[Seen], ended: Callable[[], None]):
        self._reply, self._where, self._stats, self._ended = reply, where, stats, ended
        self.report = RemoteReport(finish="cancelled", seen=list(seen))
        self._n_before, self._ids = stats["generated_tokens"], dict[Any, int]()

    def deltas(self) -> Iterator[Delta]:
        """Yield what comes with its kind. Raises: RequestError for an error that the server sends, and where the connection breaks."""
        with self._reply:
            if self._reply.kind != "text/event-stream":
                yield from self._take(parsed(self._reply.read(), self._where))
                self._end("stop")
            else:
                for event in events(self._reply.lines()):
                    if event == "[DONE]":
                        self._end("stop")
                        break
                    yield from self._take(parsed(event.encode(), self._where))
        if self.report.finish == "cancelled":
            raise RequestError(f"{self._where}: the connection ended before the answer was whole")
        self._ended()

    def _end(self, finish: str) -> None:
        """Take the answer for whole, where the server has not said how it ended."""
        if self.report.finish == "cancelled":
            self.report.finish = finish

    def _take(self, value: Any) -> Iterator[Delta]:
        """Read one event, or a whole answer."""
        if not isinstance(value, dict):
            raise RequestError(f"{self._where}: an answer is an object, not {shown(value)}")
        if value.get("error"):
            raise failure(self._where, int(_get(value["error"], "code", int) or 500), json.dumps(value).encode())
        choice = next((c for c in _get(value, "choices", list) or [] if isinstance(c, dict)), {})
        said = _get(choice, "delta", dict) or _get(choice, "message", dict) or {}
        for kind, keys in (("thinking", ("reasoning_content", "reasoning")), ("text", ("content",))):
            text = next((t for key in keys if (t := _get(said, key, str))), "")
            if text:
                yield self._counted(Delta(kind, text))
        for call in _get(said, "tool_calls", list) or ():
            yield from map(self._counted, self._called(call))
        self.report.boxes += [_box(box) for box in _get(said, "boxes", list) or () if isinstance(box, dict)]
        self.report.boxes += [_polygon(found) for found in _get(said, "polygons", list) or () if isinstance(found, dict)]
        self.report.finish = _get(choice, "finish_reason", str) or self.report.finish
        if usage := _get(value, "usage", dict):
            self._use(usage)

    def _called(self, call: Any) -> Iterator[Delta]:
        """Read a piece of a call: the first one of a call has its name."""
        function, calls = _get(call, "function", dict) or {}, self.report.calls
        key = _get(call, "index", int)
        key = _get(call, "id", str) if key is None else key      # some servers count no calls, and send each at once
        if key is None or key not in self._ids:
            self._ids[key] = len(calls)
            name = _get(function, "name", str) or ""
            calls.append(ToolCall(_get(call, "id", str) or new_call_id(), name, ""))
            yield Delta("call", name, len(calls) - 1)
        at = self._ids[key]
        text = function.get("arguments")
        text = text if isinstance(text, str) else json.dumps(text) if isinstance(text, dict) else ""
        if text:
            calls[at] = ToolCall(calls[at].id, calls[at].name, calls[at].arguments + text)
            yield Delta("arguments", text, at)

    def _counted(self, delta: Delta) -> Delta:
        """Count a piece as a token until the server says how many there were."""
        self._stats["generated_tokens"] += 1
        if delta.kind == "thinking":
            self.report.thinking += delta.text
            self.report.n_thinking += 1
        return delta

    def _use(self, usage: Mapping[str, Any]) -> None:
        report = self.report
        report.n_prompt = _get(usage, "prompt_tokens", int) or 0
        report.n_cached = _get(_get(usage, "prompt_tokens_details", dict), "cached_tokens", int) or 0
        thought = _get(_get(usage, "completion_tokens_details", dict), "reasoning_tokens", int)
        report.n_thinking = thought if thought else report.n_thinking
        generated = _get(usage, "completion_tokens", int)
        if generated is not None:
            self._stats["generated_tokens"] = self._n_before + generated
        self._stats["prompt_tokens"] += report.n_prompt
        self._stats["cached_tokens"] += report.n_cached

    def close(self) -> None:
        """End the connection."""
        self._reply.close()


def events(lines: Iterable[bytes]) -> Iterator[str]:
    """Yield the data of server-sent events (html.spec.whatwg.org, 9.2): comments and other fields are left out."""
    data: list[str] = []
    for line in lines:
        name, _, value = line.decode("utf-8", "replace").partition(":")
        if not line and data:
            yield "\n".join(data)
            data = []
        elif name == "data":
            data.append(value.removeprefix(" "))
    if data:                                                 # a server that does not end its last one
        yield "\n".join(data)


def _get(value: Any, key: str, kind: type) -> Any:
    """Return a field if it is there, and of its type; None otherwise."""
    found = value.get(key) if isinstance(value, Mapping) else None
    return found if isinstance(found, kind) and not (kind is int and isinstance(found, bool)) else None


def _polygon(found: Mapping[str, Any]) -> Polygon:
    def corner(c: Any) -> tuple[float, ...]:
        return tuple(float(n) for n in c if isinstance(n, (int, float))) if isinstance(c, list) else ()

    parts = (map(corner, part) for part in _get(found, "parts", list) or () if isinstance(part, list))
    corners = tuple(tuple((c[0], c[1]) for c in part if len(c) == 2) for part in parts)
    return Polygon(_get(found, "label", str) or "", corners, _get(found, "image", int) or 0)


def _box(box: Mapping[str, Any]) -> Box | Point:
    def number(key: str) -> float:
        found = box.get(key)
        return float(found) if isinstance(found, (int, float)) else 0.0

    label, image = _get(box, "label", str) or "", _get(box, "image", int) or 0
    return Box(label, *map(number, ("x1", "y1", "x2", "y2")), image) if "x1" in box else Point(label, number("x"), number("y"), image)


# -- the model ------------------------------------------------------------------------------------------------------------


class RemoteModel:
    """What the chat uses of a Model, of a server's. What only a model in this process has is refused in words."""

    sampling_defaults: dict[str, Any] = {}                   # the server has them, and follows them
    stop_defaults: tuple[str, ...] = ()
    system_default = ""

    def __init__(self, server: Server, name: str, n_ctx: int | None = None, sees: bool = True):
        self.server, self.plan, self._known = server, RemotePlan(name, server.url, n_ctx), n_ctx is not None
        self.media = self if sees else None
        self.file = SimpleNamespace(path=name, metadata={"tokenizer.chat_template": ""})
        self.config = SimpleNamespace(n_ctx_train=n_ctx or 0)
        self.stats = {"prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0}
        self._urls: dict[bytes, str] = {}                    # of pictures that were sent, by their digests

    @property
    def n_ctx(self) -> int | None:
        """Size of the context; None where the server does not say."""
        return self.plan.n_ctx

    def chat(self, messages: Sequence[dict[str, Any]], stream: bool = True, max_tokens: int | None = None, stop: Sequence[str] | None = None,
             think: Any = None, format: Any = None, tools: Sequence[dict[str, Any]] | None = None, **sampling: Any) -> RemoteStream:
        """Ask. Returns when the server begins to answer. Raises: RequestError, ContextOverflowError, BusyError."""
        seen: list[Seen] = []
        body: dict[str, Any] = {"model": self.plan.model, "messages": [self._message(m, seen) for m in messages], "stream": True,
                                "stream_options": {"include_usage": True}, **sampling}
        body |= {name: value for name, value in (("max_tokens", max_tokens), ("stop", stop), ("tools", tools), ("think", think)) if value is not None}
        if isinstance(think, str) or think is False:         # as OpenAI has it
            body["reasoning_effort"] = think or "none"
        if format is not None:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": format}}
        path = "/v1/chat/completions"
        return RemoteStream(self.server.open(path, body), self.server.url + path, self.stats, seen, self._learn)

    def _learn(self) -> None:
        """Ask once more how large the context is: a server may have loaded the model for the first answer."""
        if not self._known:
            self._known, self.plan.n_ctx = True, _context(self.server, {"id": self.plan.model})
            self.config.n_ctx_train = self.plan.n_ctx or 0

    def _message(self, message: dict[str, Any], seen: list[Seen]) -> dict[str, Any]:
        content = message["content"]
        return message if isinstance(content, str) else {**message, "content": [self._part(part, seen) for part in content]}

    def _part(self, part: dict[str, Any], seen: list[Seen]) -> dict[str, Any]:
        """Return a part as it is sent: a picture as a data URL, with the settings of the processor beside it."""
        if part["type"] == "text":
            return part
        if part["type"] != "image":
            raise RequestError(f"{part['name']}: a server is sent pictures, but no videos")
        picture = part["image"]
        seen.append(Seen("image", picture.size))
        if picture.digest not in self._urls:
            self._urls[picture.digest] = data_url(picture)
        return {"type": "image_url", "image_url": {"url": self._urls[picture.digest]}, **picture.options}

    def reset(self) -> None:
        """Forget the pictures that were sent; what the server keeps of a conversation is its own."""
        self._urls.clear()

    @property
    def template(self) -> Any:
        """The server's chat template, if it shows it. Raises: RequestError."""
        source = _get(self.server.asked("/api/show", {"model": self.plan.model}), "template", str)
        if source is None:
            raise RequestError(f"{self.server.url} does not show its chat template")
        return SimpleNamespace(source=source)

    def chat_ids(self, messages: Sequence[dict[str, Any]], tools: Any = None) -> list[int]:
        """Refuse: only the server counts tokens. Raises: RequestError."""
        raise RequestError(f"only an answer says how many tokens {self.server.url} counts: /set keep latest works with a model of this process")

    def stream(self, prompt: str, **settings: Any) -> Any:
        """Refuse: a server is asked in messages. Raises: RequestError."""
        raise RequestError("a server answers through its chat template: leave --raw out")

    def save(self, path: Any, **settings: Any) -> int:
        """Refuse: what is computed is the server's. Raises: RequestError."""
        raise RequestError(f"/save {path}: what is computed of the conversation is on the server; a model of this process can be saved")

    def restore(self, path: Any) -> int:
        """Refuse as `save` does. Raises: RequestError."""
        raise RequestError(f"/load {path}: a server takes no saved conversation; start with the model itself")


def data_url(picture: Image) -> str:
    """Return a picture as a data URL: its pixels as they are, in PNG."""
    import PIL.Image

    content = io.BytesIO()
    PIL.Image.fromarray(picture.pixels).save(content, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def connect(url: str, name: str | None, key: str | None) -> RemoteModel:
    """Find a model of a server by its name, or the beginning of just one; without a name the only one.

    Raises: RequestError where there is none, or several.
    """
    server = Server(url, key)
    listed = server.json("/v1/models")
    entries = [entry for entry in _get(listed, "data", list) or () if _get(entry, "id", str)]
    names = [entry["id"] for entry in entries]
    if not names:
        raise RequestError(f"{server.url}: it serves no model")
    if name is None and len(names) > 1:
        raise RequestError(f"{server.url}: it serves several models, name one: {_few(names)}")
    begun = [n for n in names if n.casefold().startswith((name or "").casefold())]
    found = name if name in names else begun[0] if len(begun) == 1 else None
    if found is None:
        several = f"; several begin so: {_few(begun)}" if begun else nearest(name or "", names) or f"; there are {_few(names)}"
        raise RequestError(f"{server.url}: it serves no model {name}{several}")
    abilities = _get(server.asked("/api/show", {"model": found}), "capabilities", list)
    return RemoteModel(server, found, _context(server, entries[names.index(found)]), abilities is None or "vision" in abilities)


def _context(server: Server, entry: Mapping[str, Any]) -> int | None:
    """Return the size of a model's context, if the server says it in one of the ways that servers have."""
    if n := _get(entry, "max_model_len", int):
        return n
    for held in _get(server.asked("/api/ps"), "models", list) or ():
        if entry["id"] in (_get(held, "name", str), _get(held, "model", str)) and (n := _get(held, "context_length", int)):
            return n
    return _get(_get(server.asked("/props"), "default_generation_settings", dict), "n_ctx", int)


def refuse_local(options: Mapping[str, bool]) -> None:
    """Refuse options about a model in this process; `options`: whether each was given. Raises: RequestError."""
    for option, given in options.items():
        if given:
            raise RequestError(f"{option} is about a model in this process; with --server it is the server that decides")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
