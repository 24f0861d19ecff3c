"""Pictures that are seen by cross-attention: one position of the prompt each, rows of their own in caches of their own."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_multimodal import DOT, LONG, THIN, A, B, picture

import pyengine as pe
from pyengine.media.views import Limits
from pyengine.programs.rows import lay_out_rows, MediaSegment, TokenSegment
from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError, SessionError, UnsupportedModelError

tiny = pytest.importorskip("tiny")
SEVERAL = [7, 8, A, B, "x y z", LONG, DOT, "and so on", THIN, "abc", A]     # 4, 4, 4, 1, 4 and 4 tiles


def same(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 2e-5 * np.ptp(want)
    assert np.array_equal(got.argmax(-1), want.argmax(-1))


@pytest.fixture
def path(tiny_gguf):
    return tiny_gguf("mllama")[0]


def ask(model: pe.Model, parts: list[Any], n: int = 8) -> Any:
    """Sampled text that does not end, with the log-probability of each token."""
    never = tuple((i, -1e9) for i in model.tokenizer.eog_ids)
    return model.generate(parts, max_tokens=n, temperature=0.7, seed=1, logit_bias=never)


def equal(a: Any, b: Any) -> None:
    assert a.tokens == b.tokens and [x.logprob for x in a.sampled] == [x.logprob for x in b.sampled]


# ---- which rows see which pictures ----------------------------------------------------------------------------------


def shot(n: int, mark: bytes) -> MediaSegment:
    return MediaSegment(np.zeros((n, 4), np.float32), np.zeros((1, n), np.int32), 1, None, True, False, mark, token=99)


def test_what_text_sees_drawn() -> None:
    """Encoder rows of p, q and r are columns. Text sees the pictures before it that stand side by side, and no earlier ones."""
    p, q, r, word = shot(2, b"p"), shot(3, b"q"), shot(1, b"r"), TokenSegment((5,))
    rows = lay_out_rows([word, p, word, q, r, word, word])
    assert rows.ids.tolist() == [5, 99, 5, 99, 99, 5, 5] and rows.positions.tolist() == [list(range(7))] and rows.next == 7
    assert rows.keys == [5, (b"p", 0), 5, (b"q", 0), (b"r", 0), 5, 5]
    drawn = ["".join("x" if lo <= j < hi else "." for j in range(6)) for lo, hi in rows.sees.T]
    assert drawn == [
        "......",
        "xx....",
        "xx....",
        "..xxx.",
        "..xxxx",
        "..xxxx",
        "..xxxx"]
    assert [(i, len(e)) for i, e in rows.across(1, 4)] == [(1, 2), (3, 3)]


def test_text_sees_what_transformers_mask_says() -> None:
    from transformers.models.mllama import processing_mllama as theirs

    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = rng.choice([5, 99], rng.integers(1, 12), p=[0.6, 0.4]).tolist()
        tiles = rng.integers(1, 5, ids.count(99)).tolist()
        sizes = iter(tiles)
        segments = [shot(next(sizes), bytes([i])) if id_ == 99 else TokenSegment((id_,)) for i, id_ in enumerate(ids)]
        lo, hi = lay_out_rows(segments).sees
        got = np.arange(sum(tiles)) >= lo[:, None]
        got &= np.arange(sum(tiles)) < hi[:, None]
        sparse = theirs.get_cross_attention_token_mask(ids, 99)
        mask = theirs.convert_sparse_cross_attention_mask_to_dense([sparse], [tiles], 4, len(ids))[0]
        want = np.concatenate([mask[:, i, :n] for i, n in enumerate(tiles)], axis=1) if tiles else np.zeros((len(ids), 0))
        assert np.array_equal(got, want == 1), ids


# ---- results --------------------------------------------------------------------------------------------------------


def test_unmodified_transformers_agrees_where_a_picture_comes_first(tiny_gguf) -> None:
    """Text before it is what they and the authors treat differently; here there is none, so the oracle changes nothing."""
    out, folder = tiny_gguf("mllama")
    for prompt in ([A, "what is this?"], [LONG, B, "which?", DOT, 5]):
        same(pe.load(out, n_ctx=64, kv_dtype="f32").logits(prompt), tiny.hf_seen(folder, prompt).logits)


def test_no_bit_depends_on_how_steps_are_cut(path) -> None:
    """Pictures of 40 rows are written 512, 16, 7 and 1 at a time; steps end before, at and behind their tokens."""
    want = pe.load(path, n_ctx=128).logits(SEVERAL)
    for n_batch in (16, 7, 1):
        assert np.array_equal(pe.load(path, n_ctx=128, n_batch=n_batch).logits(SEVERAL), want)
    for n_threads in (1, 3):
        assert np.array_equal(pe.load(path, n_ctx=128, n_threads=n_threads).logits(SEVERAL), want)


def test_text_before_the_first_picture_is_text(path) -> None:
    """It gets nothing from cross-attention, so it has the logits that it has without any picture."""
    words = [3, 9, "only text here"]
    model = pe.load(path, n_ctx=128)
    text = model.logits(words)
    assert np.array_equal(model.logits([*words, A, 5])[: len(text)], text)
    assert not np.array_equal(model.logits([A, *words])[1:], text)
    assert np.isfinite(model.logits([*words, A, B])).all()


def test_rows_that_see_nothing_skip_the_layers(path) -> None:
    model = pe.load(path, n_ctx=128)
    seeing, run = [], model.program.execute

    def watched(entry: str | None = None, **dims: int) -> None:
        seeing.append((dims["m"], dims["s"], dims["c"]))
        run(entry, **dims)

    model.program.execute = watched
    model.logits([1, 2, 3])
    model.logits([1, 2, DOT, 3, 4])
    assert seeing == [(3, 0, 0), (0, 0, 10), (5, 3, 0)]


def test_without_pictures_the_layers_are_not_there(path) -> None:
    """images=0: no encoder, no caches and no weights of layers that attend across; text has the same bits."""
    blind, seeing = pe.load(path, n_ctx=64, images=0), pe.load(path, n_ctx=64)
    assert np.array_equal(blind.logits([1, 2, "a text"]), seeing.logits([1, 2, "a text"]))
    assert {i.layer for i in blind.plan.items if i.purpose == "weights" and i.layer is not None} == {0, 2, 5}
    assert not any("Cross" in i.detail for i in blind.plan.items) and blind.plan.total < seeing.plan.total
    with pytest.raises(RequestError, match="takes no pictures"):
        blind.generate([A, 3])


def test_the_picture_s_token_lies_beyond_the_output_head(path) -> None:
    model = pe.load(path, n_ctx=64)
    token = model.tokenizer.id_of("<|image|>")
    assert token == model.n_vocab and model.logits([3, token, 4]).shape == (3, model.n_vocab)
    assert np.array_equal(model.logits([3, token, 4])[0], model.logits([3, 4])[0])
    with pytest.raises(RequestError, match=f"outside the vocabulary of {model.n_vocab + 8}"):
        model.logits([model.n_vocab + 8])
    answer = model.generate([A, 3, 4], max_tokens=3, temperature=0, repeat_penalty=1.2, logprobs=2)
    assert answer.n_prompt == 3 and answer.media[0].n_tokens == 1 and answer.media[0].grids == ((1, 2, 2),)
    with pytest.raises(RequestError, match="pictures, not videos"):
        model.generate([[A, A], 3])


@pytest.mark.parametrize("kv_dtype", ["bf16", "q8_0", "q4_0", "q8_0/f16"])
def test_caches_in_other_formats(tiny_gguf, kv_dtype: str) -> None:
    """Close to float32 in the measure of the format; equal would mean that it was not used."""
    path = tiny_gguf("mllama", text_config={"num_attention_heads": 3, "num_key_value_heads": 1})[0]
    exact, close = (pe.load(path, n_ctx=128, kv_dtype=d, n_seq=2).logits(SEVERAL) for d in ("f32", kv_dtype))
    error = np.sqrt(np.mean((exact - close) ** 2) / np.mean(exact**2))
    assert 1e-5 < error < {"bf16": 2e-2, "q8_0": 3e-2, "q4_0": 0.35, "q8_0/f16": 3e-2}[kv_dtype]


def test_layers_over_parts_of_memory(path) -> None:
    parts = pe.load(path, n_ctx=128, device={"cpu:0": 1 << 30, "cpu:1": 1 << 29}, n_seq=2)
    assert "layers: " in parts.plan.table() and len(parts.program.programs) == 2
    assert np.array_equal(parts.logits(SEVERAL), pe.load(path, n_ctx=128).logits(SEVERAL))


# ---- conversations --------------------------------------------------------------------------------------------------


def test_conversations_side_by_side_are_those_alone(path) -> None:
    prompts = [[3, A, "so?"], ["text only, and longer than the others"], [B, LONG, "which?"], [5, DOT, 6], [A, "so?", B, 4, 5]]
    alone = pe.load(path, n_ctx=96)
    want = []
    for p in prompts:
        alone.reset()
        want.append(ask(alone, p))
    never = tuple((i, -1e9) for i in alone.tokenizer.eog_ids)
    for settings in ({"n_seq": 3}, {"n_seq": 5, "n_batch": 6}):
        many = pe.load(path, n_ctx=96, **settings)
        for a, b in zip(many.generate_many(prompts, max_tokens=8, temperature=0.7, seed=1, logit_bias=never), want):
            equal(a, b)


def written(model: pe.Model) -> list[int]:
    """Numbers of encoder rows, as they are written from now on."""
    found: list[int] = []
    cross = model._runner.inputs.cross
    model._runner.inputs.cross = lambda s, pictures: (found.extend(len(p) for p in pictures), cross(s, pictures))[1]
    return found


def test_a_conversation_goes_on_without_writing_its_pictures_again(path) -> None:
    model = pe.load(path, n_ctx=128)
    first = [{"role": "user", "content": [{"type": "image", "image": A}, "what is it?"]}]
    rows = written(model)
    a = model.chat(first, max_tokens=4, temperature=0)
    second = [*first, {"role": "assistant", "content": str(a)},
              {"role": "user", "content": [{"type": "image", "image": B}, "and this?"]}]
    b = model.chat(second, max_tokens=4, temperature=0)
    assert rows == [40, 40] and b.n_cached >= a.n_prompt - 1 and b.media[0].cached and not b.media[1].cached
    fresh = pe.load(path, n_ctx=128).chat(second, max_tokens=4, temperature=0)
    equal(b, fresh)


def test_forks_share_pictures(path) -> None:
    """Three questions on the same two pictures: conversations share the first one's pages, and the half-full one until they add."""
    model, fresh = pe.load(path, n_ctx=128, n_seq=3), pe.load(path, n_ctx=128)
    start = [3, A, B, "these two are"]                                   # 80 rows: a page of 64 and 16 in the next
    rows, cells = written(model), model._runner.cells
    ask(model, [*start, 5, 6, 7, 8])
    ask(model, [*start, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18])
    forked = ask(model, [*start, 19, DOT, 20])
    number = model._runner.step.across
    assert rows == [40, 40, 10] and len(cells.conversations) == 3 and dict(cells.shared())[number] == 2
    equal(forked, ask(fresh, [*start, 19, DOT, 20]))
    equal(ask(model, [*start, 5, 6, 7, 9]), ask(fresh, [*start, 5, 6, 7, 9]))
    assert rows == [40, 40, 10]
    other = ask(model, [3, A, "alone"])                                  # goes back to before the second picture
    fresh.reset()
    equal(other, ask(fresh, [3, A, "alone"]))
    assert rows == [40, 40, 10] and other.n_cached == 2


