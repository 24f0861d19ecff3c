"""What a model of either kind says of itself, open or closed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TYPE_CHECKING

from pyengine.errors import RequestError

if TYPE_CHECKING:
    from pyengine.files.gguf import GGUFFile


class Closed:
    """What stands in the place of the parts of a model that is closed: any use of it is the error."""

    def __init__(self, name: str):
        self._said = f"{name} is closed: its weights and caches are freed; load it again"

    @property
    def error(self) -> RequestError:
        """What its use raises."""
        return RequestError(self._said)

    def __getattr__(self, name: str) -> Any:
        raise self.error

    def __getitem__(self, key: object) -> Any:
        raise self.error


def weights_in_words(files: Iterable[GGUFFile]) -> str:
    """Return how many weights files hold, as people write it: "134.5M"."""
    n = sum(t.n_elements for f in files for t in f.tensors.values())
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)
