"""llama.cpp's interface: tokens, templates, completions and infill in its own form (tools/server/README.md of that project)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import pyengine
from pyengine.chat.reply.deltas import Delta
from pyengine.engine.loop import Handle
from pyengine.errors import PyEngineError, RequestError
from pyengine.server import replies
from pyengine.server.fields import FieldError, Fields, parse
from pyengine.server.infill import laid_out
from pyengine.server.models import Models, Served
from pyengine.server.openai import failed
from pyengine.server.streams import encoded, event, Script, SSE, Stream

MOST_FILES = 256                     # of input_extra
_NAMES = {"format": "json_schema"}
_NOT_HERE = {"n_probs": "give logprobs to /v1/completions", "post_sampling_probs": "there are none of them", "return_tokens": "the tokens are not given back",
             "samplers": "the order of the sampler's steps is fixed", "t_max_predict_ms": "there is no such limit of one request",
             "multimodal_data": "give pictures to /v1/chat/completions", "image_data": "give pictures to /v1/chat/completions"}


def routes(models: Models) -> list[Route]:
    """Return the routes of llama.cpp's server."""
    def post(path: str, endpoint: Any) -> Route:
        return Route(path, replies.guarded(endpoint, failed), methods=["POST"])

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def properties(request: Request) -> Response:
        return JSONResponse(_properties(await replies.using(request, models, request.query_params.get("model"))))

    async def tokenize(request: Request) -> Response:
        fields = await replies.read(request)
        return JSONResponse({"tokens": _tokens(await _one(request, models, fields), fields)})

    async def detokenize(request: Request) -> Response:
        fields = await replies.read(request)
        return JSONResponse({"content": (await _one(request, models, fields)).model.detokenize(fields.items("tokens"))})

    async def template(request: Request) -> Response:
        fields = await replies.read(request)
        served = await _one(request, models, fields)
        return JSONResponse({"prompt": await replies.apart(lambda: _rendered(served, fields))})

    async def complete(request: Request) -> Response:
        fields = await replies.read(request)
        served = await _one(request, models, fields)
        return await _answer(request, fields, served, _prompt(fields.values.get("prompt")))

    async def infill(request: Request) -> Response:
        fields = await replies.read(request)
        served = await _one(request, models, fields)
        prefix = fields.text("input_prefix", "") + fields.text("prompt", "")
        files = _files(fields.items("input_extra", []))
        return await _answer(request, fields, served, laid_out(served.model.tokenizer, prefix, fields.text("input_suffix", ""), "input_suffix", files))

    async def adapters(request: Request) -> Response:
        sent = parse(b'{"lora": ' + await replies.body(request) + b"}") if request.method == "POST" else None
        served = await replies.using(request, models, request.query_params.get("model"))
        if sent is not None:
            try:
                served.model.use_adapters(replies.adapters(sent) or {})
            except RequestError as error:
                raise replies.renamed(error) from error
        return JSONResponse([{"id": i, "path": name, "scale": scale} for i, (name, scale) in enumerate(served.model.adapters.items())])

    async def slots(request: Request) -> Response:
        said = "slots are not shown: they would tell what others ask"
        return JSONResponse({"error": {"code": 501, "message": said, "type": "not_supported_error"}}, 501)

    return [Route("/health", health), Route("/v1/health", health), Route("/props", replies.guarded(properties, failed)), post("/tokenize", tokenize),
            post("/detokenize", detokenize), post("/apply-template", template), post("/completion", complete), post("/completions", complete),
            post("/infill", infill), Route("/lora-adapters", replies.guarded(adapters, failed), methods=["GET", "POST"]), Route("/slots", slots), Route("/slots/{number}", slots, methods=["GET", "POST"])]


async def _one(request: Request, models: Models, fields: Fields) -> Served:
    """Return the model that a request names, or the only one."""
    return await replies.using(request, models, fields.text("model", None))


def _properties(served: Served) -> dict[str, Any]:
    """Return what clients ask of a model; paths of this machine are not told."""
    model, tokenizer = served.model, served.model.tokenizer
    texts = {name: "" if i is None else tokenizer.piece(i).decode("utf-8", "replace") for name, i in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))}
    return {"default_generation_settings": {"n_ctx": model.n_ctx, "params": dict(model.sampling_defaults)}, "total_slots": model.n_seq, "model_alias": served.name,
            "model_path": served.name, "chat_template": model.template.source, "modalities": {"vision": model.media is not None, "audio": False}, **texts,
            "build_info": f"pyengine-{pyengine.__version__}", "is_sleeping": False}


def _tokens(served: Served, fields: Fields) -> list[Any]:
    """Return a text's tokens: ids, or with their texts; a token that is no whole character as its bytes."""
    tokenizer = served.model.tokenizer
    ids = tokenizer.tokenize(fields.text("content"), fields.flag("add_special"), fields.flag("parse_special", True))
    if not fields.flag("with_pieces"):
        return ids
    found = []
    for i in ids:
        piece: Any = tokenizer.piece(i)
        try:
            found.append({"id": i, "piece": piece.decode()})
        except UnicodeDecodeError:
            found.append({"id": i, "piece": list(piece)})
    return found


