"""What a model's file says, and what goes with it, without loading it; and which models there are."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pyengine.cli.report.abilities import abilities, in_words, TEMPLATE
from pyengine.cli.screen import note, PROGRAM, show, show_columns, size
from pyengine.errors import PyEngineError
from pyengine.files.adapters import Asked, is_adapter, open_adapter
from pyengine.files.dialects import ENCODER, ENCODER_TENSORS, is_projector, translate
from pyengine.files.gguf import GGUFFile, Metadata, TensorInfo
from pyengine.files.stores import FoundModel, list_models, look_up, missing_folders, Modelfile, read_modelfile, SET_FOLDER

SHOWN_ELEMENTS = 8                   # of a long array
SHOWN_CHARACTERS = 200               # of a long text


def describe(name: str, mmproj: str | None = None) -> dict[str, Any]:
    """Return what a model's file says, as plain data; of a long array the type, the count and the first elements.

    mmproj: the file of its image encoder, if it is in one of its own and not found by itself.
    Raises: ModelNotFoundError, InvalidModelError, UnsupportedModelError.
    """
    found = look_up(name)
    projector = found.mmproj if mmproj is None else Path(mmproj)
    encoder, encoder_metadata = None, {}
    if projector is not None:
        with GGUFFile(projector) as file:
            encoder, encoder_metadata = _encoder(file), {key: _plain(file.metadata, key) for key in file.metadata}
    modelfile = read_modelfile(found)
    with GGUFFile(found.path) as file:
        if is_adapter(file):
            return _adapter(found)
        meta, tensors = file.metadata, file.tensors.values()
        arch = meta.get("general.architecture")
        return {
            "name": _plain(meta, "general.name"),
            "title": found.title or None,
            "path": str(file.path),
            "files": [str(p) for p in file.paths],
            "projector": None if projector is None else str(projector),
            "encoder": encoder or _encoder(file),
            "version": file.version,
            "architecture": _plain(meta, "general.architecture"),
            **abilities(name, mmproj, meta),
            "file_bytes": sum(p.stat().st_size for p in file.paths),
            "n_parameters": sum(t.n_elements for t in tensors),
            "tensors": _formats(tensors),
            "n_ctx": _plain(meta, f"{arch}.context_length"),
            "tokenizer": _plain(meta, "tokenizer.ggml.model"),
            "pre_tokenizer": _plain(meta, "tokenizer.ggml.pre"),
            "n_tokens": meta.count("tokenizer.ggml.tokens") if "tokenizer.ggml.tokens" in meta else 0,
            "chat_template": TEMPLATE in meta,
            "sampling": _recommended(meta, modelfile),
            "modelfile": {**modelfile._asdict(), "adapters": list(map(str, modelfile.adapters)), "parameters": dict(modelfile.parameters),
                          "messages": list(map(dict, modelfile.messages))},
            "metadata": {key: _plain(meta, key) for key in meta},
            "projector_metadata": encoder_metadata,
        }


def _formats(tensors: Iterable[TensorInfo]) -> dict[str, dict[str, int]]:
    """Count tensors by format, those of most bytes first."""
    counts, elements, nbytes = Counter(), Counter(), Counter()
    for t in tensors:
        counts[t.dtype.name] += 1
        elements[t.dtype.name] += t.n_elements
        nbytes[t.dtype.name] += t.nbytes
    return {d: {"count": counts[d], "parameters": elements[d], "bytes": n} for d, n in nbytes.most_common()}


def _adapter(found: FoundModel) -> dict[str, Any]:
    """Return what an adapter's file says. Raises: as `open_adapter`."""
    adapter = open_adapter(Asked(found.path.stem, found.path, 1.0))
    meta, kinds = adapter.file.metadata, Counter(re.sub(r"blk\.\d+\.|\.weight$", "", name) for name in adapter.pairs)
    return {"name": _plain(meta, "general.name"), "title": found.title or None, "path": str(adapter.file.path),
            "files": [str(p) for p in adapter.file.paths], "architecture": _plain(meta, "general.architecture"),
            "adapter": {"type": _plain(meta, "adapter.type"), "alpha": adapter.alpha, "ranks": adapter.ranks, "changes": dict(kinds)},
            "file_bytes": found.path.stat().st_size, "n_parameters": adapter.n_parameters, "tensors": _formats(adapter.file.tensors.values()),
            "metadata": {key: _plain(meta, key) for key in meta}}


def _recommended(meta: Metadata, modelfile: Modelfile) -> dict[str, Any]:
    """Return the sampling that the model's authors recommend, by names of fields of `SamplingParams`."""
    from pyengine.engine.language import Language

    return Language(meta, modelfile).sampling_defaults


