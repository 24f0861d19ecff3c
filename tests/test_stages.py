"""A graph cut into stages gives the bits of the whole; layers are spread over devices by their room."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image

import pyengine as pe
from pyengine import planning
from pyengine.backends import backend
from pyengine.errors import PlanError, RequestError
from pyengine.schedule import Runner, Work, token_rows
from pyengine.stages import Chain, cut, spread

IDS = np.random.default_rng(7).integers(0, 512, 50).tolist()


def runner_of(built, n: int) -> Runner:
    layers = built.arch.config.n_layers
    stages = cut(built.outputs, lambda name: int(name.split(".")[1]) * n // layers if name.startswith("blk.") else None, n)
    chain = Chain(stages, [backend("cpu").prepare(s.outputs).load() for s in stages])
    return Runner(chain, built.graph.inputs, built.groups, built.layers, built.arch.position_axes, built.n_batch, built.n_head,
                  built.arch.ropes(), built.kv_dtypes)


def logits(runner: Runner, ids: list[int]) -> np.ndarray:
    s, rows, out = runner.cells.new(), token_rows(ids, 0, runner.axes), []
    for start, stop in rows.steps(0, runner.n_batch):
        wanted = np.arange(stop - start, dtype=np.int32)
        part = runner.step([Work(s, rows, start, stop, wanted)])
        done = 0
        while len(part):
            out.append(part.copy())
            done += len(part)
            part = runner.head(done) if done < len(wanted) else part[:0]
    return np.concatenate(out)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text", "gemma3", "qwen2_5_vl"])
def test_stages_give_the_bits_of_the_whole(tiny_gguf, kind: str) -> None:
    files = planning.open_files(tiny_gguf(kind)[0])
    built = planning.build(files, 64, 16, "f16")
    built.n_head = 5                                                     # the head runs several times a step
    whole = logits(runner_of(built, 1), IDS)
    for n in (2, 3):
        runner = runner_of(built, n)
        assert np.array_equal(logits(runner, IDS), whole)
        programs = runner.program.programs
        assert len(programs) == n and all(p.prepared.weight_bytes for p in programs)
        assert sum(p.prepared.state_bytes for p in programs) >= planning.backend("cpu").prepare(built.outputs).state_bytes


def test_weights_are_in_one_stage_only(tiny_gguf) -> None:
    built = planning.build(planning.open_files(tiny_gguf("llama")[0]), 64, 16, "f16")
    programs = runner_of(built, 3).program.programs
    names = [{r.tensor.name for r in p.prepared.residents.values() if r.tensor.name.startswith("blk.")} for p in programs]
    assert all(names) and not (names[0] & names[1] or names[1] & names[2] or names[0] & names[2])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.lists(st.integers(1, 300), min_size=1, max_size=4),
       st.integers(0, 40), st.integers(0, 40))
def test_layers_are_spread_in_order_and_fit(layers, rooms, first, last) -> None:
    found = spread(layers, rooms, first, last)
    if found is None:
        return
    assert found == sorted(found)
    for d, room in enumerate(rooms):
        used = sum(n for n, where in zip(layers, found) if where == d)
        used += first * (found[0] == d) + last * (found[-1] == d)
        assert used <= room


def test_spread_by_room() -> None:
    assert spread([10] * 9, [200, 100]) == [0] * 6 + [1] * 3
    assert spread([10] * 4, [100, 100], last=20) == [0, 0, 0, 1]
    assert spread([10] * 4, [25, 100]) == [0, 1, 1, 1]
    assert spread([10], [12, 20], first=15) is None and spread([10], [12, 30], first=15) == [1]
    assert spread([10] * 4, [15, 15]) is None and spread([30], [10, 50]) == [1]


def test_a_model_on_two_parts_of_memory(tiny_gguf) -> None:
    """Placed by room, counted by device, loaded where it was counted; answers are those of one device."""
    path, a = tiny_gguf("gemma3")[0], Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
    prompt = [3, 4, a, "what is it?"]
    one = pe.load(path, n_ctx=128)
    free = {"cpu:0": one.plan.of("overhead") + one.plan.of("images") + (6 << 20), "cpu:1": 10 << 20}
    two = pe.load(path, n_ctx=128, device=free, encoder_device="cpu:1")
    assert two.plan.devices == ["cpu:0", "cpu:1"] and two.plan.available == free and two.plan.fits
    assert np.array_equal(two.logits(prompt), one.logits(prompt))
    assert two.generate(prompt, max_tokens=8, temperature=0).tokens == one.generate(prompt, max_tokens=8, temperature=0).tokens
    for device, program in zip(two.plan.devices, two.program.programs):
        assert two.plan.of("weights", device) == program.prepared.weight_bytes == program.weights.nbytes
        assert two.plan.of("kv", device) == program.prepared.state_bytes and two.plan.of("arena", device) == program.prepared.arena_bytes
    assert two.plan.of("encoder", "cpu:0") == 0 < two.plan.of("encoder", "cpu:1")
    layers = [{i.layer for i in two.plan.items if i.device == d and i.purpose == "kv" and i.layer is not None} for d in two.plan.devices]
    assert sorted(layers[0] | layers[1]) == list(range(7)) and not layers[0] & layers[1]
    with pytest.raises(PlanError, match="cpu:1"):
        pe.load(path, n_ctx=128, device={"cpu:0": 4 << 20, "cpu:1": 1 << 18})
    for device, text in (({"cuda:0": 1}, "no part of main memory"), ({"cpu:0": 0}, "no part of main memory"), ("tpu", "models run on")):
        with pytest.raises(RequestError, match=text):
            pe.plan(path, device=device)
    with pytest.raises(RequestError, match="is none of cpu"):
        pe.plan(path, encoder_device="cpu:1")


def test_a_context_that_fits_the_parts(tiny_gguf) -> None:
    path = tiny_gguf("llama", max_position_embeddings=65536)[0]
    one = pe.plan(path)
    free = {"cpu:0": one.of("overhead") + (5 << 20), "cpu:1": 6 << 20}
    found = pe.plan(path, device=free)
    assert found.fits and found.n_ctx < 65536 and f"context: {found.n_ctx} of the 65536" in found.notes[0]
    assert not pe.plan(path, device=free, n_ctx=2 * found.n_ctx).fits