def test_another_picture_in_the_same_place(path) -> None:
    model = pe.load(path, n_ctx=64)
    one, two = [3, A, 4, 5], [3, picture(60, 80, 7), 4, 5]
    ask(model, one)
    other = ask(model, two)
    assert other.n_cached == 1
    equal(other, ask(pe.load(path, n_ctx=64), two))


def test_more_pictures_than_were_planned_are_refused_with_numbers(path) -> None:
    model = pe.load(path, n_ctx=128, images=(80, 60, 2), n_seq=2)
    assert model.plan.picture == 40
    want = ask(pe.load(path, n_ctx=128), [A, B, "two"])
    equal(ask(model, [A, B, "two"]), want)
    with pytest.raises(ContextOverflowError, match=r"3 pictures have 120 encoder rows.*holds 80.*images="):
        ask(model, [A, B, A, "three"])
    with pytest.raises(ContextOverflowError, match="120 encoder rows"):
        model.logits([A, B, A])
    assert len(ask(model, [DOT, DOT, DOT, DOT, 5]).media) == 4           # smaller ones: 10 rows each
    small = pe.load(path, n_ctx=128, images=(10, 10))
    assert small.plan.picture == 10 and len(small.encode_image(DOT)) == 10
    with pytest.raises(RequestError, match=r"4 tiles, 40 encoder rows.*up to 10.*images=\(80, 60\)"):
        small.encode_image(A)


