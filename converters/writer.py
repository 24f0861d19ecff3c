"""From a checkpoint to a GGUF file: the converter is found, its tensors are checked against the checkpoint and streamed through."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as QT
from gguf import LlamaFileType

from pyengine.dtype import Q8_0
from pyengine.errors import InvalidModelError, RequestError, UnsupportedModelError
from pyengine.files.writing import target_of
from pyengine.native.blocks import quantize

from .checkpoint import Checkpoint, malformed_is, read_json, to_float32
from .contract import (
    Blocks, ChangesVocabulary, Constant, Converter, DraftsFor, Entry, IsEncoders, LeavesOut, LooksFirst, MakesVectors, ReadsMore, Stack, supported, Tells)
from .generation import write_sampling
from .sentence import Dense, Sentences
from .tokenizer import Vocabulary, read_vocabulary

Tensor = Entry | Stack | Constant | Blocks
OUTTYPES: dict[str, tuple[QT, LlamaFileType]] = {
    "f32": (QT.F32, LlamaFileType.ALL_F32),
    "f16": (QT.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (QT.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (QT.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
CHUNK = 1 << 20  # elements that are converted at once: 4 MiB in float32, so the peak is the tensor and not its copies
HEAD = "LlamaForCausalLMEagle3"      # what heads are that name their layer's class only: they have fewer tokens to draft
COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$|(^|\.)position_ids$")  # buffers of old checkpoints that follow from the config
# What belongs to an image encoder: llama.cpp keeps it in a file of its own, whose name starts with "mmproj-"
VISION_TENSORS, VISION_KEYS = ("v.", "mm.", "model.image_newline"), "clip."


def convert(folder: str | os.PathLike[str], out_file: str | os.PathLike[str], outtype: str | None = None,
            with_tokenizer: bool = True, split_mmproj: bool = False, base: str | os.PathLike[str] | None = None) -> Path:
    """Convert a Hugging Face checkpoint folder to one GGUF file and return its path.

    `outtype` is a key of `OUTTYPES`; None keeps the dtype that most of the checkpoint has. With `split_mmproj` the image
    encoder goes to a second file, `mmproj_path(out_file)`. `base` is the folder of the model that a head drafts for. A file
    appears under its name only when it is whole. Memory beyond the interpreter: the vocabulary and at most one stored tensor.
    Raises InvalidModelError, UnsupportedModelError, RequestError.
    """
    sentences = Sentences(Path(folder))
    checkpoint = Checkpoint(sentences.checkpoint)
    converter = find_converter(checkpoint.config, checkpoint.config_file)
    texts = _texts(checkpoint, converter, base)
    for file in converter.more_files if isinstance(converter, ReadsMore) else ():
        checkpoint.add(file)
    for note in converter.notes if isinstance(converter, Tells) else ():
        warn(f"{checkpoint.folder}: {note}")
    checkpoint.rename(converter.renames)
    if isinstance(converter, LooksFirst):
        converter.look(checkpoint.tensors.keys())
    for layer in _layers(sentences, converter):
        checkpoint.add(layer.file, layer.prefix)
    entries = _check_entries(checkpoint, converter, sentences)
    vision = [e for e in entries if e.name.startswith(VISION_TENSORS)]
    if split_mmproj and (not vision or isinstance(converter, IsEncoders)):
        raise UnsupportedModelError(f"{checkpoint.folder}: '{converter.arch}' has no image encoder to split off")

    try:
        out_file = target_of(out_file)
    except OSError as error:
        raise RequestError(f"{out_file}: {error.strerror}") from None
    text = _Output(out_file, converter.arch, "model", checkpoint, outtype)
    if converter.vocab_size:                                    # models of pictures only have none
        text.writer.add_vocab_size(converter.vocab_size)
    with malformed_is(f"{checkpoint.config_file}: a value is of the wrong kind"):
        converter.write_keys(text.writer)
        sentences.write_keys(text.writer, converter.usual_pooling if isinstance(converter, MakesVectors) else None)
    with malformed_is(f"{checkpoint.folder}: a value of the tokenizer's files is of the wrong kind"):
        vocabulary = read_vocabulary(*texts) if with_tokenizer else Vocabulary.none()
    if with_tokenizer and vocabulary.model == "none" and converter.vocab_size:
        warn(f"{checkpoint.folder}: no tokenizer; the file takes and gives token ids only")
    if isinstance(converter, ChangesVocabulary) and vocabulary.model != "none":
        converter.change_vocabulary(vocabulary)
    if sentences.lowercase and not vocabulary.lowercase:
        raise UnsupportedModelError(f"{folder}: sentence_bert_config.json makes small letters of texts, and the tokenizer does not")
    vocabulary.write(text.writer, converter.vocab_size)
    write_sampling(checkpoint.folder, text.writer)
    outputs = [(text, entries)]
    if split_mmproj:
        outputs = [(text, [e for e in entries if not e.name.startswith(VISION_TENSORS)])]
        mmproj = _Output(mmproj_path(out_file), "clip", "mmproj", checkpoint, outtype)
        keys = text.writer.kv_data[0]
        mmproj.writer.kv_data[0] |= {k: keys.pop(k) for k in list(keys) if k.startswith(VISION_KEYS)}
        outputs.append((mmproj, vision))
    try:
        for output, its_entries in outputs:
            _write_tensors(output.writer, checkpoint, its_entries, output.wanted)
            output.writer.close()
        for output, _ in outputs:
            os.replace(output.partial, output.path)
    finally:
        for output, _ in outputs:
            output.writer.close()
            output.partial.unlink(missing_ok=True)
    return out_file


def _texts(checkpoint: Checkpoint, converter: Converter, base: str | os.PathLike[str] | None) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the tokenizer and the config beside it: those of the model that a head drafts for, where they are given."""
    folder, config = checkpoint.folder, checkpoint.config
    if base is not None:
        if not isinstance(converter, DraftsFor):
            raise RequestError(f"--base is for an adapter, and for a head that drafts for another model; {folder} is neither")
        folder = Path(base)
        config = read_json(folder / "config.json", required=True)
        with malformed_is(f"{folder / 'config.json'}: a value is of the wrong kind"):
            converter.read_base(config)
    return folder, {**(config.get("text_config") or {}), **config}           # a model with an image encoder has its text model's values one level down


