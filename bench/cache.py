"""What a cache that forgets costs: answers about many pictures, by policy, merging rule and share of the cache that is kept.

The questions are the demo generator's (converters/demo/many.py), of the test split: words, numbers, layouts and fonts that training has not
seen. Each is a conversation of its own, answered greedily, and right if its text is the expected one. Intervals are Wilson's, of
95%. All policies get the same questions, so that differences between them are paired: `differences` counts the questions that
one answers and the full cache does not, and the other way round.

Bytes are those of the cells that are kept of a prompt, in all layers.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .beside import converters
from .sight import interval
from .stats import summary

many, pictures = converters("demo.many"), converters("demo.pictures")
TASKS: tuple[str, ...] = many.TASKS
NUMBERS, TOKENS = (8, 16, 24), 16
RATIOS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.01)
# classes of the library; those that this build has not are left out
POLICIES = ("LookM", "H2O", "SnapKV", "RoCo", "StreamingLLM", "VLCache", "MEDA", "Diverse")
MERGES = ("none", "averaged", "pivotal", "weighted")
MAX_TOKENS = 16
FULL = "full"


# ---- questions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A conversation of one question; messages as `Model.chat` takes them, with pictures as arrays."""

    task: str
    number: int                         # of pictures
    messages: list[dict[str, Any]]
    answer: str


def questions(n: int, seed: int, tasks: Sequence[str] = TASKS, numbers: Sequence[int] = NUMBERS, tokens: int = TOKENS) -> list[Question]:
    """Draw n questions of each task and number of pictures, each of which has about `tokens` tokens (of many.SIDES)."""
    out = []
    for task in tasks:
        for number in numbers:
            for i in range(n):
                drawn = many.example(random.Random(f"cache {seed} {task} {number} {tokens} {i}"), "test", task, number, tokens)
                (turn,) = drawn.turns
                shown = pictures.shown_parts(drawn, [{"type": "image", "image": p.pixels} for p in drawn.pictures])
                content = [*shown, {"type": "text", "text": turn.question}]
                out.append(Question(task, number, [{"role": "user", "content": content}], turn.answer))
    return out


def right(question: Question, answer: str) -> bool:
    """Say whether an answer is the expected one."""
    return answer.strip() == question.answer


# ---- policies -----------------------------------------------------------------------------------------------------------


def known() -> dict[str, Any]:
    """Return the policies that this build has, by name."""
    import pyengine as pe

    return {name: getattr(pe, name) for name in POLICIES if name in dir(pe)}


@dataclass(frozen=True)
class Setting:
    """A policy with its arguments; no policy: the full cache."""

    policy: str
    ratio: float = 1.0
    merge: str = "none"

    def made(self) -> Any:
        """Return the object that `generate(compress=...)` takes, None for the full cache."""
        return None if self.policy == FULL else known()[self.policy](ratio=self.ratio, merge=self.merge)

    @property
    def name(self) -> str:
        return self.policy if self.policy == FULL else f"{self.policy}, {self.merge}, {self.ratio:.0%}"


def settings(policies: Sequence[str], ratios: Sequence[float], merges: Mapping[str, Sequence[str]]) -> Iterator[Setting]:
    """Yield the full cache, then each policy with each of its merging rules (by default none) and each ratio below 1."""
    yield Setting(FULL)
    for policy in policies:
        for merge in merges.get(policy, ("none",)):
            for ratio in ratios:
                if ratio < 1:
                    yield Setting(policy, ratio, merge)


# ---- answers ------------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What one setting gave: points by question, cells kept and seconds."""

    points: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    cells: list[int] = field(default_factory=list)
    prompt_seconds: list[float] = field(default_factory=list)
    token_seconds: list[float] = field(default_factory=list)

    def add(self, question: Question, answer: Any, policy: Any) -> None:
        """Note an answer of `Model.chat`."""
        self.points[question.task, question.number].append(float(right(question, answer)))
        self.cells.append(answer.n_prompt if policy is None else policy.budget_of(answer.n_prompt))
        self.prompt_seconds.append(answer.prompt_seconds)
        if len(answer.tokens) > 1:
            self.token_seconds.append(answer.seconds / (len(answer.tokens) - 1))

    def everything(self) -> list[float]:
        """List the points of all questions, in the order in which they were asked."""
        return [p for points in self.points.values() for p in points]


def cell_bytes(file: Path, kv: str) -> float:
    """Return the bytes of one position in all layers' caches, as planned."""
    import pyengine as pe

    more, less = (pe.plan(file, n_ctx=n, kv_dtype=kv, device="cpu", images=0).of("kv") for n in (8192, 4096))
    return (more - less) / 4096


