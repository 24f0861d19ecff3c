"""Drafts that are always made, for tests of what they change."""

from __future__ import annotations

import pytest

from pyengine.engine import writing
from pyengine.engine.speculation import Speculation
from pyengine.engine.writing import Odds


def draft_always(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Draft up to `most` tokens for all, whatever it costs, in front of what the text has."""
    monkeypatch.setattr(Speculation, "_paying", lambda self, odds, n, used, reads: len(odds))
    monkeypatch.setattr(writing, "_expected", lambda any, most: 1e9)
    monkeypatch.setattr(writing, "_best", lambda begun, more, own, spent, terms: [w for w in more if len(w.odds) < most])
    monkeypatch.setattr(Odds, "of", lambda self, sure: 0.999)
