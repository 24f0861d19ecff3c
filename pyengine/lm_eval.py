"""Models in EleutherAI's lm-evaluation-harness (the package lm_eval), so that they are compared by tasks.

    python -m pyengine.lm_eval --model_args path=model.gguf --tasks hellaswag --limit 100

is the harness's own command with the model "pyengine" known to it; in Python, importing this module is enough:

    import lm_eval, pyengine.lm_eval
    lm_eval.simple_evaluate(model="pyengine", model_args="path=model.gguf", tasks=["hellaswag"])

Numbers are those that the harness's own adapter for transformers (`HFLM`) gives for the checkpoint: the same tokens, the same
cuts from the left, the same windows. Known differences: greedy generation is exact for any batch (no padding), and a text that
a stop ends is cut where the first of the stops begins.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import pyengine as pe
from pyengine.errors import RequestError, shown, UnsupportedModelError
from pyengine.files.hparams import Hparams
from pyengine.files.model_files import open_files
from pyengine.measure.perplexity import nll

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    missing = f"pyengine.lm_eval needs the harness: pip install lm_eval ({error})"
    if __name__ == "__main__":
        print(missing, file=sys.stderr)
        sys.exit(2)
    raise UnsupportedModelError(missing) from None

_log = logging.getLogger(__name__)

Scored = tuple[float, bool]
DEVICE = "cuda:0"            # what the harness's command says where its user says nothing
MAX_LENGTH = 4096            # positions, unless more are asked for: caches of the training context may take more than the weights
MAX_GEN_TOKS = 256           # of an answer whose task does not say; the harness's number
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")     # the harness's order, first wins


@register_model("pyengine")
class PyEngineLM(TemplateLM):
    """A GGUF model for the harness.

    path           a file or a name, as `pyengine.load` takes them (`pretrained` is the same)
    max_length     positions of a prompt with its continuation; longer ones lose their beginning, with a warning. Default: n_ctx, else
                   the training context, 4096 at most. Perplexity of long texts depends on it
    batch_size     prompts that are generated side by side (default 1; "auto" is 8)
    prefix_token_id  what stands before a text without a context; default BOS, or EOS where there is none
    add_bos_token  put BOS before every text; default: as the file says
    Every other argument goes to `pyengine.load`: n_threads, kv_dtype, mmproj ...
    Raises: as `pyengine.load`; RequestError for arguments that are none.
    """

    def __init__(self, path: str | Path | None = None, pretrained: str | Path | None = None, max_length: int | None = None,
                 batch_size: int | str | None = 1, prefix_token_id: int | None = None, add_bos_token: bool | None = None, **settings: Any):
        super().__init__()
        if (path is None) == (pretrained is None):
            raise RequestError("give the model as path=model.gguf")
        model = path if path is not None else pretrained
        settings.pop("max_batch_size", None)                 # of "auto" on GPUs
        if settings.get("device") == DEVICE:
            _log.info("device %s is the harness's default, asked for or not: pyengine takes its own, 'auto'", DEVICE)
            del settings["device"]
        self.batch_size = 8 if str(batch_size).startswith("auto") else _int("batch_size", batch_size or 1)
        n_ctx = settings.pop("n_ctx", None) or max_length or min(MAX_LENGTH, _trained(model))
        self.model = pe.load(model, n_ctx=_int("n_ctx", n_ctx), **{"n_seq": self.batch_size, "images": 0, **settings})
        self.max_length = min(_int("max_length", max_length or n_ctx), self.model.n_ctx)
        self._add_bos = add_bos_token
        self._prefix = None if prefix_token_id is None else _int("prefix_token_id", prefix_token_id, 0)
        self._name = Path(self.model.file.path).name

    # -- what the harness asks of a tokenizer -------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        found = self.model.tokenizer.eos_id
        if found is None:
            raise UnsupportedModelError(f"{self._name}: the vocabulary has no token that ends a text; give prefix_token_id=")
        return found

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without a context follows."""
        bos = self.model.tokenizer.bos_id
        return self._prefix if self._prefix is not None else bos if bos is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's caches of requests."""
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text. A text that begins with BOS, as chat templates write it, gets no second one."""
        tokenizer, bos = self.model.tokenizer, self.prefix_token_id
        ids = tokenizer.tokenize(string, add_special=False)
        wanted = self._add_bos if add_special_tokens is None else add_special_tokens
        if wanted is False or add_special_tokens is None and ids[:1] == [bos]:
            return ids
        return [bos, *ids] if self._add_bos else tokenizer.tokenize(string)

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the model's own template writes it; without `add_generation_prompt` the last turn stays open."""
        template, last = self.model.template, "\0"
        if add_generation_prompt:
            return template.render(chat_history)
        *turns, open_turn = chat_history                     # an answer that the model goes on with
        text = template.render([*turns, {**open_turn, "content": last}], add_generation_prompt=False)
        return text[: text.rindex(last)] + open_turn["content"] if last in text else text + open_turn["content"]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the source of the template, for the record of a run."""
        return self.model.template.source if chat_template else None

    def get_model_info(self) -> dict[str, Any]:
        """Return what the record of a run says of the model."""
        return {"model_name": self._name, "model_num_parameters": sum(t.n_elements for t in self.model.file.tensors.values()),
                "pyengine": pe.__version__, "n_ctx": self.model.n_ctx, "kv_dtype": self.model.plan.kv_dtype}

    # -- scores -------------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], disable_tqdm: bool = False,
                              **_: Any) -> list[Scored]:
        """Compute scores of continuations: (sum of log-probabilities, whether each token is the likeliest).

        What several requests begin with is computed once for each: those that differ in their continuation's last token only, as
        single letters of multiple choice do, are scored from one pass.
        """
        passes: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            if not context or not continuation or len(continuation) > self.max_length:
                raise RequestError(f"a context of {len(context)} tokens and a continuation of {len(continuation)}: one token of each is "
                                   f"the least, and {self.max_length} are the most that a continuation may have; load with a larger n_ctx")
            passes.setdefault(tuple(self._cut([*context, *continuation], self.max_length + 1)[:-1]), []).append(i)
        scored: list[Scored] = [(0.0, True)] * len(requests)
        for ids, same in _shown(passes.items(), "loglikelihood", disable_tqdm):
            for i, score in self._scored(ids, [(i, requests[i][2]) for i in same]):
                scored[i] = score
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
        return scored

    def _scored(self, ids: Sequence[int], ends: Sequence[tuple[int, Sequence[int]]]) -> Iterator[tuple[int, Scored]]:
        """Yield the score of each continuation (number, tokens) whose tokens but the last are the end of `ids`."""
        firsts = [len(ids) - len(tokens) for _, tokens in ends]                # row of the logits for its first token
        sums, best = np.zeros(len(ends)), np.ones(len(ends), bool)
        for start, rows in self.model.logit_blocks(ids, min(firsts)):
            for row in range(len(rows)):
                at = start + row
                for k, (_, tokens) in enumerate(ends):
                    if at >= firsts[k]:
                        token = tokens[at - firsts[k]]
                        sums[k] -= nll(rows[row], token)
                        best[k] &= int(rows[row].argmax()) == token
        return ((i, (float(sums[k]), bool(best[k]))) for k, (i, _) in enumerate(ends))

    def _cut(self, ids: list[int], most: int) -> list[int]:
        """Cut what is too long from the left."""
        if len(ids) > most:
            _log.warning("%d tokens are more than the %d that max_length leaves: the first %d are cut off", len(ids), most, len(ids) - most)
        return ids[-most:]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Compute scores of whole texts, each token once: windows of max_length, the last one with as much before it as fits."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            for context, end in _windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length):
                windows.append((None, context, end))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, (score, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm)):
            sums[i] += score
        for request, total in zip(requests, sums):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    # -- texts --------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts, greedily unless the task says otherwise, until a stop text, the end of text, or so many tokens."""
        out = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=lambda item: item[0])), []).append(i)
        for same in groups.values():
            options, given = self._options(requests[same[0]].args[1]), [requests[i].args for i in same]
            room = self.max_length - options["max_tokens"]
            if room < 1:
                raise RequestError(f"the task generates up to {options['max_tokens']} tokens, but max_length is {self.max_length}; "
                                   "load with a larger n_ctx")
            prompts = [self._cut(self.tok_encode(context), room) or [self.prefix_token_id] for context, _ in given]
            for first in _shown(range(0, len(same), self.batch_size), "generate_until", disable_tqdm):
                batch = slice(first, first + self.batch_size)
                for i, args, answer in zip(same[batch], given[batch], self.model.generate_many(prompts[batch], **options)):
                    out[i] = str(answer)
                    self.cache_hook.add_partial("generate_until", args, out[i])
        return out

    def _options(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Return arguments of `generate` for a task's generation settings. Raises: RequestError for one that is not known."""
        asked = dict(asked)
        until = asked.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        end = self.model.tokenizer.eos_id
        if end is not None:
            until.append(self.model.tokenizer.piece(end).decode("utf-8", "replace"))
        lengths = [asked.pop(name) for name in _LENGTHS if name in asked]
        samples, temperature = asked.pop("do_sample", None), asked.pop("temperature", None)
        greedy = samples is False or not temperature and samples is None
        options = {"temperature": 0.0 if greedy else 1.0 if temperature is None else temperature,
                   "max_tokens": _int("max_gen_toks", lengths[0] if lengths else MAX_GEN_TOKS), "stop": [s for s in until if s]}
        if not greedy:
            options |= {"top_k": 50, "top_p": 1.0, "min_p": 0.0}               # transformers' defaults
        for name, own in (("repetition_penalty", "repeat_penalty"), ("repeat_penalty", "repeat_penalty")):
            if name in asked:
                options |= {own: asked.pop(name), "repeat_last_n": -1}
        return {**options, **asked}                          # what `generate` does not have, it refuses by name


def _int(name: str, value: Any, low: int = 1) -> int:
    """Return a whole number of the harness's arguments, which may come as texts."""
    try:
        n = int(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else low - 1
    except ValueError:
        n = low - 1
    if n < low:
        raise RequestError(f"{name} must be an integer of at least {low}, got {shown(value)}")
    return n


def _trained(model: str | Path) -> int:
    """Return the training context of a model."""
    return Hparams(open_files(model).model.metadata).size("context_length")


def _windows(ids: Sequence[int], prefix: int, most: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cut a text into (context, tokens that are scored), no more than `most` inputs each: every token once, with all that fits before it.

    The first window follows the prefix; a last one that is short begins before its first token.
    """
    for start in range(0, len(ids), most):
        stop = min(start + most, len(ids))
        yield [prefix] if start == 0 else list(ids[stop - most - 1 : start]), list(ids[start:stop])


def _shown(items: Any, what: str, quiet: bool) -> Any:
    """Go through items beside a line that shows how far it is, as the harness's other models do."""
    from tqdm import tqdm

    return tqdm(list(items), desc=f"Running {what} requests", disable=quiet)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the harness's command, with this model unless another one is named."""
    from lm_eval.__main__ import cli_evaluate

    given = list(sys.argv[1:] if arguments is None else arguments)
    named = any(a in ("--model", "-M") or a.startswith("--model=") for a in given)
    if given and given[0] not in ("ls", "list", "validate") and not named:
        at = int(given[0] == "run")
        given[at:at] = ["--model", "pyengine"]
    sys.argv = ["lm_eval", *given]
    cli_evaluate()


if __name__ == "__main__":
    sys.modules.setdefault("pyengine.lm_eval", sys.modules["__main__"])        # one class, also for tasks that import it
    main()
