"""The target "server": requests with damaged bodies, to every address of the HTTP server, in this process."""

from __future__ import annotations

import asyncio
import base64
import json
from functools import cached_property
from random import Random
from typing import Any

import corpus
import targets
from mutators import FLOATS, NUMBERS, spoilt_bytes, spoilt_json, TEXTS

SECONDS = 20.0                                               # of the clock: a request that takes longer hangs
MOST_TOKENS = 3
HEADERS = (("host", "localhost"), ("content-type", "application/json"))
PATHS = ("/..%2f..%2fetc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models/..%2f..%2fetc%2fpasswd", "/api/blobs/../../etc/passwd", "//", "/v1/models/%00", "/v1/models/%ff")
METHODS = ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "get", "X" * 200)
TELLTALE = ("Traceback (most recent call last)", "root:x:0:", "/pyengine/server/", "site-packages")
# What requests to each address may say beside what is in the seeds.
SETTINGS: dict[str, Any] = {
    "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9, "repeat_penalty": 1.1, "repeat_last_n": 5, "presence_penalty": 0.1,
    "frequency_penalty": 0.1, "seed": 1, "stop": ["x"], "n": 2, "logprobs": 1, "logit_bias": {"3": 1.0}, "stream": True, "stream_options": {"include_usage": True},
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}, "echo": True, "suffix": "y", "best_of": 1,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], "tool_choice": "auto", "top_logprobs": 2, "user": "me",
    "chat_template_kwargs": {"a": 1}, "raw": True, "system": "be brief", "format": "json", "think": True, "keep_alive": "5m", "context": [1, 2], "images": [],
    "options": {"num_predict": 2, "temperature": 0, "stop": ["x"], "num_ctx": 32, "seed": -1}, "with_pieces": True, "add_special": True, "thinking": {"type": "enabled"},
    "stop_sequences": ["x"], "metadata": {}, "reasoning_effort": "low", "modalities": ["text"], "verbose": True, "max_completion_tokens": 2, "n_probs": 1}


def seeds() -> list[dict[str, Any]]:
    """Right requests: method, path, body."""
    url = "data:image/png;base64," + base64.b64encode(next(corpus.pictures())).decode()
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"},
                {"role": "user", "content": [{"type": "text", "text": "and"}, "now"]}]
    seen = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]}]
    source = {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]}
    calls = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]}, {"role": "tool", "content": "3", "tool_call_id": "1"}]
    n, model, options = {"max_tokens": MOST_TOKENS}, {"model": "text"}, {"options": {"num_predict": MOST_TOKENS}}
    posts: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {**model, "messages": messages, **n}), ("/v1/chat/completions", {"model": "demo", "messages": seen, **n}),
        ("/v1/chat/completions", {**model, "messages": calls, **n}), ("/v1/completions", {**model, "prompt": "hello", **n}),
        ("/v1/completions", {**model, "prompt": [[1, 2], [3]], "echo": True, "logprobs": 1, "max_tokens": 0}),
        ("/v1/messages", {**model, "messages": messages[1:], "system": "be brief", **n}),
        ("/v1/messages", {"model": "demo", "messages": [{"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": "what?"}]}], **n}),
        ("/v1/messages/count_tokens", {**model, "messages": messages[1:]}), ("/v1/responses", {**model, "input": "hello", "max_output_tokens": MOST_TOKENS}),
        ("/v1/embeddings", {**model, "input": ["hello"]}), ("/api/chat", {**model, "messages": messages[:3], **options}),
        ("/api/chat", {"model": "demo", "messages": [{"role": "user", "content": "what?", "images": [source["data"]]}], **options}),
        ("/api/generate", {**model, "prompt": "hello", **options}), ("/api/show", model), ("/api/embed", {**model, "input": "hello"}), ("/api/pull", model),
        *((f"/api/{name}", model) for name in ("push", "create", "copy", "delete", "embeddings", "blobs/sha256:0")),
        ("/tokenize", {**model, "content": "hello"}), ("/detokenize", {**model, "tokens": [1, 2]}), ("/apply-template", {**model, "messages": messages}),
        ("/completion", {**model, "prompt": ["hello", 3], "n_predict": MOST_TOKENS}), ("/infill", {**model, "input_prefix": "a", "input_suffix": "b", "n_predict": MOST_TOKENS})]
    gets = ("/", "/v1/models", "/v1/models/text", "/api/tags", "/api/ps", "/api/version", "/health", "/props", "/metrics", "/slots")
    return [*({"method": "POST", "path": path, "body": body} for path, body in posts), *({"method": "GET", "path": path, "body": {}} for path in gets)]


