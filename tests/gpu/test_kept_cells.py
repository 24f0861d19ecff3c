"""Conversations whose cells are compressed on a device with memory of its own: it keeps the tokens that the CPU keeps, and writes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pyengine as pe
from pyengine.cache.compression.base import Compression

IDS = np.random.default_rng(5).integers(0, 300, 100).tolist()
SETTINGS: dict[str, Any] = {"n_ctx": 256, "n_batch": 32, "kv_dtype": "f32"}


def written(path: Any, device: str, policy: Compression) -> tuple[list[int], tuple[int, int, int], dict[int, list[list[int]]]]:
    with pe.load(path, device=device, compress=policy, **SETTINGS) as model:
        never = tuple((i, -1e9) for i in model.tokenizer.eog_ids)
        answer = model.generate(IDS, max_tokens=8, temperature=0, logit_bias=never)
        return answer.tokens, tuple(model.cells_held()), {k: a.tolist() for k, a in answer.report.conversation.kept.items()}


@pytest.mark.parametrize("policy", [pe.LookM(ratio=0.3), pe.LookM(budget=40, when="always"), pe.VLCache(ratio=0.3), pe.RoCo(ratio=0.3)], ids=repr)
def test_a_device_keeps_what_the_cpu_keeps(tiny_gguf, cuda_device: str, metal_device: str, policy: Compression) -> None:
    path = tiny_gguf("llama")[0]
    want = written(path, "cpu", policy)
    for device in (cuda_device, metal_device):
        assert written(path, device, policy) == want
