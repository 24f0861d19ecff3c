"""A graph cut into stages gives the bits of the whole; layers are spread over devices by their room."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image

import cases
import oracle
import pyengine as pe
from pyengine.engine.runner import Runner
from pyengine.errors import PlanError, RequestError
from pyengine.programs.rows import token_rows
from pyengine.programs.step import Step, Work
from pyengine.backends import backend
from pyengine.backends.chain import PreparedChain
from pyengine.compiler.cut import cut
from pyengine.memory.placement import spread

IDS = np.random.default_rng(7).integers(0, 512, 50).tolist()


def together(owners: list[int]) -> list[int]:
    """The number of each layer's group: what stands between a cache's owner and its last reader goes to one stage."""
    first = [min(owners[i:]) for i in range(len(owners))]
    return np.cumsum([i > 0 and first[i] == i for i in range(len(owners))]).tolist()


def runner_of(step: Step, n: int) -> Runner:
    groups, declared = together(step.model.cache_owners()), step.declare()
    parts = cut(declared.outputs, lambda name: groups[int(name.split(".")[1])] * n // (groups[-1] + 1) if name.startswith("blk.") else None, range(n))
    return Runner(step, PreparedChain.lay_out(parts, [backend("cpu")] * n, declared).load())


def logits(runner: Runner, ids: list[int]) -> np.ndarray:
    s, rows, out = runner.cells.new(), token_rows(ids, 0, runner.axes), []
    for start, stop in rows.steps(0, runner.n_batch):
        wanted = np.arange(stop - start, dtype=np.int32)
        part = runner.run([Work(s, rows, start, stop, wanted)]).whole()
        done = 0
        while len(part):
            out.append(part.copy())
            done += len(part)
            part = runner.head(done).whole() if done < len(wanted) else part[:0]
    return np.concatenate(out)


@pytest.mark.parametrize("kind", cases.kinds(own_cache=True))
def test_stages_give_the_bits_of_the_whole(tiny_gguf, kind: str) -> None:
    step = oracle.step_of(tiny_gguf(kind)[0], n_head=5)                  # the head runs several times a step
    ids = [i for i in IDS if i < step.model.config.vocab_size]
    whole = logits(runner_of(step, 1), ids)
    for n in range(2, min(3, together(step.model.cache_owners())[-1] + 1) + 1):
        runner = runner_of(step, n)
        assert np.array_equal(logits(runner, ids), whole)
        programs = runner.program.programs
        assert len(programs) == n and all(p.prepared.weight_bytes for p in programs)
        assert sum(p.prepared.state_bytes for p in programs) >= backend("cpu").prepare(step.declare()).state_bytes


def test_weights_are_in_one_stage_only(tiny_gguf) -> None:
    programs = runner_of(oracle.step_of(tiny_gguf("llama")[0]), 3).program.programs
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
    assert np.array_equal(two.hidden(prompt), one.hidden(prompt))
    assert two.generate(prompt, max_tokens=8, temperature=0).tokens == one.generate(prompt, max_tokens=8, temperature=0).tokens
    for device, program in zip(two.plan.devices, two.program.programs):
        assert two.plan.of("weights", device) == program.prepared.weight_bytes == program.weights.nbytes
        assert two.plan.of("kv", device) == program.prepared.state_bytes and two.plan.of("arena", device) == program.prepared.arena_bytes
    assert two.plan.of("encoder", "cpu:0") == 0 < two.plan.of("encoder", "cpu:1")
    layers = [{i.layer for i in two.plan.items if i.device == d and i.purpose == "kv" and i.layer is not None} for d in two.plan.devices]
    assert sorted(layers[0] | layers[1]) == list(range(7)) and not layers[0] & layers[1]
    with pytest.raises(PlanError, match="cpu:1"):
        pe.load(path, n_ctx=128, device={"cpu:0": 4 << 20, "cpu:1": 1 << 18})
    for device, text in (({"tpu:0": 1}, "no part of main memory"), ({"cpu:0": 0}, "no part of main memory"), ("tpu", "models run on")):
        with pytest.raises(RequestError, match=text):
            pe.plan(path, device=device)
    for name in ("encoder_device", "expert_device"):
        with pytest.raises(RequestError, match=f"{name}='cpu:1': is none of cpu"):
            pe.plan(path, **{name: "cpu:1"})
    with pytest.raises(RequestError, match="has no experts"):
        pe.plan(path, device=free, expert_device="cpu:1")


@pytest.fixture(scope="module")
def mixture(tiny_gguf):
    return tiny_gguf("mixtral", num_hidden_layers=4, num_local_experts=16, intermediate_size=224)[0]


def experts_of(items) -> set[int]:
    return {i.layer for i in items if i.detail == "experts of layers"}


def test_experts_on_a_part_of_their_own(mixture) -> None:
    """Attention, caches and head stay; a device has one arena and one set of states, counted and loaded alike; bits of one device."""
    one = pe.load(mixture, n_ctx=96, n_batch=32)
    free = {"cpu:0": one.plan.of("overhead") + (8 << 20), "cpu:1": 64 << 20}
    two = pe.load(mixture, n_ctx=96, n_batch=32, device=free, expert_device="cpu:1")
    assert two.plan.fits and two.plan.devices == ["cpu:0", "cpu:1"] and "their experts on cpu:1" in two.plan.table()
    assert np.array_equal(two.logits(IDS), one.logits(IDS))
    assert two.generate(IDS[:9], max_tokens=12, temperature=0).tokens == one.generate(IDS[:9], max_tokens=12, temperature=0).tokens
    home, away = two.program.programs
    for device, program in zip(two.plan.devices, (home, away)):
        assert two.plan.of("weights", device) == program.prepared.weight_bytes == program.weights.nbytes
        assert two.plan.of("arena", device) == program.prepared.arena_bytes == program.arena.nbytes
        assert two.plan.of("kv", device) == program.prepared.state_bytes
    assert two.plan.of("weights") == one.plan.of("weights") and two.plan.of("kv") == one.plan.of("kv") == two.plan.of("kv", "cpu:0")
    items = {d: [i for i in two.plan.items if i.device == d and i.purpose == "weights"] for d in two.plan.devices}
    assert experts_of(items["cpu:1"]) == {0, 1, 2, 3} and len(items["cpu:1"]) == 4 and not experts_of(items["cpu:0"])
    assert experts_of(one.plan.items) == {0, 1, 2, 3}
    names = {r.tensor.name for r in away.prepared.residents.values()}
    assert len(names) == 12 and all("_exps." in n for n in names)
    steps = [n.op.name for n in away.prepared.layout.steps]
    assert [name for name in steps if name != "rows"] == ["expert_linear", "expert_linear", "sum_experts"] * 4
    layout, n_received = away.prepared.layout, 0
    for t, life in layout.lives.values():                                # values on the way hold memory for one layer's turn only
        if t.node.kind == "input" and t.name.startswith("from"):
            turn, n_received = int(t.name[4:].split(".")[0]) // 2, n_received + 1
            begin, end = layout.turns[turn]
            assert life.start == (begin if turn else -1) and life.end < end
    assert n_received == 16 and len(layout.turns) == 4


def test_layers_and_experts_over_three_parts(mixture) -> None:
    one = pe.load(mixture, n_ctx=96, n_batch=32)
    arena = one.plan.of("arena")
    free = {"cpu:0": one.plan.of("overhead") + arena + (1 << 20), "cpu:1": 32 << 20, "cpu:2": arena + (1 << 20)}
    three = pe.load(mixture, n_ctx=96, n_batch=32, device=free, expert_device="cpu:1")
    caches = [{i.layer for i in three.plan.items if i.device == d and i.purpose == "kv" and i.layer is not None} for d in free]
    assert caches[0] and caches[2] and not caches[1] and caches[0] | caches[2] == {0, 1, 2, 3}
    assert np.array_equal(three.logits(IDS), one.logits(IDS))


def test_a_refusal_names_the_experts(mixture) -> None:
    """What does not fit with the experts of its layers, and would with them elsewhere."""
    whole = pe.plan(mixture, n_ctx=96, n_batch=32)
    experts = sum(i.nbytes for i in whole.items if i.detail == "experts of layers")
    free = {"cpu:0": whole.of("overhead") + (2 << 20), "cpu:1": experts + (1 << 19)}
    refused = pe.plan(mixture, n_ctx=96, n_batch=32, device=free, nearest=True)
    assert not refused.fits and refused.alternatives[0].settings == {"expert_device": "cpu:1"}
    assert pe.plan(mixture, n_ctx=96, n_batch=32, device=free, expert_device="cpu:1").fits
    with pytest.raises(PlanError, match="expert_device='cpu:1'"):
        pe.load(mixture, n_ctx=96, n_batch=32, device=free)


def test_a_context_that_fits_the_parts(tiny_gguf) -> None:
    path = tiny_gguf("llama", max_position_embeddings=65536)[0]
    one = pe.plan(path)
    free = {"cpu:0": one.of("overhead") + (5 << 20), "cpu:1": 6 << 20}
    found = pe.plan(path, device=free)
    assert found.fits and found.n_ctx < 65536 and f"context: {found.n_ctx:,} of the 65,536" in found.notes[0]
    assert not pe.plan(path, device=free, n_ctx=2 * found.n_ctx).fits
