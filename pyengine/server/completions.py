"""OpenAI's completions of plain text (platform.openai.com/docs/api-reference/completions).

With `echo` the prompt comes first, and its tokens' log-probabilities with those of the answer: with `max_tokens` 0 that scores a text.
With `suffix` the model fills in what stands between the two texts, where its vocabulary has the tokens for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pyengine.chat.reply.deltas import Delta
from pyengine.engine.loop import Handle
from pyengine.server import replies
from pyengine.server.fields import FieldError, Fields
from pyengine.server.infill import laid_out
from pyengine.server.models import Models
from pyengine.server.openai import failed, Interface, MOST_CHOICES
from pyengine.text.tokenizer import StreamDecoder, Tokenizer

MOST_LOGPROBS = 5                    # OpenAI's limit here


def routes(models: Models) -> list[Route]:
    """Return the route of completions."""
    async def complete(request: Request) -> Response:
        return await _Completion(models).reply(request)

    return [Route("/v1/completions", replies.guarded(complete, failed), methods=["POST"])]


class _Completion(Interface):
    object = chunk = "text_completion"
    prefix, limits = "cmpl-", ("max_tokens",)
    _most: int | None = 16           # OpenAI's default

    def _prompts(self, fields: Fields) -> list[dict[str, Any]]:
        if fields.whole("best_of", 1) > fields.whole("n", 1):
            raise FieldError("best_of", "answers are not ranked: it must not exceed n")
        self.echo, suffix = fields.flag("echo"), fields.text("suffix", "")
        prompts = _prompts(fields.values.get("prompt"))
        tokenizer = self.served.model.tokenizer
        if suffix:
            if self.echo:
                raise FieldError("suffix", "does not go together with echo")
            if not all(isinstance(p, str) for p in prompts):
                raise FieldError("suffix", "goes with a prompt that is a text")
            wanted: list[dict[str, Any]] = [{"prompt": laid_out(tokenizer, str(p), suffix, "suffix")} for p in prompts]
        else:
            wanted = [{"prompt": p} for p in prompts]
        if self.echo and self.with_logprobs:
            wanted = [{**w, "prompt_logprobs": self.n_top} for w in wanted]
        n = fields.whole("n", 1)
        self.texts = [p if isinstance(p, str) else tokenizer.detokenize(p) for p in prompts for _ in range(n)]
        self.writers: dict[int, _Writer] = {}
        return wanted

    def _n_top(self, fields: Fields) -> int:
        n = fields.whole("logprobs", None, 0, MOST_LOGPROBS)
        self.with_logprobs, self.n_top = n is not None, n or 0
        return self.n_top

    def _choice(self, i: int, handle: Handle) -> dict[str, Any]:
        answer = handle.result(0)
        return self._written(i, handle, (self.texts[i] if self.echo else "") + answer, [*answer.sampled, *self._last(handle)], answer.finish)

    def _last(self, handle: Handle) -> Sequence[Any]:
        """Return the token that ended the answer: beside a prompt it is scored too, as clients count on one token where they ask for one."""
        last = handle.report.ended_by
        return [last] if self.echo and last is not None else []

    def _written(self, i: int, handle: Handle, text: str, sampled: Sequence[Any], finish: str | None) -> dict[str, Any]:
        """Return a choice, or a piece of one; the first piece of an echoed one begins with the prompt."""
        found: dict[str, Any] = {}
        if self.with_logprobs:
            writer = self.writers.get(i)
            if writer is None:
                writer = self.writers[i] = _Writer(self.served.model.tokenizer, len(self.texts[i]))
                found = writer.prompt(_echoed(handle)) if self.echo else {}
            found = {**found, **{k: [*found.get(k, ()), *v] for k, v in writer.answer(sampled).items()}}
        return {"index": i, "text": text, "logprobs": found or None, "finish_reason": finish}

    def _piece(self, i: int, delta: Delta, first: bool) -> dict[str, Any]:
        text = self.texts[i] + delta.text if first and self.echo else delta.text
        return self._written(i, self.handles[i], text, self.untold[i].take(), None)

    def _end(self, i: int, handle: Handle) -> dict[str, Any]:
        """Return the last piece: tokens that no text came for, and the prompt where nothing came before."""
        left = [*self.untold[i].take(), *self._last(handle)] if self.with_logprobs else ()
        text = self.texts[i] if self.echo and not self.begun[i] else ""
        ended = self._written(i, handle, text, left, handle.report.finish)
        return ended if ended["logprobs"] is None or ended["logprobs"]["tokens"] else {**ended, "logprobs": None}


def _prompts(prompt: Any) -> list[str | list[int]]:
    """Return the prompts of a request. Raises: FieldError for what is none."""
    one = isinstance(prompt, str) or isinstance(prompt, list) and all(isinstance(p, int) for p in prompt)
    prompts = [prompt] if one else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) or isinstance(p, list) and all(
            isinstance(t, int) and not isinstance(t, bool) for t in p) for p in prompts):
        raise FieldError("prompt", "must be a text, a list of token ids, or a list of those")
    if len(prompts) > MOST_CHOICES:
        raise FieldError("prompt", f"at most {MOST_CHOICES} prompts are taken at once")
    return prompts


def _echoed(handle: Handle) -> list[Any]:
    """Return (token, log-probability, best ones) of the prompt's tokens; the first has nothing before it that would make it probable."""
    known = handle.report.prompted
    return [sampled if sampled is not None else (token, None, None) for token, sampled in zip(handle.prompt_ids, known)]


class _Writer:
    """A choice's tokens, written as the old interface does: their texts, and where each begins, counted from the beginning of the prompt.

    A token that is no whole character is written as its bytes, and begins where the character does.
    """

    def __init__(self, tokenizer: Tokenizer, offset: int):
        self._tokenizer, self._offset = tokenizer, offset
        self._decoder = tokenizer.decoder(skip_special=True, at_start=False)

    def prompt(self, tokens: Sequence[Any]) -> dict[str, Any]:
        """Return what is written of a prompt's tokens; a BOS that was put before the text is no part of it."""
        end, self._offset = self._offset, 0
        decoder = self._tokenizer.decoder(skip_special=False)
        extra = len(self._tokenizer.detokenize([t[0] for t in tokens])) - end         # of BOS, where the text was given without it
        found = self._write(tokens, decoder)
        found["text_offset"] = [max(0, at - extra) for at in found["text_offset"]]
        self._offset = end
        return found

    def answer(self, tokens: Sequence[Any]) -> dict[str, Any]:
        """Return what is written of more tokens of the answer."""
        return self._write(tokens, self._decoder)

    def _write(self, sampled: Sequence[Any], decoder: StreamDecoder) -> dict[str, Any]:
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "text_offset": [], "top_logprobs": []}
        for token, logprob, top in sampled:
            text, new = self._text(token), decoder.push(token)
            found["tokens"].append(text)
            found["text_offset"].append(self._offset + (len(new) - len(text) if new.endswith(text) else 0))    # "\ufffd" of others may be before it
            found["token_logprobs"].append(logprob)
            found["top_logprobs"].append(None if logprob is None else self._best(text, logprob, top))
            self._offset += len(new)
        return found

    def _best(self, text: str, logprob: float, top: Sequence[tuple[int, float]]) -> Mapping[str, float]:
        """Return the best tokens and the one that was taken, which may be one more."""
        return {text: logprob, **{self._text(t): p for t, p in reversed(top)}}

    def _text(self, token: int) -> str:
        piece = self._tokenizer.piece(token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in piece)
