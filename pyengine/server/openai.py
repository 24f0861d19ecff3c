"""OpenAI's interface: what chat completions and completions share (platform.openai.com/docs/api-reference).

Beside OpenAI's fields those of llama.cpp's server are taken: top_k, min_p, typical_p, repeat_penalty, repeat_last_n, xtc_probability ...
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pyengine.chat.reply.deltas import Delta
from pyengine.engine.loop import Handle
from pyengine.errors import ContextOverflowError, ModelNotFoundError, PyEngineError
from pyengine.server import replies
from pyengine.server.fields import FieldError, Fields
from pyengine.server.models import Models, Served
from pyengine.server.streams import encoded, event, Script, SSE, Stream

MOST_CHOICES = 16
MOST_LOGPROBS = 20                   # OpenAI's limit
_DONE = "data: [DONE]\n\n"

_NOT_HERE = {"functions": "give them as tools", "function_call": "give it as tool_choice", "audio": "no model here speaks", "prediction": "predicted outputs are not supported"}
_SEARCHES = {"web_search_options": "there is no web search"}        # asked for by an empty object too
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 408: "timeout_error", 413: "invalid_request_error", 500: "server_error",
          503: "server_error"}


def failed(error: BaseException, status: int) -> dict[str, Any]:
    """Return an error in OpenAI's form."""
    code = {ContextOverflowError: "context_length_exceeded", ModelNotFoundError: "model_not_found"}.get(type(error))
    code = "invalid_api_key" if status == 401 else code
    return {"error": {"message": str(error), "type": _KINDS.get(status, "invalid_request_error"),
                      "param": error.field if isinstance(error, FieldError) else None, "code": code}}


class Interface(Script):
    """What chat completions and completions have in common; a subclass reads the prompt and writes choices."""

    object = chunk = ""              # what a whole answer is called, and a piece of one
    prefix = ""
    limits: tuple[str, ...] = ()
    names: Mapping[str, str] = {}    # of the library's arguments, in this interface

    def __init__(self, models: Models):
        self.models = models

    async def reply(self, request: Request) -> Response:
        """Answer a request: at once, or as server-sent events."""
        fields = await replies.read(request)
        self.served = await replies.using(request, self.models, fields.text("model", None))
        fields.refuse(_NOT_HERE)
        fields.refuse(_SEARCHES, harmless=())
        n, stream = fields.whole("n", 1, 1, MOST_CHOICES), fields.flag("stream")
        self.usage = Fields(fields.object("stream_options", {})).flag("include_usage")
        wanted = self._request(fields)
        client = replies.client_of(request)
        handles: list[Handle] = []
        try:
            for prompt in self._prompts(fields):
                for i in range(n):
                    own = {**wanted, **prompt}
                    if "seed" in own and i:                  # the choices of one seed differ, and are the same each time
                        own["seed"] = (int(own["seed"]) + i) % 2**63
                    handles.append(await replies.submit(lambda own=own: self.served.submit(client, **own), self.names))
            self.head = {"id": replies.fresh(self.prefix), "object": self.object, "created": int(time.time()),
                         "model": self.served.name}
            self.handles, self.untold = handles, [replies.Untold(h, self.with_logprobs) for h in handles]
            if stream:
                return Stream(self, handles, SSE)
            await replies.finished(request, handles)
            return JSONResponse({**self.head, "choices": [self._choice(i, h) for i, h in enumerate(handles)], **_usage(handles)})
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise

    def _request(self, fields: Fields) -> dict[str, Any]:
        """Return the settings of an answer that do not depend on its prompt."""
        wanted = replies.sampling(fields)
        if isinstance(wanted.get("seed"), int) and not isinstance(wanted["seed"], bool):
            wanted["seed"] %= 2**64                          # clients send negative ones
        bias = fields.object("logit_bias", {})
        try:
            wanted["logit_bias"] = {int(token): value for token, value in bias.items()}
        except ValueError:
            raise FieldError("logit_bias", "its keys must be token ids") from None
        limits = [fields.whole(name, None) for name in self.limits]
        wanted["max_tokens"] = next((n for n in limits if n is not None), self._most)
        wanted["stop"] = fields.stops()
        wanted["logprobs"] = self._n_top(fields)
        return wanted

    def begin(self) -> str:
        """Lay out what all pieces have in common."""
        self.head = {**self.head, "object": self.chunk}
        self._opening = f"data: {encoded(self.head)[:-1]}, \"choices\": ["
        self.begun = [False] * len(self.handles)
        return ""

    def piece(self, i: int, delta: Delta) -> str:
        """Return a chunk with a piece of choice i."""
        choice = self._piece(i, delta, not self.begun[i])
        self.begun[i] = True
        return f"{self._opening}{encoded(choice)}]}}\n\n"

    def end(self) -> str:
        """Return the last chunk of each choice, usage where it is wanted, and [DONE]."""
        ends = [f"{self._opening}{encoded(self._end(i, handle))}]}}\n\n" for i, handle in enumerate(self.handles)]
        usage = f"{self._opening}], {encoded(_usage(self.handles))[1:]}\n\n" if self.usage else ""
        return "".join([*ends, usage, _DONE])

    def fail(self, error: PyEngineError) -> str:
        """Return the error, and [DONE]."""
        return event(failed(error, replies.status_of(error))) + _DONE

    def _logprobs(self, sampled: Sequence[Any]) -> list[dict[str, Any]]:
        return logprobs_of(self.served, sampled)


def logprobs_of(served: Served, sampled: Sequence[Any]) -> list[dict[str, Any]]:
    """Return tokens of an answer with their log-probabilities and those of the best ones."""
    def token(number: int, logprob: float) -> dict[str, Any]:
        piece = served.model.tokenizer.piece(number)
        return {"token": piece.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(piece)}

    return [{**token(s.token, s.logprob), "top_logprobs": [token(t, p) for t, p in s.top]} for s in sampled]


def _usage(handles: Sequence[Handle]) -> dict[str, Any]:
    """Return tokens by OpenAI's names, and seconds: prompts of several choices count once for each."""
    prompt = cached = made = thought = shown = known = drafted = taken = 0
    reading = writing = 0.0
    for handle in handles:
        r = handle.report
        prompt, cached, made, thought = prompt + r.n_prompt, cached + r.n_cached, made + len(r.tokens), thought + r.n_thinking
        reading, writing = reading + r.prompt_seconds, writing + r.seconds
        drafted, taken = drafted + r.n_drafted, taken + r.n_accepted
        for m in r.media:
            shown, known = shown + m.n_tokens, known + m.cached
    return {"usage": {
        "prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": cached, "image_tokens": shown, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": thought}},
        "timings": {"prompt_seconds": reading, "generation_seconds": writing, "cached_images": known, "draft_n": drafted, "draft_n_accepted": taken}}
