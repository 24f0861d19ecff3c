"""What is compared of two answers."""

from __future__ import annotations

from typing import Any


def told(answer: Any) -> list[tuple[int, float]]:
    """List the tokens of an answer, each with its log probability, of which every bit counts."""
    return [(t, s.logprob) for t, s in zip(answer.tokens, answer.report.sampled)]
