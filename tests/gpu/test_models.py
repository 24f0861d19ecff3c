"""Whole tiny models on a card, or on the emulator, against the CPU backend; and what must hold there as on the CPU.

With float32 weights logits agree within 1e-5 of the range of the CPU's, with quantized ones and the default settings within 1e-3: both round
activations to 8 bits, after the same operations (test_bits.py). With F16 weights the card rounds more. A prompt has the
same bits however it is cut, and whatever stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import A, B

import pyengine as pe
from converters.quantize.file import quantize_file
from pyengine.engine.runner import Runner
from pyengine.errors import PlanError, RequestError
from pyengine.programs.rows import token_rows
from pyengine.programs.step import Row, Work

IDS = np.random.default_rng(0).integers(0, 500, 100).tolist()
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "head_dim": 64}
HEADS_OF_32 = {"head_dim": 32, "num_hidden_layers": 2}
Load = Callable[..., pe.Model]


def share(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference, as a share of the range."""
    assert got.shape == want.shape and np.isfinite(got).all()
    return float(np.abs(got - want).max() / np.ptp(want))


@pytest.fixture(scope="module")
def load(cuda_device: str) -> Load:
    """load(path, device=.., n_ctx=..) -> a model on the device that is tested, each once."""
    loaded: dict[Any, pe.Model] = {}

    def get(path: Path, **settings: Any) -> pe.Model:
        settings = {"device": cuda_device, "n_ctx": 128, "kv_dtype": "f32", **settings}
        key = (str(path), repr(sorted(settings.items())))
        if key not in loaded:
            loaded[key] = pe.load(path, **settings)
        return loaded[key]

    return get


def both(load: Load, path: Path, prompt: Any, **settings: Any) -> float:
    """How far logits are from the CPU's."""
    return share(load(path, **settings).logits(prompt), load(path, device="cpu", **settings).logits(prompt))


# -- numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "outtype", "most"), [("llama", "f32", 1e-5), ("qwen3", "f16", 1e-3), ("llama", "bf16", 5e-5)])
def test_a_text_model(load: Load, tiny_gguf, kind: str, outtype: str, most: float) -> None:
    assert both(load, tiny_gguf(kind, outtype)[0], IDS[:40]) <= most


def test_weights_of_eight_bits(load: Load, tiny_gguf) -> None:
    path = tiny_gguf("llama", "q8_0")[0]
    assert both(load, path, IDS[:40]) <= 1e-3


@pytest.mark.parametrize("mixture", ["Q4_K_M", pytest.param("Q5_K_M", marks=pytest.mark.slow), pytest.param("Q2_K", marks=pytest.mark.slow),
                                     pytest.param("Q3_K_M", marks=pytest.mark.slow), pytest.param("Q4_0", marks=pytest.mark.slow)])
def test_weights_of_a_mixture_of_formats(load: Load, tiny_gguf, tmp_path, mixture: str) -> None:
    out = tmp_path / "a.gguf"
    quantize_file(tiny_gguf("llama", **WIDE)[0], out, mixture)
    assert both(load, out, IDS[:30]) <= 1e-3


@pytest.mark.parametrize("kind", ["gemma3", pytest.param("qwen2_vl", marks=pytest.mark.slow)])
def test_a_model_that_sees(load: Load, tiny_gguf, kind: str) -> None:
    path = tiny_gguf(kind)[0]
    prompt = [5, A, "and", B, 6]
    assert both(load, path, prompt, n_ctx=256) <= 1e-5
    model, cpu = load(path, n_ctx=256), load(path, device="cpu", n_ctx=256)
    assert share(model.encode_image(A), cpu.encode_image(A)) <= 1e-5
    assert model.plan.of("encoder", model.plan.devices[0]) > 0


@pytest.mark.parametrize("kind", ["mixtral", pytest.param("qwen3moe", marks=pytest.mark.slow)])
def test_a_mixture_of_experts(load: Load, tiny_gguf, kind: str) -> None:
    assert both(load, tiny_gguf(kind)[0], IDS[:40]) <= 1e-5


