"""A model's files, opened together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyengine.errors import InvalidModelError
from pyengine.files.gguf import GGUFFile
from pyengine.files.stores import find_model


@dataclass(frozen=True)
class Files:
    """A model's file, and the one that holds its media encoder (often the same)."""

    model: GGUFFile
    mmproj: GGUFFile | None

    @property
    def name(self) -> str:
        return Path(self.model.path).name


def open_files(name: str | Path, mmproj: str | Path | None = None) -> Files:
    paths = find_model(name)
    path, found = paths if isinstance(paths, list) else (paths, None)
    mmproj = mmproj or found
    files = Files(GGUFFile(path), GGUFFile(mmproj) if mmproj else None)
    if files.mmproj and files.mmproj.metadata.need("general.architecture", str) != "clip":
        raise InvalidModelError(f"{mmproj}: general.architecture is {files.mmproj.metadata['general.architecture']!r}; "
                                "a projector file has 'clip'")
    return files
