"""Real weights, the same numbers on every run: perplexity beside llama.cpp's, threads, cuts, memory.

LLAMA_CPP holds what llama.cpp (llama-cpp-python 0.3.36, AVX-512 build) computed on the same file and text by llama-perplexity's
definition, context 512, 8 chunks. `python -m bench peers --quality` compares the two programs live.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from conftest import REAL, ROOT, real_path

import pyengine as pe
from pyengine.measure.perplexity import perplexity

TEXT = (ROOT / "tests/data/plain_text.txt").read_text()
LLAMA_CPP = {"smollm2": 53.977373, "gemma": 50.768003, "qwen": 53.787334}


@pytest.mark.parametrize("name", [name if name == "smollm2" else pytest.param(name, marks=pytest.mark.slow) for name in REAL])
def test_perplexity_is_llama_cpps(name: str, real_model) -> None:
    found = perplexity(real_model(name), TEXT, 512, 8)
    assert abs(found.value / LLAMA_CPP[name] - 1) < 0.005, found


@pytest.mark.parametrize("name", REAL)
def test_threads_and_cuts_do_not_change_a_bit(name: str, real_model) -> None:
    model = real_model(name)
    ids = model.tokenize(TEXT)[:70]
    want = model.logits(ids)
    for settings in ({"n_threads": 1}, {"n_threads": 3}, {"n_batch": 1 if name == "smollm2" else 5}, {"n_batch": 64}):
        assert np.array_equal(real_model(name, **settings).logits(ids), want), settings


@pytest.mark.parametrize("name", REAL)
def test_resident_memory_stays_near_one_copy(name: str) -> None:
    """After load, by the system's own count, in a fresh process: at most 1.15 x the file + 150 MB."""
    path = real_path(name)
    code = f"import psutil, pyengine as pe; m = pe.load({str(path)!r}); m.tokenizer; print(psutil.Process().memory_info().rss)"
    rss = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout)
    assert rss <= 1.15 * path.stat().st_size + 150e6, f"{rss / 1e6:.0f} MB resident for a file of {path.stat().st_size / 1e6:.0f} MB"


def test_greedy_answers_are_what_they_should_be(real_model) -> None:
    assert "Paris" in real_model("smollm2").generate("The capital of France is", max_tokens=8, temperature=0)
    answer = real_model("qwen").chat([{"role": "user", "content": "Reply with one word: what is 2 + 2?"}], max_tokens=8, temperature=0)
    assert "4" in answer or "four" in answer.lower()
    text = real_model("gemma").generate("1, 2, 3, 4, 5, 6,", max_tokens=8, temperature=0)
    assert text.replace(" ", "").startswith("7,8")


def test_a_conversation_reuses_its_cache(real_model) -> None:
    model = real_model("smollm2")
    model.reset()
    messages = [{"role": "user", "content": "Name a colour."}]
    first = model.chat(messages, max_tokens=12, temperature=0)
    messages += [{"role": "assistant", "content": str(first)}, {"role": "user", "content": "Another one."}]
    second = model.chat(messages, max_tokens=12, temperature=0)
    assert second.n_cached >= first.n_prompt


def test_graph_of_a_model_can_be_drawn() -> None:
    path = real_path("smollm2")
    run = lambda *flags: subprocess.run([sys.executable, "-m", "pyengine.cli", "graph", str(path), *flags], check=True, capture_output=True,  # noqa: E731
                                        text=True, cwd=ROOT).stdout
    assert run("--dot").startswith("digraph") and "rope_append" in run() and "rope_append" not in run("--no-passes")


@pytest.mark.parametrize("name", REAL)
def test_the_plan_is_what_is_allocated(name: str, real_model) -> None:
    model = real_model(name)
    program = model.program
    allocated = program.weights.nbytes + program.arena.nbytes + program.state_memory.nbytes
    assert sum(model.plan.of(purpose) for purpose in ("weights", "kv", "arena")) == allocated
    assert pe.plan(real_path(name), n_ctx=1024).items == model.plan.items
