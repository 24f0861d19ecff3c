"""Caches that forget, measured: the same questions for all policies, and what is right, lost and gained is counted."""

from __future__ import annotations

import json
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
    n_prompt: int = 100
    prompt_seconds: float = 1.0
    seconds: float = 2.0
    tokens: tuple[int, ...] = (1, 2, 3)

    def strip(self) -> str:
        return self.text.strip()


class Tenth:
    """A policy that keeps a tenth."""

    def budget_of(self, n: int) -> int:
        return n // 10


def test_questions_are_the_same_of_a_seed() -> None:
    a, b, c = (cache.questions(2, seed, ["which", "line"], [4, 6]) for seed in (1, 1, 2))
    assert [q.answer for q in a] == [q.answer for q in b] != [q.answer for q in c]
    assert [(q.task, q.number) for q in a] == [(t, n) for t in ("which", "line") for n in (4, 6) for _ in range(2)]
    for q in a:
        shown = [part for part in q.messages[0]["content"] if part["type"] == "image"]
        assert len(shown) == q.number and cache.right(q, f" {q.answer}\n") and not cache.right(q, f"{q.answer} {q.answer}")


def test_settings_have_the_full_cache_first() -> None:
    chosen = list(cache.settings(["A", "B"], [1.0, 0.2, 0.1], {"A": ["none", "pivotal"]}))
    assert chosen[0] == cache.Setting(cache.FULL) and chosen[0].made() is None
    assert [(s.policy, s.merge, s.ratio) for s in chosen[1:]] == [
        ("A", "none", 0.2), ("A", "none", 0.1), ("A", "pivotal", 0.2), ("A", "pivotal", 0.1), ("B", "none", 0.2), ("B", "none", 0.1)]


def test_points_lost_and_gained() -> None:
    asked = cache.questions(4, 3, ["way"], [3])
    full, other = cache.Tally(), cache.Tally()
    for q, a, b in zip(asked, (1, 1, 1, 0), (1, 0, 0, 1)):
        full.add(q, Said(q.answer if a else "no"), None)
        other.add(q, Said(q.answer if b else "no"), Tenth())
    first, second = cache.results({cache.Setting(cache.FULL): full, cache.Setting("T", 0.1): other}, 8.0)
    assert (first["score"]["median"], second["score"]["median"]) == (0.75, 0.5) and (second["lost"], second["gained"]) == (2, 1)
    assert (first["bytes"], second["bytes"]) == (800.0, 80.0) and second["token_seconds"]["median"] == 1.0
    low, high = second["interval"]
    assert (low, high) == pytest.approx((0.150, 0.850), abs=1e-3)                # Wilson's, of 2 among 4
    assert second["kinds"][0]["questions"] == 4


def test_bytes_of_a_cell_are_those_of_keys_and_values() -> None:
    by_hand = 4 * 2 * 32 * 2 * 2                             # layers, key heads, size of a head, keys and values, bytes of F16
    assert cache.cell_bytes(WEIGHTS, "f16") == pytest.approx(by_hand, rel=0.02)
    assert cache.cell_bytes(WEIGHTS, "f32") == pytest.approx(2 * by_hand, rel=0.02)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench.__main__ import main

    command = ["cache", str(WEIGHTS), "-n", "2", "--task", "way", "--pictures", "3", "--ratio", "1", "-t", "1"]
    assert main([*command, "--json", str(tmp_path / "a.json"), "--png", str(tmp_path)]) == 0
    (result,) = json.loads((tmp_path / "a.json").read_text())["results"]
    assert result["policy"] == "full" and result["questions"] == 2 and np.isfinite(result["prompt_seconds"]["median"])
    assert (tmp_path / "cache.png").stat().st_size > 5_000 and "way" in capsys.readouterr().out
