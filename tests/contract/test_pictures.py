"""Every architecture that sees, against transformers: logits at every position, encoders, videos, conversations."""

from __future__ import annotations

import numpy as np
import pytest

import cases
import pyengine as pe
import tiny
from pictures import A, B, DOT, LONG, picture, same, THIN

SEEING = cases.kinds(sees=True)
PROMPTS = {
    "text": [3, 7, "only text here", 9],
    "one": ["what is ", A, " this?"],
    "two": [5, A, "and", B, "differ how?", 6],
    "side by side": [A, B, 4],
    "awkward": ["long ", LONG, " thin ", THIN, " dot ", DOT, " end"],
    "last": ["look at ", A],
}


def prompts(kind: str) -> dict[str, list]:
    """Prompts of a kind by name: those that show what its pictures become, if it has its own."""
    return cases.find(kind).prompts or PROMPTS


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in SEEING for name in prompts(kind)])
def test_logits_are_those_of_transformers(tiny_gguf, kind: str, name: str) -> None:
    out, folder = tiny_gguf(kind)
    prompt = prompts(kind)[name]
    want = tiny.hf_seen(folder, prompt)
    for n_batch in (512, 9):
        model = pe.load(out, n_ctx=256, kv_dtype="f32", n_batch=n_batch)
        same(model.logits(prompt), want.logits)
    media = [p for p in prompt if not isinstance(p, (int, str))]
    for part, features in zip(media, want.features):
        same(model.encode_image(part), features)


@pytest.mark.parametrize("kind", cases.kinds(videos=True))
@pytest.mark.parametrize("n_frames", [1, 2, 5])
def test_videos_are_those_of_transformers(tiny_gguf, kind: str, n_frames: int) -> None:
    out, folder = tiny_gguf(kind)
    frames = [picture(60, 90, seed) for seed in range(n_frames)]
    prompt = [3, A, "then", frames, "what moves?", 9]
    want = tiny.hf_seen(folder, prompt)
    for n_batch in (512, 7):
        same(pe.load(out, n_ctx=512, kv_dtype="f32", n_batch=n_batch).logits(prompt), want.logits)


@pytest.mark.parametrize("kind", SEEING)
def test_greedy_text_goes_on_as_transformers(tiny_gguf, kind: str) -> None:
    """Positions behind a picture, token after token."""
    out, folder = tiny_gguf(kind)
    prompt = [5, A, "and", B, 6] if cases.find(kind).several else [5, A, "and", 6]
    model = pe.load(out, n_ctx=256, kv_dtype="f32")
    never_end = tuple((i, -1e9) for i in model.tokenizer.eog_ids)
    answer = model.generate(prompt, max_tokens=12, temperature=0, logit_bias=never_end)
    want = tiny.hf_seen(folder, [*prompt, *answer.tokens])
    n = answer.n_prompt
    masked = want.logits[n - 1 : -1].copy()
    masked[:, list(model.tokenizer.eog_ids)] = -np.inf
    assert answer.tokens == masked.argmax(-1).tolist()
    same(model.logits([*prompt, *answer.tokens]), want.logits)


@pytest.mark.parametrize("kind", SEEING)
@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
def test_encoder_weights_in_other_formats(tiny_gguf, kind: str, outtype: str) -> None:
    """Close to float32 in the measure of the format; equal would mean that the format was not used."""
    exact, close = (pe.load(tiny_gguf(kind, o)[0], n_ctx=128).encode_image(A) for o in ("f32", outtype))
    error = np.sqrt(np.mean((exact - close) ** 2) / np.mean(exact**2))
    assert 1e-6 < error < {"f16": 4e-3, "bf16": 3e-2, "q8_0": 6e-2}[outtype]


@pytest.mark.parametrize("kind", SEEING)
def test_a_conversation_has_the_ids_of_transformers(tiny_gguf, kind: str) -> None:
    """Template, expansion and tokenization together: line breaks before a picture merge with those that it brings."""
    out, folder = tiny_gguf(kind)
    messages = cases.find(kind).messages or [
        {"role": "user", "content": [{"type": "image", "image": A}, {"type": "text", "text": "what is it?\n"}, {"type": "image", "image": B}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]},
        {"role": "user", "content": [{"type": "text", "text": "sure? "}, {"type": "image", "image": A}, {"type": "text", "text": "\n\nLook"}]}]
    want = tiny.hf_chat_ids(folder, messages, [part["image"] for m in messages for part in m["content"] if part["type"] == "image"])
    assert pe.load(out, n_ctx=512).chat_ids(messages) == want
