"""Conversations whose cells are compressed on a device with memory of its own: it keeps the tokens that the CPU keeps, and writes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pyengine as pe
from groups import fewer_in_full  # noqa: F401  a fixture
from pyengine.cache.compression.base import Compression

IDS = np.random.default_rng(5).integers(0, 300, 100).tolist()
SETTINGS: dict[str, Any] = {"n_ctx": 256, "n_batch": 32}


def written(path: Any, device: str, policy: Compression, kv_dtype: str = "f32") -> tuple[list[int], tuple[int, int, int], dict[int, list[list[int]]]]:
    with pe.load(path, device=device, compress=policy, kv_dtype=kv_dtype, **SETTINGS) as model:
        never = tuple((i, -1e9) for i in model.tokenizer.eog_ids)
        answer = model.generate(IDS, max_tokens=8, temperature=0, logit_bias=never)
        return answer.tokens, tuple(model.cells_held()), {k: a.tolist() for k, a in answer.report.conversation.kept.items()}


@pytest.mark.parametrize("policy", [pe.LookM(ratio=0.3), pe.LookM(budget=40, when="always"), pe.VLCache(ratio=0.3), pe.RoCo(ratio=0.3)], ids=repr)
def test_a_device_keeps_what_the_cpu_keeps(tiny_gguf, cuda_device: str, metal_device: str, policy: Compression) -> None:
    path = tiny_gguf("llama")[0]
    want = written(path, "cpu", policy)
    for device in (cuda_device, metal_device):
        assert written(path, device, policy) == want


@pytest.mark.usefixtures("fewer_in_full")
@pytest.mark.parametrize(("kv_dtype", "policy"), [("kivi4", pe.H2O(budget=80, when="always")), ("kivi2", pe.SnapKV(ratio=0.7, window=8)),
                                                  ("kivi4/q4_0", pe.RoCo(ratio=0.8))], ids=repr)
def test_it_keeps_them_where_keys_are_by_channel(tiny_gguf, cuda_device: str, metal_device: str, kv_dtype: str, policy: Compression) -> None:
    """What is kept is put into new groups, and read there."""
    path = tiny_gguf("llama", head_dim=32)[0]
    want = written(path, "cpu", policy, kv_dtype)
    for device in (cuda_device, metal_device):
        assert written(path, device, policy, kv_dtype) == want
