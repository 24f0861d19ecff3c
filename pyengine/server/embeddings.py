"""Embeddings: OpenAI's /v1/embeddings, Ollama's /api/embed and the older /api/embeddings.

A list is queued in parts, so that one request does not fill the queue; its texts are read beside what others ask.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pyengine.engine.loop import Handle
from pyengine.engine.vectors import Reading
from pyengine.errors import ContextOverflowError, RequestError
from pyengine.server import ollama, openai, replies
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
        size = fields.whole("dimensions", None, 1, served.model.config.d_model)
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


def _inputs(fields: Fields) -> list[Any]:
    """Return OpenAI's inputs: a text, token ids, or a list of either. Raises: FieldError."""
    given = fields.values.get("input")
    if given is None:
        raise FieldError("input", "is missing")
    found = [given] if isinstance(given, str) or _is_ids(given) else given
    if not isinstance(found, list) or not all(isinstance(x, str) or _is_ids(x) for x in found):
        raise FieldError("input", "must be a text, a list of token ids, or a list of those")
    if not found or not all(found):
        raise FieldError("input", "is empty, or has an empty text")
    if len(found) > MOST_INPUTS:
        raise FieldError("input", f"at most {MOST_INPUTS} are taken at once, got {len(found)}")
    return found


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
    found, client, n_tokens = [], replies.client_of(request), 0
    pooling = served.model.vectors.pooling()
    for start in range(0, len(inputs), QUEUED):
        queued = await replies.apart(partial(_queue, served, client, inputs[start : start + QUEUED], start, pooling, cut))
        await replies.finished(request, [handle for _, handle in queued])
        found += [reading.vector(normalize, size) for reading, _ in queued]
        n_tokens += sum(handle.report.n_prompt for _, handle in queued)
    return _Found(found, n_tokens)


def _queue(served: Served, client: str, inputs: Sequence[Any], first: int, pooling: str, cut: bool) -> list[tuple[Reading, Handle]]:
    """Queue inputs, the first of which has number `first`: all of them or, if one is refused, none. Raises: what refuses it."""
    vectors, loop, readings = served.model.vectors, served.model.loop, []
    for i, item in enumerate(inputs, first):
        try:
            readings.append(vectors.reading(item, pooling, cut))
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
