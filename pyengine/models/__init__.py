"""Architectures: one module each, found by the name that a file gives as general.architecture."""

from __future__ import annotations

import importlib
import pkgutil

from pyengine.errors import UnsupportedModelError
from pyengine.models.architecture import Architecture, Towers


def architectures() -> list[str]:
    """List the modules of the decoders that can be run; a hyphen of a file's name is an underscore there."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg and m.name != "architecture")


def tower_models() -> list[str]:
    """List the modules of the models of encoders that can be run, in the same way."""
    return sorted(m.name for m in pkgutil.iter_modules([f"{path}/towers" for path in __path__]))


def model_class(name: str) -> type[Architecture] | type[Towers]:
    """Return the class `Model` of an architecture's module. Raises: UnsupportedModelError listing those that there are."""
    module = name.replace("-", "_")
    if module in architectures():
        return importlib.import_module(f"pyengine.models.{module}").Model
    if module in tower_models():
        return importlib.import_module(f"pyengine.models.towers.{module}").Model
    raise UnsupportedModelError(f"architecture {name!r} is not supported; these are: {', '.join(sorted([*architectures(), *tower_models()]))}")
