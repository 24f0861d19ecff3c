"""Caches that forget, measured: the same questions for all policies, and what is right, lost and gained is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

pytest.importorskip("matplotlib", reason="its fonts: pip install -r requirements/peers.txt")

from bench import cache  # noqa: E402  it needs the fonts

WEIGHTS = ROOT / "converters/demo/weights/demo-many-f16.gguf"


@dataclass
class Said:
    """What `add` reads of an answer."""

    text: str
    prompt_seconds: float = 1.0
    seconds: float = 2.0
    tokens: tuple[int, ...] = (1, 2, 3)

    def strip(self) -> str:
        return self.text.strip()


@dataclass
class Held:
    """What `add` reads of the cells held."""

    n_cells: int
    nbytes: int


def test_questions_are_the_same_of_a_seed() -> None:
    a, b, c = (cache.questions(2, seed, ["which", "line"], [4, 6]) for seed in (1, 1, 2))
    assert [q.answer for q in a] == [q.answer for q in b] != [q.answer for q in c]
    assert [(q.task, q.number) for q in a] == [(t, n) for t in ("which", "line") for n in (4, 6) for _ in range(2)]
    for q in a:
        shown = [part for part in q.messages[0]["content"] if part["type"] == "image"]
        assert len(shown) == q.number and cache.right(q, f" {q.answer}\n") and not cache.right(q, f"{q.answer} {q.answer}")


def test_questions_are_the_same_in_every_process() -> None:
    """What is drawn hangs on no order of a set of texts, which changes from one process to the next."""
    draw = ("from bench import cache; from hashlib import sha256; "
            "print([(q.answer, [sha256(p['image']).hexdigest() for p in q.messages[0]['content'] if 'image' in p]) for q in cache.questions(3, 1, ['colour'], [8])])")
    found = {subprocess.run([sys.executable, "-c", draw], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": str(i)}, capture_output=True, check=True).stdout
             for i in range(3)}
    assert len(found) == 1


def test_settings_are_policies_with_ratios() -> None:
    import pyengine as pe

    chosen = cache.settings(["h2o", "look-m:merge=none"], [1.0, 0.2, 0.1])
    assert list(chosen) == [cache.FULL, "h2o", "look-m:merge=none"] and cache.policy(cache.FULL, ratio=1.0) is None
    assert [s.ratio for s in chosen["h2o"]] == [0.2, 0.1] and list(cache.settings(["h2o"], [1.0])) == [cache.FULL]
    assert cache.policy("h2o", ratio=0.2) == pe.H2O(ratio=0.2)
    assert cache.policy("look-m:merge=none", budget=64, when="always") == pe.LookM(budget=64, merge="none", when="always")
    for text in cache.POLICIES:
        assert cache.policy(text, ratio=0.05).ratio == 0.05


def test_points_lost_and_gained() -> None:
    asked = cache.questions(4, 3, ["way"], [3])
    full, other = cache.Tally(), cache.Tally()
    for q, a, b in zip(asked, (1, 1, 1, 0), (1, 0, 0, 1)):
        full.add(q, Said(q.answer if a else "no"), Held(100, 800))
        other.add(q, Said(q.answer if b else "no"), Held(10, 80))
    first, second = cache.results({cache.Setting(cache.FULL): full, cache.Setting("T", 0.1): other})
    assert (first["score"]["median"], second["score"]["median"]) == (0.75, 0.5) and (second["lost"], second["gained"]) == (2, 1)
    assert (first["bytes"], second["bytes"]) == (800.0, 80.0) and second["token_seconds"]["median"] == 1.0
    low, high = second["interval"]
    assert (low, high) == pytest.approx((0.150, 0.850), abs=1e-3)                # Wilson's, of 2 among 4
    assert second["kinds"][0]["questions"] == 4


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench.__main__ import main

    command = ["cache", str(WEIGHTS), "-n", "2", "--task", "way", "--pictures", "6", "--policy", "snapkv", "--ratio", "0.2", "-t", "1"]
    assert main([*command, "--json", str(tmp_path / "a.json"), "--png", str(tmp_path)]) == 0
    full, kept = json.loads((tmp_path / "a.json").read_text())["results"]
    assert (full["policy"], kept["name"], kept["questions"]) == ("full", "snapkv 20%", 2) and np.isfinite(kept["prompt_seconds"]["median"])
    assert 0.15 < kept["bytes"] / full["bytes"] < 0.3                           # the answer's tokens are held too
    assert (tmp_path / "cache.png").stat().st_size > 5_000 and "way" in capsys.readouterr().out


def test_time_and_perplexity_of_text_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_gguf) -> None:
    from bench import cache_models
    from bench.gpu.synthetic import SMALL

    monkeypatch.setattr(cache_models, "SHAPES", {"tiny": SMALL["qwen2 Q5_0"]})
    monkeypatch.setattr(cache_models, "VOCABULARY", 512)
    chosen = [cache.Setting(cache.FULL), cache.Setting("h2o", 0.2)]
    full, kept = cache_models.speeds(["tiny"], 1, [256], chosen, "f16", 2)["results"]
    assert full["score"]["median"] == 1 and kept["score"]["median"] > 0 and 0.2 < kept["bytes"] / full["bytes"] < 0.35
    exact, less = cache_models.perplexities(tiny_gguf("llama")[0], 1, [32], ["h2o"], "f32", 128, 1)["results"]
    assert exact["perplexity"] > 1 and less["perplexity"] != exact["perplexity"]
