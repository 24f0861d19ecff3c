"""Fuyu against transformers: patches, ends of lines, the token behind them; its layout of a question, its unigram vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyengine as pe
import tiny
from cases import Case, Converted, Tokens
from converters import convert
from converters.fuyu import TEMPLATE
from hollow import Encoder, Full, kv, PlainDecoder
from oracle import encoder_of
from pictures import A, B, DOT, LONG, same, THIN
from pyengine.errors import ContextOverflowError, InvalidModelError, PyEngineError, RequestError, UnsupportedModelError
from pyengine.media.image import Image
from sight import of_any_backend, Run, Sight
from test_persimmon import TEXT

try:
    import transformers
except ImportError:         # the cases are found without it
    transformers = None

pytestmark = pytest.mark.skipif(transformers is None, reason="needs transformers and torch: pip install -r requirements/test.txt")

SIZE = {"height": 36, "width": 60}
TOKENS = Tokens(("<s>", "|ENDOFTEXT|", "|SPEAKER|", "|NEWLINE|", "<0x04>"), "<s>", "|ENDOFTEXT|", "|ENDOFTEXT|", TEMPLATE,
                {"image_token_id": "|SPEAKER|"})


def underscored(tokenizer: Any) -> Any:
    """Make a tokenizer write one token more before the picture's, as the authors' does: the processor takes it away again."""
    kind = type(tokenizer)

    def call(self: Any, text: str, **more: Any) -> Any:
        made = kind.__call__(self, text, **more)
        if text.startswith("|SPEAKER|"):
            one = made["input_ids"][..., :1]
            made = transformers.BatchEncoding({name: type(one)(np.concatenate([ids[..., :1], ids], axis=-1)) if isinstance(ids, np.ndarray)
                                               else one.new_tensor(np.concatenate([ids[..., :1].numpy(), ids.numpy()], axis=-1))
                                               for name, ids in made.items()})
        return made

    tokenizer.__class__ = type("Underscored", (kind,), {"__call__": call})
    return tokenizer


def pillow(folder: Path) -> Any:
    """Return the Pillow processor. Its patches are cut with NumPy from what transformers' processor has as tensors, batches of one."""
    import torch

    class Images(transformers.FuyuImageProcessorPil):
        def patchify_image(self, image: Any, patch_size: Any = None) -> Any:
            return torch.from_numpy(super().patchify_image(np.asarray(image), patch_size))[None]

    return Images.from_pretrained(folder)


class FuyuSight(Sight):
    """A picture's own size, in patches."""

    model_types, marker = ("fuyu",), "|SPEAKER|"

    def images(self, config: Any, settings: dict[str, Any]) -> Any:
        patch = {"height": config.patch_size, "width": config.patch_size}
        return transformers.FuyuImageProcessorPil(**{"size": SIZE, "patch_size": patch, **settings})

    def processor(self, folder: Path, config: Any, tokenizer: Any) -> Any:
        from transformers.models.fuyu.processing_fuyu import FuyuProcessor

        return of_any_backend(FuyuProcessor)(pillow(folder), underscored(tokenizer))

    def part(self, processor: Any, config: Any, folder: Path, part: Any, **settings: Any) -> tuple[list[int], dict[str, Any]]:
        """Without the token with which an answer begins."""
        made = processor(text="", images=part, return_tensors="pt", return_legacy_image_output=False, **settings)
        ids = made["input_ids"][0].tolist()
        return ids[: ids.index(processor.tokenizer.convert_tokens_to_ids("<s>")) + 1], made

    def chat(self, processor: Any, text: str, pictures: Sequence[Any]) -> list[int]:
        """The processor writes the picture and the answer's beginning itself."""
        text = text.removeprefix("|SPEAKER|").removesuffix("<0x04>")
        return processor(text=text, images=pictures[0], return_tensors="pt")["input_ids"][0].tolist()

    def run(self, model: Any, tokens: Any, made: list[dict[str, Any]], fps: float | None) -> Run:
        import torch

        if not made:
            return Run({}, [], [], [])
        pixels = [m["pixel_values"] for m in made]
        features = [model.model.get_image_features(p).last_hidden_state for p in pixels]
        return Run({"pixel_values": torch.cat(pixels)}, features, pixels, [])


