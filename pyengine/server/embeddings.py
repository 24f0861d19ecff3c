"""Embeddings: OpenAI's /v1/embeddings, of pictures too, Ollama's /api/embed and the older /api/embeddings.

A list is queued in parts, so that one request does not fill the queue; its texts are read beside what others ask. A model of encoders takes each
part at once.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pyengine.engine.loop import Handle
from pyengine.engine.prompts import media_of
from pyengine.engine.towers import EncoderModel
from pyengine.engine.vectors import Reading, unit
from pyengine.errors import ContextOverflowError, RequestError
from pyengine.server import ollama, openai, replies
from pyengine.server.allowed import allowed
from pyengine.server.fields import FieldError, Fields
from pyengine.server.models import Models, Served

MOST_INPUTS = 2048                   # of one request: OpenAI's limit
QUEUED = 64                          # of those, so many are queued at a time


class _Found(NamedTuple):
    """Vectors of a request's inputs, and the tokens of these."""

    vectors: list[np.ndarray]
    n_tokens: int


def routes(models: Models) -> list[Route]:
    """Return the routes of all interfaces."""
    async def created(request: Request) -> Response:
        fields = await replies.read(request)
        served = await replies.using(request, models, fields.text("model", None))
        size = fields.whole("dimensions", None, 1, _width(served))
        write = _written(fields.text("encoding_format", "float"))
        found = await _read(request, served, _inputs(fields), size=size)
        usage = {"prompt_tokens": found.n_tokens, "total_tokens": found.n_tokens}
        return await replies.apart(lambda: JSONResponse({
            "object": "list", "data": [{"object": "embedding", "index": i, "embedding": write(v)} for i, v in enumerate(found.vectors)],
            "model": served.name, "usage": usage}))

    async def embedded(request: Request) -> Response:
        began = time.perf_counter()
        fields = await replies.read(request)
        served = await replies.using(request, models, fields.text("model", None), ollama.keep_alive(fields))
        ollama.check_context(Fields(fields.object("options", {})), served)
        size = fields.whole("dimensions", 0) or None
        found = await _read(request, served, _texts(fields), cut=fields.flag("truncate", True), size=size)
        return await replies.apart(lambda: JSONResponse({
            "model": served.name, "embeddings": [v.tolist() for v in found.vectors], "total_duration": int((time.perf_counter() - began) * 1e9),
            "load_duration": int(replies.waited(request) * 1e9), "prompt_eval_count": found.n_tokens}))

    async def embedded_once(request: Request) -> Response:
        fields = await replies.read(request)
        served = await replies.using(request, models, fields.text("model", None), ollama.keep_alive(fields))
        ollama.check_context(Fields(fields.object("options", {})), served)
        text = fields.text("prompt", "")                     # without one, the model is loaded, as everywhere in this interface
        found = await _read(request, served, [text] if text else [], normalize=False)
        return JSONResponse({"embedding": found.vectors[0].tolist() if text else []})

    return [Route("/v1/embeddings", replies.guarded(created, openai.failed), methods=["POST"]),
            Route("/api/embed", replies.guarded(embedded, ollama.failed), methods=["POST"]),
            Route("/api/embeddings", replies.guarded(embedded_once, ollama.failed), methods=["POST"])]


@dataclass(frozen=True)
class _Shown:
    """A picture among the inputs: an address, a data URL or base64."""

    source: str
    url: bool

    def opened(self) -> Any:
        """Return its pixels. Raises: ImageError."""
        return media_of(self.source, "image", allowed().media, self.url)


def _inputs(fields: Fields) -> list[Any]:
    """Return the inputs: OpenAI's, a text, token ids, or a list of either; in a list pictures too, in the forms of a message's parts or of Jina's
    interface. Raises: FieldError."""
    given = fields.values.get("input")
    if given is None:
        raise FieldError("input", "is missing")
    found = [given] if isinstance(given, (str, dict)) or _is_ids(given) else given
    if not isinstance(found, list):
        raise FieldError("input", "must be a text, a list of token ids, or a list of those and of pictures")
    if not found or "" in found:
        raise FieldError("input", "is empty, or has an empty text")
    if len(found) > MOST_INPUTS:
        raise FieldError("input", f"at most {MOST_INPUTS} are taken at once, got {len(found)}")
    inputs = [_part(x, f"input[{i}]") if isinstance(x, dict) else x for i, x in enumerate(found)]
    if not all(isinstance(x, (str, _Shown)) or _is_ids(x) for x in inputs):
        raise FieldError("input", "must be a text, a list of token ids, or a list of those and of pictures")
    most = allowed().media.most
    if most is not None and sum(isinstance(x, _Shown) for x in inputs) > most:
        raise FieldError("input", f"at most {most} pictures are taken at once")
    return inputs


