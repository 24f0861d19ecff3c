"""Choose tokens from logits: what a request may ask for, and the C sampler (csrc/host/sampling.h describes the chain)."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pyengine import native
from pyengine.arguments import INT32_MAX, number, takes, whole
from pyengine.errors import ModelWarning, PyEngineError, RequestError, ShapeError, shown
from pyengine.text.repetition import Repetitions


def sampler_bytes(n_vocab: int) -> int:
    """Return the working memory of one `Sampler`, in bytes."""
    return native.lib.pe_sample_scratch(n_vocab) + 64


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen; a value that leaves a step out is given in brackets.

    temperature        0 is greedy                                    [1]
    top_k              keep the k largest logits                      [0]
    top_p              keep the most probable until they reach top_p  [1]
    min_p              keep p >= min_p * largest p                    [0]
    typical_p          keep those whose surprise is near the entropy  [1]
    repeat_penalty     divide positive logits of recent tokens by it  [1]
    repeat_last_n      how many tokens are recent, -1 for all         [0]
    presence_penalty   subtract it from logits of recent tokens       [0]
    frequency_penalty  subtract it for each recent occurrence         [0]
    seed               the same seed draws the same tokens from the same logits; None draws a seed
    logprobs           how many of the most probable tokens to report beside the chosen one
    logit_bias         pairs (token, bias) or a mapping, added to the logits; -inf forbids a token
    top_n_sigma        keep logits within so many standard deviations of the largest               [0]
    xtc_probability    how often, of tokens of at least xtc_threshold, only the least probable stays [0]
    dynatemp_range     how far the temperature goes below and above by the entropy of what is left [0]
    dynatemp_exponent  the power of the normalised entropy in it
    mirostat           1 or 2: hold the surprise near mirostat_tau bits, instead of all that truncates [0]
    mirostat_eta       how fast it follows
    dry_multiplier     subtract it * dry_base^(n - dry_allowed_length) from what would prolong a repetition of n tokens [0]
    dry_penalty_last_n how many tokens are searched for repetitions, -1 for all                    [0]
    dry_sequence_breakers  texts that no repetition reaches over

    A model's file may have other defaults than these: `sampling_defaults`. Raises RequestError with the offending value.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")

    def __post_init__(self) -> None:
        def keep(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name, low, high in _NUMBERS:
            keep(name, number(name, getattr(self, name), low, high))
        if float(np.float32(self.repeat_penalty)) == 0:
            raise RequestError(f"repeat_penalty must be greater than 0, got {shown(self.repeat_penalty)}")
        for name, low, high in _WHOLE:
            keep(name, whole(name, getattr(self, name), low, high))
        if self.seed is not None:
            keep("seed", whole("seed", self.seed, 0, 2**64 - 1))
        keep("logit_bias", _biases(self.logit_bias))
        keep("dry_sequence_breakers", _texts("dry_sequence_breakers", self.dry_sequence_breakers))


_NUMBERS = (("temperature", 0, math.inf), ("top_p", 0, 1), ("min_p", 0, 1), ("typical_p", 0, 1), ("repeat_penalty", 0, math.inf),
            ("presence_penalty", -math.inf, math.inf), ("frequency_penalty", -math.inf, math.inf), ("top_n_sigma", -math.inf, math.inf),
            ("xtc_probability", 0, 1), ("xtc_threshold", 0, 1), ("dynatemp_range", 0, math.inf), ("dynatemp_exponent", 0, math.inf),
            ("mirostat_tau", 0, math.inf), ("mirostat_eta", 0, math.inf), ("dry_multiplier", 0, math.inf), ("dry_base", 1, math.inf))
_WHOLE = (("top_k", 0, INT32_MAX), ("repeat_last_n", -1, INT32_MAX), ("logprobs", 0, INT32_MAX), ("mirostat", 0, 2),
          ("dry_allowed_length", 0, INT32_MAX), ("dry_penalty_last_n", -1, INT32_MAX))
SamplingParams.__init__ = takes()(SamplingParams.__init__)   # type: ignore[method-assign]


def _biases(bias: Any) -> tuple[tuple[int, float], ...]:
    """Return the pairs of `logit_bias`, plain numbers. Raises: RequestError."""
    try:
        pairs = tuple((token, value) for token, value in (bias.items() if isinstance(bias, Mapping) else bias))
    except (TypeError, ValueError):
        raise RequestError(f"logit_bias must be pairs (token, bias), or a mapping, got {shown(bias)}") from None
    made = []
    for token, value in pairs:
        token = whole("a token of logit_bias", token)
        forbidden = isinstance(value, (float, np.floating)) and value == -math.inf
        made.append((token, -math.inf if forbidden else number(f"logit_bias of token {token}", value)))
    return tuple(made)


def _texts(name: str, texts: Any) -> tuple[str, ...]:
    """Return some texts, none of them empty. Raises: RequestError."""
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) and text for text in texts):
        raise RequestError(f"{name} must be a list of texts that are not empty, got {shown(texts)}")
    return tuple(texts)


def sampling_params(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> SamplingParams:
    """Return a model's defaults with what a request gives instead. Raises RequestError also for a name that no field has."""
    return SamplingParams(**{**defaults, **given})


