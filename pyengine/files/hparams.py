"""A model's numbers, read from GGUF metadata below the architecture's name: `h.need("attention.head_count", int)`."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyengine.errors import InvalidModelError, UnsupportedModelError
from pyengine.files.gguf import Metadata


class Hparams:
    """Keys "<arch>.<name>" of one file. `need` raises when a key is missing; `get` is for documented constants only."""

    def __init__(self, meta: Metadata, prefix: str | None = None):
        """Keep the metadata. prefix: what stands before each key; default the architecture's name."""
        self._meta = meta                 # private: a key asked for without its prefix is never there
        self.arch: str = prefix or meta.need("general.architecture", str)

    def __contains__(self, name: str) -> bool:
        """Say whether the file has this key."""
        return f"{self.arch}.{name}" in self._meta

    def key(self, name: str) -> str:
        """Return the file and the whole key as it stands there, for messages."""
        return self._meta.place(f"{self.arch}.{name}")

    def need(self, name: str, *kinds: type) -> Any:
        """Return the value of a key that must be there. Raises: InvalidModelError."""
        return self._meta.need(f"{self.arch}.{name}", *kinds)

    def get(self, name: str, default: Any = None, *kinds: type) -> Any:
        """Return the value of a key, or the architecture's documented constant."""
        return self._meta.get(f"{self.arch}.{name}", default, *kinds)

    def size(self, name: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        """Return a count or width: an int from 1 to `most`.

        Raises: InvalidModelError for numbers outside, UnsupportedModelError for a value per layer where layers differ.
        """
        value = self.get(name, default, int, np.ndarray) if default is not None else self.need(name, int, np.ndarray)
        if isinstance(value, np.ndarray):
            if len(set(value.tolist())) != 1:
                raise UnsupportedModelError(f"{self.key(name)} differs from layer to layer, which this architecture does not support here")
            value = int(value[0])
        if not 1 <= value <= most:
            raise InvalidModelError(f"{self.key(name)} is {value}, which is no possible size: 1 to {most:,} are")
        return value

    def window(self) -> int:
        """Return the width of a sliding window, 0 where there is none.

        Writers say so in several ways: no key, 0, -1, and the largest number of 31 or 32 bits, wider than any context.
        """
        value = self.get("attention.sliding_window", 0, int)
        return value if 0 < value < 2**31 - 1 else 0

    def number(self, name: str, default: float | None = None, *, least: float | None = None, above: float | None = None) -> float:
        """Return a finite float, `least` or more, and more than `above`. Raises: InvalidModelError for others."""
        value = self.need(name, float) if default is None else self.get(name, default, float)
        if not np.isfinite(value):
            raise InvalidModelError(f"{self.key(name)} is {value}, which is no number")
        if least is not None and value < least or above is not None and value <= above:
            raise InvalidModelError(f"{self.key(name)} is {value}: must be {f'above {above:g}' if above is not None else f'{least:g} or more'}")
        return float(value)

    def refuse(self, **features: str) -> None:
        """Raise UnsupportedModelError if one of these keys (dots written as __) is there with a value that is not zero."""
        for name, what in ((name.replace("__", "."), what) for name, what in features.items()):
            if self.window() if name == "attention.sliding_window" else np.any(self.get(name, 0)):
                raise UnsupportedModelError(f"{self.key(name)} is {self.get(name)}: {what} is not supported")
