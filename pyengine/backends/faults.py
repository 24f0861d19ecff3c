"""What devices find while they compute, in words: a kernel there notes a number and its limit, not a text."""

from __future__ import annotations

_TEXTS = {"rows": "id {} of {}", "expert_linear": "expert {} of {}", "attention": "a row reads key, cell or sequence {} of {}",
          "cache_append": "a row goes to cell {} of {}", "rope_append": "a row goes to cell {} of {}",
          "rope_table": "axis {} of {} rows of positions"}


def said(op: str, value: int, limit: int) -> str:
    """Say what an op found: "rows: id 7 of 5"."""
    return f"{op}: {_TEXTS.get(op, '{} is not below {}').format(value, limit)}"
