"""Scores of documents for a query: /v1/rerank, in the form that Jina's and Cohere's interfaces and llama.cpp's server share."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pyengine.server import openai, replies
from pyengine.server.fields import FieldError, Fields
from pyengine.server.models import Models

MOST_DOCUMENTS = 2048                # of one request


def routes(models: Models) -> list[Route]:
    """Return the routes."""
    async def ranked(request: Request) -> Response:
        fields = await replies.read(request)
        query, documents = fields.text("query"), _documents(fields)
        top = fields.whole("top_n", len(documents), 1) or len(documents)
        shown = fields.flag("return_documents", False)
        served = await replies.using(request, models, fields.text("model", None))
        scores, n_tokens = await replies.apart(lambda: served.model.ranked(query, documents))
        order = sorted(range(len(documents)), key=lambda i: -float(scores[i]))[:top]
        found = [{"index": i, "relevance_score": float(scores[i]), **({"document": {"text": documents[i]}} if shown else {})} for i in order]
        return JSONResponse({"model": served.name, "object": "list", "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens}, "results": found})

    return [Route(path, replies.guarded(ranked, openai.failed), methods=["POST"]) for path in ("/v1/rerank", "/rerank", "/v1/reranking", "/reranking")]


def _documents(fields: Fields) -> list[str]:
    """Return the documents: texts, or objects with a text. Raises: FieldError."""
    given: list[Any] = fields.items("documents")
    if not given or len(given) > MOST_DOCUMENTS:
        raise FieldError("documents", f"must be a list of 1 to {MOST_DOCUMENTS} texts")
    return [Fields(one, f"documents[{i}].").text("text") if isinstance(one, dict) else _text(one, i) for i, one in enumerate(given)]


def _text(given: Any, i: int) -> str:
    if not isinstance(given, str):
        raise FieldError(f"documents[{i}]", "must be a text, or an object with a text")
    return given
