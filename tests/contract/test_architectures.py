"""The contract of an architecture and its encoders, for every one that there is: what they promise is what they give, and nothing is kept."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import pairwise
from typing import Any

import cases
import numpy as np
import pytest
from PIL import Image

from pyengine.cache.policy import Policy
from pyengine.compiler.listing import to_text
from pyengine.dtype import dtype
from pyengine.errors import PyEngineError
from pyengine.files.model_files import open_files
from pyengine.graph.graph import Graph, topological
from pyengine.graph.tensor import axis_max
from pyengine.media.image import open_image
from pyengine.media.video import open_video
from pyengine.media.views import Blend, Limits, Piece, Processed, View
from pyengine.models import architectures, model_class
from pyengine.models.architecture import Architecture, Encoder
from pyengine.programs import encoder as encoders
from pyengine.programs.bound import bind, Bound
from pyengine.programs.sizes import Sizes
from pyengine.programs.step import Step

CONVERTED = [c for c in cases.select() if c.converted]      # others have no converter of ours
N_CTX, N_BATCH = 256, 16
PICTURES = ((1, 1), (60, 80), (97, 53), (40, 170), (150, 29), (224, 224), (500, 20), (640, 480))          # width, height


@pytest.fixture(scope="module", params=[c.kind for c in CONVERTED])
def bound(request, tiny_gguf) -> Bound:
    return bind(open_files(tiny_gguf(request.param)[0]))


@pytest.fixture(scope="module")
def model(bound: Bound) -> Architecture:
    return bound.model


@pytest.fixture(scope="module", params=[c.kind for c in CONVERTED if c.sees])
def seen(request, tiny_gguf) -> Bound:
    return bind(open_files(tiny_gguf(request.param)[0]))


@pytest.fixture(scope="module")
def image(seen: Bound) -> Encoder:
    return seen.image


def sizes(bound: Bound, n_ctx: int = N_CTX, n_batch: int = N_BATCH, kind: str = "F16") -> Sizes:
    runs = {k: e.most_rows(n_ctx) for k, e in bound.encoders.items()}
    across = max(runs.values(), default=0) if any(p.across for p in bound.model.policies()) else 0
    return Sizes(n_ctx, n_batch, 2, 4, dtype(kind), dtype(kind), runs, across)


def listing(bound: Bound, at: Sizes) -> str:
    """A step as text, with its arguments and the weights that it reads."""
    outputs = Step(bound.model, at).declare().outputs
    read = [(n.op.name, n.params, [t.name for t in n.inputs]) for n in topological(outputs) if n.op is not None]
    return "\n".join([to_text(outputs), *map(str, read)])


def picture(width: int, height: int, **options: Any) -> Any:
    rng = np.random.default_rng((width, height))
    return open_image(Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)), **options)


# -- decoders -------------------------------------------------------------------------------------------------------------


def test_every_architecture_has_a_tiny_model() -> None:
    there = {name.replace("-", "_") for c in CONVERTED for name in (c.arch, *c.also)} | {c.arch for c in cases.sources().values()}
    assert set(architectures()) <= there and {c.arch.replace("-", "_") for c in CONVERTED} <= set(architectures())


@pytest.mark.parametrize("name", architectures())
def test_a_class_is_an_architecture(name: str) -> None:
    kind = model_class(name)
    assert issubclass(kind, Architecture) and not kind.__abstractmethods__ and kind.position_axes >= 1 and kind.__doc__


def test_the_config_has_what_the_engine_asks_for(model: Architecture) -> None:
    c = model.config
    for name in ("n_layers", "d_model", "n_kv_heads", "head_dim", "vocab_size"):
        assert type(getattr(c, name)) is int and getattr(c, name) > 0, name
    assert model.n_ids >= 1 and model.position_axes >= 1
    assert dataclasses.is_dataclass(c) and c.__dataclass_params__.frozen


def test_each_layer_has_a_policy_and_a_rotation(model: Architecture) -> None:
    policies = model.policies()
    assert len(policies) == model.config.n_layers and all(isinstance(p, Policy) for p in policies)
    assert policies == model.policies() and len(set(policies)) <= 4              # equal ones share a table of cells
    for n_ctx in (1, 64, 100_000):
        ropes = model.ropes(n_ctx)
        assert len(ropes) == model.config.n_layers
        for r in ropes:
            assert r.inv_freq.dtype == np.float32 and 2 * len(r.inv_freq) <= model.config.head_dim and np.isfinite(r.inv_freq).all()
            assert r.scale > 0 and isinstance(r.interleaved, bool)


def test_policies_see_and_hold_what_they_say(model: Architecture) -> None:
    n = np.arange(3 * N_CTX)
    for p in set(model.policies()):
        if p.across:
            assert p.holding(7).slots(N_CTX, N_BATCH) == 7
            continue
        if p.recurrent:
            assert p.slots(N_CTX, N_BATCH) > 2 and [s.name for s in p.inputs()] == ["before", "after"] and p.nbytes > 0
            assert all(p.first_of(i) == max(i - 1, 0) for i in (0, 1, 9))        # one state, behind the last token
            continue
        first = p.first(n)
        assert (first <= n).all() and (np.diff(first) >= 0).all() and p.first_of(5) == first[5]
        lo, hi = p.visible(n)
        assert lo.dtype == hi.dtype == np.int32 and np.array_equal(lo, first) and np.array_equal(hi, n + 1)
        for n_ctx in (8, 64, N_CTX):
            for n_batch in (1, 5, N_BATCH):
                slots = p.slots(n_ctx, n_batch)
                # a ring must hold all that the oldest row of a batch sees when the batch has been written
                end = np.arange(n_batch, n_ctx + 1)
                assert 0 < slots <= n_ctx and (end - p.first(end - n_batch) <= slots).all()
        assert {s.name for s in p.inputs()} >= {"cells", "lo", "hi"}


def test_building_the_step_twice_gives_the_same_graph(bound: Bound) -> None:
    """Also with other sizes in between: nothing of a plan is kept by the model."""
    first = listing(bound, sizes(bound))
    other = listing(bound, sizes(bound, 64, 8, "F32"))
    assert listing(bound, sizes(bound)) == first and listing(bound, sizes(bound, 64, 8, "F32")) == other


def test_the_step_has_the_shapes_that_it_promises(bound: Bound) -> None:
    at, c = sizes(bound), bound.model.config
    step = Step(bound.model, at)
    logits, hidden = step.declare().outputs
    assert logits.shape[1:] == (c.vocab_size,) and axis_max(logits.shape[0]) == at.n_head
    assert hidden.shape[1:] == (c.d_model,) and axis_max(hidden.shape[0]) == at.n_batch
    leaves = {n.name: n.outputs[0] for n in topological([logits, hidden]) if n.op is None and n.name}
    assert leaves["positions"].shape[0] == bound.model.position_axes and "ids" in leaves
    n_caches = sum(number is not None for number in step.layers)
    states = [n.outputs[0] for n in topological([logits, hidden]) if n.kind == "state"]
    assert len(states) == 2 * n_caches and {s.name for s in states} | {n for n, t in leaves.items() if t.node.kind == "table"} == set(
        step.lasting_shapes(at.n_ctx, at.n_seq))
    assert all(step.lasting_shapes(at.n_ctx, at.n_seq)[s.name] == s.shape for s in states)


def test_without_an_encoder_the_decoder_is_whole(bound: Bound) -> None:
    alone = bound.without_encoders()
    assert alone.encoders == {} and alone.model is bound.model and bound.encoders == ({} if alone is bound else bound.encoders)
    text = listing(alone, sizes(alone))
    assert "media" not in text and "across" not in text


# -- encoders -------------------------------------------------------------------------------------------------------------


def test_encoders_are_told_by_their_kind(seen: Bound) -> None:
    assert seen.encoders
    for kind, encoder in seen.encoders.items():
        assert isinstance(encoder, Encoder) and encoder.kind == kind and kind in ("image", "audio", "text")


def test_markers_are_ids_of_the_vocabulary(seen: Bound, image: Encoder) -> None:
    n_tokens = seen.files.model.metadata.count("tokenizer.ggml.tokens")
    assert "image" in image.markers and set(image.markers) <= {"image", "video", "audio", "text"}
    for kind, ids in image.markers.items():                  # of pictures there is one; a video may have no token of its own
        assert isinstance(ids, tuple) and (ids or kind == "video") and all(type(i) is int and 0 <= i < n_tokens for i in ids)


def test_rows_are_bounded(image: Encoder) -> None:
    most = [image.most_rows(n) for n in (64, N_CTX, 4096, 131072)]
    assert most == sorted(most) and most[0] > 0 and 0 <= image.atomic_rows <= most[-1]
    assert all(image.n_rows(w, h) > 0 for w, h in PICTURES)


def processed(image: Encoder, media: Any) -> Processed:
    return image.process(media, Limits(4096, image.most_rows(4096)))


def views_of(found: Processed) -> list[View]:
    """The views of parts, after what every part must be."""
    for p in found.parts:
        assert isinstance(p, (str, View, Piece, Blend)) or type(p) is int
        if isinstance(p, Blend):
            rows = sum(v.positions.shape[1] for v in p.views)
            assert p.indices.shape == p.weights.shape and p.weights.dtype == np.float32 and 0 <= p.indices.min() <= p.indices.max() < rows
            assert np.allclose(p.weights.sum(1), 1)
    return found.views


@pytest.mark.parametrize("size", PICTURES)
def test_a_picture_has_the_rows_that_were_promised(seen: Bound, image: Encoder, size: tuple[int, int]) -> None:
    media = picture(*size)
    before = media.pixels.copy()
    found = processed(image, media)
    assert np.array_equal(media.pixels, before) and found.size == size and min(found.processed) > 0
    views = views_of(found)
    rows = [v.positions.shape[1] for v in views]
    taken = sum(p.stop - p.start if isinstance(p, Piece) else len(p.indices) if isinstance(p, Blend) else p.positions.shape[1]
                for p in found.parts if isinstance(p, (Piece, Blend, View)))
    assert 0 < max(rows) <= image.most_rows(4096) and taken <= image.n_rows(*size)
    for view in views:
        assert view.positions.shape[0] == seen.model.position_axes and view.positions.dtype == np.int32
        assert (view.positions >= 0).all() and view.advance > 0
        assert not view.atomic or view.positions.shape[1] <= image.atomic_rows
        assert view.causal or view.atomic                    # rows that see those behind them cannot come later
        assert view.token is None or any(p.across for p in seen.model.policies())
        assert view.grid is None or len(view.grid) == 3
        pieces = [p for p in found.parts if isinstance(p, Piece) and p.view is view]
        if pieces:                                           # in order; one that ends lines comes again, and padding not at all
            assert all(0 <= p.start < p.stop <= view.positions.shape[1] for p in pieces)
            often = Counter((p.start, p.stop) for p in pieces)
            assert all(a.stop <= b.start for a, b in pairwise(p for p in pieces if often[p.start, p.stop] == 1))


@pytest.mark.parametrize("size", PICTURES[:6])
def test_a_run_takes_what_views_bring(seen: Bound, image: Encoder, size: tuple[int, int]) -> None:
    """Inputs of the declared graph are those that a view makes, within its axes, and its output has rows for all positions."""
    for view in views_of(processed(image, picture(*size))):
        rows = view.positions.shape[1]
        graph = Graph()
        out = image.declare(graph, rows)
        assert out.dtype.name == "F32" and out.shape[1:] == (seen.model.media_width,) and axis_max(out.shape[0]) >= rows
        arrays = view.inputs
        needed = {n.name: n.outputs[0] for n in topological([out]) if n.kind == "input"}
        assert set(needed) == set(arrays)
        for name, t in needed.items():
            shape = tuple(a if isinstance(a, int) else a.scale * view.axes[a.name] for a in t.shape)
            assert arrays[name].size == np.prod(shape), name
            assert arrays[name].size <= np.prod([axis_max(a) for a in t.shape])
            assert arrays[name].dtype == (np.int32 if t.dtype.name == "I32" else np.float32)
        assert all(np.array_equal(a, view.inputs[name]) for name, a in arrays.items())               # made anew, and the same


def test_building_the_encoder_twice_gives_the_same_graph(image: Encoder) -> None:
    def text(rows: int) -> str:
        return to_text(encoders.declare(image, rows).outputs)

    most = image.most_rows(1024)
    first = text(most)
    text(max(1, most // 4))
    assert text(most) == first


def test_processing_is_the_same_twice(image: Encoder) -> None:
    a, b = (processed(image, picture(97, 53)) for _ in range(2))
    assert [p for p in a.parts if isinstance(p, (str, int))] == [p for p in b.parts if isinstance(p, (str, int))]
    for v, w in zip(views_of(a), views_of(b)):
        assert v.axes == w.axes and np.array_equal(v.positions, w.positions) and (v.advance, v.grid, v.token) == (w.advance, w.grid, w.token)
        assert all(np.array_equal(x, w.inputs[name]) for name, x in v.inputs.items())


def test_limits_are_kept(image: Encoder) -> None:
    """A picture that takes more rows than a plan left is refused, or made smaller, and never more than was left."""
    rows = max(image.n_rows(640, 480) // 3, image.n_rows(1, 1))                # a plan leaves what the smallest picture takes
    for limits in (Limits(4096, rows), Limits(16, image.most_rows(4096))):
        try:
            found = image.process(picture(640, 480), limits)
        except PyEngineError as error:
            assert str(error)
            continue
        assert all(v.positions.shape[1] <= max(limits.rows, image.atomic_rows) for v in found.views)


def test_unknown_options_and_media_are_refused(image: Encoder) -> None:
    with pytest.raises(PyEngineError, match="zoom"):
        processed(image, picture(60, 80, zoom=3))
    frames = [Image.fromarray(np.full((40, 60, 3), 40 * i, np.uint8)) for i in range(4)]
    if "video" in image.markers:
        assert views_of(processed(image, open_video(frames)))
    else:
        with pytest.raises(PyEngineError, match="video"):
            processed(image, open_video(frames))
