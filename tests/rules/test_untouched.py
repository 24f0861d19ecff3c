"""Nothing is assigned to a model's objects from outside: once it is bound, one model serves any plan and any request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cases
import numpy as np
import pytest
from PIL import Image

from pyengine import hardware
from pyengine.engine.model import Model
from pyengine.files.model_files import open_files
from pyengine.memory.fit import alternatives, fit
from pyengine.memory.layout import ModelLayout
from pyengine.memory.settings import Settings
from pyengine.programs.bound import bind, Bound

HELD = ("pyengine.models", "pyengine.nn")                    # whose objects a model is made of


def parts(root: Any) -> list[Any]:
    """All objects of a model, and the lists, dicts and arrays that they hold."""
    found: dict[int, Any] = {}
    left = [root]
    while left:
        x = left.pop()
        ours = type(x).__module__.startswith(HELD)
        if id(x) in found or not (ours or isinstance(x, (list, tuple, dict, set, np.ndarray))):
            continue
        found[id(x)] = x
        if ours and hasattr(x, "__dict__"):
            left += vars(x).values()
        elif isinstance(x, dict):
            left += [*x.keys(), *x.values()]
        elif isinstance(x, (list, tuple, set)):
            left += x
    return list(found.values())


def written(root: Any) -> dict[int, Any]:
    """What each part holds now: who its attributes and elements are, and the numbers of arrays."""
    out = {}
    for x in parts(root):
        if isinstance(x, np.ndarray):
            out[id(x)] = x.tobytes()
        elif isinstance(x, dict):
            out[id(x)] = [(k, id(v)) for k, v in x.items()]
        elif isinstance(x, (list, tuple)):
            out[id(x)] = [id(v) for v in x]
        elif hasattr(x, "__dict__"):
            out[id(x)] = [(k, id(v)) for k, v in vars(x).items()]
    return out


class Assigned(Exception):
    """Something was assigned to a model's object."""


@contextmanager
def guarded(root: Any) -> Iterator[None]:
    """Refuse assignments to a model's objects, and compare what they hold before and after."""
    def refuse(self: Any, name: str, value: Any = None) -> None:
        raise Assigned(f"{type(self).__name__}.{name}")

    kinds = {type(x) for x in parts(root) if type(x).__module__.startswith(HELD) and not isinstance(x, tuple)}
    assert len(kinds) > 3
    before = written(root)
    with pytest.MonkeyPatch.context() as patch:
        for kind in kinds:
            patch.setattr(kind, "__setattr__", refuse)
            patch.setattr(kind, "__delattr__", refuse)
        yield
    assert written(root) == before


def picture(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def use(bound: Bound, seeing: bool, **changes: Any) -> list[np.ndarray]:
    """Plan a bound model at several sizes, load it, and run text, pictures and several conversations."""
    machine, want = hardware.detect(), Settings(**{"n_ctx": 128, "n_batch": 16, "n_threads": 2, **changes})
    for other in ({"n_ctx": 64}, {"n_ctx": 96, "n_batch": 7, "kv_dtype": "f32"}, {"n_seq": 3}, {"images": (60, 40)} if seeing else {},
                  {"n_ctx": None}):
        ModelLayout(bound, Settings(**{"n_ctx": 128, "n_batch": 16, **other}), machine)
    fitted = fit(bound, want)
    alternatives(bound, want, fitted)
    model = Model(fitted, fitted.layout.prepared.load())
    ids = list(range(3, 40))
    out = [model.logits(ids)]
    if seeing:
        prompt = [3, 4, picture(1), 5, 6, picture(2, 50, 70), 7]
        out += [model.logits(prompt), model.encode_image(picture(3))]
        model.generate(prompt, max_tokens=3, temperature=0)
    model.generate_many([ids[:5], ids[:9]], max_tokens=3, temperature=0)
    return out


@pytest.mark.parametrize("kind", cases.kinds(own_cache=True))
def test_a_bound_model_is_not_assigned_to(tiny_gguf, kind: str) -> None:
    """Two uses of one object, other plans in between, give what a fresh one gives."""
    files = open_files(tiny_gguf(kind)[0])
    bound = bind(files)
    seeing = bound.image is not None
    with guarded([bound.model, bound.encoders]):
        first = use(bound, seeing, n_seq=2)
        use(bound, seeing, n_ctx=96, n_batch=9, n_seq=2)
        again = use(bound, seeing, n_seq=2)
    fresh = use(bind(files), seeing, n_seq=2)
    for a, b, c in zip(first, again, fresh):
        assert np.array_equal(a, b) and np.array_equal(a, c)


def test_what_is_assigned_is_found(tiny_gguf) -> None:
    bound = bind(open_files(tiny_gguf("gemma3")[0]))
    root = [bound.model, bound.encoders]
    for spoil in (lambda: setattr(bound.image, "max_rows", 7), lambda: setattr(bound.model.norm, "eps", 1.0),
                  lambda: delattr(bound.model, "rope")):
        with pytest.raises(Assigned), guarded(root):
            spoil()
    for spoil in (lambda: bound.image.markers.update(video=(3,)), lambda: bound.model.rope_local.inv_freq.fill(1),
                  lambda: bound.model.blocks.pop()):
        with pytest.raises(AssertionError), guarded(root):
            spoil()