def _encoder(file: GGUFFile) -> dict[str, Any] | None:
    """Return what a file says about its image encoder and projector, in whatever dialect, None if it has none."""
    tensors = [t for name, t in file.tensors.items() if name.split(".")[0] in ENCODER_TENSORS]
    if not tensors:
        return None
    meta = translate(file).metadata
    arch = meta.get("general.architecture")
    own = next((start for start in (ENCODER, arch) if f"{start}.vision.block_count" in meta), ENCODER)
    return {"path": str(file.path), "projector_type": _plain(meta, f"{ENCODER}.projector_type"), "n_tensors": len(tensors),
            "bytes": sum(t.nbytes for t in tensors), **{key: _plain(meta, f"{own}.vision.{key}") for key in (
                "block_count", "embedding_length", "patch_size")}}


def show_model(name: str, mmproj: str | None = None) -> None:
    """Print `describe` for people. Raises as it does."""
    d = describe(name, mmproj)
    if "adapter" in d:
        return _show_adapter(d)

    def known(value: Any) -> Any:
        return "not given" if value is None else value

    tokenizer = f"{d['tokenizer']} ({d['pre_tokenizer']})" if d["pre_tokenizer"] else known(d["tokenizer"])
    name = d["name"] if not d["title"] else f"{d['title']} ({d['name']})" if d["name"] else d["title"]
    rows = [("name", known(name)), *(("file", f) for f in d["files"]), ("architecture", known(d["architecture"])),
            ("size", size(d["file_bytes"])), ("parameters", f"{d['n_parameters']:,}")]
    if d["architecture"] != ENCODER or d["runs"]:
        context = f"{d['n_ctx']:,}" if isinstance(d["n_ctx"], int) else known(d["n_ctx"])
        template = f"yes{', with ' + ' and '.join(d['template_takes']) if d['template_takes'] else ''}" if d["chat_template"] else "no"
        n = f"{d['plan']['n_ctx']:,}" if d["runs"] else ""
        of = f" with a context of {n}" if "text" in d["can"] else f", texts of up to {n} tokens" if n != "0" else ""
        runs = (f"yes, in {size(d['plan']['bytes'])} of {size(d['plan']['available'])} available{of}" if d["runs"] else f"no: {d['why_not']}")
        writes = not d["runs"] or "text" in d["can"]
        rows += [*([("context", context)] if writes or isinstance(d["n_ctx"], int) else []),
                 *([("tokenizer", f"{tokenizer}, {d['n_tokens']:,} tokens")] if writes or d["n_tokens"] else []),
                 *([("chat template", template)] if writes else []), *([("can", in_words(d))] if d["can"] else []), ("runs here", runs)]
        if d["sampling"]:
            rows.append(("sampling", ", ".join(f"{key} {_line(value)}" for key, value in d["sampling"].items())))
    if e := d["encoder"]:
        shape = f"{known(e['block_count'])} blocks of width {known(e['embedding_length'])}"
        file = "a file of the store" if d["title"] else Path(e["path"]).name
        where = f"{size(e['bytes'])} in {file}"
        patch = f"patches of {known(e['patch_size'])}"
        kind = f"{e['projector_type']}: " if e["projector_type"] is not None else "" if d["runs"] and "text" not in d["can"] else "not given: "
        sizes = f"{shape}, {patch}, " if any(e[name] is not None for name in ("block_count", "embedding_length", "patch_size")) else ""
        rows.append(("image encoder", f"{kind}{sizes}{where}"))
    show_columns(rows)
    _show_modelfile(d["modelfile"])
    _show_contents(d)
    if d["projector"]:
        show(f"\nMetadata of {d['projector']}")
        show_columns([(f"  {key}", _line(value)) for key, value in d["projector_metadata"].items()])


def _show_contents(d: dict[str, Any]) -> None:
    """Print a file's tensors by format, and its keys."""
    show("\nTensors")
    show_columns([(f"  {dtype}", f"{n['count']} tensors", f"{n['parameters']:,} parameters", size(n["bytes"]))
                  for dtype, n in d["tensors"].items()], right=(1, 2, 3))
    show("\nMetadata")
    show_columns([(f"  {key}", _line(value)) for key, value in d["metadata"].items()])


