"""Which device a test of the contract runs on: each backend of this installation, or the one that `--backend` names."""

from __future__ import annotations

import os

import pytest

from pyengine.backends import backend, CARDS, parsed
from pyengine.backends.base import Backend
from pyengine.errors import PyEngineError


def device(request: pytest.FixtureRequest, name: str) -> str:
    """The device to test for a backend's name: without a card, the emulated one. Skips what `--backend` does not name."""
    wanted = request.config.getoption("--backend")
    if wanted is not None:
        found = parsed(wanted)
        if found is None:
            raise pytest.UsageError(f"--backend {wanted}: there is no such device")
        if found[0] != name:
            pytest.skip(f"--backend {wanted}")
        return wanted
    if name not in CARDS:
        return name
    try:
        backend(name)
    except PyEngineError:
        return f"{name}-emulated"
    return name


def on_card() -> bool:
    """Whether models of the contract suites go to a card (`--backend`), which rounds more than the CPU does."""
    found = parsed(os.environ.get("PYENGINE_DEVICE", ""))
    return found is not None and found[0] in CARDS


def opened(request: pytest.FixtureRequest, name: str, n_threads: int = 2) -> Backend:
    """That device's backend."""
    return backend(device(request, name), n_threads=n_threads)
