"""Which devices a model may go to: what a machine has, what is asked for, and in which order layouts are tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pyengine.backends import CARDS, devices, parsed
from pyengine.errors import PyEngineError, RequestError
from pyengine.hardware.facts import Device, Hardware
from pyengine.memory.settings import is_card, Settings


def named(want: Settings) -> list[str]:
    """Return the devices that settings name; none for "auto"."""
    given = list(want.parts or ([] if want.device == "auto" else [want.device]))
    return [*given, *([want.encoder_device] if want.encoder_device and want.encoder_device not in given else [])]


def usable(machine: Hardware) -> list[Device]:
    """Return the cards that a model may go to without being told: those of kinds whose library is built and whose driver answers."""
    found: list[Device] = []
    for kind in sorted(CARDS):
        try:
            seen = devices(kind)
        except PyEngineError:                                # `named` ones say why
            continue
        listed = {d.id: d for d in machine.devices}
        found += [listed.get(d.id, d) for d in seen]
    return found


def with_devices(machine: Hardware, want: Settings) -> Hardware:
    """Return the machine with the cards that settings name, or that can be used, among its devices: NVML may be missing, and emulated
    ones are nobody's hardware. Raises: PyEngineError for one that cannot be used, RequestError for a number that there is not.
    """
    there = {d.id for d in machine.devices}
    if want.device == "auto":
        added = [d for d in usable(machine) if d.id not in there]
        return machine._replace(devices=(*machine.devices, *added))
    added = []
    for name in filter(is_card, named(want)):
        kind, options = parsed(name) or ("", {})
        seen = devices(kind, options.get("emulated", False))
        if not any(d.id == name for d in seen):
            raise RequestError(f"device={name!r}: there is none of this number; this machine has {', '.join(d.id for d in seen) or 'no card'}")
        added += [d for d in seen if d.id == name and name not in there]
    return machine._replace(devices=(*machine.devices, *added))


def choices(want: Settings, machine: Hardware, sees: bool) -> list[Settings]:
    """Return settings that say where everything goes, the one to try first first; the last one is the one that is refused.

    sees: the model has an encoder.
    """
    if want.device != "auto":
        return _encoders(want, sees)
    cards = sorted((d for d in usable(machine) if not d.unified), key=lambda d: -d.free) if not want.mmap else []
    if want.expert_device or not cards:
        return [replace(want, device="cpu")]
    ids: Sequence[str] = [d.id for d in cards]
    tried: list[Any] = [ids[0], *([dict.fromkeys(ids)] if len(ids) > 1 else []), dict.fromkeys([*ids, "cpu"])]
    return [*(choice for device in tried for choice in _encoders(replace(want, device=device), sees)), replace(want, device="cpu")]


def _encoders(want: Settings, sees: bool) -> list[Settings]:
    """Return settings with the encoder beside the layers on a card, then on the CPU, unless they say where it goes."""
    if want.encoder_device is not None or not sees or not want.pictures or not any(map(is_card, named(want))):
        return [want]
    card = next(filter(is_card, named(want)))
    return [replace(want, encoder_device=card), replace(want, encoder_device="cpu")]
