"""Architectures: one module each, found by the name that a file gives as general.architecture."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable

from pyengine.errors import UnsupportedModelError
from pyengine.models.architecture import Architecture, Towers
from pyengine.nn.ahead import Ahead

LAYERS, HEAD_LAYERS = "blk", "ahead"                         # what names of a decoder's layers begin with; those of a head beside it


def architectures() -> list[str]:
    """List the modules of the decoders that can be run; a hyphen of a file's name is an underscore there."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg and m.name != "architecture")


def tower_models() -> list[str]:
    """List the modules of the models of encoders that can be run, in the same way."""
    return sorted(m.name for m in pkgutil.iter_modules([f"{path}/towers" for path in __path__]))


def head_models() -> list[str]:
    """List the modules of the heads that draft for a decoder from a file of their own, in the same way."""
    return sorted(m.name for m in pkgutil.iter_modules([f"{path}/heads" for path in __path__]))


def head_class(name: str) -> type[Ahead]:
    """Return the class `Head` of the module of a head, one of `head_models`: it is bound to a file's keys, tensors and a decoder."""
    return importlib.import_module(f"pyengine.models.heads.{name.replace('-', '_')}").Head


def head_names(names: Iterable[str]) -> dict[str, str]:
    """Return other names of a head's layers, "ahead.0" for "blk.0": they are none of the decoder's."""
    return {name: HEAD_LAYERS + name.removeprefix(LAYERS) for name in names if name.startswith(f"{LAYERS}.")}


def model_class(name: str) -> type[Architecture] | type[Towers]:
    """Return the class `Model` of an architecture's module. Raises: UnsupportedModelError listing those that there are."""
    module = name.replace("-", "_")
    if module in architectures():
        return importlib.import_module(f"pyengine.models.{module}").Model
    if module in tower_models():
        return importlib.import_module(f"pyengine.models.towers.{module}").Model
    if module in head_models():
        raise UnsupportedModelError(f"architecture {name!r} is a head that drafts for another model: load that one, with draft= this file")
    raise UnsupportedModelError(f"architecture {name!r} is not supported; these are: {', '.join(sorted([*architectures(), *tower_models()]))}")
