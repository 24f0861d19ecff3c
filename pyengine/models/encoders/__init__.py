"""Encoders that stand beside text models of another name: which one a file holds is its clip.projector_type (llama.cpp's pairs)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyengine.errors import UnsupportedModelError
from pyengine.files.hparams import Hparams
from pyengine.models.encoders import pixtral
from pyengine.nn.encoder import projector_type
from pyengine.files.weights import Weights

ENCODERS: dict[str, Callable[..., Any]] = {"pixtral": pixtral.Vision}


def encoder(h: Hparams, v: Hparams, w: Weights, n_ctx: int, token: Callable[[str], int]) -> Any:
    """The `Vision` that the file's projector names. Raises: UnsupportedModelError for another one."""
    name = projector_type(v)
    if name not in ENCODERS:
        raise UnsupportedModelError(f"{v.arch}.projector_type is {name!r}; beside {h.arch!r} these are supported: "
                                    f"{', '.join(sorted(ENCODERS))}")
    return ENCODERS[name](h, v, w, n_ctx, token)
