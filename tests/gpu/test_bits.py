"""Steps on a card and on a Mac's GPU have the bits of the CPU backend, so that what is rounded to 8 bits behind them is the same number.

They do the CPU's operations in its order: sums over rows (csrc/cpu/vec.h), slices of k, chunks and tiles of attention, functions by the same
polynomials. On a card that holds for all but more than EXACT_KEYS keys (csrc/cuda/attention.cu) in caches that are not of floats, and
16-bit weights, which take its tensor cores; there results are as near as other sums are. On a Mac's GPU it holds
where its matrices add up one product after the other, which Apple does not say, and
the emulator does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import real_path
from groups import fewer_in_full  # noqa: F401  a fixture

import pyengine as pe
from converters.quantize.file import quantize_file
from pyengine import ops
from pyengine.backends import backend
from pyengine.graph.tensor import Dim

WIDTHS = (1, 5, 64, 300, 512, 600, 1000, 1024, 1030, 3000, 9000)
LONG_K = {"hidden_size": 320, "intermediate_size": 4480, "num_attention_heads": 5, "num_key_value_heads": 1, "num_hidden_layers": 1,
          "head_dim": 64}                                    # slices of 16 and of 8 steps, the last ones shorter
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "head_dim": 64}
IDS = np.random.default_rng(0).integers(0, 500, 300).tolist()


@pytest.fixture(params=["cuda_device", "metal_device"])
def emulated(request: pytest.FixtureRequest) -> str:
    """The device, where its arithmetic is the emulator's."""
    device = request.getfixturevalue(request.param)
    if not device.endswith("-emulated"):
        pytest.skip("what a GPU gives is held to the CPU by test_models.py and test_metal_models.py")
    return device


def same(device: str, build: Callable[[pe.Graph], Any], **inputs: np.ndarray) -> None:
    """Compile twice, run twice."""
    results = []
    for name in ("cpu", device):
        with pe.Graph() as g:
            program = backend(name).compile(build(g), strict=True)
        results.append(program.run(**inputs))
    for got, want in zip(results[1], results[0]):
        assert got.tobytes() == want.tobytes(), int((got != want).sum())


@pytest.mark.parametrize("width", WIDTHS)
def test_sums_over_rows(emulated: str, width: int) -> None:
    rng = np.random.default_rng(width)
    x = (rng.standard_normal((5, width)) * np.exp(rng.standard_normal((5, 1)) * 3)).astype(np.float32)
    weight, bias = rng.standard_normal((2, width)).astype(np.float32)

    def build(g: pe.Graph) -> list[Any]:
        y = g.input("x", (Dim("m", 8), width))
        return [ops.rms_norm(y, weight, eps=1e-6), ops.layer_norm(y, weight, bias, eps=1e-5), ops.softmax(y, scale=0.3),
                ops.reduce(y, kind="sum"), ops.reduce(y, kind="mean")]

    same(emulated, build, x=x)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu", "quick_gelu", "sigmoid", "tanh", "exp", "softplus"])
def test_functions(emulated: str, kind: str) -> None:
    special = [0.0, 1e-30, 0.64, 0.95, 4.0, 86.9, 87.5, 88.72, 88.8, 200.0, np.inf]
    x = np.concatenate([np.linspace(-100, 100, 4001), special, np.negative(special)]).astype(np.float32)[None]
    same(emulated, lambda g: [ops.unary(g.input("x", x.shape), kind=kind), ops.softcap(g.input("y", x.shape), cap=30.0)], x=x, y=x)


