"""A run of an encoder: declared for the largest one, and filled with one picture's, crop's or video's inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyengine.backends.base import Declared, Program
from pyengine.graph.graph import Graph
from pyengine.models.architecture import Encoder

if TYPE_CHECKING:
    from pyengine.media.views import View


def declare(encoder: Encoder, rows: int) -> Declared:
    """Declare a run of at most `rows` rows."""
    return Declared([encoder.declare(Graph(), rows)])


def run(program: Program, view: View) -> np.ndarray:
    """Encode a view, whose inputs are made here and gone again: rows float32 [n, d_model]."""
    for name, array in view.inputs.items():
        program.inputs[name].reshape(-1)[: array.size] = array.reshape(-1)
    program.execute(**view.axes)
    rows, out = view.positions.shape[1], program.outputs[0]
    embedding = out.reshape(-1)[: rows * out.shape[-1]].reshape(rows, -1).copy()
    embedding.flags.writeable = False
    return embedding
