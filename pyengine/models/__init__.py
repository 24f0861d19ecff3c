"""Architectures: one module each, found by the name that a file gives as general.architecture."""

from __future__ import annotations

import importlib
import pkgutil

from pyengine.errors import UnsupportedModelError
from pyengine.models.architecture import Architecture


def architectures() -> list[str]:
    """List the names of the architectures that can be run."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg and m.name != "architecture")


def model_class(name: str) -> type[Architecture]:
    """Return the class `Model` of an architecture's module. Raises: UnsupportedModelError listing those that there are."""
    if name not in architectures():
        raise UnsupportedModelError(f"architecture {name!r} is not supported; these are: {', '.join(architectures())}")
    return importlib.import_module(f"pyengine.models.{name}").Model