def mmproj_path(out_file: Path) -> Path:
    """Return the name of the image encoder's file beside a text model's, as llama.cpp's converter names it."""
    return out_file.with_name(f"mmproj-{out_file.name}")


class _Output:
    """A file that is being written, with the keys that every file has."""

    def __init__(self, path: Path, arch: str, kind: str, checkpoint: Checkpoint, outtype: str | None):
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.wanted, file_type = OUTTYPES[outtype or checkpoint.prevailing_dtype]
        self.writer = gguf.GGUFWriter(self.partial, arch)
        self.writer.add_type(kind)
        self.writer.add_name(checkpoint.name)
        self.writer.add_file_type(file_type)
        self.writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def warn(message: str) -> None:
    """Say on stderr what a conversion went on without."""
    print(f"warning: {message}", file=sys.stderr)


def find_converter(config: dict[str, Any], file: Path) -> Converter:
    """Return the converter of a config.json's architecture. Raises: InvalidModelError, UnsupportedModelError."""
    known = supported()
    classes = config.get("architectures") or []
    with malformed_is(f"{file}: a value is of the wrong kind"):
        for name in [*([HEAD] if "draft_vocab_size" in config else []), *classes]:
            if name in known:
                return known[name](config, file)
    raise UnsupportedModelError(f"{file}: architecture "
                                f"{', '.join(map(str, classes)) or 'unknown'} is not supported; supported: {', '.join(sorted(known))}")


def entries_of(converter: Converter, file: Path) -> list[Tensor]:
    """List the tensors that a converter makes. Raises: InvalidModelError for values of the config `file` that are of the wrong kind."""
    with malformed_is(f"{file}: a value is of the wrong kind"):
        return list(converter.tensors())


def _layers(sentences: Sentences, converter: Converter) -> list[Dense]:
    """Return what stands behind the pooling. Raises: UnsupportedModelError for a model that has no place for it."""
    if sentences.dense and not isinstance(converter, MakesVectors):
        raise UnsupportedModelError(f"{sentences.folder}: '{converter.arch}' has no place for layers behind its pooling")
    return sentences.dense


