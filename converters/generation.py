"""The authors' settings for answers: generation_config.json to the keys `general.sampling.*` (gguf-py: Keys.General.SAMPLING_*), and of
encoder-decoders, whose answers are searched for, to keys `general.search.*` (pyengine/text/search.py)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf

from pyengine.errors import InvalidModelError, UnsupportedModelError

WHOLE_TEXT = -1                # a penalty_last_n: transformers' penalty is for all tokens of a text, llama.cpp's for the last 64


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (ValueError, RecursionError) as e:
        raise InvalidModelError(f"{file}: not JSON: {e}") from None


def write_search(folder: Path, arch: str, out: gguf.GGUFWriter) -> None:
    """Write how a checkpoint's authors search for answers, and the token that these begin with; before transformers 4.26 config.json says it.

    An end that is forced where an answer has to stop (`forced_eos_token_id`) is left out: it is none that the model gives.
    Raises: InvalidModelError; UnsupportedModelError for kinds of search that are not known.
    """
    config = {**_read(folder / "config.json"), **_read(folder / "generation_config.json")}

    def said(name: str, *kinds: type) -> Any:
        value = config.get(name)
        if value is not None and type(value) not in kinds:
            raise InvalidModelError(f"{folder}: {name} is {value!r}, which is not {' or '.join(k.__name__ for k in kinds)}")
        return value

    for name, usual in (("num_beam_groups", 1), ("encoder_no_repeat_ngram_size", 0)):
        if (said(name, int) or usual) != usual:
            raise UnsupportedModelError(f"{folder}: {name} is {config[name]}, a search that is not known here")
    for name, key in (("num_beams", "n_beams"), ("no_repeat_ngram_size", "no_repeat_ngram")):
        if (value := said(name, int)) is not None and value >= 0:
            out.add_uint32(f"general.search.{key}", value)
    if (value := said("length_penalty", int, float)) is not None:
        out.add_float32("general.search.length_penalty", float(value))
    if (value := said("early_stopping", bool, str)) is not None:
        (out.add_bool if isinstance(value, bool) else out.add_string)("general.search.early_stopping", value)
    least = said("min_new_tokens", int) or max(0, (said("min_length", int) or 0) - 1)          # min_length counts the decoder's first token
    if least > 0:
        out.add_uint32("general.search.min_tokens", least)
    if (value := said("forced_bos_token_id", int)) is not None:
        out.add_uint32(f"{arch}.forced_bos_token_id", value)


def write_sampling(folder: Path, out: gguf.GGUFWriter) -> None:
    """Write what a checkpoint's authors recommend; what they leave open stays open. Raises: InvalidModelError."""
    file = folder / "generation_config.json"
    config = _read(file)

    def number(name: str) -> float | None:
        value = config.get(name) if isinstance(config, dict) else None
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise InvalidModelError(f"{file}: {name} is {value!r}, which is no number")
        return value

    for name, add in (("temperature", out.add_sampling_temp), ("top_p", out.add_sampling_top_p), ("min_p", out.add_sampling_min_p),
                      ("repetition_penalty", out.add_sampling_penalty_repeat)):
        if (value := number(name)) is not None:
            add(value)
    if number("repetition_penalty") is not None:
        out.add_sampling_penalty_last_n(WHOLE_TEXT)
    if (top_k := number("top_k")) is not None:
        if top_k != int(top_k) or not -(2**31) <= top_k < 2**31:
            raise InvalidModelError(f"{file}: top_k is {top_k!r}, which is no count")
        out.add_sampling_top_k(int(top_k))
