"""peft's LoRA folders into llama.cpp's adapter files, by the tables that convert the base model.

A folder has adapter_config.json and adapter_model.safetensors, whose tensors are named
`base_model.model.<name of the module>.lora_A.weight` [r, n_in] and `.lora_B.weight` [n_out, r]. B's rows are those of the weight, and
go where the base model's converter puts them (rows in another order; parts of a matrix); A stays as it is. An embedding has `.lora_embedding_A`
[r, vocabulary], which is turned, and `.lora_embedding_B` [n_out, r]. Modules of a layer's experts become one tensor, as their weights do.

The scale of a module is lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`; `rank_pattern` and `alpha_pattern` give other numbers
to some modules. A file has one alpha: where alpha / r is not a module's scale, its B is multiplied. Follows peft `lora/config.py`,
`lora/layer.py`, `utils/other.py: get_pattern_key`. Of the base model only config.json is read, or the keys of a GGUF file.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as QT

from pyengine.errors import InvalidModelError, PyEngineError, RequestError, UnsupportedModelError
from pyengine.files.adapters import EMBEDDING
from pyengine.files.gguf import GGUFFile
from pyengine.files.stores import hub_folder
from pyengine.files.writing import target_of

from .base_config import configs_of
from .checkpoint import Config, read_json, read_safetensors_header, Stored, STORED_DTYPES, to_float32
from .contract import Converter, Entry, Stack
from .writer import entries_of, find_converter

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TYPES = {"f32": QT.F32, "f16": QT.F16, "bf16": QT.BF16}
# names of a text model's weights in checkpoints that see, and in those that do not
_TEXT = ((r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?(?=layers\.|norm\.|embed_tokens\.)", "model."),
         (r"^(?:model\.)?language_model\.lm_head\.", "lm_head."))
_KEY = re.compile(r"^base_model\.model\.(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?(2)|\.weight)$")
_DEFAULTS: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
                             "bias": "none", "fan_in_fan_out": False}
# what peft's LoraConfig may ask for beside two matrices, in words
_OTHER = {"use_dora": "DoRA, which also scales the weight's rows", "modules_to_save": "whole modules beside the adapter (merge them into the base model)",
          "trainable_token_indices": "trained token embeddings", "layer_replication": "replicated layers", "lora_bias": "biases in the adapter",
          "megatron_config": "Megatron's layers", "target_parameters": "experts' parameters", "alora_invocation_tokens": "an activated LoRA",
          "use_qalora": "QA-LoRA", "use_bdlora": "block-diagonal LoRA", "arrow_config": "Arrow", "monteclora_config": "MonteCLoRA"}


class Low(NamedTuple):
    """The two matrices of a module, and the module's scale. embeds: the module is an embedding, whose weight is (b a)^T."""

    a: Stored
    b: Stored
    scale: float
    embeds: bool

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's shape."""
        shape = self.b.shape[0], self.a.shape[1]
        return shape[::-1] if self.embeds else shape


class Place(NamedTuple):
    """A weight of the base model's file, and the two matrices of the module that it comes from; of experts, of the module of each."""

    name: str
    entry: Entry
    lows: tuple[Low, ...]
    experts: bool


def is_adapter(folder: Path) -> bool:
    """Say whether a folder is one of peft's."""
    return (folder / CONFIG).is_file()


def convert_adapter(folder: Path, base: Path | None, out: Path, outtype: str | None = None) -> Path:
    """Convert a peft folder to a file, and return its path. base: the folder of its base model, or a GGUF file of it; None: the folder that
    the config names.

    outtype is one of TYPES; None keeps the type that the tensors have.
    Raises: InvalidModelError, UnsupportedModelError; RequestError for a base that is not there.
    """
    config = Config(read_json(folder / CONFIG, required=True), _DEFAULTS, folder / CONFIG)
    _check(config)
    if outtype is not None and outtype not in TYPES:
        raise RequestError(f"--outtype {outtype}: an adapter is written in {', '.join(TYPES)}")
    found = _pairs(folder / TENSORS, config)
    arch, placed = _places(found, base or _base(config), folder)
    try:
        out = target_of(out)
    except OSError as error:
        raise RequestError(f"{out}: {error.strerror}") from None
    partial = out.with_name(out.name + ".partial")
    try:
        _write(partial, arch, folder, placed, None if outtype is None else TYPES[outtype])
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return out


