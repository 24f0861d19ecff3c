"""A run of an encoder: declared for the largest one, and filled with one picture's, crop's or video's inputs.

Maps of attention are a second turn of the same program, which shares its weights and runs when they are asked for only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyengine.backends.base import Backend, Declared, Prepared, Program
from pyengine.compiler.arena import Turns
from pyengine.graph.graph import Graph
from pyengine.models.architecture import Encoder

if TYPE_CHECKING:
    from pyengine.media.views import View


def declare(encoder: Encoder, rows: int) -> Declared:
    """Declare a run of at most `rows` rows: its first output; the others are maps of attention."""
    return Declared(encoder.declare_maps(Graph(), rows))


def prepare(backend: Backend, encoder: Encoder, rows: int) -> Prepared:
    """Declare a run and lay it out on a device."""
    declared = declare(encoder, rows)
    n = len(declared.outputs)
    return backend.prepare(declared, Turns((0, *(1,) * (n - 1)), (True,) * n, {}))


def run(program: Program, view: View) -> np.ndarray:
    """Encode a view, whose inputs are made here and gone again: rows float32 [n, d_model]."""
    fill(program, view)
    program.execute(turn=0, **view.axes)
    rows, out = view.positions.shape[1], program.outputs[0]
    embedding = out.reshape(-1)[: rows * out.shape[-1]].reshape(rows, -1).copy()
    embedding.flags.writeable = False
    return embedding


def maps(program: Program, view: View, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Encode a view, and return what its layers attended to: float32 [heads, queries, keys] by name."""
    fill(program, view)
    program.execute(**view.axes)
    return {name: np.array(out, np.float32) for name, out in zip(names, program.outputs[1:], strict=True)}


def fill(program: Program, view: View) -> None:
    """Make a view's inputs, and write them into the program's."""
    for name, array in view.inputs.items():
        program.inputs[name].reshape(-1)[: array.size] = array.reshape(-1)
