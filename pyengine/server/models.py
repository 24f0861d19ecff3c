"""The models that a server has, by the names that requests use."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pyengine.engine.loop import Handle
from pyengine.engine.model import Model
from pyengine.engine.vectors import POOLINGS
from pyengine.errors import ModelNotFoundError, nearest
from pyengine.files.gguf import quoted
from pyengine.media.policy import MediaPolicy
from pyengine.server.fields import FieldError

REMOTE = MediaPolicy(paths=False)    # what a message may show: its own bytes, no file of this machine, nothing of a network


@dataclass(frozen=True)
class Served:
    """A loaded model with the names that it goes by."""

    names: tuple[str, ...]
    model: Model
    loaded: float                    # seconds since 1970
    nbytes: int                      # of its files

    @property
    def name(self) -> str:
        """The name that answers carry."""
        return self.names[0]

    @cached_property
    def kind(self) -> dict[str, Any]:
        """What it is, in Ollama's words: format, families, parameters, quantization."""
        meta, file = self.model.file.metadata, self.model.file
        arch = str(meta.get("general.architecture", ""))
        n = sum(t.n_elements for t in file.tensors.values())
        return {"parent_model": "", "format": "gguf", "family": arch, "families": [arch], "quantization_level": self._quantization,
                "parameter_size": f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.2f}M"}

    @property
    def _quantization(self) -> str:
        """What the file says of its types, or else the one that most bytes have."""
        from gguf import LlamaFileType

        try:
            return LlamaFileType(self.model.file.metadata.get("general.file_type")).name.removeprefix("MOSTLY_")
        except ValueError:
            sizes: dict[str, int] = {}
            for t in self.model.file.tensors.values():
                sizes[t.dtype.name] = sizes.get(t.dtype.name, 0) + t.nbytes
            return max(sizes, key=sizes.__getitem__)

    @property
    def capabilities(self) -> list[str]:
        """What can be asked of it. Vectors can be had of any model; "embedding" is one whose file says how they are made."""
        made = self.model.vectors.said in POOLINGS
        return ["completion", *(["vision"] if self.model.media is not None else []), *(["embedding"] if made else [])]

    def count(self, messages: Sequence[Any], tools: Sequence[Any] | None = None) -> int:
        """Count the tokens of a conversation, pictures' too. Raises as `Model.chat_ids`."""
        return len(self.model.chat_ids(messages, tools, media_policy=REMOTE))

    def submit(self, client: str, **request: Any) -> Handle:
        """Queue a request; its messages may show no file of this machine. Raises as `Model.submit`."""
        return self.model.submit(client=client, media_policy=REMOTE, **request)


class Models:
    """Served models by name; a name is not case-sensitive, and ":latest" may be left out.

    Of two models with one name the first has it, and the other goes by what else it is called: its path.
    """

    def __init__(self, served: Sequence[Served]):
        self.all: list[Served] = []
        self._by_name: dict[str, Served] = {}
        for s in served:
            free = tuple(n for n in s.names if _key(n) not in self._by_name)
            if free:                                         # else it is there already
                self.all.append(replace(s, names=free))
                self._by_name.update({_key(n): self.all[-1] for n in free})

    def get(self, name: str | None) -> Served:
        """Return a model by its name, or by the beginning of just one; without a name the only one.

        Raises: ModelNotFoundError naming those that there are, FieldError where a name is needed.
        """
        if name is None:
            if len(self.all) == 1:
                return self.all[0]
            raise FieldError("model", "is missing")
        found = self._by_name.get(_key(name))
        begun = [s for s in self.all if any(_key(n).startswith(_key(name)) for n in s.names)] if name else []
        if found is None and len(begun) == 1:
            return begun[0]
        if found is None:
            there = [s.name for s in self.all]
            raise ModelNotFoundError(f"there is no model {quoted(name)} here{nearest(name, there)}; served: {', '.join(there)}")
        return found


def _key(name: str) -> str:
    return name.casefold().removesuffix(":latest")


def load(name: str, **options: Any) -> Served:
    """Load a model to be served: `options` are those of `pyengine.load`. Raises as that does."""
    from pyengine.engine.load import load as load_model
    from pyengine.files.stores import look_up

    found = look_up(name)
    model = load_model(name, **options)
    stem = Path(found.path).stem if not found.source else found.name
    return Served(tuple(dict.fromkeys([stem, found.name, name, Path(found.path).name, *found.aliases])), model, time.time(), found.nbytes)