def _check_entries(checkpoint: Checkpoint, converter: Converter, sentences: Sentences) -> list[Tensor]:
    entries = [*entries_of(converter, checkpoint.config_file), *sentences.entries()]
    parts = [p for e in entries for p in (e.parts if isinstance(e, Stack) else [e])]
    by_source = {e.source: e.shape if e.stored is None else e.stored for e in parts if isinstance(e, Entry)}
    by_source |= {source: shape for e in parts if isinstance(e, Blocks) for source, shape in e.sources}
    by_source |= {source: shape for e in parts if isinstance(e, Entry) and e.change for source, shape in (
        (e.change.low, (e.change.rank, e.shape[1])), (e.change.high, (e.shape[0], e.change.rank)))}
    missing = sorted(by_source.keys() - checkpoint.tensors.keys())
    if missing:
        raise InvalidModelError(f"{checkpoint.folder}: {_listing(missing)} missing from the checkpoint")
    unknown = sorted(n for n in checkpoint.tensors.keys() - by_source.keys() - converter.unused()
                     if not COMPUTED.search(n))
    for pattern, words in converter.leaves if isinstance(converter, LeavesOut) else ():
        if any(re.search(pattern, n) for n in unknown):
            warn(f"{checkpoint.folder}: {words}")
            unknown = [n for n in unknown if not re.search(pattern, n)]
    if unknown:
        raise UnsupportedModelError(f"{checkpoint.folder}: '{converter.arch}' has no place for {_listing(unknown)}")
    bytes_of = {source for e in parts if isinstance(e, Blocks) for source, _ in e.sources}
    for source, shape in by_source.items():
        if checkpoint.tensors[source].dtype in ("I64", "BOOL") or (checkpoint.tensors[source].dtype == "U8") != (source in bytes_of):
            raise UnsupportedModelError(f"{checkpoint.folder}: tensor '{source}' is {checkpoint.tensors[source].dtype}")
        if checkpoint.tensors[source].shape != shape:
            raise InvalidModelError(f"{checkpoint.folder}: tensor '{source}' has shape "
                                    f"{checkpoint.tensors[source].shape}, config.json asks for {shape}")
    return entries


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(repr(n) for n in names[:3])}{more}"


def stored_type(entry: Tensor, shape: tuple[int, ...], wanted: QT) -> QT:
    """Return the type that a tensor is written in: vectors in float32, rows that are no whole blocks in float16."""
    if isinstance(entry, Blocks):
        return entry.qtype
    if isinstance(entry, Constant) or len(shape) < 2:
        return QT.I64 if isinstance(entry, Constant) and entry.values.dtype == np.int64 else QT.F32
    wanted = entry.instead.get(wanted, wanted) if isinstance(entry, Entry) else wanted
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if shape[-1] % block == 0 else QT.F16


def with_whole_blocks(entry: Tensor, block: int) -> Tensor:
    """Pad the axis that may be padded to whole blocks."""
    if not isinstance(entry, Entry) or entry.units is None or entry.shape[entry.units] % block == 0:
        return entry
    shape = list(entry.shape)
    shape[entry.units] += -shape[entry.units] % block
    return replace(entry, padded=tuple(shape))