def encoder(d_model: int) -> Encoder:
    """One product of patches of 30 x 30 pixels."""
    keys = {"clip.has_vision_encoder": True, "clip.projector_type": "fuyu", "clip.vision.patch_size": 30, "clip.vision.block_count": 0,
            "clip.vision.embedding_length": d_model, "clip.vision.projection_dim": d_model, "clip.vision.preproc_image_height": 1080,
            "clip.vision.preproc_image_width": 1920, "clip.vision.padding_value": 1}
    return keys, [("mm.0.weight", (d_model, 2700), "F16"), ("mm.0.bias", (d_model,), "F32")]


CASES = (Case(
    "fuyu", "persimmon", "FuyuConfig", "FuyuForCausalLM", "spm", {"patch_size": 6, "tie_word_embeddings": False},
    {**TEXT, "model_type": "persimmon"}, {}, TOKENS, FuyuSight(), cached_as="llama",
    prompts={"text": [3, 7, "only text here", 9], "one": [A, "what is this?", 9], "wide": [LONG, "long"], "thin": [THIN, "thin"], "dot": [DOT, 4],
             "behind": [5, A, "is how?", 6]},
    several=False,
    messages=[{"role": "user", "content": [{"type": "image", "image": A}, {"type": "text", "text": "what is it?\n"}]}],
    converted=Converted(
        {"general.architecture": "persimmon", "tokenizer.chat_template": TEMPLATE},
        clip={"has_vision_encoder": True, "projector_type": "fuyu", "block_count": 0, "embedding_length": 96, "projection_dim": 96, "patch_size": 6,
              "preproc_image_height": 36, "preproc_image_width": 60, "padding_value": 1, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2},
        clip_tokens={"image_token_id": "|SPEAKER|"},
        renames=((("language_model.lm_head.", "lm_head."), ("language_model.model.", "model.language_model."),
                  ("vision_embed_tokens.", "model.vision_embed_tokens.")),)),
    full={"fuyu-8b": Full(PlainDecoder("persimmon", 36, 4096, 16384, 64, 64, 64, 262144, 16384, head_norms=True,
                                       keys={"attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": 32}),
                          ("|SPEAKER|", "|NEWLINE|", "<s>"), encoder)}),)

SIZES = [(61, 47), (30, 300), (300, 17), (9, 11), (400, 500), (60, 36), (55, 31), (1, 30), (131, 130)]      # width, height
RNG = np.random.default_rng(4)
PICTURES = [RNG.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in SIZES]


@pytest.mark.parametrize("settings", [{}, {"padding_value": 7.0, "resample": 3, "image_mean": [0.4, 0.5, 0.45], "image_std": [0.2, 0.25, 0.3]}])
def test_pixels_of_patches(tiny_gguf, settings: dict[str, Any]) -> None:
    path, folder = tiny_gguf("fuyu", processor=settings)
    ours = encoder_of(path)
    processor = FuyuSight().processor(folder, None, transformers.AutoTokenizer.from_pretrained(folder))
    for pixels in PICTURES:
        want = processor(text="", images=pixels, return_tensors="pt", input_data_format="channels_last")["image_patches"].numpy()
        (view,) = ours.process(Image(pixels)).views
        assert np.array_equal(view.inputs["patches"], want) and len(want) == ours.n_rows(pixels.shape[1], pixels.shape[0])


def test_layout(tiny_gguf) -> None:
    """Rows, the ends of their lines, and the token behind them, which the tokenizer does not put before them once more."""
    path, _ = tiny_gguf("fuyu")
    model = pe.load(path, n_ctx=128)
    newline, bos = (model.tokenizer.need(text) for text in ("|NEWLINE|", "<s>"))
    ids = model.chat_ids([{"role": "user", "content": [{"type": "image", "image": PICTURES[3]}, "hm"]}])             # 9 x 11 pixels: 2 x 2 patches
    assert ids[:7] == [-1, -1, newline, -1, -1, newline, bos] and bos not in ids[7:] and ids[-1] == model.tokenizer.need("<0x04>")
    assert model.generate("hm", images=[PICTURES[3]], max_tokens=1).n_prompt == 7 + len(model.tokenize("hm", add_special=False))
    assert model.tokenize("hm")[0] == bos
    for messages in ([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}], [{"role": "assistant", "content": "x"}]):
        with pytest.raises(PyEngineError, match="answers one question"):
            model.chat(messages)


