"""Llama 4 whole, against transformers: chunks and their borders, temperature, experts, tiles of pictures, and its variants."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import picture, same

import pyengine as pe
from pyengine.files.model_files import open_files
from oracle import Planned
from pyengine.programs.bound import bind
from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError, UnsupportedModelError
from pyengine.cache.policy import Chunked, Full

tiny = pytest.importorskip("tiny")
llama4 = pytest.importorskip("pyengine.models.llama4")

# 56 pixels a tile, 4 soft tokens; canvases of 1, 1 x 2, 3 x 1, 1 x 4 and 4 x 4 tiles
ONE, WIDE, TALL, ROW = picture(50, 56), picture(40, 97, 1), picture(150, 29, 2), picture(40, 170)
LARGE, DOT = picture(240, 260), picture(1, 1)
PROMPTS: dict[str, list[Any]] = {
    "text": np.random.default_rng(0).integers(0, 390, 120).tolist(),
    "one tile": ["what is ", ONE, " this?"],
    "tiles": [5, WIDE, "and", TALL, "differ how?", 6],
    "side by side": [ONE, DOT, ROW],
    "sixteen tiles and the whole": ["look at ", LARGE, " and ", WIDE],
}
MAVERICK = {"use_qk_norm": False, "num_local_experts": 7}


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_are_those_of_transformers(tiny_gguf, name: str) -> None:
    """Chunks of 24 tokens: their borders lie in texts and within pictures."""
    out, folder = tiny_gguf("llama4")
    want = tiny.hf_seen(folder, PROMPTS[name])
    for n_batch in (512, 9):
        same(pe.load(out, n_ctx=256, kv_dtype="f32", n_batch=n_batch).logits(PROMPTS[name]), want.logits)
    model = pe.load(out, n_ctx=256)
    for part, features in zip([p for p in PROMPTS[name] if not isinstance(p, (int, str))], want.features):
        same(model.encode_image(part), features)


VARIANTS: dict[str, dict[str, Any]] = {
    "Maverick": {"text_config": MAVERICK},
    "two experts a token": {"text_config": {"num_experts_per_tok": 2, "interleave_moe_layer_step": 1}},
    "no temperature": {"text_config": {"attn_temperature_tuning": False}},
    "the last layer has no positions": {"text_config": {"num_hidden_layers": 4, "no_rope_layers": [0, 1, 1, 0]}},
    "full layers with positions": {"text_config": {"layer_types": [*["full_attention", "chunked_attention"] * 2, "full_attention"]}},
    "biases, tied, other experts": {"text_config": {"attention_bias": True, "moe_layers": [0, 4], "tie_word_embeddings": True}},
    "plain rope, odd chunk": {"text_config": {"attention_chunk_size": 7, "floor_scale": 3,
                                              "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(tiny_gguf, variant: str) -> None:
    out, folder = tiny_gguf("llama4", **VARIANTS[variant])
    ids = PROMPTS["text"][:70]
    same(pe.load(out, n_ctx=128, kv_dtype="f32", n_batch=32).logits(ids), tiny.hf_seen(folder, ids).logits)


def test_the_text_model_alone(tiny_gguf) -> None:
    out, folder = tiny_gguf("llama4_text")
    ids = PROMPTS["text"][:70]
    model = pe.load(out, n_ctx=128, kv_dtype="f32")
    same(model.logits(ids), tiny.hf_logits(folder, ids))
    with pytest.raises(UnsupportedModelError, match="no image encoder"):
        model.encode_image(ONE)


def test_each_part_matters(tiny_gguf) -> None:
    """What a wrong constant would change, it changes in the oracle too: within 120 tokens chunks, temperature and norm all act."""
    ids = PROMPTS["text"]
    want = tiny.hf_seen(tiny_gguf("llama4")[1], ids).logits
    for key, value in (("attention_chunk_size", 64), ("floor_scale", 200), ("attn_scale", 0.1), ("use_qk_norm", False)):
        other = pe.load(tiny_gguf("llama4", text_config={key: value})[0], n_ctx=128, kv_dtype="f32").logits(ids)
        assert np.abs(other - want).max() > 0.01 * np.ptp(want), key


@pytest.mark.parametrize("n_batch", [1, 7, 32])
def test_any_cut_gives_the_same_bits(tiny_gguf, n_batch: int) -> None:
    """Rings of a chunk and a step, of any length, across borders of chunks."""
    path = tiny_gguf("llama4")[0]
    prompt = [*PROMPTS["text"][:40], WIDE, *PROMPTS["text"][40:80]]
    whole = pe.load(path, n_ctx=256).logits(prompt)
    assert np.array_equal(pe.load(path, n_ctx=256, n_batch=n_batch, n_threads=1).logits(prompt), whole)


def test_greedy_text_goes_on_as_transformers(tiny_gguf) -> None:
    """From within a chunk over its border, behind pictures, token after token."""
    out, folder = tiny_gguf("llama4")
    prompt = [5, WIDE, "and", ONE, 6]
    model = pe.load(out, n_ctx=256, kv_dtype="f32")
    never_end = tuple((i, -1e9) for i in model.tokenizer.eog_ids)
    answer = model.generate(prompt, max_tokens=30, temperature=0, logit_bias=never_end)
    n = answer.n_prompt
    assert n // 24 < (n + 30) // 24
    want = tiny.hf_seen(folder, [*prompt, *answer.tokens]).logits
    masked = want[n - 1 : -1].copy()
    masked[:, list(model.tokenizer.eog_ids)] = -np.inf
    assert answer.tokens == masked.argmax(-1).tolist()


def test_conversations_that_share_a_beginning(tiny_gguf) -> None:
    """Forks and continued conversations, whose rings hold the last chunk only, give the bits of fresh ones."""
    path = tiny_gguf("llama4")[0]
    model = pe.load(path, n_ctx=256, n_seq=3, n_batch=16)
    text = PROMPTS["text"]
    prompts = [text[:60], [*text[:60], *text[80:100]], [*text[:50], *text[100:]], text[:40], text[:25]]
    cached = []
    for prompt in prompts:
        got = model.generate(prompt, max_tokens=4, temperature=0)
        cached.append(got.n_cached)
        fresh = pe.load(path, n_ctx=256, n_batch=16)
        assert got.tokens == fresh.generate(prompt, max_tokens=4, temperature=0).tokens
    # 40 tokens are gone from all rings where they begin a chunk; 24 are whole chunks, of which the next token sees nothing
    assert cached == [0, 60, 50, 0, 24]


def test_layers_ask_for_what_they_see(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama4")[0], n_ctx=200, n_batch=16)
    assert [type(g.policy) for g in model._runner.cells.groups] == [Chunked, Full]
    held = {i.layer: dict(i.factors) for i in model.plan.items if i.purpose == "kv" and i.layer is not None}
    cells = {n: next(v for k, v in f.items() if k == "cells") for n, f in held.items()}
    assert [cells[i] for i in range(5)] == [40, 40, 40, cells[3], 40] and cells[3] >= 200


def test_a_conversation_has_the_ids_of_transformers(tiny_gguf) -> None:
    out, folder = tiny_gguf("llama4")
    messages = [
        {"role": "user", "content": [{"type": "image", "image": WIDE}, {"type": "text", "text": "what is it?\n"},
                                     {"type": "image", "image": ONE}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]},
        {"role": "user", "content": [{"type": "text", "text": "sure? "}, {"type": "image", "image": LARGE}]}]
    assert pe.load(out, n_ctx=512).chat_ids(messages) == tiny.hf_chat_ids(folder, messages, [WIDE, ONE, LARGE])


def test_tokens_of_the_tiles_without_keys_for_them(tiny_gguf) -> None:
    """Their texts name them, as in files of llama.cpp's converter."""
    model = pe.load(tiny_gguf("llama4")[0], n_ctx=256)
    v, token = model.media.encoder, model.tokenizer.id_of
    assert (v.start, v.end, v.across, v.down, v.whole) == tuple(map(token, (
        "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>", "<|image|>")))


