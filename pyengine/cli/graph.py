"""`pyengine-run graph`: a model's graph as text, or for Graphviz."""

from __future__ import annotations

from pyengine.compiler import passes
from pyengine.compiler.listing import to_dot, to_text
from pyengine.programs.step import model_graph


def listing(model: str, dot: bool, fused: bool) -> str:
    """The graph of a model's step; `fused` shows it as backends run it, else as its module wrote it."""
    outputs = model_graph(model)
    if fused:
        outputs = passes.apply(outputs)
    return to_dot(outputs, model) if dot else to_text(outputs)