@pytest.mark.parametrize("tiled", [False, True])
def test_states(emulated: str, tiled: bool) -> None:
    """A conversation of two rows, and one of one; states are left behind the first row and the last."""
    rng = np.random.default_rng(3)
    numbers = {"k": (3, 2, 40), "v": (3, 4, 48), "decay": (3, 4), "x": (3, 70)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in numbers.items()}
    arrays |= {"k": arrays["k"] / 8, "decay": -np.abs(arrays["decay"])}
    cells = {"before": np.array([-1, -2, -1], np.int32), "after": np.array([2, -1, 1], np.int32)}

    def build(g: pe.Graph) -> list[Any]:
        t = {name: g.input(name, a.shape, "F32" if a.dtype == np.float32 else "I32") for name, a in (arrays | cells).items()}
        conv = ops.causal_conv(t["x"], np.ones((4, 70), np.float32) / 3, g.state("s0", (3, 3, 70)), t["before"], t["after"])[0]
        return [conv, ops.gated_delta_rule(t["k"], t["k"], t["v"], t["decay"], ops.sigmoid(t["decay"]), g.state("s1", (4, 3, 40 * 48)), t["before"],
                                           t["after"], tiled=tiled)[0]]

    same(emulated, build, **arrays, **cells)


@pytest.mark.parametrize("n", [33, 1600, 4000])
def test_choices_of_experts(emulated: str, n: int) -> None:
    scores = np.random.default_rng(n).standard_normal((5, n)).astype(np.float32)
    same(emulated, lambda g: list(ops.top_experts(g.input("s", scores.shape), n_used=9, gate="sigmoid", normed=True)), s=scores)


def test_angles(emulated: str) -> None:
    positions = np.random.default_rng(0).integers(0, 200_000, (1, 60)).astype(np.int32)
    frequencies = (500_000.0 ** (-np.arange(64) / 64)).astype(np.float32)
    same(emulated, lambda g: [ops.rope_table(g.input("p", (1, 60), "I32"), frequencies)], p=positions)


@pytest.mark.parametrize(("kind", "outtype", "config", "n"), [
    ("llama", "q8_0", {}, 300), ("llama", "q8_0", LONG_K, 20), ("llama", "Q4_K_M", WIDE, 20), ("gemma3_text", "q8_0", {}, 300), ("mixtral", "q8_0", {}, 40),
    pytest.param("gpt_oss", "q8_0", {}, 40, marks=pytest.mark.slow), pytest.param("gemma2", "q8_0", {}, 40, marks=pytest.mark.slow),
    pytest.param("llama", "Q2_K", WIDE, 20, marks=pytest.mark.slow), pytest.param("gpt2", "q8_0", {}, 40, marks=pytest.mark.slow)])
def test_models_of_blocks(emulated: str, tiny_gguf, tmp_path, kind: str, outtype: str, config: dict[str, Any], n: int) -> None:
    """A prompt of several chunks of keys, then rows one by one."""
    path = tiny_gguf(kind, outtype if outtype.islower() else "f32", **config)[0]
    if not outtype.islower():
        quantize_file(path, path := tmp_path / "a.gguf", outtype)
    model, cpu = (pe.load(path, device=d, n_ctx=512 if n > 128 else 128, kv_dtype="f32") for d in (emulated, "cpu"))
    assert model.logits(IDS[:n]).tobytes() == cpu.logits(IDS[:n]).tobytes()
    assert model.logits(IDS[n - 1 : n]).tobytes() == cpu.logits(IDS[n - 1 : n]).tobytes()


def agree(device: str, path: Path, n_ctx: int = 512, **settings: Any) -> None:
    """The bits of a prompt's logits, and of the next ten tokens, with the default settings but for these."""
    model, cpu = (pe.load(path, device=d, n_ctx=n_ctx, **settings) for d in (device, "cpu"))
    assert model.logits(IDS).tobytes() == cpu.logits(IDS).tobytes()
    answers = [m.generate(IDS, max_tokens=10, temperature=0, logprobs=4) for m in (model, cpu)]
    assert answers[0].sampled == answers[1].sampled


@pytest.mark.parametrize(("kind", "outtype"), [("llama", "Q4_K_M"), ("llama", "q8_0"), ("gemma3_text", "q8_0"), ("qwen3", "f32"),
                                               *(pytest.param(kind, outtype, marks=pytest.mark.slow) for kind, outtype in (
                                                   ("llama", "Q4_0"), ("llama", "Q5_K_M"), ("llama", "Q2_K"), ("mixtral", "q8_0"), ("gpt_oss", "q8_0"),
                                                   ("gemma2", "q8_0"), ("phi3", "q8_0")))])
