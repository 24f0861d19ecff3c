"""OpenAI's completions of plain text (platform.openai.com/docs/api-reference/completions)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pyengine.engine.loop import Handle
from pyengine.server import replies
from pyengine.server.fields import FieldError, Fields
from pyengine.server.models import Models
from pyengine.server.openai import MOST_CHOICES, Interface, failed


def routes(models: Models) -> list[Route]:
    """Return the route of completions."""
    async def complete(request: Request) -> Response:
        return await _Completion(models).reply(request)

    return [Route("/v1/completions", replies.guarded(complete, failed), methods=["POST"])]


class _Completion(Interface):
    object, prefix, limits = "text_completion", "cmpl-", ("max_tokens",)
    _most: int | None = 16           # OpenAI's default

    def _prompts(self, fields: Fields) -> list[dict[str, Any]]:
        fields.refuse({"suffix": "filling in the middle is not supported yet", "echo": "the prompt is not given back"})
        if fields.whole("best_of", 1) > fields.whole("n", 1):
            raise FieldError("best_of", "answers are not ranked: it must not exceed n")
        prompt = fields.values.get("prompt")
        one = isinstance(prompt, str) or isinstance(prompt, list) and all(isinstance(p, int) for p in prompt)
        prompts = [prompt] if one else prompt
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) or isinstance(p, list) and all(
                isinstance(t, int) and not isinstance(t, bool) for t in p) for p in prompts):
            raise FieldError("prompt", "must be a text, a list of token ids, or a list of those")
        if len(prompts) > MOST_CHOICES:
            raise FieldError("prompt", f"at most {MOST_CHOICES} prompts are taken at once")
        return [{"prompt": p} for p in prompts]

    def _n_top(self, fields: Fields) -> int:
        n = fields.whole("logprobs", None, 0, 5)
        self.with_logprobs = n is not None
        return n or 0

    def _old_logprobs(self, sampled: Sequence[Any]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        texts = [self._token(s.token, s.logprob)["token"] for s in sampled]
        starts = list(accumulate(map(len, texts), initial=0))[:-1]
        return {"tokens": texts, "token_logprobs": [s.logprob for s in sampled], "text_offset": starts,
                "top_logprobs": [{self._token(t, p)["token"]: p for t, p in s.top} for s in sampled]}

    def _choice(self, i: int, handle: Handle) -> dict[str, Any]:
        answer = handle.result(0)
        return {"index": i, "text": str(answer), "logprobs": self._old_logprobs(answer.sampled), "finish_reason": answer.finish}

    def _delta(self, i: int, piece: str, first: bool, sampled: Sequence[Any]) -> dict[str, Any]:
        return {"index": i, "text": piece, "logprobs": self._old_logprobs(sampled), "finish_reason": None}

    def _end(self, i: int, handle: Handle) -> dict[str, Any]:
        return {"index": i, "text": "", "logprobs": None, "finish_reason": handle.report.finish}
