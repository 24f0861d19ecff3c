"""SigLIP and SigLIP 2: ids, hidden states, vectors, similarities against transformers; padding that is seen; pictures of their own shape."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny_towers
from PIL import Image

import pyengine as pe
from converters.writer import convert
from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError, UnsupportedModelError

N_CTX = 24
TEXT = {"hidden_size": 72, "intermediate_size": 136, "num_hidden_layers": 3, "num_attention_heads": 3, "max_position_embeddings": N_CTX, "projection_size": 80}
VISION = {"hidden_size": 80, "intermediate_size": 168, "num_hidden_layers": 2, "num_attention_heads": 5, "patch_size": 6}
IMAGES = {"do_normalize": True, "do_resize": True, "do_rescale": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
SQUARE = {**IMAGES, "size": {"height": 42, "width": 42}, "resample": 3, "image_processor_type": "SiglipImageProcessor"}
NAFLEX = {**IMAGES, "resample": 2, "patch_size": 6, "max_num_patches": 60, "image_processor_type": "Siglip2ImageProcessor"}


class Kind(NamedTuple):
    """A kind of model: its class, its tokenizer's and image processor's, where texts are padded."""

    model: str
    config: str
    save_words: Callable[[Path], None]
    images: dict[str, Any]
    side: str = "right"


KINDS = {
    "SigLIP": Kind("SiglipModel", "SiglipConfig", tiny_towers.save_canonical_unigram, SQUARE),
    "SigLIP 2": Kind("SiglipModel", "SiglipConfig", lambda folder: tiny_towers.save_small_letters(folder, padding_side="right"), SQUARE),
    "NaFlex": Kind("Siglip2Model", "Siglip2Config", tiny_towers.save_small_letters, NAFLEX, "left"),
}


def save(folder: Path, kind: Kind) -> Path:
    """Write a checkpoint with everything around it."""
    import transformers

    folder.mkdir(exist_ok=True)
    kind.save_words(folder)
    n = len(transformers.AutoTokenizer.from_pretrained(folder))
    sizes = {"image_size": 42} if kind.model == "SiglipModel" else {"num_patches": 25}
    config = getattr(transformers, kind.config)(text_config={**TEXT, "vocab_size": n + 3}, vision_config={**VISION, **sizes})
    tiny_towers.make(kind.model, config, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(kind.images))
    return folder


TINY = {"siglip": lambda folder: save(folder, KINDS["SigLIP"])}


class Made(NamedTuple):
    """A checkpoint, what transformers makes of it, and our model."""

    kind: Kind
    folder: Path
    theirs: Any
    words: Any
    model: Any

    def seen(self, picture: Any) -> tuple[dict[str, Any], int]:
        """Return the inputs of their model for a picture, and the rows that are no padding."""
        import transformers

        if self.kind.model == "SiglipModel":
            return {"pixel_values": tiny_towers.processor("SiglipImageProcessorPil", self.folder)(picture)}, 49
        given = transformers.Siglip2ImageProcessorPil.from_pretrained(self.folder)(picture, return_tensors="pt")
        return dict(given), int(given["spatial_shapes"].prod())

    def padded(self, texts: list[str]) -> Any:
        """Return their padded ids of texts, cut where they are too long."""
        return self.words(texts, padding="max_length", max_length=N_CTX, truncation=True, return_tensors="pt")["input_ids"]


@pytest.fixture(scope="module", params=KINDS)
def made(request: Any, tmp_path_factory: Any) -> Iterator[Made]:
    import transformers

    kind = KINDS[request.param]
    folder = save(tmp_path_factory.mktemp("siglip") / "m", kind)
    with pe.load(convert(folder, folder / "m.gguf", "f32")) as model:
        yield Made(kind, folder, tiny_towers.reference(kind.model, folder), transformers.AutoTokenizer.from_pretrained(folder), model)


PICTURES = [*tiny_towers.pictures(), Image.fromarray(np.random.default_rng(4).integers(0, 256, (7, 150, 3), dtype=np.uint8))]


def test_ids_are_those_of_transformers(made: Made) -> None:
    for text in (*tiny_towers.TEXTS, *tiny_towers.HARD, "(PUNCTUATION), gone! \u03a3\u0391\u03a3", " .  ", "\x1c\x85 a"):
        assert made.model.tokenize(text) == made.words(text)["input_ids"], text


def test_pictures_are_those_of_transformers(made: Made) -> None:
    for picture in PICTURES:
        inputs, n = made.seen(picture)
        out = made.theirs.vision_model(**({"pixel_attention_mask": None, **inputs} if "pixel_attention_mask" in inputs else inputs))
        tiny_towers.close(made.model.hidden(picture), out.last_hidden_state[0, :n])        # behind the last norm, without padding
        tiny_towers.close(made.model.embed(picture, normalize=False), out.pooler_output[0])


def test_texts_are_padded_and_padding_is_seen(made: Made) -> None:
    import torch

    texts = ["a cat", "the dog is lazy", "", "it's 2 o'clock!"]
    ids = made.padded(texts)
    out = made.theirs.text_model(ids)
    for i, text in enumerate(texts):
        tiny_towers.close(made.model.hidden(text), out.last_hidden_state[i])
        tiny_towers.close(made.model.embed(text, normalize=False), out.pooler_output[i])
        assert np.array_equal(made.model.hidden(ids[i].tolist()), made.model.hidden(text))
    short = [5, 9, 1]                                                                      # ids are taken as they are
    tiny_towers.close(made.model.embed([short], normalize=False)[0], made.theirs.text_model(torch.tensor([short])).pooler_output[0])


def test_similarities_are_the_models_logits(made: Made) -> None:
    texts = ["a cat", "The DOG is lazy.", "2 foxes", "dog " * 30]
    ids = made.padded(texts)
    want = np.concatenate([made.theirs(input_ids=ids, **made.seen(p)[0]).logits_per_image.detach().numpy() for p in PICTURES])
    tiny_towers.close(made.model.similarity(PICTURES, texts), want)
    shares = made.model.classify(PICTURES[0], texts)
    assert np.allclose([shares[t] for t in texts], 1 / (1 + np.exp(-want[0])), atol=1e-5)
    assert sum(made.model.classify(PICTURES[0], texts, activation="softmax").values()) == pytest.approx(1)
    with pytest.raises(ContextOverflowError, match=f"longer than the {N_CTX}"):
        made.model.embed("dog " * 30)


def test_texts_have_one_length(made: Made) -> None:
    assert made.model.plan.n_ctx == N_CTX
    with pytest.raises(RequestError, match=f"every text as {N_CTX} tokens"):
        pe.plan(made.folder / "m.gguf", n_ctx=12)


def test_pictures_of_their_own_shape_may_be_smaller(tmp_path: Path) -> None:
    import transformers

    kind = KINDS["NaFlex"]
    folder = save(tmp_path / "m", kind)
    path = convert(folder, tmp_path / "m.gguf", "f32")
    theirs = tiny_towers.reference(kind.model, folder)
    process = transformers.Siglip2ImageProcessorPil.from_pretrained(folder)
    with pe.load(path) as model:
        assert model.plan.picture == 60
        given = process(PICTURES[0], max_num_patches=17, return_tensors="pt")
        n = int(given["spatial_shapes"].prod())
        small = model.hidden(pe.open_image(PICTURES[0], max_num_patches=17))
        tiny_towers.close(small, theirs.vision_model(**given).last_hidden_state[0, :n])
        assert len(small) <= 17 < len(model.hidden(PICTURES[0])) <= 60
        for wrong in (0, 61, "9"):
            with pytest.raises(RequestError, match="max_num_patches"):
                model.embed(pe.open_image(PICTURES[0], max_num_patches=wrong))
    shape = process(Image.new("RGB", (20, 9)), return_tensors="pt")["spatial_shapes"]
    assert pe.plan(path, images=(20, 9)).picture == int(shape.prod()) > 8                  # small pictures are made larger
    assert pe.plan(path, images=0).of("images") == 0


@pytest.mark.parametrize("kind, change, words", [
    ("SigLIP", {"size": {"height": 36, "width": 36}}, "36 pixels a side"), ("SigLIP", {"size": {"shortest_edge": 42}}, "not cut to a square"),
    ("NaFlex", {"patch_size": 7}, "patches of 6 pixels"), ("NaFlex", {"image_processor_type": "SiglipImageProcessor"}, "SiglipImageProcessor")])
def test_what_it_cannot_run_is_refused(tmp_path: Path, kind: str, change: dict[str, Any], words: str) -> None:
    folder = save(tmp_path / "m", KINDS[kind])
    (folder / "preprocessor_config.json").write_text(json.dumps({**KINDS[kind].images, **change}))
    with pytest.raises((UnsupportedModelError, InvalidModelError), match=words):
        convert(folder, tmp_path / "m.gguf", "f32")


@pytest.mark.parametrize("outtype, least", [("f16", 0.99999), ("q8_0", 0.998)])
def test_smaller_formats_stay_near(made: Made, tmp_path: Path, outtype: str, least: float) -> None:
    with pe.load(convert(made.folder, tmp_path / "m.gguf", outtype)) as small:
        for x in (PICTURES[0], "the quick fox"):
            assert small.embed(x) @ made.model.embed(x) > least


@pytest.mark.parametrize("model, config, images, sizes", [
    ("SiglipForImageClassification", "SiglipConfig", SQUARE, {"image_size": 42}), ("Siglip2ForImageClassification", "Siglip2Config", NAFLEX, {"num_patches": 25})])
def test_a_head_of_classes_in_the_place_of_texts(tmp_path: Path, model: str, config: str, images: dict[str, Any], sizes: dict[str, int]) -> None:
    import transformers

    made = getattr(transformers, config)(vision_config={**VISION, **sizes}, id2label=dict(enumerate("abc")), label2id={})
    tiny_towers.make(model, made, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    tiny_towers.compare_classes(model, f"{images['image_processor_type']}Pil", tmp_path)