def _rendered(served: Served, fields: Fields) -> str:
    """Return a conversation in the model's format, ready for the answer; pictures as the template marks them."""
    from pyengine.chat.checks import check_messages, check_tools
    from pyengine.engine.prompts import template_options
    from pyengine.media.messages import split

    template, tools = served.model.template, fields.items("tools", None)
    messages, _ = split(fields.items("messages"))
    check_messages(messages, template.source)
    check_tools(tools)
    options = template_options(fields.object("chat_template_kwargs", None))
    return template.render(messages, tools=tools, add_generation_prompt=fields.flag("add_generation_prompt", True), variables=options)


def _prompt(prompt: Any) -> Any:
    """Return a prompt: a text, or texts and token ids in a list. Raises: FieldError for anything else."""
    if isinstance(prompt, str) or isinstance(prompt, list) and all(isinstance(p, (str, int)) and not isinstance(p, bool) for p in prompt):
        return prompt
    raise FieldError("prompt", "must be a text, or a list of texts and token ids; several prompts go to /v1/completions")


def _files(extra: Sequence[Any]) -> list[tuple[str, str]]:
    """Return names and texts of other files. Raises: FieldError."""
    if len(extra) > MOST_FILES:
        raise FieldError("input_extra", f"at most {MOST_FILES} files are taken")
    for i, one in enumerate(extra):
        if not isinstance(one, dict) or not isinstance(one.get("text"), str) or not isinstance(one.get("filename", ""), str):
            raise FieldError(f"input_extra[{i}]", 'must be an object as {"filename": text, "text": text}')
    return [(one.get("filename") or "tmp", one["text"]) for one in extra]


def _settings(fields: Fields) -> dict[str, Any]:
    fields.refuse(_NOT_HERE, harmless=(False, 0, -1, "", [], {}))
    wanted = replies.sampling(fields)
    if isinstance(wanted.get("seed"), int) and wanted["seed"] in (-1, 2**32 - 1):
        del wanted["seed"]                                   # another one each time
    n = fields.whole("n_predict", fields.whole("max_tokens", -1, -1), -2)
    form = fields.given({"grammar": "grammar", "json_schema": "format", "regex": "regex"})
    return {**wanted, **form, "max_tokens": None if n < 0 else n, "stop": fields.stops()}


async def _answer(request: Request, fields: Fields, served: Served, prompt: Any) -> Response:
    """Continue a prompt, at once or as server-sent events."""
    wanted, client, stream = _settings(fields), replies.client_of(request), fields.flag("stream")
    handle = await replies.submit(lambda: served.submit(client, prompt=prompt, **wanted), _NAMES)
    if stream:
        return Stream(_Events(handle, served), [handle], SSE)
    await replies.finished(request, [handle])
    return JSONResponse({"index": 0, "content": str(handle.result(0)), **_end(handle, served)})


class _Events(Script):
    """How a stream is written."""

    def __init__(self, handle: Handle, served: Served):
        self._handle, self._served = handle, served

    def piece(self, i: int, delta: Delta) -> str:
        """Return a piece of the content; a completion has no other ones."""
        r = self._handle.report
        return event({"index": 0, "content": delta.text, "tokens": [], "stop": False, "id_slot": -1, "tokens_predicted": len(r.tokens), "tokens_evaluated": r.n_prompt})

    def end(self) -> str:
        """Return how the answer ended."""
        return event({"index": 0, "content": "", **_end(self._handle, self._served)})

    def fail(self, error: PyEngineError) -> str:
        """Return an error as llama.cpp's server does: in a field of its own."""
        return f"error: {encoded(failed(error, replies.status_of(error))['error'])}\n\n"


def _end(handle: Handle, served: Served) -> dict[str, Any]:
    """Return how an answer ended."""
    r = handle.report
    n, new, prompt, seconds = len(r.tokens), r.n_prompt - r.n_cached, r.prompt_seconds, r.seconds
    kind = "word" if r.stopped_by else {"stop": "eos", "length": "limit"}.get(r.finish, "none")
    return {"tokens": [], "id_slot": -1, "stop": True, "model": served.name, "tokens_predicted": n, "tokens_evaluated": r.n_prompt, "tokens_cached": r.n_prompt + n,
            "truncated": False, "stop_type": kind, "stopping_word": r.stopped_by or "",
            "timings": {"cache_n": r.n_cached, "draft_n": r.n_drafted, "draft_n_accepted": r.n_accepted,
                        "prompt_n": new, "prompt_ms": prompt * 1e3, "prompt_per_second": new / prompt if prompt else None,
                        "predicted_n": n, "predicted_ms": seconds * 1e3, "predicted_per_second": n / seconds if seconds else None}}
