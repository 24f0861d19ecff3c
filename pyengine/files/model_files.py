"""A model's files, opened together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyengine.files.dialects import check_encoder, translate
from pyengine.files.gguf import GGUFFile
from pyengine.files.stores import find_model


@dataclass(frozen=True)
class Files:
    """A model's file, and the one that holds its media encoder (often the same), in llama.cpp's names."""

    model: GGUFFile
    mmproj: GGUFFile | None
    opened: tuple[GGUFFile, ...]     # the same by their own names, as they lie on disk

    @property
    def name(self) -> str:
        return Path(self.model.path).name


def open_files(name: str | Path, mmproj: str | Path | None = None) -> Files:
    paths = find_model(name)
    path, found = paths if isinstance(paths, list) else (paths, None)
    mmproj = mmproj or found
    opened = tuple(GGUFFile(p) for p in (path, mmproj) if p)
    for encoder in opened[1:]:
        check_encoder(encoder)
    model, *encoders = map(translate, opened)
    return Files(model, encoders[0] if encoders else None, opened)
