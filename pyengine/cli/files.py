"""What a model's file says, without loading it; and which models there are."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from pyengine.cli.screen import show, show_columns, size
from pyengine.files.dialects import ENCODER, ENCODER_TENSORS, translate
from pyengine.files.gguf import GGUFFile, Metadata
from pyengine.files.stores import find_model, list_models

SHOWN_ELEMENTS = 8                   # of a long array
SHOWN_CHARACTERS = 200               # of a long text
TEMPLATE = "tokenizer.chat_template"


def describe(name: str, mmproj: str | None = None) -> dict[str, Any]:
    """Return what a model's file says, as plain data; of a long array the type, the count and the first elements.

    mmproj: the file of its image encoder, if it is in one of its own and not found by itself.
    Raises: ModelNotFoundError, InvalidModelError, UnsupportedModelError.
    """
    found = find_model(name)
    path, projector = found if isinstance(found, list) else (found, None)
    projector = projector if mmproj is None else Path(mmproj)
    encoder, encoder_metadata = None, {}
    if projector is not None:
        with GGUFFile(projector) as file:
            encoder, encoder_metadata = _encoder(file), {key: _plain(file.metadata, key) for key in file.metadata}
    with GGUFFile(path) as file:
        meta, tensors = file.metadata, file.tensors.values()
        arch = meta.get("general.architecture")
        counts, elements, nbytes = Counter(), Counter(), Counter()
        for t in tensors:
            counts[t.dtype.name] += 1
            elements[t.dtype.name] += t.n_elements
            nbytes[t.dtype.name] += t.nbytes
        return {
            "name": _plain(meta, "general.name"),
            "path": str(file.path),
            "files": [str(p) for p in file.paths],
            "projector": None if projector is None else str(projector),
            "encoder": encoder or _encoder(file),
            "version": file.version,
            "architecture": _plain(meta, "general.architecture"),
            "file_bytes": sum(p.stat().st_size for p in file.paths),
            "n_parameters": elements.total(),
            "tensors": {d: {"count": counts[d], "parameters": elements[d], "bytes": n}
                        for d, n in nbytes.most_common()},
            "n_ctx": _plain(meta, f"{arch}.context_length"),
            "tokenizer": _plain(meta, "tokenizer.ggml.model"),
            "pre_tokenizer": _plain(meta, "tokenizer.ggml.pre"),
            "n_tokens": meta.count("tokenizer.ggml.tokens") if "tokenizer.ggml.tokens" in meta else 0,
            "chat_template": TEMPLATE in meta,
            "metadata": {key: _plain(meta, key) for key in meta},
            "projector_metadata": encoder_metadata,
        }


def _encoder(file: GGUFFile) -> dict[str, Any] | None:
    """Return what a file says about its image encoder and projector, in whatever dialect, None if it has none."""
    tensors = [t for name, t in file.tensors.items() if name.split(".")[0] in ENCODER_TENSORS]
    if not tensors:
        return None
    meta = translate(file).metadata
    return {"path": str(file.path), "projector_type": _plain(meta, f"{ENCODER}.projector_type"), "n_tensors": len(tensors),
            "bytes": sum(t.nbytes for t in tensors), **{key: _plain(meta, f"{ENCODER}.vision.{key}") for key in (
                "block_count", "embedding_length", "patch_size")}}


def show_model(name: str, mmproj: str | None = None) -> None:
    """Print `describe` for people. Raises as it does."""
    d = describe(name, mmproj)

    def known(value: Any) -> Any:
        return "not given" if value is None else value

    tokenizer = f"{d['tokenizer']} ({d['pre_tokenizer']})" if d["pre_tokenizer"] else known(d["tokenizer"])
    rows = [("name", known(d["name"])), *(("file", f) for f in d["files"]), ("architecture", known(d["architecture"])),
            ("size", size(d["file_bytes"])), ("parameters", f"{d['n_parameters']:,}")]
    if d["architecture"] != ENCODER:
        rows += [("context", known(d["n_ctx"])), ("tokenizer", f"{tokenizer}, {d['n_tokens']:,} tokens"),
                 ("chat template", "yes" if d["chat_template"] else "no")]
    if e := d["encoder"]:
        shape = f"{known(e['block_count'])} blocks of width {known(e['embedding_length'])}"
        where = f"{size(e['bytes'])} in {Path(e['path']).name}"
        patch = f"patches of {known(e['patch_size'])}"
        rows.append(("image encoder", f"{known(e['projector_type'])}: {shape}, {patch}, {where}"))
    show_columns(rows)
    show("\nTensors")
    show_columns([(f"  {dtype}", f"{n['count']} tensors", f"{n['parameters']:,} parameters", size(n["bytes"]))
                  for dtype, n in d["tensors"].items()], right=(1, 2, 3))
    show("\nMetadata")
    show_columns([(f"  {key}", _line(value)) for key, value in d["metadata"].items()])
    if d["projector"]:
        show(f"\nMetadata of {d['projector']}")
        show_columns([(f"  {key}", _line(value)) for key, value in d["projector_metadata"].items()])


def show_template(name: str) -> bool:
    """Print a file's chat template as it is; returns False if it has none. Raises as `describe`."""
    found = find_model(name)
    with GGUFFile(found[0] if isinstance(found, list) else found) as file:
        source = file.metadata.get(TEMPLATE, None, str)
    if source is not None:
        show(source)
    return source is not None


def models() -> list[dict[str, Any]]:
    """Return the models that can be named on this machine, as plain data."""
    return [{"name": m.name, "bytes": m.nbytes, "source": m.source, "path": str(m.path),
             "projector": None if m.mmproj is None else str(m.mmproj)} for m in list_models()]


def show_models() -> bool:
    """Print the models that can be named on this machine; returns False if there are none."""
    found = models()
    if found:
        show_columns([("NAME", "SIZE", "SOURCE", "PATH"),
                      *((m["name"], size(m["bytes"]), m["source"], m["path"]) for m in found)], right=(1,))
    return bool(found)


def _plain(meta: Metadata, key: str) -> Any:
    """Return a value as JSON can hold it, None if it is missing; a long array as its type and first elements."""
    value = meta.get(key)
    single = key in meta and "float32" in meta.type_name(key)
    if isinstance(value, (list, np.ndarray)):
        head = value[:SHOWN_ELEMENTS]
        first = [_number(v, single) for v in (head.tolist() if isinstance(head, np.ndarray) else head)]
        return first if len(value) <= SHOWN_ELEMENTS else {"type": meta.type_name(key), "first": first}
    return _number(value, single)


def _number(value: Any, single: bool) -> Any:
    """Return a number as JSON can hold it: "nan" and "inf" by name, a float32 with the digits that it has."""
    value = float(str(np.float32(value))) if single else value                # 1e-06, not 9.999999974752427e-07
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _line(value: Any) -> str:
    """Return a value on one line, cut where it is long."""
    if isinstance(value, dict):
        return f"{value['type']}: {', '.join(map(repr, value['first']))}, ..."
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}... ({len(value):,} characters)"
