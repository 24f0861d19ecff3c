"""ViT and DINOv2, with registers and without: hidden states, vectors and classes against transformers; labels of the file; positions of another grid."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny_towers

import pyengine as pe
from converters.writer import convert
from pyengine.errors import InvalidModelError, RequestError, UnsupportedModelError

SIZES = {"hidden_size": 80, "num_hidden_layers": 3, "num_attention_heads": 5, "patch_size": 6}
LABELS = ["a cat", "tabby, tabby cat", "Hund", "", "a cat"]
COLOURS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
VIT = {"image_processor_type": "ViTFeatureExtractor", "size": 42, "resample": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.4, 0.5]}
BIT = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 50}, "crop_size": {"height": 44, "width": 44}, "do_center_crop": True,
       "resample": 3, **COLOURS}


class Kind(NamedTuple):
    """A checkpoint's class, config, image processor's settings and class."""

    model: str
    config: str
    sizes: dict[str, Any]
    images: dict[str, Any]
    processor: str


KINDS = {
    "ViT": Kind("ViTForImageClassification", "ViTConfig", {"intermediate_size": 104, "image_size": 42}, VIT, "ViTImageProcessorPil"),
    "ViT without a head": Kind("ViTModel", "ViTConfig", {"intermediate_size": 104, "image_size": 42, "qkv_bias": False}, VIT, "ViTImageProcessorPil"),
    "DINOv2": Kind("Dinov2ForImageClassification", "Dinov2Config", {"image_size": 66}, BIT, "BitImageProcessorPil"),
    "DINOv2, larger pictures": Kind("Dinov2Model", "Dinov2Config", {"image_size": 30}, BIT, "BitImageProcessorPil"),
    "registers": Kind("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", {"image_size": 66, "num_register_tokens": 3}, BIT,
                      "BitImageProcessorPil"),
    "registers, larger pictures": Kind("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {"image_size": 30, "num_register_tokens": 3}, BIT,
                                       "BitImageProcessorPil"),
    "registers, the same grid": Kind("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig",
                                     {"image_size": 44, "num_register_tokens": 1, "use_swiglu_ffn": True}, BIT, "BitImageProcessorPil"),
    "DINOv2, gated": Kind("Dinov2ForImageClassification", "Dinov2Config", {"image_size": 42, "use_swiglu_ffn": True}, BIT, "BitImageProcessorPil"),
}


def save(folder: Path, kind: Kind) -> Path:
    """Write a checkpoint with what its pictures go through."""
    import transformers

    labelled = {"id2label": dict(enumerate(LABELS)), "label2id": {}} if kind.model.endswith("Classification") else {}
    tiny_towers.make(kind.model, getattr(transformers, kind.config)(**SIZES, **kind.sizes, **labelled), folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(kind.images))
    return folder


TINY = {"vit": lambda folder: save(folder, KINDS["ViT"]), "dinov2": lambda folder: save(folder, KINDS["DINOv2"])}


class Made(NamedTuple):
    """A checkpoint, what transformers makes of it, and our model."""

    kind: Kind
    folder: Path
    theirs: Any
    model: Any


@pytest.fixture(scope="module", params=KINDS)
def made(request: Any, tmp_path_factory: Any) -> Iterator[Made]:
    kind = KINDS[request.param]
    folder = save(tmp_path_factory.mktemp("vit") / "m", kind)
    with pe.load(convert(folder, folder / "m.gguf", "f32")) as model:
        yield Made(kind, folder, tiny_towers.reference(kind.model, folder), model)


def test_pictures_are_those_of_transformers(made: Made) -> None:
    pixels = tiny_towers.processor(made.kind.processor, made.folder)
    body = next((found for name in ("vit", "dinov2", "dinov2_with_registers") if (found := getattr(made.theirs, name, None))), made.theirs)
    for picture in tiny_towers.pictures():
        want = body(pixels(picture)).last_hidden_state[0]
        tiny_towers.close(made.model.hidden(picture), want)
        tiny_towers.close(made.model.embed(picture, normalize=False), want[0])
        tiny_towers.close(made.model.embed(picture, pooling="mean", normalize=False), want.mean(0))


def test_classes_are_those_of_transformers(made: Made) -> None:
    picture = tiny_towers.pictures()[0]
    if not made.kind.model.endswith("Classification"):
        with pytest.raises(UnsupportedModelError, match="no classes of its own"):
            made.model.classify(picture)
        return
    want = made.theirs(tiny_towers.processor(made.kind.processor, made.folder)(picture)).logits
    shares = made.model.classify(picture)
    names = ["a cat (class 0)", "tabby, tabby cat", "Hund", "class 3", "a cat (class 4)"]        # names that two classes have, or none, are told apart
    assert set(shares) == set(names) and list(shares.values()) == sorted(shares.values(), reverse=True)
    assert np.allclose([shares[name] for name in names], want.softmax(1)[0].detach(), atol=1e-5)
    plain = made.model.classify(picture, activation="none")
    tiny_towers.close(np.array([plain[name] for name in names], np.float32), want[0])
    with pytest.raises(UnsupportedModelError, match="compare"):
        made.model.classify(picture, ["a dog"])


def test_it_reads_pictures_only(made: Made, tmp_path: Path) -> None:
    tiny_towers.pictures()[0].save(tmp_path / "a.png")
    assert np.array_equal(made.model.embed(str(tmp_path / "a.png")), made.model.embed(tiny_towers.pictures()[0]))      # a text is a path here
    with pytest.raises(RequestError, match="reads pictures only"):
        made.model.embed([[1, 2]])
    plan = pe.plan(made.folder / "m.gguf")
    assert plan.n_ctx == 0 and plan.picture == 50 + made.kind.sizes.get("num_register_tokens", 0) and plan.total == made.model.plan.total and "pictures" in plan.table()


@pytest.mark.parametrize("name, file, change, words", [
    ("ViT", "preprocessor_config.json", {"size": 36}, "36 pixels a side"), ("ViT", "preprocessor_config.json", {"image_processor_type": "x"}, "a x;"),
    ("DINOv2", "preprocessor_config.json", {"do_center_crop": False}, "not cut to a square"), ("DINOv2", "config.json", {"num_channels": 4}, "num_channels"),
    ("ViT", "config.json", {"id2label": {"0": "a", "2": "b"}}, "names 2 classes"), ("ViT", "config.json", {"hidden_act": "swish9"}, "swish9")])
def test_what_it_cannot_run_is_refused(tmp_path: Path, name: str, file: str, change: dict[str, Any], words: str) -> None:
    folder = save(tmp_path / "m", KINDS[name])
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **change}))
    with pytest.raises((UnsupportedModelError, InvalidModelError), match=words):
        convert(folder, tmp_path / "m.gguf", "f32")


@pytest.mark.parametrize("outtype, least", [("f16", 0.99999), ("q8_0", 0.999)])
def test_smaller_formats_stay_near(made: Made, tmp_path: Path, outtype: str, least: float) -> None:
    with pe.load(convert(made.folder, tmp_path / "m.gguf", outtype)) as small:
        picture = tiny_towers.pictures()[3]
        assert small.embed(picture) @ made.model.embed(picture) > least
