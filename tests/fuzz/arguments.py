"""The target "arguments": methods of the library, called with values that are almost right, and with some that nobody would think of."""

from __future__ import annotations

import fractions
import io
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import corpus
import numpy as np
import targets
from mutators import FLOATS, NUMBERS, TEXTS

WORDS = ("role", "content", "type", "text", "image", "image_url", "url", "images", "user", "system", "assistant", "tool", "data:image/png;base64,AAAA", "tool_calls",
         "function", "name", "arguments", "{}", "video", "input_audio", "source", "base64", "data", "detail", "low", "fps")


class Hostile:
    """Says nothing of itself."""

    def __repr__(self) -> str:
        raise ZeroDivisionError("a stranger's repr")

    __str__ = __index__ = __float__ = __fspath__ = __int__ = __repr__                        # type: ignore[assignment]


class Text(str):
    """A str that hides."""

    def __len__(self) -> int:
        return 0

    def __str__(self) -> str:
        raise ValueError("no text")


def endless() -> Iterator[int]:
    """Not endless, but long enough to notice who reads all of it."""
    yield from range(300_000)


def nested(kind: type, depth: int) -> Any:
    out: Any = 1
    for _ in range(depth):
        out = [out] if kind is list else {"content": out} if kind is dict else (out,)
    return out


def odd(rng: Random, depth: int = 3) -> Any:
    """Any value of Python."""
    match rng.randrange(24 if depth else 14):
        case 0:
            return None
        case 1:
            return rng.random() < 0.5
        case 2 | 3:
            return rng.choice(NUMBERS) * rng.choice((1, -1))
        case 4:
            return rng.choice((10**400, -(10**400), 1 << 5000))
        case 5 | 6:
            return rng.choice(FLOATS)
        case 7 | 8:
            return rng.choice((*TEXTS, *WORDS))
        case 9:
            return rng.choice((b"", b"\xff\xfe", b"\x89PNG\r\n", bytearray(b"x"), memoryview(b"abc"), 1j, fractions.Fraction(1, 3), range(3), range(10**12), ..., int,
                               len, NotImplemented))
        case 10:
            return rng.choice((np.float32("nan"), np.int64(-1), np.uint64(2**64 - 1), np.bool_(True), np.float16(1), np.array(3), np.array([1, 2], object), np.array([]),
                               np.zeros((2, 3)), np.zeros((0, 5, 3), np.uint8), np.zeros((4, 4, 3), np.uint8), np.full((3, 3), np.nan), np.array(["a"]),
                               np.zeros((1, 1, 1, 1, 3)), np.zeros((2, 2), complex), np.datetime64("2020-01-01"), np.arange(300, dtype=np.int8)))
        case 11:
            return rng.choice((Hostile(), Text("hello"), Path("x"), Path("\0"), io.BytesIO(b"x"), endless(), iter([1, 2]), object(), type("T", (dict,), {})(role="user")))
        case 12:
            return nested(rng.choice((list, dict, tuple)), rng.choice((3, 50, 900, 5000)))
        case 13:
            loop: list[Any] = [1]
            loop.append(loop)
            return rng.choice((loop, {"role": "user", "content": loop}))
        case 14 | 15 | 16:
            return [odd(rng, depth - 1) for _ in range(rng.randrange(4))]
        case 17:
            return tuple(odd(rng, depth - 1) for _ in range(rng.randrange(3)))
        case 18 | 19 | 20:
            return {rng.choice(WORDS): odd(rng, depth - 1) for _ in range(rng.randrange(4))}
        case 21:
            return {key: odd(rng, 0) for key in (0, None, True, 1.5, ("a",), b"x") if rng.random() < 0.3}
        case 22:
            return {1, "a"} if rng.random() < 0.5 else frozenset({3})
    return [rng.choice((1, 2, "a")) for _ in range(rng.choice((0, 1, 100, 5000)))]


def mixed(rng: Random, value: Any, share: float = 0.15) -> Any:
    """The same value with some of its parts replaced by odd ones."""
    if rng.random() < share / 2:
        return odd(rng)
    if isinstance(value, dict):
        out = {key: mixed(rng, part, share) for key, part in value.items() if rng.random() > share / 3}
        if rng.random() < share:
            out[rng.choice(WORDS)] = odd(rng)
        return out
    if isinstance(value, list):
        out = [mixed(rng, part, share) for part in value]
        return out + [odd(rng)] if rng.random() < share else out
    return odd(rng) if rng.random() < share else value