def _places(found: dict[str, Low], base: Path, folder: Path) -> tuple[str, list[Place]]:
    """Return the architecture, and where each module's weight is in its file. base: a folder with config.json, or a GGUF file."""
    if not base.is_file():
        file = base / "config.json"
        converter = find_converter(read_json(file, required=True), file)
        return converter.arch, list(_placed(converter, found, file, folder))
    with GGUFFile(base) as model:
        configs = list(configs_of(model))
    problem: PyEngineError | None = None
    for config in configs:
        try:
            converter = find_converter(config, base)
            return converter.arch, list(_placed(converter, found, base, folder, _TEXT))
        except PyEngineError as error:
            problem = problem or error                      # of the text model's class, if there is one
    problem = problem or UnsupportedModelError(f"{base}: no converter writes files of its architecture")
    raise type(problem)(f"{problem}; with --base HF_DIR, the folder of the base model's config.json, nothing has to be guessed")


def _check(config: Config) -> None:
    """Refuse what a file of two matrices for each weight cannot say. Raises: UnsupportedModelError."""
    config.refuse_unless("peft_type", "LORA")
    config.refuse_unless("bias", "none", None)
    for name, what in _OTHER.items():
        if config.get(name):
            of = ", ".join(map(str, config.get(name))) if isinstance(config.get(name), list) else ""
            raise UnsupportedModelError(f"{config.file}: '{name}' is set{f' ({of})' if of else ''}: {what}; this converter knows plain LoRA")


def _base(config: Config) -> Path:
    """Return the folder that the config names as the base model: on the disk, or in Hugging Face's cache. Raises: RequestError."""
    name = config.get("base_model_name_or_path")
    if isinstance(name, str) and name:
        if (Path(name) / "config.json").is_file():
            return Path(name)
        for found in sorted((hub_folder() / f"models--{name.replace('/', '--')}" / "snapshots").glob("*/config.json")):
            return found.parent
    raise RequestError(f"--base HF_DIR is missing: the folder of the base model ({name or 'not named by the adapter'}), of which config.json is read")


def _pairs(file: Path, config: Config) -> dict[str, Low]:
    """Return the matrices of each module, by the name of its weight in a checkpoint. Raises: InvalidModelError, UnsupportedModelError."""
    if not file.is_file():
        raise InvalidModelError(f"{file}: is missing; save the adapter with safetensors")
    halves: dict[str, dict[str, Stored]] = {}
    embeds: set[str] = set()
    for name, stored in read_safetensors_header(file).items():
        key = _KEY.match(name)
        if key is None:
            what = ("DoRA's magnitudes" if "lora_magnitude" in name else "biases of LoRA" if name.endswith(".lora_B.bias") else "no matrix of LoRA")
            raise UnsupportedModelError(f"{file}: tensor '{name}': {what}, which this converter does not know")
        halves.setdefault(key[1], {})[key[3]] = stored
        embeds |= {key[1]} if key[2] else set()
    found: dict[str, Low] = {}
    for module, half in halves.items():
        if half.keys() != {"A", "B"}:
            raise InvalidModelError(f"{file}: '{module}' has no lora_{'B' if 'A' in half else 'A'}")
        a, b = half["A"], half["B"]
        rank = _pattern(config, "rank_pattern", "r", module)
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] != rank:
            raise InvalidModelError(f"{file}: '{module}' has matrices of shapes {a.shape} and {b.shape}, and its rank is {rank}")
        alpha = _pattern(config, "alpha_pattern", "lora_alpha", module)
        found[f"{module}.weight"] = Low(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), module in embeds)
    if not found:
        raise InvalidModelError(f"{file}: has no tensors")
    return found


def _pattern(config: Config, patterns: str, usual: str, module: str) -> float:
    """Return a module's number: that of the first pattern that its name ends with, or the usual one."""
    given = config.get(patterns) or {}
    if not isinstance(given, dict):
        raise InvalidModelError(f"{config.file}: '{patterns}' is {given!r}; a mapping is expected")
    for pattern, value in given.items():
        try:
            meant = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise InvalidModelError(f"{config.file}: '{patterns}': {pattern!r} is no regular expression: {error}") from None
        if meant:
            break
    else:
        value = config.need(usual)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 2**31:
        raise InvalidModelError(f"{config.file}: '{patterns}' or '{usual}' is {value!r} for {module}; a number above 0 is expected")
    return value


