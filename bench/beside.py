"""The converters, which stand beside this package: `converters` in a checkout, `pyengine.converters` where it is installed."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def converters(module: str = "") -> ModuleType:
    """Import the converters, or one of their modules by its dotted name below them."""
    return import_module(f"{__package__.removesuffix('bench')}converters{'.' * bool(module)}{module}")
