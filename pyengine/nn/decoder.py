"""Numbers that every decoder has."""

from __future__ import annotations

from pyengine.errors import InvalidModelError
from pyengine.files.weights import Weights


def vocab_size(w: Weights) -> int:
    """Rows of the output head (of the embedding, where they are tied); a vocabulary may have more tokens, or fewer."""
    for name in ("output", "token_embd"):
        shape = w[name].shape("weight")
        if shape is not None and len(shape) == 2:
            return shape[0]
    raise InvalidModelError(f"{w!r}: neither 'output.weight' nor 'token_embd.weight' is a matrix of the file")
