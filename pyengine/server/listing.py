"""Lists of models below /v1: in OpenAI's form, or in Anthropic's for its clients, which say so in a header."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pyengine.server import anthropic, openai, replies
from pyengine.server.models import Models, Offer, Served

Endpoint = Callable[[Request], Any]


def routes(models: Models) -> list[Route]:
    """Return the routes below /v1/models."""
    async def listed(request: Request) -> Response:
        await replies.apart(models.look)
        shown = [_shown(s, request) for s in models.all]
        if not _is_anthropics(request):
            return JSONResponse({"object": "list", "data": shown})
        ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
        return JSONResponse({"data": shown, "has_more": False, **ends})

    async def one(request: Request) -> Response:
        return JSONResponse(_shown(await replies.apart(lambda: models.find(request.path_params["name"])), request))

    return [Route("/v1/models", _guarded(listed)), Route("/v1/models/{name:path}", _guarded(one))]


def _guarded(endpoint: Endpoint) -> Endpoint:
    ours, theirs = (replies.guarded(endpoint, failed) for failed in (openai.failed, anthropic.failed))

    async def answer(request: Request) -> Any:
        return await (theirs if _is_anthropics(request) else ours)(request)

    return answer


def _is_anthropics(request: Request) -> bool:
    return "anthropic-version" in request.headers            # each of its requests has it (docs.anthropic.com/en/api/versioning)


def _shown(model: Offer | Served, request: Request) -> dict[str, Any]:
    if not _is_anthropics(request):
        return {"id": model.name, "object": "model", "created": int(model.modified), "owned_by": "pyengine"}
    context = {"max_input_tokens": model.model.n_ctx, "max_tokens": model.model.n_ctx} if isinstance(model, Served) else {}
    return {"id": model.name, "type": "model", "display_name": model.name, "created_at": replies.moment(int(model.modified)), "lifecycle": "active", **context}