def test_idle_conversations_go_for_pictures_of_others(path) -> None:
    """Encoder rows of two conversations of two pictures each: a third takes the place of the one used longest ago."""
    model = pe.load(path, n_ctx=128, images=(80, 60, 2), n_seq=2)
    prompts = [[A, B, i, "so?"] for i in (1, 2, 3, 4)]
    fresh = pe.load(path, n_ctx=128)
    for p in [*prompts, *prompts]:
        fresh.reset()
        equal(ask(model, p), ask(fresh, p))
        assert len(model._runner.cells.conversations) <= 2


def test_tokens_behind_a_picture_can_be_removed(path) -> None:
    """Encoder rows have no positions: they stay, the same keys are left of the text's layers."""
    model = pe.load(path, n_ctx=64)
    ask(model, [3, A, *range(20, 40)])
    runner, s = model._runner, model._runner.cells.conversations[0]
    layer, every = runner.store.layers[1], np.arange(runner.store.layers[1].k.shape[1])
    held = [layer.k.gather(every), layer.v.gather(every)]
    runner.shift(s, 6, 10)
    assert s.crossed() == 40 and s.sees == (0, 40) and len(s.keys) == 2 + 20 + 7 - 4
    assert all(np.array_equal(a, b) for a, b in zip(held, (layer.k.gather(every), layer.v.gather(every))))
    with pytest.raises(RequestError, match="before or within a picture"):
        runner.shift(s, 0, 1)