def _placed(converter: Converter, found: dict[str, Low], base: Path, folder: Path, renames: tuple[tuple[str, str], ...] = ()) -> Iterator[Place]:
    """Yield where the base model's converter puts each module's weight. Raises: UnsupportedModelError, InvalidModelError."""
    renamed: dict[str, str] = {}
    for name in found:
        new = name
        for pattern, replacement in (*renames, *converter.renames):
            new = re.sub(pattern, replacement, new)
        renamed[new] = name
    placed: set[str] = set()
    for tensor in entries_of(converter, base):
        parts = tensor.parts if isinstance(tensor, Stack) else (tensor,)
        sources = [renamed.get(getattr(part, "source", "")) for part in parts]
        own = [source for source in sources if source is not None]
        if not own:
            continue
        lows = tuple(found[source] for source in own)
        for source, part in zip(sources, parts):
            if source is not None:
                _check_place(part, tensor.name, found[source], f"{folder}: '{source}'", base)
        if len(own) < len(parts) or len({low.b.shape[1] for low in lows}) > 1 or isinstance(tensor, Stack) and tensor.joined:
            raise UnsupportedModelError(f"{folder}: '{own[0]}' is a part of '{tensor.name}', which takes adapters of one rank for all of its {len(parts)} parts")
        placed.update(own)
        yield Place(tensor.name, parts[0], lows, isinstance(tensor, Stack))
    if missing := sorted(found.keys() - placed):
        raise UnsupportedModelError(f"{folder}: '{converter.arch}' has no product for '{missing[0]}'" + (f" and {len(missing) - 1} more" if missing[1:] else ""))


def _check_place(entry: Entry, name: str, low: Low, what: str, base: Path) -> None:
    """Check that a weight takes an adapter. Raises: UnsupportedModelError, InvalidModelError."""
    whole = entry.stored or entry.shape
    plain = len(whole) == 2 and entry.frame is None and entry.middle is None and entry.first_column is None and entry.make is None
    if not plain or name.startswith(("v.", "mm.")) or low.embeds is not (name == EMBEDDING):
        raise UnsupportedModelError(f"{what} becomes '{name}', whose adapters are not supported")
    shape = whole[::-1] if entry.turned else whole
    if low.shape != shape:
        raise InvalidModelError(f"{what} has matrices for a weight {low.shape}, and {base} asks for {shape}: the adapter is of another base model")


def _matrices(place: Place, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the two tensors of a weight in the file: of experts one above the other, of an embedding the first turned."""
    made = []
    for low in place.lows:
        a, b, entry = _read(low.a), _read(low.b), place.entry
        factor = np.float32(low.scale * a.shape[0] / alpha)
        if low.embeds:
            a = np.ascontiguousarray(a.T)
        else:
            b = b[entry.row_order] if entry.row_order is not None else b[entry.first_row : entry.first_row + entry.shape[0]]
        made.append((a, b if factor == 1 else b * factor))
    return (np.stack([a for a, _ in made]), np.stack([b for _, b in made])) if place.experts else made[0]


def _read(stored: Stored) -> np.ndarray:
    raw = np.fromfile(stored.file, STORED_DTYPES[stored.dtype], math.prod(stored.shape), offset=stored.offset)
    return to_float32(raw, stored.dtype).reshape(stored.shape)


def _write(file: Path, arch: str, folder: Path, placed: list[Place], wanted: QT | None) -> None:
    """Write the keys and the matrices."""
    scales = [place.lows[0].scale * place.lows[0].a.shape[0] for place in placed]
    alpha = max(scales, key=scales.count)                                       # most modules' B stays as it is
    out = gguf.GGUFWriter(file, arch)
    out.add_type("adapter")
    out.add_name(folder.resolve().name)
    out.add_string("adapter.type", "lora")
    out.add_float32("adapter.lora.alpha", alpha)
    for place in placed:
        a, b = _matrices(place, alpha)
        for end, values, stored in (("lora_a", a, place.lows[0].a), ("lora_b", b, place.lows[0].b)):
            qtype = wanted or TYPES[stored.dtype.lower()]
            with np.errstate(over="ignore"):
                data = gguf.quants.quantize(np.ascontiguousarray(values), qtype)
            if qtype == QT.F16 and np.isinf(data).any() and np.isfinite(values).all():
                raise UnsupportedModelError(f"tensor '{place.name}.{end}' has values that float16 cannot hold; use --outtype f32")
            out.add_tensor(f"{place.name}.{end}", data, raw_dtype=qtype)
    try:
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
    finally:
        out.close()