class Arguments(targets.Target):
    """A call is drawn from the input's bytes."""

    name = "arguments"
    seconds = 8.0
    right = False                                            # any number is a call

    @cached_property
    def seeds(self) -> list[bytes]:
        return [b"1"]

    def spoilt(self, rng: Random, data: bytes) -> bytes:
        return str(rng.getrandbits(60)).encode()

    @cached_property
    def models(self) -> list[Any]:
        import pyengine as pe

        text = pe.load(targets.made(self.folder, corpus.model_specs()[0]), **targets.SETTINGS)
        return [text, pe.load(targets.ROOT / "converters" / "demo" / "weights" / "demo-q8_0.gguf", n_ctx=256, n_threads=1, images=(64, 64, 2))]

    @cached_property
    def calls(self) -> dict[str, Callable[..., Any]]:
        """Functions of (model, keyword arguments)."""
        import pyengine as pe

        path = self.folder / "model.gguf"

        def stream(model: Any, **given: Any) -> None:
            for i, _ in enumerate(model.stream(**given)):
                if i == 3:
                    break

        def chat(model: Any, **given: Any) -> None:
            answer = model.chat(**given)
            if given.get("stream"):
                list(answer)

        return {"generate": lambda m, **g: m.generate(**g), "stream": stream, "chat": chat, "chat_ids": lambda m, **g: m.chat_ids(**g),
                "logits": lambda m, **g: m.logits(**g), "hidden": lambda m, **g: m.hidden(**g), "embed": lambda m, **g: m.embed(**g), "feed": lambda m, **g: m.feed(**g), "shift": lambda m, **g: m.shift(**g),
                "tokenize": lambda m, **g: m.tokenize(**g), "detokenize": lambda m, **g: m.detokenize(**g), "encode_image": lambda m, **g: m.encode_image(**g),
                "generate_many": lambda m, **g: m.generate_many(**g), "restore": lambda m, **g: m.restore(**g), "logit_blocks": lambda m, **g: list(m.logit_blocks(**g)),
                "load": lambda m, **g: self._load(path, g), "plan": lambda m, **g: pe.plan(path, **g), "open_image": lambda m, source, **g: pe.open_image(source, **g),
                "video": lambda m, frames, **g: pe.Video(frames, **g), "params": lambda m, **g: pe.SamplingParams(**g), "tokenizer": lambda m, model: pe.load_tokenizer(model),
                "look": lambda m, model: pe.plan(model), "render": lambda m, **g: m.template.render(**g)}

    def _load(self, path: Path, given: dict[str, Any]) -> None:
        import pyengine as pe

        if pe.plan(path, **given).total < targets.SMALL:
            pe.load(path, **given)

    @staticmethod
    def likely(rng: Random, call: str) -> dict[str, Any]:
        """Right arguments of a call, not always all of them."""
        picture = np.zeros((20, 30, 3), np.uint8)
        prompt = rng.choice(("hello", [1, 2, 3], ["hello", picture, 5], [1, [picture, picture], "x"], "", [np.int64(3)], "<s>hello</s>" * 5))
        messages = [{"role": "system", "content": "be brief"},
                    {"role": "user", "content": rng.choice(("hello", [{"type": "text", "text": "hello"}, {"type": "image", "image": picture}],
                                                            [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]))},
                    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]},
                    {"role": "tool", "content": "3", "tool_call_id": "1"}]
        tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}]
        ask = {"max_tokens": 3, "stop": ["x", "yy"], "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 1, "logprobs": 2, "logit_bias": {3: 1.0},
               "repeat_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1, "repeat_last_n": 5, "typical_p": 0.9}
        whole = {"generate": {"prompt": prompt, "images": [picture], **ask}, "stream": {"prompt": prompt, "images": [], **ask},
                 "chat": {"messages": messages, "tools": tools, "stream": True, **ask}, "chat_ids": {"messages": messages, "tools": tools},
                 "logits": {"prompt": prompt}, "hidden": {"x": prompt}, "embed": {"x": rng.choice((["hello", [1, 2]], "hello", picture)), "normalize": False, "pooling": "mean"}, "feed": {"ids": [1, 2], "n_batch": 4}, "shift": {"start": 0, "stop": 1}, "logit_blocks": {"prompt": [1, 2, 3], "first": 1},
                 "tokenize": {"text": "hello", "add_special": True}, "detokenize": {"ids": [1, 2]}, "encode_image": {"image": picture},
                 "generate_many": {"prompts": ["hello", [1, 2]], **ask}, "restore": {"path": "nothing"},
                 "load": {"mmproj": None, "device": {"cpu:0": 2**30}, "n_ctx": 64, "kv_dtype": "q8_0/f16", "n_threads": 1, "n_batch": 16, "n_seq": 2, "images": (64, 64, 1),
                          "encoder_device": None, "expert_device": None},
                 "open_image": {"source": picture, "min_pixels": 100}, "video": {"frames": [picture, picture], "fps": 2.0}, "params": {k: v for k, v in ask.items() if k not in ("max_tokens", "stop")},
                 "tokenizer": {"model": "nothing.gguf"}, "look": {"model": "nothing"},
                 "render": {"messages": messages, "tools": tools, "add_generation_prompt": True, "enable_thinking": False, "variables": {"a": 1}}}
        whole["plan"] = whole["load"]
        needed = {"generate": ["prompt"], "stream": ["prompt"], "chat": ["messages"], "chat_ids": ["messages"], "render": ["messages"], "generate_many": ["prompts"],
                  "open_image": ["source"], "video": ["frames"], "load": [], "plan": [], "params": [], "feed": ["ids"], "logit_blocks": ["prompt"], "tokenize": ["text"], "embed": ["x"]}
        return {k: v for k, v in whole[call].items() if k in needed.get(call, whole[call]) or rng.random() < 0.3}

    def run(self, data: bytes) -> None:
        rng = Random(data)
        call = rng.choice(list(self.calls))
        model = self.models[rng.random() < 0.3]
        given = self.likely(rng, call)
        for _ in range(rng.randrange(1, 3)):
            if given:
                key = rng.choice(list(given))
                given[key] = mixed(rng, given[key]) if rng.random() < 0.6 else odd(rng)
        if call in ("generate", "chat", "stream") and rng.random() < 0.05:
            given[rng.choice(WORDS[:8])] = odd(rng)
        self.calls[call](model, **given)
