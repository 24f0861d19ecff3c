"""Mistral Small 3.1 and Pixtral against transformers: pixels, geometry, encoder, decoder; tiny random models, odd sizes and ids."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import pyengine as pe
from oracle import encoder_of
from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError, UnsupportedModelError
from pyengine.media.image import Image
from pyengine.models import architectures

transformers = pytest.importorskip("transformers", reason="needs transformers and torch: pip install -r requirements/test.txt")

import foreign  # noqa: E402
import hollow  # noqa: E402
import tiny  # noqa: E402

SIZES = [(61, 47), (30, 300), (300, 17), (9, 11), (400, 500), (112, 112), (28, 84), (90, 1), (130, 131)]      # width, height
RNG = np.random.default_rng(4)
PICTURES = [RNG.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in SIZES]
A, B = PICTURES[0], PICTURES[4]


def close(got: np.ndarray, want: np.ndarray, share: float = 2e-5) -> None:
    assert got.shape == want.shape and np.abs(got - want).max() <= share * np.ptp(want)


def pil(pixels: np.ndarray):
    import PIL.Image

    return PIL.Image.fromarray(pixels)


# ---- processor ---------------------------------------------------------------------------------------------------------------


OTHER = {"image_mean": [0.4, 0.5, 0.45], "image_std": [0.2, 0.25, 0.3], "resample": 2, "size": {"longest_edge": 97}}


@pytest.mark.parametrize("settings", [{}, OTHER], ids=["as released", "others"])
def test_pixels_are_bit_for_bit_those_of_transformers(tiny_gguf, settings) -> None:
    path, folder = tiny_gguf("mistral3", processor=settings)
    ours, theirs = encoder_of(path), transformers.PixtralImageProcessorPil.from_pretrained(folder)
    for pixels in PICTURES:
        made = theirs(pixels, patch_size=28, return_tensors="np", input_data_format="channels_last")      # 14 x merge of 2
        done = ours.process(Image(pixels))
        (view,) = done.views
        _, lines, columns = view.grid
        patches = view.inputs["patches"].reshape(lines, columns, 2, 2, 3, 14, 14).transpose(4, 0, 2, 5, 1, 3, 6)
        assert np.array_equal(patches.reshape(3, lines * 28, columns * 28), made["pixel_values"][0])
        assert done.size == pixels.shape[1::-1] and done.processed == (columns * 28, lines * 28)
        assert ours.n_rows(*done.size) == lines * columns == view.positions.shape[1]
        ends = [p for p in done.parts if isinstance(p, int)]
        assert ends == [ours.line_end] * (lines - 1) + [ours.end] and done.parts[-1] == ours.end
        pieces = [(p.start, p.stop) for p in done.parts if not isinstance(p, int)]
        assert pieces == [(i * columns, (i + 1) * columns) for i in range(lines)]


def test_sizes_are_transformers_and_within_the_bound(tiny_gguf) -> None:
    from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size as theirs

    ours = encoder_of(tiny_gguf("mistral3")[0])
    for _ in range(2000):
        height, width = (int(s) for s in np.exp(RNG.uniform(0, 9, 2)))
        longest = int(np.exp(RNG.uniform(2, 8)))
        try:
            lines, columns = ours.grid(width, height, longest)
        except RequestError:
            assert min(height, width) * longest / max(height, width) < 1
            continue
        shape = np.broadcast_to(np.uint8(0), (3, height, width))
        assert (lines * 28, columns * 28) == theirs(shape, (longest, longest), (28, 28), "channels_first")
        assert max(lines, columns) <= -(-longest // 28)


def test_a_smaller_edge_and_what_is_refused(tiny_gguf) -> None:
    path, folder = tiny_gguf("mistral3")
    model = pe.load(path, n_ctx=64, kv_dtype="f32")
    want = tiny.hf_seen(folder, [5, pil(B), 6], size={"longest_edge": 60})
    close(model.logits([5, pe.open_image(B, longest_edge=60), 6]), want.logits)
    for media, text in [
        (pe.open_image(A, pan_and_scan=True), "has longest_edge"),
        (pe.open_image(A, longest_edge=0), "from 1 to 130"),
        (pe.open_image(A, longest_edge=131), "from 1 to 130"),
        (pe.open_image(A, longest_edge=60.0), "whole number"),
        (np.zeros((1, 400, 3), np.uint8), "less than one remains"),
        ([A, A], "not videos"),
    ]:
        with pytest.raises(RequestError, match=text):
            model.encode_image(media)
    with pytest.raises(ContextOverflowError, match="30 positions, but the context holds 20"):       # 5 lines of 5 rows and an end
        pe.load(path, n_ctx=20).encode_image(PICTURES[8])
    small = pe.load(path, n_ctx=64, images=(56, 56))
    assert small.plan.picture == 4 and len(small.encode_image(np.zeros((56, 56, 3), np.uint8))) == 4
    with pytest.raises(RequestError, match=r"takes 6 soft tokens.*up to 4.*images=\(61, 47\)"):
        small.encode_image(A)


def test_lines_of_rows_are_one_run_of_the_encoder(tiny_gguf) -> None:
    """What a request reports, the prompt's places, and the second time from the cache."""
    path, folder = tiny_gguf("mistral3")
    model = pe.load(path, n_ctx=128)
    answer = model.generate([3, A, 4], max_tokens=1, temperature=0)
    info = answer.media[0]
    assert (info.views, info.grids, info.n_tokens, info.processed) == (1, ((1, 2, 3),), 6, (84, 56))
    assert answer.n_prompt == len(tiny.hf_seen(folder, [3, pil(A), 4]).ids) == 1 + 2 * (3 + 1) + 1
    again = model.generate([3, A, 4, 5], max_tokens=1, temperature=0)
    assert again.media[0].cached and again.n_cached == answer.n_prompt and model.stats["image_misses"] == 1
    other = model.generate([3, A[::-1].copy(), 4], max_tokens=1, temperature=0)
    assert other.n_cached <= 3


