"""Arguments of the wrong kind, as fuzzing found them (tests/fuzz): each ends in a RequestError that names it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pyengine as pe
from pyengine.engine.prompts import token_ids
from pyengine.errors import ImageError, RequestError
from pyengine.memory.settings import Settings


class Silent:
    """Has no repr, and is no path."""

    def __repr__(self) -> str:
        raise ZeroDivisionError

    __fspath__ = __index__ = __repr__


@pytest.mark.parametrize(("name", "value"), [
    *((name, value) for name in ("n_ctx", "n_batch", "n_seq") for value in ({}, "8", 1.5, True, 0, -1, 2**31, 10**400, np.array(3), Silent())),
    ("n_batch", None), ("n_seq", None), ("n_threads", "2"), ("n_threads", 5000), ("n_threads", -1), ("kv_dtype", 3.5), ("kv_dtype", b"f16"), ("device", np.zeros(2)),
    ("device", {Silent(): 1}), ("device", {"cpu:0": 2**70}), ("device", Silent()), ("encoder_device", []), ("expert_device", {}), ("images", (2**40, 2**40)),
    ("images", Silent()), ("images", [[]])])
def test_settings_of_a_model(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name.partition("_device")[0] if name == "device" else name):
        Settings(**{name: value}).check()


def test_settings_that_only_together_are_too_large() -> None:
    with pytest.raises(RequestError, match="together"):
        Settings(n_ctx=2**20, n_seq=2**20).check()
    want = Settings(n_ctx=np.uint8(200), n_seq=np.uint8(200))
    want.check()
    assert (type(want.n_ctx), want.n_ctx * want.n_seq) == (int, 40_000)


@pytest.mark.parametrize("path", [None, 3, [], {}, iter(()), Silent()])
def test_what_is_no_path(tiny_gguf, path: Any) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=64)
    for use in (pe.load, pe.plan, pe.load_tokenizer, pe.GGUFFile, model.restore, model.save):
        with pytest.raises(RequestError, match="path"):
            model.feed([1])
            model.save(path) if use == model.save else use(path)


def test_arguments_of_calls(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=64)
    model.feed([1, 2, 3])
    empty = np.array([])
    for call in (lambda: model.shift({}, 1), lambda: model.shift(0, None), lambda: model.feed([1], n_batch="2"), lambda: model.feed([1], n_batch=0),
                 lambda: list(model.logit_blocks([1, 2], first=[])), lambda: model.logits(np.array(3)), lambda: model.feed(np.array(3)),
                 lambda: model.feed(np.zeros((2, 2), int)), lambda: model.tokenize("a", add_special=empty), lambda: model.tokenizer.tokenize("a", parse_special=empty),
                 lambda: model.chat([{"role": "user", "content": "a"}], max_tokens=1, stream=empty), lambda: model.template.render(3),
                 lambda: model.template.render([], variables=range(3)), lambda: model.template.render([{"role": "user", "content": [{"type": {}}]}]),
                 lambda: model.template.render([{"role": "assistant", "tool_calls": 3}]),
                 lambda: model.template.render([{"role": "user", "content": [{"type": np.zeros(2)}]}]),
                 lambda: pe.Video([np.zeros((4, 4, 3), np.uint8)], fps=10**400), lambda: pe.load(tiny_gguf("llama")[0], mmproj=np.zeros(2)),
                 lambda: model.template.render([{"role": "assistant", "tool_calls": np.zeros(3)}]), lambda: model.generate("a", images=range(10**12)),
                 lambda: model.template.render([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 100_000}}]}])):
        with pytest.raises(RequestError):
            call()


def test_an_array_of_one_number_is_no_list(tiny_gguf) -> None:
    model, one = pe.load(tiny_gguf("llama")[0], n_ctx=64), np.array(3)
    for call in (model.generate_many, model.detokenize, model.chat, model.generate, model.feed, model.logits, model.chat_ids, model.template.render,
                 lambda x: model.generate("a", stop=x), lambda x: model.chat([{"role": np.array([]), "content": "a"}])):
        with pytest.raises(RequestError):
            call(one)


def test_sequences_longer_than_memory() -> None:
    with pytest.raises(RequestError, match="token id 300"):
        token_ids(range(10**12), 300)
    with pytest.raises(ImageError, match="list of frames, not range"):
        pe.Video(range(10**12))
