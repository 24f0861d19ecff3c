"""A whole model on the reference backend: the op declarations themselves, in float64, on dequantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pyengine import hardware, ops
from pyengine.backends.reference import Backend
from pyengine.engine.runner import Runner
from pyengine.files.model_files import open_files
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Tensor
from pyengine.media.views import Limits, Processed
from pyengine.memory.layout import ModelLayout
from pyengine.memory.settings import Settings
from pyengine.models.architecture import Encoder
from pyengine.programs.bound import bind
from pyengine.programs.rows import token_rows
from pyengine.programs.step import Step, Work


def step_of(path: Path, n_ctx: int = 64, n_batch: int = 16, kv_dtype: str = "f16", mmproj: Path | None = None, adapters: Any = None, **sizes: int) -> Step:
    """A model's step at these sizes."""
    layout = ModelLayout(bind(open_files(path, mmproj, adapters)), Settings(n_ctx, n_batch, kv_dtype), hardware.detect())
    return Step(layout.bound.model, layout.sizes.with_(**sizes), layout.bound.adapters)


class Planned:
    """An encoder as plans use it: within the limits of a context, and of the rows of a run."""

    def __init__(self, encoder: Encoder, n_ctx: int, rows: int | None = None):
        self.encoder, self.limits = encoder, Limits(n_ctx, rows or encoder.most_rows(n_ctx))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def process(self, media: Any) -> Processed:
        return self.encoder.process(media, self.limits)

    def declare(self, graph: Graph) -> Tensor:
        return self.encoder.declare(graph, self.limits.rows)


def encoder_of(path: Path, mmproj: Path | None = None, n_ctx: int = 256) -> Planned:
    """The encoder that a model's files hold."""
    return Planned(bind(open_files(path, mmproj)).image, n_ctx)


def logits(path: Path, ids: list[int], adapters: Any = None) -> np.ndarray:
    """Logits after each position, float64 [n, vocab], computed in one step; adapters: (path, scale) each."""
    n = len(ids)
    step = step_of(path, n, n, "f32", adapters=adapters, n_head=n)
    runner = Runner(step, Backend(dtype=np.float64).prepare(step.declare()).load())
    scales = tuple(a.scale for a in step.adapters)
    return runner.run([Work(runner.cells.new(scales), token_rows(ids, 0, runner.axes), 0, n, np.arange(n, dtype=np.int32))]).whole()


def int8_activations(x, w, bias=None, norm=None, residual=None, **params):
    """`linear` as kernels do it for quantized weights: rows are rounded to int8 in blocks of 32, scale max |x| / 127."""
    h = x if norm is None else x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + params["norm_eps"]) * norm
    blocks = h.reshape(*h.shape[:-1], -1, 32)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    q = np.rint(blocks / np.where(scale == 0, 1, scale)) * scale
    return _linear(q.reshape(h.shape), w, bias, None, residual, **params)


_linear = ops.linear.fn