def test_default_settings(emulated: str, tiny_gguf, tmp_path, kind: str, outtype: str) -> None:
    """Caches of f16: a prompt of several chunks of keys, then tokens one by one."""
    path = tiny_gguf(kind, outtype if outtype.islower() else "f32", **({} if outtype.islower() else WIDE))[0]
    if not outtype.islower():
        quantize_file(path, path := tmp_path / "a.gguf", outtype)
    agree(emulated, path)


@pytest.mark.parametrize("outtype", ["q8_0", pytest.param("f32", marks=pytest.mark.slow)])
def test_heads_of_512(emulated: str, tiny_gguf, outtype: str) -> None:
    """As the global layers of Gemma 4 have them. With their 256 angles a position, one of the first 300 positions is turned by a cosine that is
    not the CPU's on Metal (csrc/metal/angles.h: nearly always)."""
    path = tiny_gguf("gemma4_text", outtype, global_head_dim=512)[0]
    got, want = (pe.load(path, device=d, n_ctx=512).logits(IDS) for d in (emulated, "cpu"))
    rows = (got != want).any(axis=1)
    assert rows.sum() <= emulated.startswith("metal") and np.abs(got - want).max() <= 1e-5 * np.ptp(want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_real_models(emulated: str, name: str) -> None:
    """With the default settings, a prompt of some 24 tokens and four more."""
    path = real_path(name)
    model, cpu = (pe.load(path, device=d, n_ctx=64) for d in (emulated, "cpu"))
    ids = cpu.tokenize("The three primary colours are red, yellow and blue. Of red and yellow comes orange, of yellow and blue")
    assert model.logits(ids).tobytes() == cpu.logits(ids).tobytes()
    answers = [m.generate(ids, max_tokens=4, temperature=0, logprobs=4) for m in (model, cpu)]
    assert answers[0].sampled == answers[1].sampled


@pytest.mark.parametrize("kv_dtype", ["bf16", pytest.param("f16/bf16", marks=pytest.mark.slow)])
def test_caches_of_16_bits(emulated: str, tiny_gguf, kv_dtype: str) -> None:
    agree(emulated, tiny_gguf("qwen3", "q8_0", head_dim=32, num_hidden_layers=2)[0], kv_dtype=kv_dtype)


@pytest.mark.parametrize("kv_dtype", ["q8_0", "q4_1", "kivi4", "kivi2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("q4_0", "q8_0/f16", "kivi4/q4_0"))])
def test_caches_of_blocks(emulated: str, tiny_gguf, kv_dtype: str) -> None:
    agree(emulated, tiny_gguf("qwen3", "q8_0", head_dim=32, num_hidden_layers=2)[0], kv_dtype=kv_dtype)


@pytest.mark.usefixtures("fewer_in_full")
@pytest.mark.parametrize(("kv_dtype", "most"), [("f16", 3e-5), ("q8_0", 3e-4), ("kivi4", 3e-4), pytest.param("q4_0", 3e-4, marks=pytest.mark.slow)])
def test_tensor_cores_lose_no_digits(cuda_device: str, tiny_gguf, monkeypatch: pytest.MonkeyPatch, kv_dtype: str, most: float) -> None:
    """As beyond EXACT_KEYS, with float32 weights. In the mean within 1e-5 of the range of logits; more where a number that a cache or a query of
    8 bits rounds lies in the middle of two."""
    monkeypatch.setenv("PYENGINE_CUDA_EXACT_KEYS", "0")
    path = tiny_gguf("llama", **WIDE)[0]
    model, cpu = (pe.load(path, device=d, n_ctx=256, kv_dtype=kv_dtype) for d in (cuda_device, "cpu"))
    for ids in (IDS[:100], IDS[:101]):
        got, want = model.logits(ids), cpu.logits(ids)
        rows = np.abs(got - want).max(axis=1) / np.ptp(want)
        assert rows.mean() <= 1e-5 and rows.max() <= most
