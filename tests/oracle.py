"""A whole model on the reference backend: the op declarations themselves, in float64, on dequantized weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pyengine import ops
from pyengine.files.model_files import open_files
from pyengine.programs.step import build
from pyengine.backends.reference import Backend
from pyengine.cache.policy import visible


def logits(path: Path, ids: list[int]) -> np.ndarray:
    """Logits after each position, float64 [n, vocab], computed in one step."""
    built = build(open_files(path), len(ids), len(ids), "f32")
    program = Backend().compile(built.outputs, dtype=np.float64)
    index = np.arange(len(ids))
    feed = {"ids": np.array(ids), "positions": index[None], "wanted": index, "head": index, "seq": index * 0, "seq_wanted": index * 0}
    for g, name in built.groups:
        lo, hi = visible(g.policy, index)
        feed |= {f"{name}.cells": index % g.slots, f"{name}.lo": lo, f"{name}.hi": hi, f"{name}.lo_wanted": lo, f"{name}.hi_wanted": hi}
    for node in program.nodes:
        if node.kind == "state" and node.name.endswith(".table"):
            program.values[id(node), 0][0] = np.arange(node.outputs[0].shape[1])
    return program.run(**feed)[0]


def int8_activations(x, w, bias=None, norm=None, residual=None, **params):
    """`linear` as kernels do it for quantized weights: rows are rounded to int8 in blocks of 32, scale max |x| / 127."""
    h = x if norm is None else x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + params["norm_eps"]) * norm
    blocks = h.reshape(*h.shape[:-1], -1, 32)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    q = np.rint(blocks / np.where(scale == 0, 1, scale)) * scale
    return _linear(q.reshape(h.shape), w, bias, None, residual, **params)


_linear = ops.linear.fn
