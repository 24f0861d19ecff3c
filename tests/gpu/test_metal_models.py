"""Whole tiny models on Metal (emulated, or a Mac's GPU) beside the CPU: logits, generation, caches, pictures, plans.

In emulation they have the CPU's bits. A GPU's matrices may add up their products in another order. Then a number that lies near the middle of
two codes, of a row of activations or of a cell, may become either: positions up to the first such number agree nearly to the last
bit; the rest, in models as narrow as these, by a code in the middle of the model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

import pyengine as pe
from converters import convert
from pyengine.backends.metal.launch import LAUNCHERS, load_launchers
from pyengine.errors import GraphError

FLOATS, HALVES, CODES = 1e-5, 2e-4, 1e-2                     # largest error on a GPU, of the range of logits
# (kind of checkpoint, type of its weights, type of its caches)
FAST = [("llama", "f32", "f32"), ("gemma3_text", "q8_0", "q8_0")]
SLOW = [("llama", "q8_0", "f16"), ("mixtral", "q8_0", "f16"), ("qwen3", "bf16", "q4_0"), ("qwen2", "f16", "f16"), ("mistral", "q8_0", "q4_1"),
        ("mixtral", "f32", "bf16")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory):
    """A function: (kind, type) -> path of a converted tiny checkpoint, each made once."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def file(kind: str, outtype: str) -> Path:
        if (kind, outtype) not in made:
            tiny.make_checkpoint(kind, folder / kind)
            convert(folder / kind, folder / f"{kind}-{outtype}.gguf", outtype=outtype)
            made[kind, outtype] = folder / f"{kind}-{outtype}.gguf"
        return made[kind, outtype]

    return file


def compared(device: str, got: np.ndarray, want: np.ndarray, most: float) -> None:
    """Each position within `most` of the range, the first ones within `FLOATS`, and the mean far below the most; in emulation the same bits."""
    if device.endswith("-emulated"):
        assert got.tobytes() == want.tobytes(), int((got != want).sum())
        return
    error = np.abs(got - want).max(1) / (want.max() - want.min())
    assert error.max() < most and error[:2].max() < FLOATS and error.mean() < most / 4, error


@pytest.mark.parametrize("kind,outtype,kv", [*FAST, *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW)])
def test_logits_and_text_are_those_of_the_cpu(files, metal_device: str, kind: str, outtype: str, kv: str) -> None:
    path = files(kind, outtype)
    cpu, own = (pe.load(path, n_ctx=128, kv_dtype=kv, device=device) for device in ("cpu", metal_device))
    ids = cpu.tokenize(tiny.TEXTS[0] + tiny.TEXTS[3])
    most = CODES if outtype == "q8_0" or kv.startswith("q") else FLOATS if kv == "f32" else HALVES
    compared(metal_device, own.logits(ids), cpu.logits(ids), most)
    assert own.generate(tiny.TEXTS[0], max_tokens=5, temperature=0) == cpu.generate(tiny.TEXTS[0], max_tokens=5, temperature=0)


def test_a_prompt_in_any_cuts_and_beside_others_has_the_same_bits(files, metal_device: str) -> None:
    path = files("llama", "q8_0")
    whole, cut = (pe.load(path, n_ctx=128, n_batch=n, device=metal_device) for n in (64, 7))
    ids = whole.tokenize(tiny.TEXTS[0])
    assert whole.logits(ids).tobytes() == cut.logits(ids).tobytes()


def test_every_step_has_a_kernel(files, metal_device: str, monkeypatch) -> None:
    monkeypatch.setenv("PYENGINE_STRICT", "1")
    for kind in ("llama", "mixtral"):
        pe.load(files(kind, "q8_0"), n_ctx=64, device=metal_device)


def test_a_step_without_a_kernel_goes_to_the_reference(files, metal_device: str, monkeypatch) -> None:
    """It is counted, refused where that is wanted, and gives the same text."""
    path = files("llama", "f32")
    want = pe.load(path, n_ctx=64, device=metal_device).generate("It is", max_tokens=3, temperature=0)
    load_launchers()
    monkeypatch.delitem(LAUNCHERS, "rope_table")
    assert pe.load(path, n_ctx=64, device=metal_device).generate("It is", max_tokens=3, temperature=0) == want
    assert "rope_table (1 step)" in pe.plan(path, n_ctx=64, device=metal_device).table()
    monkeypatch.setenv("PYENGINE_STRICT", "1")
    with pytest.raises(GraphError, match="rope_table"):
        pe.load(path, n_ctx=64, device=metal_device)


def test_the_plan_counts_what_is_allocated(files, metal_device: str) -> None:
    path = files("llama", "f16")
    plan, model = pe.plan(path, n_ctx=64, device=metal_device), pe.load(path, n_ctx=64, device=metal_device)
    assert plan.items == model.plan.items and any(i.device.startswith("metal") for i in plan.items if i.purpose == "weights")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3"])
def test_pictures_are_seen_as_on_the_cpu(files, metal_device: str, kind: str) -> None:
    path = files(kind, "f32")
    cpu, own = (pe.load(path, n_ctx=600, kv_dtype="f32", device=device, images=(56, 56)) for device in ("cpu", metal_device))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8))
    parts = ["What is in ", picture, "?"]
    compared(metal_device, own.encode_image(picture), cpu.encode_image(picture), FLOATS)
    compared(metal_device, own.logits(parts), cpu.logits(parts), FLOATS)
