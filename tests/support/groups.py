"""What tests of caches whose keys are quantized by channel, in groups of tokens, have in common: settings, fixtures, questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyengine.cache import policy

IDS = np.random.default_rng(5).integers(0, 300, 240).tolist()
SETTINGS: dict[str, Any] = {"n_ctx": 256, "n_batch": 32}
R = 32                                   # tokens in full, here: so that short prompts have groups
KINDS = {"kivi4": ("Q4_1_CHANNELS", "Q4_1"), "kivi2": ("Q2_1_CHANNELS", "Q2_1"), "kivi4/q4_0": ("Q4_1_CHANNELS", "Q4_0")}


@pytest.fixture
def fewer_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in policy.RECENT:
        monkeypatch.setitem(policy.RECENT, kind, R)


@pytest.fixture
def path(tiny_gguf) -> Path:
    return tiny_gguf("llama", head_dim=32)[0]


def ask(model: Any, parts: list[Any], n: int = 8, **more: Any) -> Any:
    never = tuple((i, -1e9) for i in model.tokenizer.eog_ids)
    return model.generate(parts, max_tokens=n, temperature=0.7, seed=1, logit_bias=never, **more)
