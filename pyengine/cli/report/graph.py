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
from pyengine.programs.bound import bind
from pyengine.programs.sizes import N_BATCH
from pyengine.programs.towers import declare_picture, declare_texts


def programs(model: str | Path, n_ctx: int = 4096, mmproj: str | Path | None = None) -> list[list[Tensor]]:
    """Return the outputs of the graph of a model's step, or those of the run of each of its encoders where it is no more than these, before fusion."""
    bound = bind(open_files(model, mmproj))
    if bound.towers:
        text, image = bound.model.text, bound.model.image
        found = [declare_texts(text, text.n_ctx, max(text.n_ctx, N_BATCH))] if text is not None else []
        found += [declare_picture(image, image.most_rows())] if image is not None else []
        return [declaration.declared.outputs for declaration in found]
    layout = ModelLayout(bound, Settings(n_ctx=min(n_ctx, bound.n_ctx_train)), hardware.detect())
    return [layout.step.declare().outputs]


def listing(model: str, dot: bool, fused: bool) -> str:
    """Format the graphs of a model; `fused` shows them as backends run them, else as its module wrote them."""
    found = [passes.apply(outputs) if fused else outputs for outputs in programs(model)]
    return "\n\n".join(to_dot(outputs, model) if dot else to_text(outputs) for outputs in found)
