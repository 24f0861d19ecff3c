"""Damage for inputs: of bytes, of texts, of JSON; each is drawn from a `random.Random`, so that a number names an input."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from random import Random
from typing import Any

NUMBERS = (0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 511, 1000, 4095, 4096, 65535, 65536, 2**20, 2**24, 2**31 - 1, 2**31,
           2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e-30, 1e30, 3.5e38, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", " ", "a", "\0", "\n", "é", "🙂", "\ud800", "a\u0301", "​", "\ufeff", "\u202e", "0", "-1", "1e999", "null", "<s>", "</s>", "%s%n",
         "../../x", "/dev/null", "x" * 300, "é" * 5000, "\u2581", "<0x00>", "<0xFFF>", "NaN")


def spoilt_bytes(rng: Random, data: bytes, others: Sequence[bytes] = (), words: Sequence[bytes] = ()) -> bytes:
    """Change some bytes, one to eight times over."""
    out = bytearray(data)
    for _ in range(1 << rng.randrange(4)):
        n = len(out)
        at, size = rng.randrange(n + 1), 1 << rng.randrange(8)
        match rng.randrange(11):
            case 0 if n:
                out[at % n] ^= 1 << rng.randrange(8)
            case 1 if n:
                out[at % n] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                form = rng.choice("<H >H <I >I <Q >Q".split())
                out[at : at + struct.calcsize(form)] = struct.pack(form, rng.choice((*NUMBERS, n, n - at)) % (1 << 8 * struct.calcsize(form)))
            case 3:
                out[at:] = b""
            case 4:
                del out[at : at + size]
            case 5:
                out[at:at] = out[(start := rng.randrange(n + 1)) : start + size]
            case 6:
                out[at:at] = bytes(rng.randrange(256) for _ in range(size % 32))
            case 7 if others:
                other = rng.choice(others)
                out[at : at + size] = other[(start := rng.randrange(len(other) + 1)) : start + size]
            case 8 if words:
                out[at : at + rng.choice((0, size % 8))] = rng.choice(words)
            case 9:
                out[at : at + size] = bytes([rng.choice((0, 0xFF, 0x20))]) * size
            case 10:
                small = rng.choice((0, 1, 2, 3, 4, 8, n % 256))
                out[at : at + 8] = struct.pack("<Q", small)
    return bytes(out)


def spoilt_text(rng: Random, text: str, words: Sequence[str]) -> str:
    """Put in, take out and repeat pieces of a text."""
    for _ in range(1 << rng.randrange(4)):
        at, size = rng.randrange(len(text) + 1), 1 << rng.randrange(6)
        match rng.randrange(6):
            case 0:
                text = text[:at] + text[at + size :]
            case 1 | 2:
                text = text[:at] + rng.choice(words) + text[at:]
            case 3:
                start = rng.randrange(len(text) + 1)
                text = text[:at] + text[start : start + size] * rng.choice((1, 2, 50)) + text[at:]
            case 4:
                text = text[:at] + rng.choice(TEXTS) + text[at + size % 4 :]
            case 5:
                text = text[:at] + rng.choice(words) + text[at + size :]
    return text[:200_000]


def anything(rng: Random, depth: int = 2) -> Any:
    """A value of JSON."""
    match rng.randrange(9 if depth else 6):
        case 0:
            return None
        case 1:
            return rng.random() < 0.5
        case 2:
            return rng.choice(NUMBERS) * rng.choice((1, 1, -1))
        case 3:
            return rng.choice(FLOATS)
        case 4 | 5:
            return rng.choice(TEXTS)
        case 6 | 7:
            return [anything(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice(TEXTS): anything(rng, depth - 1) for _ in range(rng.randrange(4))}


def spoilt_json(rng: Random, value: Any) -> Any:
    """The same value with some of its parts changed, left out, doubled, moved or nested."""
    value = json.loads(json.dumps(value))
    for _ in range(1 << rng.randrange(3)):
        holder: dict[Any, Any] = {"": value}                 # a place to put the whole back in
        place: Any = holder
        key: Any = ""
        while isinstance(place[key], (dict, list)) and place[key] and (place is holder or rng.random() < 0.85):
            place, key = place[key], None
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        old = place[key]
        match rng.randrange(7):
            case 0 | 1:
                place[key] = anything(rng)
            case 2:
                del place[key]
            case 3 if isinstance(place, list):
                place[key:key] = [old] * rng.choice((1, 2, 300))
            case 3:
                place[rng.choice(TEXTS)] = old
            case 4:
                place[key] = [old] if rng.random() < 0.5 else {"": old}
            case 5 if isinstance(old, bool) or not isinstance(old, (int, float, str)):
                place[key] = rng.choice((None, [], {}, "", 0, True))
            case 5 if isinstance(old, str):
                place[key] = spoilt_text(rng, old, TEXTS)
            case 5:
                place[key] = rng.choice((old + 1, old - 1, -old, old * 1000, str(old), float(old)))
            case 6:
                other = rng.choice(list(place.values()) if isinstance(place, dict) else place)
                place[key] = other if not isinstance(other, (dict, list)) else json.loads(json.dumps(other))
        value = holder.get("", anything(rng))
    return value
