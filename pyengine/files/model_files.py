"""A model's files, opened together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyengine.arguments import place
from pyengine.errors import InvalidModelError
from pyengine.files.adapters import Adapter, asked_for, is_adapter, open_adapter
from pyengine.files.dialects import check_encoder, translate
from pyengine.files.gguf import GGUFFile
from pyengine.files.stores import look_up, Modelfile, read_modelfile
from pyengine.records import NamedTuple


class Files(NamedTuple):
    """A model's file, and the one that holds its media encoder (often the same), in llama.cpp's names."""

    model: GGUFFile
    mmproj: GGUFFile | None
    opened: tuple[GGUFFile, ...]           # the same by their own names, as they lie on disk
    modelfile: Modelfile = Modelfile()     # what Ollama's store says beside them
    title: str = ""                        # the model's name in that store, where files are called by their digests
    adapters: tuple[Adapter, ...] = ()
    head: GGUFFile | None = None           # that of a head beside the model, which drafts for it

    @property
    def name(self) -> str:
        return self.title or Path(self.model.path).name


def open_files(name: str | Path, mmproj: str | Path | None = None, adapters: Any = None) -> Files:
    """Open a model by its path or its name, with its projector and with adapters: those that Ollama's store has for it, and those given.

    adapters: see `adapters.asked_for`. Raises: ModelNotFoundError, InvalidModelError, UnsupportedModelError, RequestError.
    """
    given = asked_for(adapters)
    found = look_up(place("model", name))
    mmproj = None if mmproj is None else place("mmproj", mmproj)
    modelfile = read_modelfile(found)
    wanted = asked_for({**{f"adapter{i or ''}": path for i, path in enumerate(modelfile.adapters)}, **{a.name: (a.path, a.scale) for a in given}})
    if mmproj is None or isinstance(mmproj, str) and not mmproj:
        mmproj = found.mmproj
    opened = tuple(GGUFFile(p) for p in (found.path, mmproj) if p is not None)
    for encoder in opened[1:]:
        check_encoder(encoder)
    if is_adapter(opened[0]):
        path = str(opened[0].path)
        raise InvalidModelError(f"{path}: is an adapter, which changes a model: load that one, with adapters={path!r}")
    model, *encoders = map(translate, opened)
    return Files(model, encoders[0] if encoders else None, opened, modelfile, found.title, tuple(map(open_adapter, wanted)))
