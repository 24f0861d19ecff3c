"""A model's files, opened together."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pyengine.arguments import place
from pyengine.errors import UnsupportedModelError
from pyengine.files.dialects import check_encoder, translate
from pyengine.files.gguf import GGUFFile
from pyengine.files.stores import look_up, Modelfile, read_modelfile


class Files(NamedTuple):
    """A model's file, and the one that holds its media encoder (often the same), in llama.cpp's names."""

    model: GGUFFile
    mmproj: GGUFFile | None
    opened: tuple[GGUFFile, ...]           # the same by their own names, as they lie on disk
    modelfile: Modelfile = Modelfile()     # what Ollama's store says beside them
    title: str = ""                        # the model's name in that store, where files are called by their digests

    @property
    def name(self) -> str:
        return self.title or Path(self.model.path).name


def open_files(name: str | Path, mmproj: str | Path | None = None) -> Files:
    """Open a model by its path or its name, with its projector.

    Raises: ModelNotFoundError, InvalidModelError, UnsupportedModelError for a model of Ollama's with adapters.
    """
    found = look_up(place("model", name))
    mmproj = None if mmproj is None else place("mmproj", mmproj)
    modelfile = read_modelfile(found)
    if modelfile.adapters:
        raise UnsupportedModelError(f"{found.name}: has {len(modelfile.adapters)} LoRA adapter(s), which are not supported; "
                                    f"its model without them is {found.path}")
    if mmproj is None or isinstance(mmproj, str) and not mmproj:
        mmproj = found.mmproj
    opened = tuple(GGUFFile(p) for p in (found.path, mmproj) if p is not None)
    for encoder in opened[1:]:
        check_encoder(encoder)
    model, *encoders = map(translate, opened)
    return Files(model, encoders[0] if encoders else None, opened, modelfile, found.title)