def limited(value: Any) -> Any:
    """The same body with answers kept short, so that time is spent on what is damaged."""
    if not isinstance(value, dict):
        return value
    out = dict(value)
    for name in ("max_tokens", "max_completion_tokens", "n_predict", "max_output_tokens"):
        if out.get(name) is None or isinstance(out[name], (int, float)) and not -1 <= out[name] <= 50:
            out[name] = MOST_TOKENS
    if isinstance(out.get("options"), dict) and isinstance(out["options"].get("num_predict", -1), (int, float)):
        out["options"] = {**out["options"], "num_predict": MOST_TOKENS}
    return out


class Service(targets.Target):
    """One request; whatever comes, the answer is one, in time, and no error of the server's."""

    name = "server"
    seconds = 8.0
    right = False                                            # some addresses refuse everything

    @cached_property
    def seeds(self) -> list[bytes]:
        return [json.dumps(s).encode() for s in seeds()]

    @cached_property
    def app(self) -> Any:
        from pyengine.server.app import application
        from pyengine.server.models import load

        text = self.folder / "text.gguf"
        text.write_bytes(corpus.model_specs()[0].write())
        demo = targets.ROOT / "converters" / "demo" / "weights" / "demo-q8_0.gguf"
        return application([load(str(text), n_ctx=64, n_threads=1, n_batch=16, n_seq=2), load(str(demo), n_ctx=256, n_threads=1, n_seq=2, images=(64, 64, 2))])

    def spoilt(self, rng: Random, data: bytes) -> bytes:
        asked = json.loads(data)
        body = asked["body"]
        for _ in range(rng.randrange(3)):
            name = rng.choice(list(SETTINGS))
            body[name] = SETTINGS[name]
        if rng.random() < 0.85 and isinstance(body, dict):
            kept = dict(body)
            if rng.random() < 0.5 and kept:                  # damage of one field, so that the others are looked at
                name = rng.choice(list(kept))
                if name != "model":
                    kept[name] = spoilt_json(rng, kept[name])
                body = kept
            else:
                body = spoilt_json(rng, kept)
        raw = json.dumps(limited(body)).encode("utf-8", "surrogatepass")
        match rng.randrange(12):
            case 0:
                raw = spoilt_bytes(rng, raw, words=[json.dumps(t).encode() for t in TEXTS] + [str(x).encode() for x in (*NUMBERS, *FLOATS)])
            case 1:
                raw = rng.choice((b"", b"null", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 10_000, b"\xff\xfe", b"\xef\xbb\xbf{}", raw + b"{}", raw.decode().encode("utf-16"),
                                  raw[:-1] + b',"model":"text","model":1e999}', raw.replace(b"hello", b"\xed\xa0\x80"), raw.replace(b"hello", b"\\ud83d\\u0000")))
        path, method = asked["path"], asked["method"]
        if rng.random() < 0.05:
            path = rng.choice(PATHS)
        if rng.random() < 0.05:
            method = rng.choice(METHODS)
        return json.dumps({"method": method, "path": path, "raw": raw.decode("latin-1")}).encode()

    def run(self, data: bytes) -> None:
        from pyengine.errors import PyEngineError
        from pyengine.server import replies

        faults: list[Exception] = []
        replies.unexpected = faults.append
        asked = json.loads(data)
        raw = asked["raw"].encode("latin-1") if "raw" in asked else json.dumps(asked["body"]).encode()
        status, answer = asyncio.run(asyncio.wait_for(ask(self.app, asked["method"], asked["path"], raw), SECONDS))
        if faults:
            raise faults[0]
        text = answer.decode("utf-8")
        assert status < 500 or status in (501, 503), f"{status}: {text[:500]}"
        assert "an error of the server" not in text, text[:500]
        for part in TELLTALE:
            assert part not in text or part.encode() in raw, text[:500]
        if status >= 400 and asked["method"] != "HEAD":
            assert "error" in json.loads(text), text[:500]
            raise PyEngineError(text[:200])


async def ask(app: Any, method: str, path: str, raw: bytes) -> tuple[int, bytes]:
    """Ask an application; returns the status and the whole answer."""
    from urllib.parse import unquote

    parts, begun = [raw[: len(raw) // 2], raw[len(raw) // 2 :]], []
    answer = bytearray()
    done = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if parts:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
        await done.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            begun.append(message["status"])
        else:
            answer.extend(message.get("body", b""))

    headers = [(k.encode(), v.encode()) for k, v in (*HEADERS, ("content-length", str(len(raw))))]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "path": unquote(path, errors="replace"),
             "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers, "client": ("127.0.0.1", 1), "server": ("localhost", 8080)}
    await app(scope, receive, send)
    done.set()
    return begun[0], bytes(answer)
