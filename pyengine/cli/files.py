"""What a model's file says, without loading it; and which models there are."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

from pyengine.cli.screen import show, show_columns, size
from pyengine.gguf import GGUFFile, Metadata
from pyengine.locate import find_model, list_models

SHOWN_ELEMENTS = 8                   # of a long array
SHOWN_CHARACTERS = 200               # of a long text
TEMPLATE = "tokenizer.chat_template"


def describe(name: str) -> dict[str, Any]:
    """Return what a model's file says, as plain data; of a long array the type, the count and the first elements.

    Raises: ModelNotFoundError, InvalidModelError, UnsupportedModelError.
    """
    found = find_model(name)
    path, projector = found if isinstance(found, list) else (found, None)
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
        }


def show_model(name: str) -> None:
    """Print `describe` for people. Raises as it does."""
    d = describe(name)
    known = lambda value: "not given" if value is None else value  # noqa: E731
    tokenizer = f"{d['tokenizer']} ({d['pre_tokenizer']})" if d["pre_tokenizer"] else known(d["tokenizer"])
    rows = [("name", known(d["name"])), *(("file", f) for f in d["files"]), ("architecture", known(d["architecture"])),
            ("size", size(d["file_bytes"])), ("parameters", f"{d['n_parameters']:,}"), ("context", known(d["n_ctx"])),
            ("tokenizer", f"{tokenizer}, {d['n_tokens']:,} tokens"),
            ("chat template", "yes" if d["chat_template"] else "no")]
    show_columns(rows + ([("projector", d["projector"])] if d["projector"] else []))
    show("\nTensors")
    show_columns([(f"  {dtype}", f"{n['count']} tensors", f"{n['parameters']:,} parameters", size(n["bytes"]))
                  for dtype, n in d["tensors"].items()], right=(1, 2, 3))
    show("\nMetadata")
    show_columns([(f"  {key}", _line(value)) for key, value in d["metadata"].items()])


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
    if isinstance(value, (list, np.ndarray)):
        head = value[:SHOWN_ELEMENTS]
        first = [_finite(v) for v in (head.tolist() if isinstance(head, np.ndarray) else head)]
        return first if len(value) <= SHOWN_ELEMENTS else {"type": meta.type_name(key), "first": first}
    return _finite(value)


def _finite(value: Any) -> Any:
    """Return a number that JSON cannot hold as its name: "nan", "inf"."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _line(value: Any) -> str:
    """Return a value on one line, cut where it is long."""
    if isinstance(value, dict):
        return f"{value['type']}: {', '.join(map(repr, value['first']))}, ..."
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}... ({len(value):,} characters)"
