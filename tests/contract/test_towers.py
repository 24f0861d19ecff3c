"""The contract of a model of encoders, for every one that there is: plans, bits, formats, what it refuses, and how it is closed."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cases
import numpy as np
import pytest

import pyengine as pe
from pyengine.compiler.arena import ALIGN
from pyengine.engine.model import Model
from pyengine.errors import ContextOverflowError, ImageError, InvalidModelError, PyEngineError, RequestError, UnsupportedModelError
from pyengine.files.model_files import open_files
from pyengine.models import model_class, tower_models
from pyengine.models.architecture import Towers
from pyengine.programs.bound import bind

pytest.importorskip("transformers", reason="needs transformers and torch: pip install -r requirements/test.txt")
import tiny_towers  # noqa: E402

from converters.writer import convert  # noqa: E402

TEXTS = ["a dog and a fox", "x", "the lazy dog in the snow", "a", "3 o clock", "the quick brown fox " * 3]


class Made(NamedTuple):
    """A tiny checkpoint, its file, and the model."""

    name: str
    folder: Path
    path: Path
    model: Any

    @property
    def reads(self) -> Towers:
        return self.model.towers

    def inputs(self, model: Any) -> list[Any]:
        """Texts and pictures that the model reads."""
        return [*(TEXTS if model.towers.text else []), *(tiny_towers.pictures()[:2] if model.towers.image else [])]

    def states(self, model: Any) -> list[bytes]:
        """Hidden states and vectors of each input by itself, as bits."""
        return [part.tobytes() for x in self.inputs(model) for part in (model.hidden(x), model.embed(x))]


@pytest.fixture(scope="module", params=tower_models())
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    name = request.param
    folder = cases.towers()[name](tmp_path_factory.mktemp(name) / "hf")
    path = convert(folder, folder / "f32.gguf", "f32")
    with pe.load(path) as model:
        yield Made(name, folder, path, model)


def test_every_module_has_a_tiny_model() -> None:
    assert set(cases.towers()) == set(tower_models())


@pytest.mark.parametrize("name", tower_models())
def test_a_class_is_towers(name: str) -> None:
    kind = model_class(name)
    assert issubclass(kind, Towers) and not kind.__abstractmethods__


def test_the_file_is_of_the_module(made: Made) -> None:
    assert type(made.reads).__module__ == f"pyengine.models.towers.{made.name}" and made.reads.towers
    for tower in made.reads.towers.values():
        assert tower.d_out > 0
    assert bind(open_files(made.path)).model is not made.reads


# ---- plans ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"n_batch": 64}, {"n_threads": 1}, {"mmap": True}], ids=str)
def test_the_plan_is_what_is_allocated(made: Made, settings: dict[str, Any]) -> None:
    plan = pe.plan(made.path, **settings)
    with pe.load(made.path, **settings) as model:
        assert model.plan.items == plan.items and plan.fits and plan.of("kv") == plan.of("sampler") == 0
        programs = model._programs.values()
        assert plan.of("weights") == sum(p.prepared.weight_bytes for p in programs) <= sum(p.weights.nbytes for p in programs)
        assert all(p.weights.nbytes in (p.prepared.weight_bytes, ALIGN) for p in programs)
        assert plan.of("arena") == sum(p.arena.nbytes for p in programs)
        assert 0 < model.held().resident["cpu"] <= plan.total
        assert made.states(model) == made.states(made.model)
    in_file = sum(tensor.nbytes for tensor in made.model.file.tensors.values())
    assert plan.of("weights") + plan.of("mapped") >= 0.8 * in_file and (plan.of("weights") < 0.1 * in_file) == ("mmap" in settings)
    assert all(word in plan.table() for word in ("mapped" if "mmap" in settings else "weights", "arena"))


def test_a_tower_that_is_left_out_takes_nothing(made: Made) -> None:
    if len(made.reads.towers) < 2:
        with pytest.raises(RequestError, match="texts only|pictures only"):
            pe.plan(made.path, images=(40, 40) if made.reads.text else 0)
        return
    with pe.load(made.path, images=0) as model:
        assert model.plan.total < made.model.plan.total and model.plan.picture == 0
        assert np.array_equal(model.embed(TEXTS), made.model.embed(TEXTS))
        with pytest.raises(RequestError, match="reads text only"):
            model.embed(tiny_towers.pictures()[0])


# ---- bits -----------------------------------------------------------------------------------------------------------------


def test_bits_are_the_same_alone_and_beside_others(made: Made) -> None:
    items = made.inputs(made.model)
    alone = [made.model.embed(x) for x in items]
    for order in (list(range(len(items))), list(range(len(items)))[::-1], [0, 0, *range(len(items)), *range(len(items))]):
        together = made.model.embed([items[i] for i in order])
        assert together.dtype == np.float32 and together.shape == (len(order), len(alone[0]))
        assert all(np.array_equal(row, alone[i]) for row, i in zip(together, order))
    assert made.model.embed([]).shape == (0, len(alone[0]))


@pytest.mark.parametrize("n_threads", [1, 3])
def test_bits_are_the_same_with_any_number_of_threads(made: Made, n_threads: int) -> None:
    with pe.load(made.path, n_threads=n_threads) as model:
        assert made.states(model) == made.states(made.model)


def test_bits_are_the_same_when_several_threads_ask(made: Made) -> None:
    items = made.inputs(made.model) * 3
    want = [made.model.embed(x).tobytes() for x in items]
    with ThreadPoolExecutor(4) as pool:
        assert [v.tobytes() for v in pool.map(made.model.embed, items)] == want


def test_vectors_are_as_long_as_asked(made: Made) -> None:
    for x in made.inputs(made.model):
        one, plain = made.model.embed(x), made.model.embed(x, normalize=False)
        assert abs(np.linalg.norm(one.astype(np.float64)) - 1) < 1e-6 and np.isfinite(plain).all()
        assert np.abs(one - plain / np.linalg.norm(plain)).max() < 1e-6
        hidden = made.model.hidden(x)
        assert np.abs(made.model.embed(x, pooling="mean", normalize=False) - hidden.mean(axis=0, dtype=np.float64)).max() < 1e-5
        assert np.array_equal(made.model.embed(x, pooling="last", normalize=False), hidden[-1])
        assert np.array_equal(made.model.embed(x, pooling="cls", normalize=False), hidden[0])


# ---- formats --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outtype, least", [("f16", 0.9999), ("q8_0", 0.99)])
def test_smaller_formats_load_and_stay_near(made: Made, outtype: str, least: float) -> None:
    path = convert(made.folder, made.folder / f"{outtype}.gguf", outtype)
    assert path.stat().st_size < made.path.stat().st_size
    with pe.load(path) as model:
        plan, wide = model.plan, made.model.plan
        assert plan.of("weights") + plan.of("mapped") < wide.of("weights") + wide.of("mapped")
        cosines = [model.embed(x) @ made.model.embed(x) for x in made.inputs(model)]
        assert min(cosines) > least, cosines
        assert np.array_equal(model.embed(made.inputs(model)), np.stack([model.embed(x) for x in made.inputs(model)]))


# ---- what it refuses ------------------------------------------------------------------------------------------------------


def test_what_it_cannot_do_is_said(made: Made) -> None:
    model, picture = made.model, tiny_towers.pictures()[0]
    for name in ("generate", "chat", "stream", "submit", "feed", "save", "restore", "reset", "encode_image"):
        assert hasattr(Model, name)
        with pytest.raises(UnsupportedModelError, match=f"writes no text: it has no '{name}'"):
            getattr(model, name)
    assert not hasattr(model, "no_such_thing")
    if not (made.reads.text and made.reads.image):
        with pytest.raises(UnsupportedModelError, match="does not compare pictures"):
            model.similarity([picture], ["a"])
        with pytest.raises(RequestError, match="reads text only" if made.reads.text else "reads pictures only"):
            model.embed(picture if made.reads.text else [1, 2])
    if made.reads.text:
        with pytest.raises(UnsupportedModelError, match="no head that predicts tokens"):
            model.logits([1, 2])
        with pytest.raises(UnsupportedModelError, match="gives no scores of a text"):
            model.rerank("a", ["b"])
        with pytest.raises(ContextOverflowError, match="longer than the"):
            model.embed([[3] * (model.n_ctx + 1)])
        with pytest.raises(RequestError, match="outside"):
            model.hidden([made.reads.text.n_ids])
        with pytest.raises(RequestError, match="without tokens"):
            model.hidden([])
    else:
        with pytest.raises(RequestError, match="reads pictures only"):
            model.rerank("a", ["b"])
    if not made.reads.labels:
        with pytest.raises(UnsupportedModelError, match="no classes of its own"):
            model.classify("a" if made.reads.text and not made.reads.image else picture)


def test_arguments_that_are_wrong_are_refused(made: Made, tmp_path: Path) -> None:
    model, good = made.model, made.inputs(made.model)[0]
    for wrong in (None, 3, 1.5, True, {"a": 1}, [None], [1.5], [good, None], [good, 2.5], np.float32(1), b"", object()):
        with pytest.raises((RequestError, ImageError)):
            model.embed(wrong)
    for options in ({"pooling": "x"}, {"pooling": 3}, {"normalize": "yes"}, {"no_such": 1}, {"prompt": "no such"}, {"prompt": 5},
                    {"prompt": np.zeros(3)}, {"pooling": np.zeros(3)}):
        with pytest.raises(RequestError):
            model.embed(good, **options)
    for activation in ("", "tanh", 0, np.zeros(3)):
        with pytest.raises(RequestError, match="activation must be"):
            model.classify(good, ["a", "b"] if len(made.reads.towers) == 2 else None, activation)
    with pytest.raises(RequestError, match="labels: 'a' is given twice"):
        model.classify(good, ["a", "b", "a"])
    with pytest.raises(RequestError, match="expected, not NoneType"):
        model.embed(None)
    with pytest.raises(RequestError, match=r"^x\[1\]: .*expected, not NoneType"):
        model.embed([good, None])
    with pytest.raises(RequestError, match="token ids, all of them ints" if made.reads.text else "pictures, not videos|frame 0"):
        model.hidden([1.5])
    if not made.reads.text:
        with pytest.raises(RequestError, match="reads pictures only"):
            model.tokenize("a")
    with pytest.raises((UnsupportedModelError, RequestError)):
        model.embed(good, pooling="head" if made.name not in ("clip", "siglip") else "no head")
    for options in ({"n_ctx": 0}, {"n_ctx": -1}, {"n_ctx": "a"}, {"n_ctx": 10**9}, {"n_threads": 0}, {"n_batch": 0}, {"device": "tpu"}, {"device": 3},
                    {"kv_dtype": "q9"}, {"images": "large"}, {"no_such": 1}, {"mmap": "no"}, {"mmap": 2}):
        if options == {"n_ctx": 10**9} and not made.reads.text:
            continue                                         # there is no text whose length it could be
        with pytest.raises(PyEngineError):
            pe.load(made.path, **options)
    with pytest.raises(PyEngineError):
        pe.load(made.path, adapters=str(tmp_path))


def test_hidden_states_of_a_long_list_are_not_kept(made: Made) -> None:
    item = made.inputs(made.model)[-1]
    n = made.model.hidden(item).nbytes
    tracemalloc.start()
    try:
        vectors = made.model.embed([item] * 300, pooling="cls")
        assert tracemalloc.get_traced_memory()[1] - 3 * vectors.nbytes < 300 * n / 2
    finally:
        tracemalloc.stop()


# ---- closed, cut ----------------------------------------------------------------------------------------------------------


def test_a_model_is_closed_once_and_for_all(made: Made) -> None:
    with pe.load(made.path) as model:
        kinds = [word for kind, word in (("text", "text"), ("image", "pictures")) if kind in made.reads.towers]
        assert repr(model).startswith("EncoderModel(") and f"reads {' and '.join(kinds)}" in repr(model)
        assert model.stats == {"prompt_tokens": 0, "steps": 0}
        model.embed(made.inputs(model)[0])
        assert model.stats["steps"] == 1 and model.stats["prompt_tokens"] > 0
    assert model.closed and "closed" in repr(model) and model.held() is None
    for use in (lambda: model.embed(made.inputs(made.model)[0]), lambda: model.hidden("a"), lambda: model.__enter__()):
        with pytest.raises(RequestError, match="closed"):
            use()
    model.close()
    assert made.states(made.model)                           # the other one is as it was


def test_a_model_is_closed_while_a_picture_is_read(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    if not made.reads.image:
        return
    with pe.load(made.path) as model:
        process = model.towers.image.process
        monkeypatch.setattr(model.towers.image, "process", lambda *given: (process(*given), model.close())[0])
        with pytest.raises(RequestError, match="closed"):
            model.embed(tiny_towers.pictures()[0])


def test_a_file_that_was_cut_is_refused(made: Made, tmp_path: Path) -> None:
    whole, path = made.path.read_bytes(), tmp_path / "cut.gguf"
    for size in sorted({0, 3, 20, *(len(whole) * i // 9 for i in range(1, 9)), len(whole) - 64}):
        path.write_bytes(whole[:size])
        for open_ in (pe.load, pe.plan):
            with pytest.raises(InvalidModelError, match="cut.gguf"):
                open_(path)
    path.write_bytes(whole)
    with pe.load(path) as model:
        assert made.states(model) == made.states(made.model)
