"""Where graphs run. A backend is a module or package here that defines `Backend`; it is found by its name."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from pyengine.backends.base import Backend
from pyengine.errors import GraphError, shown


_SHARED = {"base", "chain", "graph", "host", "prepared"}       # what backends have in common


def names() -> list[str]:
    """Return the names of the backends that this installation has."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _SHARED)


def backend(device: str = "cpu", n_threads: int | None = None, **options: Any) -> Backend:
    """Return the backend for a device name. options: what that one takes besides.

    Raises: GraphError if there is none of that name.
    """
    if not isinstance(device, str) or device not in names():
        raise GraphError(f"there is no device {shown(device)}; this installation has {', '.join(names())}")
    return importlib.import_module(f"pyengine.backends.{device}").Backend(n_threads=n_threads, **options)
