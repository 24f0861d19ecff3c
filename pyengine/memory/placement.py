"""Layers to devices."""

from __future__ import annotations

from collections.abc import Sequence


def spread(layers: Sequence[int], rooms: Sequence[int], first: int = 0, last: int = 0) -> list[int] | None:
    """The device of each layer, in order and in proportion to the devices' room; None if they do not fit.

    layers: bytes of each; rooms: bytes of each device; first, last: bytes that go with the first and with the last layer (embedding,
    output head). The fullest device is as little full as can be, so no device is used to the brim while another one idles.
    """
    def filled(share: float) -> list[int] | None:
        device, used, out = 0, float(first), []
        for i, n in enumerate(layers):
            n += last if i == len(layers) - 1 else 0
            while device < len(rooms) and used + n > share * rooms[device]:
                device, used = device + 1, float(0 if out else first)         # what comes first is where the first layer is
            if device == len(rooms):
                return None
            used += n
            out.append(device)
        return out

    low, high = 0.0, 1.0
    best = filled(high)
    for _ in range(40 if best is not None else 0):
        middle = (low + high) / 2
        found = filled(middle)
        if found is None:
            low = middle
        else:
            high, best = middle, found
    return best
