"""Policies as texts and as JSON: look-m:ratio=0.2,merge=pivotal and {"policy": "look-m", "ratio": 0.2}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pyengine.cache.compression.attention import H2O, LookM, RoCo, SnapKV, StreamingLLM
from pyengine.cache.compression.base import Compression
from pyengine.cache.compression.diverse import Diverse
from pyengine.cache.compression.layers import MEDA, VLCache
from pyengine.errors import nearest, RequestError, shown

POLICIES: dict[str, type[Compression]] = {kind.word: kind for kind in (LookM, H2O, SnapKV, RoCo, StreamingLLM, VLCache, MEDA, Diverse)}
_SHORT = {word.replace("-", ""): word for word in POLICIES}
_NONE = ("none", "off")


def compression_of(given: Any) -> Compression | None:
    """Return the policy that is meant by a text, a mapping, or a policy; None for None, "none" and "off". Raises: RequestError.

    A text is a name, then perhaps a colon and name=value pairs with commas between; a mapping has its name under "policy".
    """
    if given is None or isinstance(given, Compression):
        return given
    if isinstance(given, str):
        name, _, pairs = given.partition(":")
        arguments = dict(_pair(p) for p in pairs.split(",") if p.strip())
        if len(arguments) < sum(1 for p in pairs.split(",") if p.strip()):
            raise RequestError(f"compression {shown(given)}: an argument is given twice")
    elif isinstance(given, Mapping):
        arguments = {str(key): value for key, value in given.items() if key != "policy"}
        name = given.get("policy")
        if not isinstance(name, str):
            raise RequestError(f"compression: \"policy\" must be one of {', '.join(POLICIES)}, got {shown(name)}")
    else:
        raise RequestError(f"compression must be a policy, a text like look-m:ratio=0.2, or a mapping with \"policy\", got {shown(given)}")
    word = name.strip().lower().replace("_", "-")
    if word in _NONE and not arguments:
        return None
    kind = POLICIES.get(_SHORT.get(word.replace("-", ""), ""))
    if kind is None:
        raise RequestError(f"there is no compression {shown(name)}; there are {', '.join(POLICIES)}, none{_near(word)}")
    return kind(**arguments)


def _near(word: str) -> str:
    return nearest(word, POLICIES)


def _pair(text: str) -> tuple[str, Any]:
    """Return name=value as a name and a number, None, or a text."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not name or not value:
        raise RequestError(f"compression: {shown(text)} is no name=value, as in ratio=0.2")
    if value.lower() == "none":
        return name, "none" if name == "merge" else None
    try:
        number = json.loads(value)
    except ValueError:
        return name, value
    return name, number if isinstance(number, (int, float)) and not isinstance(number, bool) else value