def _write_tensors(out: gguf.GGUFWriter, checkpoint: Checkpoint, entries: list[Tensor], wanted: QT) -> None:
    entries = [with_whole_blocks(e, gguf.GGML_QUANT_SIZES[wanted][0]) for e in entries]
    shapes = [e.padded or e.shape if isinstance(e, Entry) else e.shape for e in entries]
    types = [stored_type(e, shape, wanted) for e, shape in zip(entries, shapes)]
    for entry, shape, qtype in zip(entries, shapes, types):
        block, n_bytes = gguf.GGML_QUANT_SIZES[qtype]
        out.add_tensor_info(entry.name, shape, np.dtype(np.float32),
                            math.prod(shape) // block * n_bytes, raw_dtype=qtype)
    out.write_header_to_file()
    with malformed_is(f"{checkpoint.folder}: a value of the config or the tokenizer is of the wrong kind"):
        out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    # GGUFWriter takes whole tensors only; offsets are already written, so chunks and padding follow in the same order
    file = out.fout[0]
    out.write_padding(file, file.tell())
    for entry, qtype in zip(entries, types):
        for chunk in _chunks(checkpoint, entry):
            if isinstance(entry, Blocks) or qtype == QT.I64:
                data = chunk
            elif qtype == QT.Q8_0:
                data = _quantize_blocks(entry.name, chunk)
            else:
                with np.errstate(over="ignore"):
                    data = gguf.quants.quantize(chunk, qtype)
            if qtype == QT.F16 and np.isinf(data).any() and np.isfinite(chunk).all():
                raise UnsupportedModelError(f"tensor '{entry.name}' has values that float16 cannot hold; "
                                            "use --outtype bf16 or f32")
            data.tofile(file)
        out.write_padding(file, file.tell())


def _quantize_blocks(name: str, chunk: np.ndarray) -> np.ndarray:
    """Return rows in Q8_0: gguf-py's bytes, many times faster."""
    try:
        return quantize(chunk, Q8_0)
    except RequestError as error:
        raise InvalidModelError(f"tensor '{name}': {error}") from None


def _change(checkpoint: Checkpoint, entry: Entry, start: int, stop: int) -> np.ndarray:
    """Return rows [start, stop) of what is added to a matrix, float32."""
    c = entry.change
    low = to_float32(checkpoint.read(c.low, 0, c.rank), checkpoint.tensors[c.low].dtype)
    high = to_float32(checkpoint.read(c.high, start, stop), checkpoint.tensors[c.high].dtype)
    return np.float32(c.scale) * (high @ low)


def _chunks(checkpoint: Checkpoint, entry: Tensor) -> Iterator[np.ndarray]:
    """Yield a tensor in float32, or in bytes where it is in blocks already, some rows at a time."""
    match entry:
        case Constant(values=values):
            yield values
        case Stack(parts=parts):
            for part in parts:
                yield from _chunks(checkpoint, part)
        case Blocks(shape=shape, sources=sources, make=make):
            for i in range(shape[0]):
                yield make(*(checkpoint.read(source, i, i + 1) for source, _ in sources))
        case Entry(source=source, shape=(_, rows), first_row=row, turned=True):
            yield np.ascontiguousarray(to_float32(checkpoint.read(source, row, row + rows), checkpoint.tensors[source].dtype).T)
        case Entry(source=source, shape=(_,) as shape, stored=(_, _), first_row=row):
            yield to_float32(checkpoint.read(source, row, row + 1).reshape(shape), checkpoint.tensors[source].dtype)
        case Entry(source=source, shape=shape, row_order=order, add=add):
            n_rows = max(1, CHUNK // max(1, math.prod((entry.stored or shape)[1:])))
            # rows that are moved need the whole tensor, in its stored dtype
            whole = checkpoint.read(source, 0, (entry.stored or shape)[0]) if order is not None else None
            for i in range(0, shape[0], n_rows):
                stop = min(i + n_rows, shape[0])
                raw = (checkpoint.read(source, entry.first_row + i, entry.first_row + stop) if whole is None
                       else whole[order[i:stop]])
                if entry.frame is not None:
                    raw = raw[:, :, entry.frame]
                if entry.middle is not None:
                    raw = raw[:, entry.middle : entry.middle + shape[1]]
                if entry.first_column is not None:
                    raw = raw[:, :, entry.first_column : entry.first_column + shape[1]].swapaxes(1, 2)
                values = np.ascontiguousarray(to_float32(raw, checkpoint.tensors[source].dtype))
                values = values + np.float32(add) if add else values
                values = values + _change(checkpoint, entry, i, stop) if entry.change else values
                values = entry.make(values) if entry.make else values
                if entry.padded and len(shape) == 2:
                    values = np.pad(values, ((0, 0), (0, entry.padded[1] - shape[1])))
                yield values
            if entry.padded and entry.padded[0] > shape[0]:
                yield np.zeros((entry.padded[0] - shape[0], *entry.padded[1:]), np.float32)
