"""The engine's promises about pictures in prompts: loaded late, encoded once, placed, cached, refused in words; rows and masks."""

from __future__ import annotations

import io

import numpy as np
import pytest
from pictures import A, B, LONG, picture

import pyengine as pe
from pyengine.programs.rows import lay_out_rows, MediaSegment, TokenSegment
from pyengine.errors import ContextOverflowError, ImageError, RequestError, UnsupportedModelError
from pyengine.cache.policy import Full, Sliding


@pytest.fixture
def gemma(tiny_gguf):
    return pe.load(tiny_gguf("gemma3")[0], n_ctx=256)


@pytest.fixture
def qwen(tiny_gguf):
    return pe.load(tiny_gguf("qwen2_5_vl")[0], n_ctx=256)


def test_text_loads_no_encoder(gemma) -> None:
    assert gemma.plan.of("encoder") > 0 and not gemma.media.loaded
    gemma.generate("only text", max_tokens=3, temperature=0)
    assert not gemma.media.loaded
    gemma.generate("a picture", images=[A], max_tokens=3, temperature=0)
    assert gemma.media.loaded
    program = gemma.media._program
    assert gemma.plan.of("encoder") == program.weights.nbytes + program.prepared.arena_bytes


def test_the_second_question_encodes_nothing(gemma, qwen) -> None:
    for model in (gemma, qwen):
        first = [{"role": "user", "content": [{"type": "image", "image": A}, "what is it?"]}]
        a = model.chat(first, max_tokens=4, temperature=0)
        assert not a.media[0].cached and a.media[0].encode_seconds > 0 and a.n_cached == 0
        b = model.chat([*first, {"role": "assistant", "content": str(a)}, {"role": "user", "content": "sure?"}], max_tokens=4, temperature=0)
        assert b.media[0].cached and b.media[0].encode_seconds == 0
        assert b.n_cached >= a.n_prompt - 1
        assert (model.stats["image_hits"], model.stats["image_misses"]) == (1, 1)
        fresh = b.tokens
        model.reset()
        again = model.chat([*first, {"role": "assistant", "content": str(a)}, {"role": "user", "content": "sure?"}], max_tokens=4, temperature=0)
        assert again.n_cached == 0 and again.tokens == fresh


def test_another_picture_of_the_same_size_is_another_prompt(gemma, qwen) -> None:
    for model in (gemma, qwen):
        one, two = [3, A, 4], [3, picture(60, 80, 7), 4]
        model.generate(one, max_tokens=1, temperature=0)
        other = model.generate(two, max_tokens=1, temperature=0)
        assert other.n_cached <= 3                                       # what stands before the picture
        assert not np.array_equal(model.logits(one), model.logits(two))


def test_a_prompt_that_ends_in_a_cached_picture_computes_it_whole(gemma) -> None:
    gemma.generate([1, 2, A, 3, 4], max_tokens=1, temperature=0)
    n = len(gemma.logits([1, 2, A]))
    gemma.reset()
    want = gemma.generate([1, 2, A], max_tokens=3, temperature=0).tokens
    gemma.reset()
    gemma.generate([1, 2, A, 3, 4], max_tokens=1, temperature=0)
    got = gemma.generate([1, 2, A], max_tokens=3, temperature=0)
    assert got.tokens == want and 0 < got.n_cached < n


def test_the_cache_forgets_the_least_recently_used_and_spares_what_is_in_use(gemma) -> None:
    def held() -> list[bool]:
        return [pe.open_image(p).digest in gemma.media._cache for p in (A, B, LONG)]

    one = gemma.encode_image(A).nbytes
    gemma.media.budget = 2 * one
    gemma.encode_image(B)
    gemma.encode_image(A)                                                # A is younger than B now
    gemma.encode_image(LONG)
    assert held() == [True, False, True] and gemma.stats["image_cache_bytes"] == 2 * one
    gemma.generate([A, 3], max_tokens=1, temperature=0)
    gemma.encode_image(LONG)                                             # A is the oldest, but a conversation holds it
    gemma.encode_image(B)
    assert held() == [True, True, False]
    gemma.media.budget = 0
    gemma.encode_image(LONG)
    assert held() == [False, False, False] and gemma.stats["image_cache_bytes"] == 0


def test_pictures_come_in_many_forms(gemma) -> None:
    file = io.BytesIO()
    A.save(file, "PNG")
    want = gemma.generate([A, 5], max_tokens=1, temperature=0)
    for form in (np.array(A), file.getvalue(), pe.open_image(A)):
        assert gemma.generate([form, 5], max_tokens=1, temperature=0).tokens == want.tokens
    assert gemma.stats["image_misses"] == 1


def test_where_pictures_stand_in_a_text(gemma, qwen) -> None:
    for model, marker in ((gemma, "<start_of_image>"), (qwen, "<|vision_start|><|image_pad|><|vision_end|>")):
        marker = model._prompts.markers()["image"]
        placed = model.generate(f"see {marker} and {marker}!", images=[A, B], max_tokens=1, temperature=0)
        first = model.generate("see", images=[A], max_tokens=1, temperature=0)
        front = model.generate(f"{marker}see", images=[A], max_tokens=1, temperature=0)
        assert len(placed.media) == 2 and first.n_prompt == front.n_prompt and first.tokens == front.tokens
        with pytest.raises(RequestError, match="2 places for pictures"):
            model.generate(f"{marker}{marker}", images=[A])