def test_windows_that_slide(load: Load, tiny_gguf) -> None:
    """Prompts of several times the window, in cells that are used again."""
    path = tiny_gguf("gemma3_text")[0]
    assert both(load, path, IDS, n_batch=8) <= 1e-5


@pytest.mark.parametrize("kv_dtype", ["f16", "q8_0", "q4_0", pytest.param("bf16", marks=pytest.mark.slow),
                                      pytest.param("q8_0/q4_1", marks=pytest.mark.slow)])
def test_formats_of_caches(load: Load, tiny_gguf, kv_dtype: str) -> None:
    assert both(load, tiny_gguf("qwen3", **HEADS_OF_32)[0], IDS[:50], kv_dtype=kv_dtype) <= 1e-5


def test_greedy_text_is_the_cpus(load: Load, tiny_gguf) -> None:
    path = tiny_gguf("llama", "q8_0")[0]
    model, cpu = load(path), load(path, device="cpu")
    answers = [m.generate(IDS[:20], max_tokens=16, temperature=0).tokens for m in (model, cpu)]
    assert answers[0] == answers[1]
    replayed, held = model.program.graphs()
    assert replayed >= 10 and held >= 1                      # from the second token on, one graph


# -- invariants -----------------------------------------------------------------------------------------------------------


def test_a_token_needs_the_largest_logits_only(load: Load, tiny_gguf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of logits stay on the card where a request does not need them, and then tokens and log-probabilities are the same."""
    model, read = load(tiny_gguf("llama")[0]), []
    program, own = model._runner.program, model._runner.program.read
    monkeypatch.setattr(program, "read", lambda *args: read.append(args) or own(*args))

    def answers(**settings: Any) -> tuple[list[Any], int]:
        before = len(read)
        return model.generate(IDS[:20], max_tokens=6, **settings).sampled, len(read) - before

    for settings, needs in (({"seed": 5}, False), ({"temperature": 0, "logprobs": 3}, False), ({"seed": 1, "top_k": 0, "top_p": 0.5}, False),
                            ({"seed": 2, "presence_penalty": 0.5}, True), ({"seed": 3, "top_k": 0, "top_p": 1, "min_p": 0}, True)):
        sampled, times = answers(**settings)
        assert (times > 0) == needs, (settings, read)
        with monkeypatch.context() as m:
            m.setattr(Row, "largest", None)
            whole, times = answers(**settings)
        assert times == len(whole) and sampled == whole, settings


@pytest.mark.parametrize(("kind", "outtype", "kv_dtype"), [("llama", "f32", "f32"), ("llama", "q8_0", "f16"), ("gemma3_text", "f32", "f16"),
                                                           pytest.param("mixtral", "q8_0", "f16", marks=pytest.mark.slow)])
def test_any_cut_of_a_prompt_gives_the_same_bits(load: Load, tiny_gguf, kind: str, outtype: str, kv_dtype: str) -> None:
    path = tiny_gguf(kind, outtype)[0]
    whole = load(path, kv_dtype=kv_dtype).logits(IDS[:40])
    for n_batch in (1, 7, 32):
        assert np.array_equal(load(path, kv_dtype=kv_dtype, n_batch=n_batch).logits(IDS[:40]), whole), n_batch


def test_any_cut_of_a_prompt_that_passes_the_border(tiny_gguf, cuda_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more than EXACT_KEYS keys (csrc/cuda/attention.cu) are for another kernel than those before them."""
    monkeypatch.setenv("PYENGINE_CUDA_EXACT_KEYS", "20")
    models = [pe.load(tiny_gguf("llama", "q8_0")[0], device=cuda_device, n_ctx=64, n_batch=n) for n in (64, 1, 7)]
    whole, *cut = [model.logits(IDS[:40]) for model in models]
    assert all(np.array_equal(logits, whole) for logits in cut)
    cpu = pe.load(tiny_gguf("llama", "q8_0")[0], device="cpu", n_ctx=64).logits(IDS[:40])
    assert np.array_equal(whole[:20], cpu[:20]) and not np.array_equal(whole[20:], cpu[20:])


def logits_of(model: pe.Model, prompts: list[list[int]]) -> list[np.ndarray]:
    """Logits after the last token of each prompt, all of one step."""
    runner = Runner(model._runner.step, model.program)
    work = [Work(runner.cells.new(), token_rows(ids, 0, runner.axes), 0, len(ids), np.array([len(ids) - 1], np.int32)) for ids in prompts]
    return list(runner.run(work).whole().copy())


@pytest.mark.parametrize(("kind", "outtype", "kv_dtype"), [("llama", "f32", "f16"), ("llama", "q8_0", "f16"),
                                                           pytest.param("mixtral", "q8_0", "f16", marks=pytest.mark.slow)])
def test_conversations_beside_others_have_the_bits_of_one_alone(tiny_gguf, cuda_device: str, kind: str, outtype: str, kv_dtype: str) -> None:
    model = pe.load(tiny_gguf(kind, outtype)[0], device=cuda_device, n_ctx=64, n_seq=5, kv_dtype=kv_dtype)
    prompts = [IDS[i : i + n] for i, n in enumerate((1, 9, 1, 20, 3))]
    beside = logits_of(model, prompts)
    for i, ids in enumerate(prompts):
        assert np.array_equal(beside[i], logits_of(model, [ids])[0]), i


def test_a_second_turn_reuses_the_prefix(load: Load, tiny_gguf) -> None:
    model = load(tiny_gguf("llama")[0])
    model.reset()
    fresh = model.generate(IDS[:50], max_tokens=8, temperature=0)
    model.reset()
    model.generate(IDS[:30], max_tokens=1, temperature=0)
    again = model.generate(IDS[:50], max_tokens=8, temperature=0)
    assert (fresh.n_cached, again.n_cached) == (0, 30) and again.tokens == fresh.tokens


def test_a_conversation_is_saved_here_and_goes_on_there(load: Load, tiny_gguf, tmp_path) -> None:
    """Caches have the same bytes everywhere: one of the card goes on the CPU, and back."""
    path = tiny_gguf("gemma3_text")[0]
    model, cpu = load(path), load(path, device="cpu")
    for first, second in ((model, cpu), (cpu, model), (model, model)):
        first.reset()
        answer = first.generate(IDS[:60], max_tokens=4, temperature=0)
        first.save(tmp_path / "a", answer)
        on = first.generate([*IDS[:60], *answer.tokens, 3], max_tokens=6, temperature=0)
        second.reset()
        n = second.restore(tmp_path / "a")
        again = second.generate([*IDS[:60], *answer.tokens, 3], max_tokens=6, temperature=0)
        assert n == again.n_cached == on.n_cached and again.tokens == on.tokens


def test_cells_are_copied_where_conversations_part(tiny_gguf, cuda_device: str) -> None:
    """Two answers from one prompt: the second conversation gets copies of the first one's cells."""
    path = tiny_gguf("llama")[0]
    model, cpu = (pe.load(path, device=d, n_ctx=64, n_seq=3, kv_dtype="f32") for d in (cuda_device, "cpu"))
    for m in (model, cpu):
        m.generate(IDS[:30], max_tokens=4, temperature=0)
    for tail in (7, 8, 9):
        got, want = (m.generate([*IDS[:25], tail], max_tokens=4, temperature=0) for m in (model, cpu))
        assert got.tokens == want.tokens and got.n_cached == want.n_cached


# -- devices --------------------------------------------------------------------------------------------------------------


def card(device: str, number: int) -> str:
    """The name of another device of this kind."""
    return f"{device.partition(':')[0]}:{number}"


def test_two_cards_and_the_cpu(tiny_gguf, cuda_device: str) -> None:
    if not cuda_device.endswith("-emulated"):
        pytest.skip("needs two devices")
    path = tiny_gguf("llama", num_hidden_layers=6)[0]
    one = pe.load(path, device=cuda_device, n_ctx=64, kv_dtype="f32")
    layer = one.plan.of("weights") // 8
    names = [card(cuda_device, 0), card(cuda_device, 1), "cpu"]
    rooms = {names[0]: one.plan.of("arena", names[0]) + 2 * layer, names[1]: one.plan.of("arena", names[0]) + 4 * layer, "cpu": None}
    model = pe.load(path, device=rooms, n_ctx=64, kv_dtype="f32")
    holders = {d: {i.layer for i in model.plan.items if i.device == d and i.purpose == "kv" and i.layer is not None} for d in names}
    assert all(holders.values()) and sorted(set.union(*holders.values())) == list(range(6)), holders
    assert max(holders["cpu"]) < min(holders[names[0]])      # the CPU has the first ones
    assert share(model.logits(IDS[:20]), one.logits(IDS[:20])) <= 1e-5
    assert model.generate(IDS[:20], max_tokens=6, temperature=0).tokens == one.generate(IDS[:20], max_tokens=6, temperature=0).tokens


def test_experts_on_the_cpu_and_the_rest_on_a_card(tiny_gguf, cuda_device: str) -> None:
    path = tiny_gguf("mixtral", num_hidden_layers=2)[0]
    one = pe.load(path, device="cpu", n_ctx=64, kv_dtype="f32")
    model = pe.load(path, device=[cuda_device, "cpu"], expert_device="cpu", n_ctx=64, kv_dtype="f32")
    assert {i.device for i in model.plan.items if i.detail == "experts of layers"} == {"cpu"}
    assert share(model.logits(IDS[:20]), one.logits(IDS[:20])) <= 1e-5


def test_an_encoder_on_the_cpu(tiny_gguf, cuda_device: str) -> None:
    path = tiny_gguf("gemma3")[0]
    model = pe.load(path, device=cuda_device, encoder_device="cpu", n_ctx=256, kv_dtype="f32")
    assert model.plan.of("encoder", "cpu") > 0 == model.plan.of("encoder", model.plan.devices[0])
    assert share(model.logits([A, 5]), pe.load(path, device="cpu", n_ctx=256, kv_dtype="f32").logits([A, 5])) <= 1e-5


def test_what_is_planned_is_what_is_taken(tiny_gguf, cuda_device: str) -> None:
    """To the byte on the emulator, within the driver's granularity on a card."""
    from pyengine.backends.cuda.library import library

    own = library(cuda_device.endswith("-emulated"))
    path = tiny_gguf("qwen3", "q8_0")[0]
    before = own.facts(0).free
    model = pe.load(path, device=card(cuda_device, 0), n_ctx=96)
    taken, device = before - own.facts(0).free, card(cuda_device, 0)
    planned = model.plan.on(device) - model.plan.of("overhead", device)
    assert planned == taken if own.emulated else planned <= taken <= planned + (64 << 20)
    model.close()
    del model
    assert own.facts(0).free >= before - (0 if own.emulated else 64 << 20)


def test_a_model_that_does_not_fit_says_what_would(tiny_gguf, cuda_device: str) -> None:
    path = tiny_gguf("llama", num_hidden_layers=6)[0]
    device = card(cuda_device, 0)
    with pytest.raises(PlanError, match=f"does not fit: {device}") as refused:
        pe.load(path, device={device: 1 << 20}, n_ctx=128)
    assert any("cpu" in a.settings.get("device", ()) for a in refused.value.plan.alternatives)
    with pytest.raises(RequestError, match="there is none of this number"):
        pe.load(path, device=card(cuda_device, 77))


# -- faults ---------------------------------------------------------------------------------------------------------------


def test_a_bad_token_is_refused_and_the_model_goes_on(tiny_gguf, cuda_device: str) -> None:
    path = tiny_gguf("llama")[0]
    model, cpu = (pe.load(path, device=d, n_ctx=64, kv_dtype="f32") for d in (cuda_device, "cpu"))
    want = logits_of(model, [IDS[:5]])[0]
    for m in (model, cpu):
        with pytest.raises(RequestError, match="rows: id 100000 of"):
            logits_of(m, [[1, 100_000]])
    assert np.array_equal(logits_of(model, [IDS[:5]])[0], want)
