"""What converters of decoders share."""

from __future__ import annotations

from gguf import GGUFWriter


def write_window(out: GGUFWriter, window: int | None, sliding: list[bool]) -> None:
    """Write the window (a query sees that many keys, itself included) and which layers slide."""
    if window is not None and any(sliding):
        out.add_sliding_window(window)
        out.add_sliding_window_pattern(sliding)
