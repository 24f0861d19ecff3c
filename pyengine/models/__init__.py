"""Architectures: one module each, found by the name that a file gives as general.architecture."""

from __future__ import annotations

import importlib
import pkgutil

from pyengine.errors import UnsupportedModelError
from pyengine.models.architecture import Architecture


def architectures() -> list[str]:
    """List the modules of the architectures that can be run; a hyphen of a file's name is an underscore there."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg and m.name != "architecture")


def model_class(name: str) -> type[Architecture]:
    """Return the class `Model` of an architecture's module. Raises: UnsupportedModelError listing those that there are."""
    module = name.replace("-", "_")
    if module not in architectures():
        raise UnsupportedModelError(f"architecture {name!r} is not supported; these are: {', '.join(architectures())}")
    return importlib.import_module(f"pyengine.models.{module}").Model