def test_a_saved_conversation_needs_room_for_its_pictures(path, tmp_path) -> None:
    model = pe.load(path, n_ctx=128)
    model.save(tmp_path / "a", ask(model, [A, B, "two"]))
    with pytest.raises(ContextOverflowError, match="80 encoder rows, but a conversation holds 40"):
        pe.load(path, n_ctx=128, images=(80, 60, 1)).restore(tmp_path / "a")
    with pytest.raises((ContextOverflowError, SessionError)):
        pe.load(path, n_ctx=128, images=0).restore(tmp_path / "a")


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_tiles_are_those_of_transformers() -> None:
    from pyengine.models.mllama import arrange, arrangements, fit, VisionConfig
    from transformers.models.mllama import image_processing_pil_mllama as theirs

    rng = np.random.default_rng(0)
    edges = [1, 2, 559, 560, 561, 1119, 1120, 1121, 1680, 2240, 2241, 5000]
    sizes = [(w, h) for w in edges for h in edges] + [tuple(s) for s in np.exp(rng.uniform(0, 8.5, (2000, 2))).astype(int).tolist()]
    for max_tiles, tile in ((4, 560), (4, 448), (6, 100), (1, 64)):
        c = VisionConfig(tile, 14, 1, 1, 1, 1, 1e-5, "gelu", (), max_tiles, (0.0,) * 3, (1.0,) * 3, 2)
        assert arrangements(max_tiles) == theirs.get_all_supported_aspect_ratios(max_tiles)
        for w, h in sizes:
            y, x = arrange(w, h, c)
            assert (y * tile, x * tile) == theirs.get_optimal_tiled_canvas(h, w, max_tiles, tile), (w, h)
            assert fit(w, h, (y, x), tile)[::-1] == theirs.get_image_size_fit_to_canvas(h, w, y * tile, x * tile, tile), (w, h)


