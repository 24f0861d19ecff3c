"""Fixtures of tests that run on a card, or on the emulator where there is none; `--backend cuda` insists on the card."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def cuda_device(request: pytest.FixtureRequest) -> str:
    """The device to test: "cuda" where there is a card and its library, else "cuda-emulated", or what `--backend` names."""
    import devices

    return devices.device(request, "cuda")


@pytest.fixture(scope="session")
def metal_device(request: pytest.FixtureRequest) -> str:
    """The same for Metal: "metal" on a Mac, else "metal-emulated"."""
    import devices

    return devices.device(request, "metal")
