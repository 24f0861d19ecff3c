"""`pyengine-run graph`: a model's graph as text, or for Graphviz."""

from __future__ import annotations

from pathlib import Path

from pyengine import hardware
from pyengine.compiler import passes
from pyengine.compiler.listing import to_dot, to_text
from pyengine.files.model_files import open_files
from pyengine.graph.tensor import Tensor
from pyengine.memory.layout import ModelLayout
from pyengine.memory.settings import Settings
from pyengine.programs import encoder
from pyengine.programs.bound import bind


def outputs(model: str | Path, n_ctx: int = 4096, mmproj: str | Path | None = None, kind: str | None = None) -> list[Tensor]:
    """Return the outputs of the graph of a model's step, or of the encoder of a kind, before fusion."""
    bound = bind(open_files(model, mmproj))
    layout = ModelLayout(bound, Settings(n_ctx=min(n_ctx, bound.n_ctx_train)), hardware.detect())
    return encoder.declare(bound.encoders[kind], layout.sizes.runs[kind]).outputs if kind else layout.step.declare().outputs


def listing(model: str, dot: bool, fused: bool) -> str:
    """Format the graph of a model's step; `fused` shows it as backends run it, else as its module wrote it."""
    found = outputs(model)
    if fused:
        found = passes.apply(found)
    return to_dot(found, model) if dot else to_text(found)