def test_pixels_and_aspect_ratios_are_those_of_transformers(tiny_gguf) -> None:
    out, folder = tiny_gguf("mllama")
    vision = pe.load(out, n_ctx=16).media.encoder
    c, p = vision.config, vision.config.patch_size
    sizes = ((44, 44), (88, 88), (45, 43), (300, 10), (10, 3000), (200, 130), (44, 120), (44, 80))
    pictures = [A, B, LONG, THIN, DOT, *(picture(h, w) for h, w in sizes)]
    want = tiny.hf_seen(folder, [*pictures, 3])
    assert {n for _, n, _ in want.grids} == {1, 2, 3, 4}
    for image, pixels, (ratio, n, _) in zip(pictures, want.pixels, want.grids):
        processed = vision.process(pe.open_image(image), Limits(16, vision.most_rows(16)))
        inputs = processed.views[0].inputs
        assert processed.views[0].positions.shape[1] == n * c.rows
        assert inputs["places"][0] == ratio * c.max_tiles * c.rows
        edge = c.side * p
        cut = pixels[:, :, :edge, :edge].reshape(n, 3, c.side, p, c.side, p).transpose(0, 2, 4, 1, 3, 5).reshape(n, c.side**2, -1)
        patches = inputs["patches"].reshape(c.max_tiles, c.rows, -1)
        np.testing.assert_allclose(patches[:n, 1:], cut, atol=1e-6)
        assert not patches[n:].any() and not patches[:, 0].any()


def test_the_meaning_of_layer_numbers_is_the_version_s(tiny_gguf, tmp_path) -> None:
    """The authors count layers before a state; transformers since 4.54 takes the state behind that layer."""
    from converters import convert

    folder = tiny_gguf("mllama")[1]
    for version, states in (("5.23.0", [1, 3]), ("4.54.1", [1, 3]), ("4.45.0.dev0", [0, 2]), (None, [0, 2])):
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_version": version}))
        found = pe.GGUFFile(convert(tmp_path, tmp_path / "out.gguf", "f32")).metadata["clip.vision.feature_layer"]
        assert list(found) == states
    behind, before = pe.load(tiny_gguf("mllama")[0], n_ctx=16), pe.load(tmp_path / "out.gguf", n_ctx=16)
    assert np.abs(behind.encode_image(A) - before.encode_image(A)).max() > 0.1


def test_what_the_converter_refuses(tiny_gguf, tmp_path) -> None:
    from converters import convert

    folder = tiny_gguf("mllama")[1]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    images = json.loads((folder / "preprocessor_config.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    vision = config["vision_config"]
    for name, changed, error in (
            ("preprocessor_config.json", {**images, "max_image_tiles": 2}, UnsupportedModelError),
            ("preprocessor_config.json", {**images, "size": {"height": 56, "width": 56}}, UnsupportedModelError),
            ("config.json", {**config, "vision_config": {**vision, "supported_aspect_ratios": [[1, 1]]}}, InvalidModelError),
            ("config.json", {**config, "vision_config": {**vision, "intermediate_layers_indices": "all"}}, InvalidModelError)):
        was = (tmp_path / name).read_text()
        (tmp_path / name).write_text(json.dumps(changed))
        with pytest.raises(error):
            convert(tmp_path, tmp_path / "out.gguf", "f32")
        (tmp_path / name).write_text(was)


def test_a_picture_as_array_or_file_is_one_picture(path, tmp_path) -> None:
    model = pe.load(path, n_ctx=64)
    Image.fromarray(np.array(A)).save(tmp_path / "a.png")
    want = ask(model, [A, 5])
    for form in (np.array(A), pe.open_image(tmp_path / "a.png")):
        equal(ask(model, [form, 5]), want)
    named, marked = (model.generate(text, images=[image], max_tokens=2, temperature=0)
                     for text, image in (("so", tmp_path / "a.png"), ("<|image|>so", A)))
    equal(named, marked)
    assert model.stats["image_misses"] == 1