# Keys of files (gguf-py: Keys.General.SAMPLING_*), which converters fill from generation_config.json, and what they are here.
SAMPLING_KEYS = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repeat_penalty",
                 "penalty_last_n": "repeat_last_n", "xtc_probability": "xtc_probability", "xtc_threshold": "xtc_threshold",
                 "mirostat": "mirostat", "mirostat_tau": "mirostat_tau", "mirostat_eta": "mirostat_eta"}
_ORDER = "sequence"                  # of steps, in a file: it is fixed here


def sampling_defaults(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model's authors recommend, by fields of `SamplingParams`: the file's keys `general.sampling.*`.

    What is not there keeps its usual default. Warns of values out of range, and of another order of steps.
    """
    said = {key: meta.get(f"general.sampling.{key}") for key in (*SAMPLING_KEYS, _ORDER)}
    if said[_ORDER] not in (None, ""):
        warnings.warn(f"general.sampling.{_ORDER}: {shown(said[_ORDER])} is ignored: the order of the sampler's steps is fixed", ModelWarning)
    return usable_sampling({field: said[key] for key, field in SAMPLING_KEYS.items() if said[key] is not None}, "general.sampling")


# Parameters of Ollama (its page of the Modelfile) that are no sampling settings: of memory, speed and length, or without effect today.
_OTHER_PARAMETERS = set(
    "stop num_ctx num_predict num_keep num_batch num_gpu main_gpu low_vram f16_kv vocab_only use_mmap use_mlock num_thread numa num_gqa "
    "embedding_only logits_all penalize_newline rope_frequency_base rope_frequency_scale draft_num_predict".split())
_NO_SUCH_STEP = {"tfs_z": 1}              # and the value with which they do nothing


def ollama_sampling(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a model of Ollama's by fields of `SamplingParams`; names are the same. Warns of what cannot be followed."""
    taken = {}
    for name, value in parameters.items():
        if name in SamplingParams.__dataclass_fields__ and name not in ("logprobs", "logit_bias"):
            if not (name == "seed" and value == -1):     # -1: another one each time
                taken[name] = value
        elif name not in _OTHER_PARAMETERS and not (name in _NO_SUCH_STEP and value == _NO_SUCH_STEP[name]):
            warnings.warn(f"Ollama's parameter {shown(name)} is ignored: there is no such setting here", ModelWarning)
    return usable_sampling(taken, "Ollama's parameters")


def usable_sampling(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the values of a file, by fields of `SamplingParams`, that are in range; warn of the others, named with their source.

    Numbers of 32 bits get the digits that they have, and a top_k below 0, which means all tokens elsewhere, is 0.
    """
    usable: dict[str, Any] = {}
    for name, value in values.items():
        if name == "top_k" and type(value) is int and value < 0:
            value = 0
        if isinstance(value, (float, np.floating)) and np.isfinite(value):
            value = float(str(np.float32(value)))                              # 0.6, not 0.6000000238418579
        try:
            SamplingParams(**{name: value})
        except RequestError as error:
            warnings.warn(f"{source}: {name} is ignored: {error}", ModelWarning)
        else:
            usable[name] = value
    return usable


class Sampled(NamedTuple):
    """A chosen token. Logprobs are natural and of the logits as given: without bias, penalties and temperature."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the `logprobs` most probable tokens and their logprobs, best first


@dataclass
class Sampler:
    """Sample one sequence: owns the random stream, the recent tokens and the scratch memory of the C sampler.

    `n_vocab` are the tokens that there are: rows of a model's head beyond them are padding, which nobody may draw, and the caller
    leaves them out. `seed` is the one in use, also where params left it open: it replays the text. `piece`: the bytes of a token, by
    which DRY finds its sequence breakers. Not for several threads at once.
    """

    params: SamplingParams
    n_vocab: int
    piece: Callable[[int], bytes] | None = None
    seed: int = field(init=False)
    step: int = field(init=False, default=0)  # numbers drawn so far

    def __post_init__(self) -> None:
        p = self.params
        whole("n_vocab", self.n_vocab, 1)
        if p.logprobs > self.n_vocab:
            raise RequestError(f"logprobs must be at most the vocabulary's {self.n_vocab}, got {p.logprobs}")
        for token, _ in p.logit_bias:
            whole("a token of logit_bias", token, 0, self.n_vocab - 1)
        self.seed = int.from_bytes(os.urandom(8), "little") if p.seed is None else p.seed
        self._penalizes = p.repeat_last_n != 0 and (
            p.repeat_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        )
        self._recent: deque[int] = deque()
        self._counts: Counter[int] = Counter()
        self._repetitions = _repetitions(p, self.piece)
        ffi = native.ffi
        self._scratch = np.empty(sampler_bytes(self.n_vocab), np.uint8)
        self._scratch_at = ffi.cast("void *", self._scratch.ctypes.data + -self._scratch.ctypes.data % 64)
        self._params = ffi.new(
            "pe_sampler_params *",
            [p.temperature, p.top_k, p.top_p, p.min_p, p.typical_p]
            + [p.repeat_penalty, p.presence_penalty, p.frequency_penalty]
            + [max(p.top_n_sigma, 0), p.xtc_probability, p.xtc_threshold, p.dynatemp_range, p.dynatemp_exponent]
            + [p.mirostat, p.mirostat_tau, p.mirostat_eta],
        )
        self._bias = ffi.new("pe_token_value[]", list(p.logit_bias))
        self._input = ffi.new("pe_sampler_input *")
        self._input.n_vocab = self.n_vocab
        self._input.bias, self._input.n_bias = self._bias, len(p.logit_bias)
        self._input.seed = self.seed
        self._input.mu = 2 * p.mirostat_tau
        self._out = ffi.new("pe_sampled *")
        self._top = ffi.new("pe_token_value[]", p.logprobs)

    def accept(self, token: int) -> None:
        """Note a token of the sequence, from the prompt or sampled, for the penalties.

        Raises RequestError if the vocabulary has no such token.
        """
        whole("token", token, 0, self.n_vocab - 1)
        if self._repetitions is not None:
            self._repetitions.accept(int(token))
        if not self._penalizes:
            return
        self._recent.append(token)
        self._counts[token] += 1
        if 0 <= self.params.repeat_last_n < len(self._recent):
            oldest = self._recent.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]

    def sample(self, logits: np.ndarray, allowed: np.ndarray | None = None) -> Sampled:
        """Choose a token from float32 `logits` [n_vocab], which are only read; the caller accepts it.

        allowed   uint32 [ceil(n_vocab / 32)], bit t % 32 of word t / 32 set if token t may be chosen; None allows all

        Raises ShapeError for arrays of another shape or dtype, RequestError if no token is left to choose from, and
        PyEngineError if the model gave NaN or infinity.
        """
        _check_array("logits", logits, np.float32, self.n_vocab)
        ffi, row = native.ffi, self._input
        row.logits = ffi.cast("float *", logits.ctypes.data)
        row.allowed = ffi.NULL
        if allowed is not None:
            _check_array("allowed", allowed, np.uint32, (self.n_vocab + 31) // 32)
            row.allowed = ffi.cast("uint32_t *", allowed.ctypes.data)
        recent = ffi.new("pe_token_count[]", list(self._counts.items()))
        row.recent, row.n_recent = recent, len(self._counts)
        less = ffi.new("pe_token_value[]", [] if self._repetitions is None else self._repetitions.penalties())
        row.less, row.n_less = less, len(less)
        row.step = self.step
        status = native.lib.pe_sample(
            self._params, row, self._scratch_at, self._out, self._top, self.params.logprobs
        )
        row.logits = row.allowed = row.recent = row.less = ffi.NULL
        found = self._sampled(status)
        row.mu = self._out.mu
        return found

    def sample_few(self, logits: np.ndarray, tokens: np.ndarray, sums: np.ndarray) -> Sampled | None:
        """Choose the token that `sample` would, from the k largest logits alone: what the op `top_k` finds in a row.

        None where it depends on others: with penalties, biases, top_n_sigma and mirostat, without top_k where the tokens that top_p and
        min_p keep do not end among these, and for more logprobs than there are. Raises as `sample`.
        """
        p, k = self.params, len(logits)
        if self._counts or p.logit_bias or p.logprobs > k or self._repetitions is not None and self._repetitions.penalties():
            return None
        ffi = native.ffi
        few = ffi.new("pe_sampler_few *", [ffi.cast("float *", logits.ctypes.data), ffi.cast("int32_t *", tokens.ctypes.data),
                                           ffi.cast("float *", sums.ctypes.data), k, self.n_vocab, self.seed, self.step])
        status = native.lib.pe_sample_few(self._params, few, self._scratch_at, self._out, self._top, p.logprobs)
        if status != 0 and self._out.fault == native.lib.PE_FAULT_FEW:
            return None
        return self._sampled(status)

    def _sampled(self, status: int) -> Sampled:
        """Return what C has drawn. Raises what it says instead."""
        if status != 0:
            raise self._error(status)
        self.step += 1
        top = tuple((pair.token, pair.value) for pair in self._top if pair.token >= 0)
        return Sampled(self._out.token, self._out.logprob, top)

    def _error(self, status: int) -> PyEngineError:
        out, lib = self._out, native.lib
        if out.fault == lib.PE_FAULT_LOGIT:
            return PyEngineError(
                f"the logit of token {out.token} is NaN or infinite: the model's weights are damaged, a logit_bias or "
                "penalty is too large, or a kernel is wrong"
            )
        if out.fault == lib.PE_FAULT_EMPTY:
            return RequestError("no token is left to choose from: every one is forbidden by mask, bias or the model")
        return PyEngineError(f"pe_sample refused its arguments: status {status}, fault {out.fault}, token {out.token}")


def _repetitions(p: SamplingParams, piece: Callable[[int], bytes] | None) -> Repetitions | None:
    """Return what DRY counts, or None where it is left out. Raises: RequestError without a tokenizer."""
    if p.dry_multiplier == 0 or p.dry_penalty_last_n == 0:
        return None
    if piece is None and p.dry_sequence_breakers:
        raise RequestError("dry_sequence_breakers: a sampler without a tokenizer does not know the texts of tokens; give piece=, or no breakers")
    return Repetitions(p.dry_multiplier, p.dry_base, p.dry_allowed_length, p.dry_penalty_last_n, p.dry_sequence_breakers, piece or (lambda token: b""))


def _check_array(name: str, array: np.ndarray, dtype: type, size: int) -> None:
    if array.dtype != dtype or array.shape != (size,) or not array.flags.c_contiguous:
        wanted = f"contiguous {np.dtype(dtype).name} [{size}]"
        raise ShapeError(f"{name} must be {wanted}, got {array.dtype} {list(array.shape)}")