def _context(asked: Sequence[Question], tokens: int) -> int:
    """Return the positions that the longest of some questions needs, with its answer."""
    most = max(q.number for q in asked)
    return -(-(most * (tokens * 3 // 2 + 8) + 128) // 256) * 256


def ask(file: Path, kv: str, n_threads: int, asked: Sequence[Question], chosen: Sequence[Setting], tokens: int = TOKENS) -> dict[Setting, Tally]:
    """Ask each question under each setting, one question after the other: its pictures are encoded once."""
    import pyengine as pe

    side = many.SIDES[tokens][1] + pictures.GROUP
    model = pe.load(file, n_ctx=_context(asked, tokens), kv_dtype=kv, n_threads=n_threads,
                    images=(side, side, max(q.number for q in asked)))
    tallies = {setting: Tally() for setting in chosen}
    policies = {setting: setting.made() for setting in chosen}
    began = time.monotonic()
    for i, question in enumerate(asked, 1):
        for setting, policy in policies.items():
            given = {} if policy is None else {"compress": policy}
            answer = model.chat(question.messages, temperature=0, max_tokens=MAX_TOKENS, **given)
            tallies[setting].add(question, answer, policy)
        if i % 100 == 0:
            print(f"  {i} of {len(asked)} questions, {time.monotonic() - began:.0f} s", flush=True)
    return tallies


def differences(full: Tally, other: Tally) -> dict[str, int]:
    """Count the questions that one of two caches answers and the other does not."""
    pairs = list(zip(full.everything(), other.everything(), strict=True))
    return {"lost": sum(a > b for a, b in pairs), "gained": sum(a < b for a, b in pairs)}


def results(tallies: Mapping[Setting, Tally], nbytes: float) -> list[dict[str, Any]]:
    """Make a result of each setting: over all questions, and by task and number of pictures."""
    out, full = [], tallies[Setting(FULL)]
    for setting, tally in tallies.items():
        points = tally.everything()
        low, high = interval(points)
        mean = float(np.mean(points))
        kinds = [{"task": task, "pictures": number, "right": float(np.mean(p)), "interval": list(interval(p)), "questions": len(p)}
                 for (task, number), p in tally.points.items()]
        out.append({"name": setting.name, "policy": setting.policy, "ratio": setting.ratio, "merge": setting.merge,
                    "score": {"median": mean, "spread": (high - low) / 2 / mean if mean else 0.0}, "interval": [low, high],
                    "questions": len(points), "cells": float(np.mean(tally.cells)), "bytes": nbytes * float(np.mean(tally.cells)),
                    "prompt_seconds": _times(tally.prompt_seconds), "token_seconds": _times(tally.token_seconds),
                    **differences(full, tally), "kinds": kinds})
    return out


def _times(seconds: Sequence[float]) -> dict[str, float]:
    """Summarize samples without listing them: there are thousands."""
    return {k: v for k, v in summary(seconds).items() if k != "samples"} if seconds else {}


def run(file: Path, n_threads: int, n: int, seed: int, kv: str, asked_for: Mapping[str, Sequence[Any]], tokens: int = TOKENS) -> dict[str, Any]:
    """Ask n questions of each task and number of pictures under each setting.

    asked_for: lists by "tasks", "numbers", "policies", "ratios" and "merges", the rules of LookM; other policies merge nothing.
    """
    policies = [name for name in asked_for["policies"] if name in known()]
    if missing := [name for name in asked_for["policies"] if name not in policies]:
        print(f"this build has no {', '.join(missing)}", flush=True)
    merges = {name: asked_for["merges"] for name in policies if name == "LookM"}
    chosen = list(settings(policies, asked_for["ratios"], merges))
    asked = questions(n, seed, asked_for["tasks"], asked_for["numbers"], tokens)
    print(f"{file.name}, cache {kv}: {len(asked)} questions, {len(chosen)} settings, pictures of {tokens} tokens", flush=True)
    found = results(ask(file, kv, n_threads, asked, chosen, tokens), cell_bytes(file, kv))
    for r in found:
        low, high = r["interval"]
        print(f"  {r['name']:<34} {r['score']['median']:6.1%} [{low:.1%}, {high:.1%}]  lost {r['lost']}, gained {r['gained']}  "
              f"{r['bytes'] / 1024:8.1f} KiB  {1000 * r['token_seconds'].get('median', 0):.2f} ms a token", flush=True)
        if r["policy"] == FULL:
            for k in r["kinds"]:
                print(f"    {k['task']:<10} {k['pictures']:>3} pictures {k['right']:6.1%} [{k['interval'][0]:.1%}, {k['interval'][1]:.1%}]", flush=True)
    return {"suite": "cache", "file": file.name, "kv": kv, "seed": seed, "tokens": tokens, "results": found}