def test_messages_carry_pictures_in_the_usual_forms(qwen, tmp_path) -> None:
    path = tmp_path / "a.png"
    A.save(path)
    import base64

    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    forms = [{"role": "user", "content": [{"type": "image", "image": A}, {"type": "text", "text": "so?"}]},
             {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "so?"}]},
             {"role": "user", "content": [{"type": "image", "path": str(path)}, "so?"]},
             {"role": "user", "content": [A, "so?"]},
             {"role": "user", "content": "so?", "images": [path.read_bytes()]}]
    answers = [qwen.chat([m], max_tokens=3, temperature=0) for m in forms]
    assert len({tuple(a.tokens) for a in answers}) == 1 and len({a.n_prompt for a in answers}) == 1
    assert qwen.stats["image_misses"] == 1
    video = qwen.chat([{"role": "user", "content": [{"type": "video", "video": [A, A, A]}, "so?"]}], max_tokens=1, temperature=0)
    assert video.media[0].kind == "video" and video.media[0].grids[0][0] == 2


def test_what_cannot_be_taken_says_so(gemma, tiny_gguf) -> None:
    with pytest.raises(RequestError, match="pictures, not videos"):
        gemma.generate([[A, A], 3])
    with pytest.raises(RequestError, match="option 'zoom'"):
        gemma.encode_image(pe.open_image(A, zoom=2))
    with pytest.raises(RequestError, match="must be True or False"):
        gemma.encode_image(pe.open_image(A, pan_and_scan="yes"))
    with pytest.raises(ImageError, match="no such file"):
        gemma.generate("x", images=["nowhere.png"])
    with pytest.raises(ContextOverflowError, match="context holds 256"):
        gemma.generate([A] * 60)
    blind = pe.load(tiny_gguf("llama")[0], n_ctx=64)
    with pytest.raises(RequestError, match="takes no pictures"):
        blind.chat([{"role": "user", "content": [{"type": "image", "image": A}]}])
    with pytest.raises(UnsupportedModelError, match="no image encoder"):
        blind.encode_image(A)
    shut = pe.load(tiny_gguf("gemma3")[0], n_ctx=64, images=0)
    for ask in (lambda: shut.generate("x", images=[A]), lambda: shut.encode_image(A), lambda: shut.chat([{"role": "user", "content": [{"type": "image", "image": A}]}])):
        with pytest.raises(RequestError, match="loaded with images=0"):
            ask()


def test_a_picture_beyond_the_plan_is_refused_with_numbers(tiny_gguf) -> None:
    small = pe.load(tiny_gguf("qwen2_5_vl")[0], n_ctx=8)
    with pytest.raises(ContextOverflowError, match="49 positions, but the context holds 8"):
        small.generate([picture(200, 200), 3], max_tokens=1)


# ---- segments and masks, drawn --------------------------------------------------------------------------------------


def drawn(policy, segments) -> list[str]:
    rows = lay_out_rows(segments)
    index = np.arange(len(rows), dtype=np.int32)
    lo, hi = policy.visible(index, rows.span_end)
    return ["".join("x" if a <= j < b else "." for j in index) for a, b in zip(lo, hi)]


def media(n: int, causal: bool = False, advance: int | None = None, axes: int = 1, mark: bytes = b"p") -> MediaSegment:
    positions = np.tile(np.arange(n, dtype=np.int32), (axes, 1))
    return MediaSegment(np.zeros((n, 4), np.float32), positions, n if advance is None else advance, None, causal, not causal, mark)


def test_masks_of_prompts_with_pictures() -> None:
    """Rows are queries. T p p p T q q: a picture sees itself whole, text sees what is before it, q does not see p's future."""
    prompt = [TokenSegment((1,)), media(3), TokenSegment((2,)), media(2, mark=b"q")]
    assert drawn(Full(), prompt) == [
        "x......",
        "xxxx...",
        "xxxx...",
        "xxxx...",
        "xxxxx..",
        "xxxxxxx",
        "xxxxxxx"]
    assert drawn(Sliding(2), prompt) == [
        "x......",
        "xxxx...",
        ".xxx...",
        "..xx...",
        "...xx..",
        "....xxx",
        ".....xx"]
    neighbours = [media(2), media(2, mark=b"q")]
    assert drawn(Full(), neighbours) == ["xx..", "xx..", "xxxx", "xxxx"]
    assert drawn(Full(), [TokenSegment((1,)), media(2, causal=True)]) == ["x..", "xx.", "xxx"]


def test_rows_are_laid_out_and_cut() -> None:
    rows = lay_out_rows([TokenSegment((7, 8)), media(3, advance=2, axes=3), TokenSegment((9,))], axes=3)
    assert rows.positions.tolist() == [[0, 1, 2, 3, 4, 4]] * 3 and rows.next == 5
    assert rows.keys == [7, 8, (b"p", 0), (b"p", 1), (b"p", 2), 9]
    assert list(rows.steps(0, 4)) == [(0, 2), (2, 6)] and list(rows.steps(0, 3)) == [(0, 2), (2, 5), (5, 6)]
    assert [rows.whole(n) for n in range(7)] == [0, 1, 2, 2, 2, 5, 6]
    assert [(s.start, s.stop, len(e)) for s, e in rows.embeddings(1, 4)] == [(1, 3, 2)]
    with pytest.raises(RequestError, match="3 rows must be one step"):
        list(rows.steps(2, 2))
    assert list(lay_out_rows([media(5, causal=True)]).steps(0, 2)) == [(0, 2), (2, 4), (4, 5)]
