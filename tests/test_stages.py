"""A graph cut into stages gives the bits of the whole; layers are spread over devices by their room."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from pyengine import planning
from pyengine.backends import backend
from pyengine.schedule import Runner, Work, token_rows
from pyengine.stages import Chain, cut, spread

IDS = np.random.default_rng(7).integers(0, 512, 50).tolist()


def runner_of(built, n: int) -> Runner:
    layers = built.arch.config.n_layers
    stages = cut(built.outputs, lambda name: int(name.split(".")[1]) * n // layers if name.startswith("blk.") else None, n)
    chain = Chain(stages, [backend("cpu").prepare(s.outputs).load() for s in stages])
    return Runner(chain, built.graph.inputs, built.groups, built.layers, built.arch.position_axes, built.n_batch, built.n_head)


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
    assert spread([10] * 4, [15, 15]) is None and spread([30], [10, 50]) == [1]