# ---- the image processor ----------------------------------------------------------------------------------------------------


def oracle_geometry(height: int, width: int, tile: int, most: int, largest: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of tiles, and size in the canvas, by transformers' own functions."""
    import torch
    from transformers.image_utils import SizeDict

    theirs = next(c for c in tiny._llama4_images().__mro__ if c.__name__ == "Llama4ImageProcessor")._preprocess.__globals__
    canvases = torch.tensor(theirs["find_supported_resolutions"](most, SizeDict(height=tile, width=tile)))
    best = theirs["get_best_fit"]((height, width), canvases, resize_to_max_canvas=largest)
    room = best if largest else (min(max(height, tile), best[0]), min(max(width, tile), best[1]))     # as `_preprocess` does
    size = theirs["get_max_res_without_distortion"]((height, width), room)
    return tuple((best // tile).tolist()), tuple(max(int(n), 1) for n in size)


sides = st.one_of(st.integers(1, 400), st.integers(1, 30).map(lambda n: 56 * n), st.integers(1, 9000))


@settings(max_examples=300, deadline=None)
@given(sides, sides, st.sampled_from([56, 336]), st.sampled_from([1, 5, 12, 16]), st.booleans())
def test_canvases_and_sizes_are_those_of_transformers(height: int, width: int, tile: int, most: int, largest: bool) -> None:
    rows, columns = llama4.canvas(height, width, tile, most, largest)
    size = llama4.fitted(height, width, (rows * tile, columns * tile), tile, largest)
    assert ((rows, columns), size) == oracle_geometry(height, width, tile, most, largest)


@pytest.mark.parametrize("options", [{}, {"max_patches": 3}, {"resize_to_max_canvas": True, "image_mean": [0.4, 0.5, 0.6],
                                                              "image_std": [0.3, 0.5, 0.9]}])
def test_pixels_are_those_of_transformers(tiny_gguf, options: dict[str, Any]) -> None:
    """To the last bit: Pillow's resizing, padding, bfloat16."""
    out, folder = tiny_gguf("llama4", processor=options)
    vision = Planned(pe.load(out, n_ctx=512).media.encoder, 512)
    processor = tiny._llama4_images().from_pretrained(folder)
    for image in (ONE, WIDE, TALL, LARGE, DOT):
        want = processor(image, return_tensors="pt")["pixel_values"].float().numpy()               # [tiles, 3, 56, 56]
        views = vision.process(pe.open_image(image)).views
        assert len(views) == len(want) == vision.n_rows(*image.size) // 4
        for view, tile in zip(views, want):
            patches = tile.reshape(3, 4, 14, 4, 14).transpose(1, 3, 0, 2, 4).reshape(16, -1)[vision.order]
            assert np.array_equal(view.inputs["patches"], np.concatenate([patches, np.zeros((1, 588), np.float32)]))


def test_fewer_tiles_by_request(tiny_gguf) -> None:
    out, folder = tiny_gguf("llama4")
    model = pe.load(out, n_ctx=256, kv_dtype="f32")
    prompt = [3, pe.open_image(LARGE, max_tiles=4), 4]
    answer = model.generate(prompt, max_tokens=1, temperature=0)
    assert answer.media[0].views == 5 and answer.media[0].processed == (112, 103) and answer.media[0].n_tokens == 20
    same(model.logits(prompt), tiny.hf_seen(folder, [3, LARGE, 4], max_patches=4).logits)


def test_what_cannot_be_taken_says_so(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama4")[0], n_ctx=64)
    with pytest.raises(RequestError, match="pictures, not videos"):
        model.generate([[ONE, ONE], 3])
    for wrong in (0, 17, "all"):
        with pytest.raises(RequestError, match="max_tiles="):
            model.encode_image(pe.open_image(ONE, max_tiles=wrong))
    with pytest.raises(ContextOverflowError, match="17 tiles of 4 positions, but the context holds 64"):
        model.encode_image(LARGE)


def test_keys_that_cannot_be(tiny_gguf) -> None:
    path = tiny_gguf("llama4")[0]
    for key, value, error in (("llama4.rope.layers", np.array([True]), "1 entries for 5 layers"),
                              ("clip.vision.attention.head_count", 16, "multiple of 4 elements"),
                              ("clip.vision.patch_size", 15, "no multiple"), ("clip.vision.max_tiles", 5000, "max_tiles 5000")):
        files = open_files(path)
        files.model.metadata._decoded[key] = value
        with pytest.raises(InvalidModelError, match=error):
            bind(files)
