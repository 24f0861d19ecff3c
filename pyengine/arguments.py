"""What a caller gives, checked before it is used: names of arguments, numbers, switches, paths.

What is wrong is a RequestError that names it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from pyengine.errors import nearest, RequestError, shown

F = TypeVar("F", bound=Callable[..., Any])

INT32_MAX = 2**31 - 1
_FLOAT32_MAX = float(np.finfo(np.float32).max)
# What other programs call an argument: OpenAI, transformers, vLLM, llama.cpp, Ollama.
_ELSEWHERE = {"max_new_tokens": "max_tokens", "max_completion_tokens": "max_tokens", "n_predict": "max_tokens", "num_predict": "max_tokens",
              "max_gen_toks": "max_tokens", "repetition_penalty": "repeat_penalty", "do_sample": "temperature", "top_logprobs": "logprobs",
              "stop_sequences": "stop", "stop_strings": "stop", "until": "stop", "num_ctx": "n_ctx", "ctx_size": "n_ctx",
              "max_model_len": "n_ctx", "max_seq_len": "n_ctx", "num_thread": "n_threads", "threads": "n_threads", "n_parallel": "n_seq",
              "batch_size": "n_batch", "n_ubatch": "n_batch", "model_path": "model", "pretrained": "model",
              "type_k": "kv_dtype", "cache_type_k": "kv_dtype", "num_beams": "n_beams", "no_repeat_ngram_size": "no_repeat_ngram", "conversation": "messages", "text": "prompt"}


def takes(more: Iterable[str] = ()) -> Callable[[F], F]:
    """Check the arguments of a function that users call: those that it does not have are a RequestError with the near name.

    more: names that it takes beside its own, in its ** parameter.
    """
    def decorate(function: F) -> F:
        code = function.__code__                             # no inspect: this is done for every public function, at import
        places = code.co_varnames[: code.co_argcount]
        names = (*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount], *more)
        known, needed = frozenset(names), len(places) - len(function.__defaults__ or ())

        @wraps(function)
        def checked(*args: Any, **given: Any) -> Any:
            n = len(args)
            plain = needed <= n <= len(places) and (not given or given.keys() <= known and given.keys().isdisjoint(places[:n]))
            if not plain:
                wrong = _wrong(places, names, needed, n, given)
                if wrong:
                    owner, _, name = function.__qualname__.rpartition(".")
                    raise RequestError(f"{owner if name == '__init__' else name}: {wrong}")
            return function(*args, **given)

        return checked                                       # type: ignore[return-value]

    return decorate


def _wrong(places: Sequence[str], names: Sequence[str], needed: int, n: int, given: Mapping[str, Any]) -> str:
    """Say what is wrong with a call: `n` arguments without a name, `given` with one; "" if nothing is."""
    names = [name for name in names if name not in ("self", "cls")]
    hidden = len(places) - len([p for p in places if p in names])
    for name in given:
        if name not in names:
            return f"{shown(name)} is no argument{near_name(name, names)}"
        if name in places[:n]:
            return f"{name!r} is given twice, with its name and without it"
    if n > len(places):
        return f"takes at most {len(places) - hidden} arguments without a name, got {n - hidden}"
    missing = [p for p in places[n:needed] if p not in given]
    return f"{missing[0]!r} is missing" if missing else ""


def near_name(name: str, names: Sequence[str]) -> str:
    """Return an error's end: the names that may be meant by `name`, or else all that there are."""
    other = _ELSEWHERE.get(name)
    near = [other] if other in names else [n for n in names if min(len(n), len(name)) > 2 and (n.startswith(name) or name.startswith(n))]
    near.sort(key=len)                                       # "temp": temperature before template_options
    return f"; near: {', '.join(near)}" if near else nearest(name, names) or f"; there are {', '.join(names)}"


def number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    """Return a finite number in low..high, also as float32; ints and NumPy's numbers are numbers, bools and texts are not."""
    plain = float(value) if isinstance(value, np.floating) else int(value) if isinstance(value, np.integer) else value
    if not isinstance(plain, (int, float)) or isinstance(plain, bool) or not low <= plain <= high or abs(plain) > _FLOAT32_MAX:
        bounds = f" in {low:g}..{high:g}" if math.isfinite(low) and math.isfinite(high) else ""
        bounds = bounds or (f", at least {low:g}" if math.isfinite(low) else "")
        raise RequestError(f"{name} must be a finite number{bounds}, got {shown(value)}")
    return float(plain)


def whole(name: str, value: object, low: int = 0, high: int | None = INT32_MAX) -> int:
    """Return an int in low..high; NumPy's ints are ints, bools, texts and floats are not, whatever their value."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < low or high is not None and value > high:
        raise RequestError(f"{name} must be an integer {f'of at least {low}' if high is None else f'in {low}..{high}'}, got {shown(value)}")
    return int(value)


def switch(name: str, value: object) -> bool:
    """Return a bool: nothing else is one, so that "no" is not yes."""
    if not isinstance(value, (bool, np.bool_)):
        raise RequestError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def place(name: str, value: object) -> str | os.PathLike[str]:
    """Return a path: a text or a path object, as the system can have it. Numbers of open files are none."""
    try:
        text = value if isinstance(value, str) else os.fspath(value) if isinstance(value, os.PathLike) else None
    except Exception:                                        # of a stranger's __fspath__
        text = None
    if not isinstance(text, str) or not text:
        raise RequestError(f"{name}: a path is a text or a path object, got {shown(value)}")
    return value                                             # type: ignore[return-value]


def iterates(value: object) -> bool:
    """Say whether an argument can be gone through: an array of a single number looks so, and cannot."""
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) != 0