def test_what_is_refused(tiny_gguf, tmp_path) -> None:
    path, folder = tiny_gguf("fuyu")
    model = pe.load(path, n_ctx=128)
    parts = [{"type": "image", "image": A}, {"type": "image", "image": B}, {"type": "text", "text": "differ how?"}]
    for ask, place in ((lambda: model.logits([A, "and", B]), r"prompt\[0\]"), (lambda: model.generate("hm", images=[A, B]), r"images\[0\]"),
                       (lambda: model.chat([{"role": "user", "content": parts}]), r"messages\[0\]")):
        with pytest.raises(RequestError, match=place + ".*takes one picture a prompt, and 2 were given"):
            ask()
    for media, text in [(pe.open_image(PICTURES[0], zoom=1), "zoom"), ([PICTURES[0]] * 2, "not videos"),
                        (np.zeros((2000, 3, 3), np.uint8), "less than one pixel remains")]:
        with pytest.raises(RequestError, match=text):
            model.encode_image(media)
    with pytest.raises(ContextOverflowError, match="takes 67 positions, but the context holds 30"):
        pe.load(path, n_ctx=30).logits([PICTURES[5]])
    for settings, error, text in [({"size": {"height": 36, "width": 61}}, InvalidModelError, "61 x 36"), ({"padding_mode": "edge"}, UnsupportedModelError, "edge"),
                                  ({"padding_value": 0.5}, UnsupportedModelError, "padding_value"), ({"do_pad": False}, UnsupportedModelError, "do_pad")]:
        made = tiny.make_checkpoint("fuyu", tmp_path / "c", processor=settings)
        with pytest.raises(error, match=text):
            convert(made, tmp_path / "m.gguf")


def test_a_flat_config_gives_the_same_file(tmp_path) -> None:
    """As the released checkpoint has it: values of the text model at the top, without a type."""
    folder = tiny.make_checkpoint("fuyu", tmp_path / "c", text_config={
        "rope_parameters": {"rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 0.5}})
    want = convert(folder, tmp_path / "a.gguf", "f32").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    text.pop("rope_parameters")
    (folder / "config.json").write_text(json.dumps({**text, **config, "rope_theta": 25000.0, "model_type": "fuyu"}))
    assert convert(folder, tmp_path / "a.gguf", "f32").read_bytes() == want


def test_a_unigram_vocabulary(tmp_path) -> None:
    """The released checkpoint's tokenizer cuts by scores and spells in bytes what it has no piece for."""
    from tokenizers import AddedToken, decoders, models, normalizers, Tokenizer

    pieces = [("<unk>", 0.0), *((f"<0x{i:02X}>", -20.0) for i in range(256)), *((letter, -8.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz.,?\n"),
              ("\u2581th", -3.0), ("\u2581the", -3.5), ("he", -3.2), ("at", -3.3), ("\u2581cat", -5.0), ("\u2581c", -4.0), ("|NEWLINE|", -9.0)]
    made = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<s>", "|ENDOFTEXT|", "|SPEAKER|")])
    folder = tiny.make_checkpoint("fuyu", tmp_path / "c")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="|ENDOFTEXT|").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "image_token_id": made.token_to_id("|SPEAKER|")}))
    model = pe.load(convert(folder, tmp_path / "m.gguf", "f32"), n_ctx=128)
    for text in ("the cat that", "that, he at", "Ü the ?\n", "bathe \u4e2d", "a", ""):
        assert model.tokenize(text, add_special=False) == made.encode(text, add_special_tokens=False).ids, text
        assert model.detokenize(model.tokenize(text, add_special=False)) == text
    ids = model.chat_ids([{"role": "user", "content": [{"type": "image", "image": PICTURES[3]}, "the cat"]}])
    newline, bos = made.token_to_id("|NEWLINE|"), made.token_to_id("<s>")
    assert ids == [-1, -1, newline, -1, -1, newline, bos, *made.encode("the cat", add_special_tokens=False).ids, made.token_to_id("<0x04>")]
    same(model.logits([PICTURES[3], 7, 8]), pe.load(convert(folder, tmp_path / "n.gguf", "f32", with_tokenizer=True), n_ctx=128).logits([PICTURES[3], 7, 8]))


def test_the_plan_of_the_published_model(full_size) -> None:
    """Its largest picture takes 36 lines of 64 patches."""
    path, mmproj = full_size("fuyu-8b")
    plan = pe.plan(path, n_ctx=4096, mmproj=mmproj)
    assert kv(plan) == {"Full": 36 * 2 * 64 * 64 * 4096 * 2} and plan.picture == 36 * 64