def _part(given: dict[str, Any], where: str) -> str | _Shown:
    """Return a text or a picture of {"text": ..}, {"image": ..}, or {"type": "text" | "image_url", ..}. Raises: FieldError."""
    fields = Fields(given, f"{where}.")
    if "text" in given:
        return fields.text("text")
    if isinstance(given.get("image_url"), dict):
        return _Shown(Fields(given["image_url"], f"{where}.image_url.").text("url"), True)
    for name in ("image_url", "image"):
        if name in given:
            return _Shown(fields.text(name), name == "image_url")
    raise FieldError(where, 'must be a text, token ids, {"text": ..}, {"image": ..} or {"type": "image_url", "image_url": {"url": ..}}')


def _texts(fields: Fields) -> list[str]:
    """Return Ollama's inputs: a text or a list of texts; none for a text that is empty. Raises: FieldError."""
    given = fields.values.get("input")
    found = ([given] if given else []) if isinstance(given, str) else [] if given is None else given
    if not isinstance(found, list) or not all(isinstance(x, str) for x in found):
        raise FieldError("input", "must be a text or a list of texts")
    return found


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)


def _written(form: str) -> Any:
    """Return what writes a vector: numbers, or their bytes as float32, the lowest first, in base64. Raises: FieldError."""
    if form == "float":
        return np.ndarray.tolist
    if form == "base64":
        return lambda v: base64.b64encode(v.astype("<f4").tobytes()).decode()
    raise FieldError("encoding_format", "must be float or base64")


async def _read(request: Request, served: Served, inputs: Sequence[Any], cut: bool = False, normalize: bool = True,
                size: int | None = None) -> _Found:
    """Compute vectors of inputs; what a client that leaves asked for is cancelled.

    cut: shorten those that exceed the context; size: numbers that are kept of each, before it is given length 1.
    """
    before = served.model.prefixes.before(None)              # what the file puts before texts that are asked for without a prompt's name
    inputs = [before + x if isinstance(x, str) else x for x in inputs] if before else inputs
    if isinstance(served.model, EncoderModel):
        return await _encode(request, served.model, inputs, cut, normalize, size)
    found, client, n_tokens = [], replies.client_of(request), 0
    pooling = served.model.vectors.pooling()
    for start in range(0, len(inputs), QUEUED):
        queued = await replies.apart(partial(_queue, served, client, inputs[start : start + QUEUED], start, pooling, cut))
        await replies.finished(request, [handle for _, handle in queued])
        found += [reading.vector(normalize, size) for reading, _ in queued]
        n_tokens += sum(handle.report.n_prompt for _, handle in queued)
    return _Found(found, n_tokens)


async def _encode(request: Request, model: EncoderModel, inputs: Sequence[Any], cut: bool, normalize: bool, size: int | None) -> _Found:
    """Compute vectors by a model of encoders, some at a time, until the client leaves. Raises: ClientDisconnect, and what a model does."""
    found, n_tokens = [], 0

    def some(first: int) -> tuple[list[np.ndarray], int]:
        items, vectors, n = [], [], 0
        for i, item in enumerate(inputs[first : first + QUEUED], first):
            try:
                if isinstance(item, str) and model.towers.text is None:        # to the library it is the path of a picture
                    raise RequestError(f'{model.plan.model} reads pictures only: give one as {{"image": base64}}, to /v1/embeddings')
                items.append(item.opened() if isinstance(item, _Shown) else item)
            except (RequestError, ContextOverflowError) as error:
                raise type(error)(f"input[{i}]: {error}") from error
        for item, given in zip(items, model.read(items, cut, lambda i: f"input[{first + i}]")):
            x = model.vector(item, given)[:size]
            vectors.append((unit(x) if normalize else x).astype(np.float32))
            n += len(given.hidden)
        return vectors, n

    for first in range(0, len(inputs), QUEUED):
        vectors, n = await replies.apart(partial(some, first))
        found += vectors
        n_tokens += n
        if await request.is_disconnected():
            raise ClientDisconnect()
    return _Found(found, n_tokens)


def _width(served: Served) -> int:
    """Return the numbers of a vector."""
    model = served.model
    return max(t.d_out for t in model.towers.towers.values()) if isinstance(model, EncoderModel) else model.config.d_model


def _queue(served: Served, client: str, inputs: Sequence[Any], first: int, pooling: str, cut: bool) -> list[tuple[Reading, Handle]]:
    """Queue inputs, the first of which has number `first`: all of them or, if one is refused, none. Raises: what refuses it."""
    vectors, loop, readings = served.model.vectors, served.model.loop, []
    for i, item in enumerate(inputs, first):
        try:
            readings.append(vectors.reading(item.opened() if isinstance(item, _Shown) else item, pooling, cut))
        except (RequestError, ContextOverflowError) as error:
            raise type(error)(f"input[{i}]: {error}") from error
    queued: list[tuple[Reading, Handle]] = []
    try:
        for reading in readings:
            queued.append((reading, loop.submit(reading, client)))
    except BaseException:
        for _, handle in queued:
            handle.cancel()
        raise
    return queued
