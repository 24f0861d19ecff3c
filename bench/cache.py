"""What a cache that forgets costs: answers about many pictures, by policy and by the share of the cache that is kept.

The questions are the demo generator's (converters/demo/many.py), of the test split: words, numbers, layouts and fonts that training has not
seen. Each is a conversation of its own, answered greedily, and right if its text is the expected one. Intervals are Wilson's, of
95%. All policies get the same questions, so that differences between them are paired: `differences` counts the questions that
the full cache answers and a policy does not, and the other way round.

Policies are texts as `pyengine.compression_of` reads them, without a ratio: look-m:merge=pivotal.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .beside import converters
from .sight import interval
from .stats import summary

many, pictures = converters("demo.many"), converters("demo.pictures")
TASKS = many.TASKS
NUMBERS, TOKENS = (8, 16, 24), 16
RATIOS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.01)
FULL = "full"
POLICIES = ("look-m:merge=none", "look-m:merge=averaged", "look-m:merge=pivotal", "look-m:merge=weighted",
            "look-m:merge=pivotal,pictures=0.25", "h2o", "snapkv", "roco", "streaming-llm", "vl-cache", "meda", "diverse")
MAX_TOKENS = 16


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


def policy(text: str, **arguments: Any) -> Any:
    """Return the policy that a text names, with more arguments; None for the full cache."""
    import pyengine as pe

    if text == FULL:
        return None
    return pe.compression_of(text + (":", ",")[":" in text] + ",".join(f"{k}={v}" for k, v in arguments.items()))


class Setting(NamedTuple):
    """A policy's text and the share of the cache that it keeps."""

    policy: str
    ratio: float = 1.0

    @property
    def name(self) -> str:
        return self.policy if self.policy == FULL else f"{self.policy} {self.ratio:.0%}"


def settings(policies: Sequence[str], ratios: Sequence[float]) -> dict[str, list[Setting]]:
    """List the settings of each policy: the full cache alone, and each other one with each ratio below 1."""
    less = [r for r in ratios if r < 1]
    return {FULL: [Setting(FULL)], **({p: [Setting(p, r) for r in less] for p in policies} if less else {})}


# ---- answers ------------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What one setting gave: points by question, cells kept and seconds."""

    points: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    cells: list[int] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    prompt_seconds: list[float] = field(default_factory=list)
    token_seconds: list[float] = field(default_factory=list)

    def add(self, question: Question, answer: Any, held: Any) -> None:
        """Note an answer of `Model.chat`, and what `Model.cells_held` says after it."""
        self.points[question.task, question.number].append(float(right(question, answer)))
        self.cells.append(held.n_cells)
        self.nbytes.append(held.nbytes)
        self.prompt_seconds.append(answer.prompt_seconds)
        if len(answer.tokens) > 1:
            self.token_seconds.append(answer.seconds / (len(answer.tokens) - 1))

    def everything(self) -> list[float]:
        """List the points of all questions, in the order in which they were asked."""
        return [p for points in self.points.values() for p in points]


def _context(asked: Sequence[Question], tokens: int) -> int:
    """Return the positions that the longest of some questions needs, with its answer."""
    most = max(q.number for q in asked)
    return -(-(most * (tokens * 3 // 2 + 8) + 128) // 256) * 256


def ask(file: Path, kv: str, n_threads: int, asked: Sequence[Question], chosen: Mapping[str, Sequence[Setting]],
        tokens: int = TOKENS) -> dict[Setting, Tally]:
    """Ask each question under each setting; a model is loaded for each policy, and keeps the pictures of a question encoded."""
    import pyengine as pe

    side = many.SIDES[tokens][1] + pictures.GROUP
    most = max(q.number for q in asked)
    tallies = {setting: Tally() for group in chosen.values() for setting in group}
    for text, group in chosen.items():
        policies = {setting: policy(text, ratio=setting.ratio) for setting in group}
        began = time.monotonic()
        with pe.load(file, n_ctx=_context(asked, tokens), kv_dtype=kv, n_threads=n_threads, images=(side, side, most),
                     compress=policies[group[0]]) as model:
            for question in asked:
                for setting, made in policies.items():
                    given = {} if made is None else {"compress": made}
                    answer = model.chat(question.messages, temperature=0, max_tokens=MAX_TOKENS, **given)
                    tallies[setting].add(question, answer, model.cells_held())
        print(f"  {text}: {time.monotonic() - began:.0f} s", flush=True)
    return tallies


def differences(full: Tally, other: Tally) -> dict[str, int]:
    """Count the questions that one of two caches answers and the other does not."""
    pairs = list(zip(full.everything(), other.everything(), strict=True))
    return {"lost": sum(a > b for a, b in pairs), "gained": sum(a < b for a, b in pairs)}


def results(tallies: Mapping[Setting, Tally]) -> list[dict[str, Any]]:
    """Make a result of each setting: over all questions, and by task and number of pictures."""
    out, full = [], tallies[Setting(FULL)]
    for setting, tally in tallies.items():
        points = tally.everything()
        low, high = interval(points)
        mean = float(np.mean(points))
        kinds = [{"task": task, "pictures": number, "right": float(np.mean(p)), "interval": list(interval(p)), "questions": len(p)}
                 for (task, number), p in tally.points.items()]
        out.append({"name": setting.name, "policy": setting.policy, "ratio": setting.ratio,
                    "score": {"median": mean, "spread": (high - low) / 2 / mean if mean else 0.0}, "interval": [low, high],
                    "questions": len(points), "cells": float(np.mean(tally.cells)), "bytes": float(np.mean(tally.nbytes)),
                    "prompt_seconds": _times(tally.prompt_seconds), "token_seconds": _times(tally.token_seconds),
                    **differences(full, tally), "kinds": kinds})
    return out


def _times(seconds: Sequence[float]) -> dict[str, float]:
    """Summarize samples without listing them: there are thousands."""
    return {k: v for k, v in summary(seconds).items() if k != "samples"} if seconds else {}


def run(file: Path, n_threads: int, n: int, seed: int, kv: str, asked_for: Mapping[str, Sequence[Any]], tokens: int = TOKENS) -> dict[str, Any]:
    """Ask n questions of each task and number of pictures under each setting.

    asked_for: lists by "tasks", "numbers", "policies" and "ratios"
    """
    chosen = settings(asked_for["policies"], asked_for["ratios"])
    asked = questions(n, seed, asked_for["tasks"], asked_for["numbers"], tokens)
    print(f"{file.name}, cache {kv}: {len(asked)} questions, {len(chosen)} policies, pictures of {tokens} tokens", flush=True)
    found = results(ask(file, kv, n_threads, asked, chosen, tokens))
    for r in found:
        low, high = r["interval"]
        print(f"  {r['name']:<42} {r['score']['median']:6.1%} [{low:.1%}, {high:.1%}]  lost {r['lost']}, gained {r['gained']}  "
              f"{r['bytes'] / 1024:8.1f} KiB  {1000 * r['token_seconds'].get('median', 0):.2f} ms a token", flush=True)
        if r["policy"] == FULL:
            for k in r["kinds"]:
                print(f"    {k['task']:<10} {k['pictures']:>3} pictures {k['right']:6.1%} [{k['interval'][0]:.1%}, {k['interval'][1]:.1%}]", flush=True)
    return {"suite": "cache", "file": file.name, "kv": kv, "seed": seed, "tokens": tokens, "results": found}
