"""A model's numbers, read from GGUF metadata below the architecture's name: `h.need("attention.head_count", int)`."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyengine.errors import InvalidModelError, UnsupportedModelError
from pyengine.files.gguf import Metadata


class Hparams:
    """Keys "<arch>.<name>" of one file. `need` raises when a key is missing; `get` is for documented constants only."""

    def __init__(self, meta: Metadata, prefix: str | None = None):
        """prefix: what stands before each key; default the architecture's name ("clip" for a vision encoder)."""
        self.meta = meta
        self.arch: str = prefix or meta.need("general.architecture", str)

    def need(self, name: str, *kinds: type) -> Any:
        """The value of a key that must be there. Raises: InvalidModelError."""
        return self.meta.need(f"{self.arch}.{name}", *kinds)

    def get(self, name: str, default: Any = None, *kinds: type) -> Any:
        """The value of a key, or the architecture's documented constant."""
        return self.meta.get(f"{self.arch}.{name}", default, *kinds)

    def size(self, name: str, default: int | None = None) -> int:
        """A count or width: an int from 1 to 2^31 - 1.

        Raises: InvalidModelError for numbers outside, UnsupportedModelError for a value per layer where layers differ.
        """
        value = self.get(name, default, int, np.ndarray) if default is not None else self.need(name, int, np.ndarray)
        if isinstance(value, np.ndarray):
            if len(set(value.tolist())) != 1:
                raise UnsupportedModelError(f"{self.arch}.{name} differs from layer to layer, which this architecture does not support here")
            value = int(value[0])
        if not 1 <= value < 2**31:
            raise InvalidModelError(f"{self.arch}.{name} is {value}, which is no possible size")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite float."""
        value = self.need(name, float) if default is None else self.get(name, default, float)
        if not np.isfinite(value):
            raise InvalidModelError(f"{self.arch}.{name} is {value}, which is no number")
        return float(value)

    def refuse(self, **features: str) -> None:
        """Raise UnsupportedModelError if one of these keys (dots written as __) is there with a value that is not zero."""
        for name, what in features.items():
            key = name.replace("__", ".")
            if np.any(self.get(key, 0)):
                raise UnsupportedModelError(f"{self.arch}.{key} is {self.get(key)}: {what} is not supported")
