"""The authors' sampling settings: generation_config.json to the keys `general.sampling.*` (gguf-py: Keys.General.SAMPLING_*)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import gguf

from pyengine.errors import InvalidModelError

WHOLE_TEXT = -1                # a penalty_last_n: transformers' penalty is for all tokens of a text, llama.cpp's for the last 64


def write_sampling(folder: Path, out: gguf.GGUFWriter) -> None:
    """Write what a checkpoint's authors recommend; what they leave open stays open. Raises: InvalidModelError."""
    file = folder / "generation_config.json"
    if not file.exists():
        return
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise InvalidModelError(f"{file}: not JSON: {e}") from None

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
