"""A run of an encoder: declared for the largest one, and filled with one picture's, crop's or video's inputs, or with a prompt's rows.

Maps of attention are a second turn of the same program, which shares its weights and runs when they are asked for only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyengine.backends.base import Backend, Declared, Prepared, Program
from pyengine.compiler.arena import Turns
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Dim
from pyengine.models.architecture import Architecture, Encoder
from pyengine.nn.batch import Source
from pyengine.programs.rows import Rows
from pyengine.programs.sizes import Sizes

if TYPE_CHECKING:
    from pyengine.media.views import View


SOURCE = "source.ids", "source.positions", "source.lo", "source.hi"          # inputs of a prompt's run, and its soft tokens
SOURCE_MEDIA = "source.media"


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
    return _taken(program, view.positions.shape[1])


def _taken(program: Program, rows: int) -> np.ndarray:
    """Copy the first rows of what a run gave."""
    out = program.outputs[0]
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


def declare_source(model: Architecture, sizes: Sizes) -> Declared:
    """Declare a run of an encoder-decoder's encoder."""
    g, m = Graph(), Dim("m", sizes.source)
    ids, positions, lo, hi = (g.input(name, (m,), "I32") for name in SOURCE)
    media = g.input(SOURCE_MEDIA, (Dim("e", sizes.source), model.media_width)) if sizes.runs else None
    return Declared([model.source.forward(Source(sizes.source, ids, positions, lo, hi, media))])


def run_source(program: Program, rows: Rows) -> np.ndarray:
    """Encode a prompt: rows float32 [n, d_model]."""
    n, e, ids = len(rows), 0, rows.ids.copy()
    for own, embedding in rows.embeddings(0, n):
        k, d = embedding.shape
        ids[own] = np.arange(-1 - e, -1 - e - k, -1)
        program.inputs[SOURCE_MEDIA].reshape(-1)[e * d : (e + k) * d] = embedding.reshape(-1)
        e += k
    for name, values in zip(SOURCE, (ids, np.arange(n), 0, n)):
        if name in program.inputs:                           # one that the encoder never reads is left out of its program
            program.inputs[name].reshape(-1)[:n] = values
    program.execute(m=n, e=e)
    return _taken(program, n)
