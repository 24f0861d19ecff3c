"""Where graphs run. A backend is a module or package here that defines `Backend`; it is found by its name.

A device is a backend's name: "cpu"; one of several of its kind, "cuda:1"; and with "-emulated" behind the name, "cuda-emulated:1", the
backend's own code on the emulator of csrc/emulate.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from typing import Any

from pyengine.backends.base import Backend
from pyengine.errors import GraphError, shown
from pyengine.hardware.facts import Device


_SHARED = {"base", "building", "chain", "faults", "graph", "host", "prepared"}       # what backends have in common
CARDS = {"cuda", "metal"}                                    # of which a machine may have none, or several, and which can be emulated


def names() -> list[str]:
    """Return the names of the backends that this installation has."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _SHARED)


def parsed(device: Any) -> tuple[str, dict[str, Any]] | None:
    """Return the backend of a device name, and what tells it which device: ("cuda", {"index": 1}); None for no such name."""
    found = re.fullmatch(r"([a-z]+)(-emulated)?(?::(\d+))?", device) if isinstance(device, str) else None
    if not found or found[1] not in names() or (found[1] not in CARDS and (found[2] or found[3])):
        return None
    return found[1], {"index": int(found[3] or 0), "emulated": bool(found[2])} if found[1] in CARDS else {}


def backend(device: str = "cpu", n_threads: int | None = None, **options: Any) -> Backend:
    """Return the backend for a device name. options: what that one takes besides.

    Raises: GraphError if there is none of that name.
    """
    found = parsed(device)
    if found is None:
        raise GraphError(f"there is no device {shown(device)}; this installation has {', '.join(names())}")
    return importlib.import_module(f"pyengine.backends.{found[0]}").Backend(n_threads=n_threads, **found[1], **options)


def devices(name: str, emulated: bool = False) -> list[Device]:
    """Return the devices of one of CARDS as a machine lists them. Raises: PyEngineError where they cannot be used, saying why."""
    module = importlib.import_module(f"pyengine.backends.{name}")
    if not hasattr(module, "devices"):
        raise GraphError(f"{name}: does not say which devices there are")
    return module.devices(emulated)