def _show_adapter(d: dict[str, Any]) -> None:
    """Print `describe` of an adapter's file."""
    a = d["adapter"]
    show_columns([("name", "not given" if d["name"] is None else d["name"]), *(("file", f) for f in d["files"]),
                  ("adapter", f"LoRA for {d['architecture']}: rank {', '.join(map(str, a['ranks']))}, alpha {a['alpha']:g}"),
                  ("size", size(d["file_bytes"])), ("parameters", f"{d['n_parameters']:,}"),
                  ("changes", ", ".join(f"{n} {kind}" for kind, n in a["changes"].items())), ("use", f"{PROGRAM} MODEL --lora {d['files'][0]}")])
    _show_contents(d)


def _show_modelfile(said: dict[str, Any]) -> None:
    """Print what Ollama's store says beside a model, if it says anything."""
    rows = [("  system", _line(said["system"])), *(("  parameter", f"{key} {_line(value)}") for key, value in said["parameters"].items()),
            *(("  adapter", f"{path} (LoRA)") for path in said["adapters"]),
            ("  template", f"{len(said['template']):,} characters of Go's syntax, not read: the file's own is used" if said["template"] else ""),
            *(("  message", f"{m['role']}: {_line(m['content'])}") for m in said["messages"]),
            ("  license", _line(said["license"].strip().partition("\n")[0]))]
    if shown := [row for row in rows if row[1]]:
        show("\nModelfile (Ollama)")
        show_columns(shown)


MISSING = {"template": "the file has no chat template", "system": "no system message comes with this model",
           "parameters": "no sampling parameters come with this model", "license": "no license text comes with this model"}


def part_of(name: str, part: str) -> str | None:
    """Return one text of what a model's files say, None if it is not there.

    part: "template" (its chat template), "system", "license", or "parameters", one to a line. Raises as `describe`.
    """
    found = look_up(name)
    modelfile = read_modelfile(found)
    with GGUFFile(found.path) as file:
        meta = file.metadata
        if part == "template":
            return meta.get(TEMPLATE, None, str)
        if part == "system":
            return modelfile.system or None
        if part == "license":
            keys = [_plain(meta, f"general.license{end}") for end in ("", ".name", ".link")]
            return modelfile.license or "\n".join(key for key in keys if isinstance(key, str)) or None
        values = {**_recommended(meta, modelfile), **{k: v for k, v in modelfile.parameters.items()}}
        return "\n".join(f"{key} {_line(value)}" for key, value in values.items()) or None


def models() -> list[dict[str, Any]]:
    """Return the models that can be named on this machine, as plain data.

    architecture  None where the file cannot be read; runs: whether it is one of those that run here
    """
    return [{"name": m.name, "bytes": m.nbytes, "source": m.source, "path": str(m.path),
             "projector": None if m.mmproj is None else str(m.mmproj), **_glance(m)} for m in list_models()]


def _glance(found: FoundModel) -> dict[str, Any]:
    """Return what the header of a model's file says at once."""
    from pyengine.programs.bound import runs

    try:
        with GGUFFile(found.path) as file:
            arch, changes = _plain(file.metadata, "general.architecture"), is_adapter(file)
            alone = not is_projector(file)
            sees = found.mmproj is not None or any(name.split(".")[0] in ENCODER_TENSORS[:2] for name in file.tensors)
    except PyEngineError:
        arch, changes, sees, alone = None, False, False, False
    return {"architecture": arch, "sees": sees, "adapter": changes, "runs": runs(arch) and alone and not changes, "modified": int(found.path.stat().st_mtime)}


def show_models(verbose: bool = False) -> None:
    """Print the models that can be named on this machine, with their files if `verbose`; say what to do where there are none."""
    found, missing = models(), missing_folders()
    for text in missing:
        note(text)
    if not found:
        note(f"no models found: `{PROGRAM} pull NAME` fetches one{'' if missing else f'; or {SET_FOLDER}'}")
    if found:
        more = ("SOURCE", "PATH") if verbose else ()
        rows = [("NAME", "SIZE", "ARCHITECTURE", "SEES", "MODIFIED", *more)]
        for m in found:
            arch = "unreadable" if m["architecture"] is None else f"{m['architecture']}{' (adapter)' if m['adapter'] else '' if m['runs'] else ' (does not run)'}"
            rows.append((m["name"], size(m["bytes"]), arch, "pictures" if m["sees"] else "-",
                         time.strftime("%Y-%m-%d", time.localtime(m["modified"])), *((m["source"], m["path"]) if verbose else ())))
        show_columns(rows, right=(1,))


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
    """Return a value on one line, as a file's author would write it, cut where it is long."""
    if isinstance(value, dict):
        return f"{value['type']}: {', '.join(map(_line, value['first']))}, ..."
    if isinstance(value, list):
        return ", ".join(map(_line, value)) or "none"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    text = text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}... ({len(text):,} characters)"