# ---- encoder and decoder -----------------------------------------------------------------------------------------------------


CASES = {
    "norm of the projector": {"text_config": {"rms_norm_eps": 0.02}},        # the text's epsilon; the encoder's own stays 1e-5
    "gelu": {"vision_config": {"hidden_act": "gelu"}},
    "biases": {"multimodal_projector_bias": True},
    "groups of 3": {"spatial_merge_size": 3, "vision_config": {"patch_size": 9}},
    "no groups": {"spatial_merge_size": 1, "vision_config": {"patch_size": 23}},
    "rope": {"vision_config": {"rope_parameters": {"rope_type": "axial", "rope_theta": 300.0}}},
    "window": {"text_config": {"sliding_window": 6}},                        # smaller than a picture
    "yarn": {"text_config": {"rope_parameters": dict(tiny.ROPES["yarn"])}},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("case", CASES)
def test_variants_are_transformers(tiny_gguf, case: str) -> None:
    path, folder = tiny_gguf("mistral3", **CASES[case])
    prompt = [5, pil(A), "and ", pil(PICTURES[1]), pil(PICTURES[3]), " what?", 9]
    want = tiny.hf_seen(folder, prompt)
    model = pe.load(path, n_ctx=128, kv_dtype="f32", n_batch=11)
    got = model.logits(prompt)
    close(got, want.logits)
    assert np.array_equal(got.argmax(-1), want.logits.argmax(-1))
    for part, features in zip((A, PICTURES[1], PICTURES[3]), want.features):
        close(model.encode_image(part), features)


def test_pixtral_12b_as_llama_cpps_pair(tmp_path) -> None:
    """Text "llama", an encoder without merger or norm: one patch a row."""
    folder = tiny.make_checkpoint("pixtral", tmp_path / "c")
    path, mmproj = foreign.llama_cpp_files(folder, tmp_path / "m.gguf")
    prompt = ["see ", pil(A), pil(PICTURES[1]), " and?"]
    want = tiny.hf_seen(folder, prompt)
    model = pe.load(path, mmproj=mmproj, n_ctx=256, kv_dtype="f32", n_batch=50)
    close(model.logits(prompt), want.logits)
    close(model.encode_image(A), want.features[0])
    assert len(want.features[0]) == 4 * 3


# ---- files -------------------------------------------------------------------------------------------------------------------


def test_shared_modules_are_no_architectures() -> None:
    assert "mistral3" in architectures() and not any(name.startswith("_") for name in architectures())


TEXT = hollow.Decoder("llama", 1, 64, 96, 4, 2, 16, 64, 256)
TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")


def plan(folder, text=TEXT, without=(), special=TOKENS, **changes):
    """A plan of a decoder beside Pixtral's full-size encoder, in files of headers, with changed keys of the encoder."""
    keys, tensors = hollow.pixtral(text.d_model)
    keys |= {f"clip.{name.replace('__', '.')}": value for name, value in changes.items()}
    path = hollow.write_decoder(folder / "m.gguf", text, special=special)
    return pe.plan(path, mmproj=hollow.write_encoder(folder / "mm.gguf", ({k: v for k, v in keys.items() if k not in without},
                                                                          [t for t in tensors if t[0] not in without])), n_ctx=64)


def test_malformed_files_are_named(tmp_path) -> None:
    assert plan(tmp_path).picture == 64
    for changes, error, text in [
        ({"projector_type": "mlp"}, UnsupportedModelError, "projector_type is 'mlp'; beside 'llama' these are supported: pixtral"),
        ({"without": ("clip.projector_type",)}, UnsupportedModelError, "projector_type is ''"),
        ({"vision__attention__head_count": 3}, InvalidModelError, "heads must have"),
        ({"vision__attention__head_count": 512}, InvalidModelError, "heads must have"),
        ({"vision__image_std": [0.1, 0.0, 0.1]}, InvalidModelError, "image_std"),
        ({"vision__image_mean": [0.1, 0.5]}, InvalidModelError, "image_mean"),
        ({"vision__hidden_act": "mish"}, UnsupportedModelError, "activation is 'mish'"),
        ({"vision__block_count": 2**31 - 1}, InvalidModelError, "v.blk.2147483646"),
        ({"vision__resample": 9}, InvalidModelError, "resample"),
        ({"vision__patch_size": 7}, InvalidModelError, "patch_embd"),
        ({"vision__spatial_merge_size": 3}, InvalidModelError, "patch_merger"),
        ({"vision__longest_edge": 0}, InvalidModelError, "longest_edge"),
        ({"without": ("clip.vision.image_size",)}, InvalidModelError, "image_size"),
        ({"without": ("mm.input_norm.weight",)}, InvalidModelError, "mm.input_norm.weight"),
        ({"without": ("v.pre_ln.weight",)}, InvalidModelError, "v.pre_ln.weight"),
        ({"special": TOKENS[:2]}, InvalidModelError, r"\[IMG_END\]"),
    ]:
        with pytest.raises(error, match=text):
            plan(tmp_path, **changes)


@pytest.mark.parametrize("key, value", [("attention.temperature_scale", 0.1), ("rope.scaling_beta", 0.1),
                                        ("rope.scaling.yarn_log_multiplier", 1.0), ("rope.scaling.mscale_all_dim", 1.0)])
def test_ministral_3_is_refused_by_name(tmp_path, key: str, value: float) -> None:
    text = replace(TEXT, arch="mistral3")
    assert plan(tmp_path, text=text).picture == 64
    with pytest.raises(UnsupportedModelError, match=rf"mistral3\.{key} is .*Ministral 3"):
        plan(tmp_path, text=replace(text, keys={key: value}))
