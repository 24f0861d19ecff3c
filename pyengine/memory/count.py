"""Programs laid out, as items of a plan: pure functions from what is prepared to bytes by device and purpose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from pyengine.backends.base import Prepared
from pyengine.backends.prepared import Counted, Resident
from pyengine.compiler.arena import aligned
from pyengine.files.adapters import A, B
from pyengine.files.model_files import Files
from pyengine.files.weights import layer_of
from pyengine.graph.tensor import axis_max
from pyengine.memory.plan import MIB, PlanItem
from pyengine.memory.settings import is_card
from pyengine.programs.step import Step
from pyengine.text.sampling import sampler_bytes

# The process itself, measured as resident memory on x86-64 Linux, CPython 3.11 (tests/memory/test_plan.py holds these to RSS):
PROCESS_BYTES = 44 * MIB             # interpreter, NumPy, kernels, the graph as objects
TOKEN_BYTES = 64                     # per token of the vocabulary, for the tokenizer
PIXEL_COPIES = 3                     # of a picture in bytes while its patches are made: decoded, resized, cut
PICTURE_BYTES = 8 * MIB              # Pillow, and what it keeps

# What the driver takes of a card for a process and its kernels; NVIDIA's tools show 300 to 500 MiB for programs of this kind.
CONTEXT_BYTES = 512 * MIB

STEP_KINDS = "layers", "experts of layers", "embedding, head and norms", "adapters of layers"
SOURCE_KINDS = ("encoder's layers",) * 2 + ("encoder's embedding and norms",)
OF_HEAD = "the head that predicts further tokens"
ENCODER_KINDS = ("weights of layers, from the first picture on",) * 2 + ("weights of patches, norms and projector",)


def weights(residents: Iterable[Resident], device: str, purpose: str, kinds: Sequence[str], program: str = "step",
            n_own: int | None = None) -> list[PlanItem]:
    """Count weights by layer, and by whether they are copied or read where the file is mapped.

    kinds: what to call those of layers, of their experts, the rest, and adapters. n_own: layers from this number on are of a head.
    """
    groups: dict[tuple[bool, int, int], list[tuple[str, int]]] = {}
    for r in residents:
        mapped, layer = r.form == "mapped", layer_of(r.name)
        part = r.name or "computed constant", r.nbytes if mapped else r.held
        kind = 2 if layer is None else 3 if r.name.endswith((A, B)) else int(r.sparse)
        groups.setdefault((mapped, -1 if layer is None else layer, kind), []).append(part)
    return [PlanItem.sum(device, "mapped" if mapped else purpose, OF_HEAD if n_own is not None and layer >= n_own else kinds[kind], parts,
                         None if kind == 2 else layer, program)
            for (mapped, layer, kind), parts in sorted(groups.items(), key=lambda g: g[0])]


def caches(step: Step, device: str, layers: Iterable[int]) -> list[PlanItem]:
    """Count keys and values, or states, of some layers."""
    s, items = step.sizes, []
    shown = set(layers)
    for i, layer in enumerate(step.owned):
        if layer in shown and step.layers[i] is not None:
            own, (heads, head_dim) = step.groups[step.layers[i]], step.shapes[i]
            k, v = (dtype.size(head_dim) for dtype in step.formats(step.layers[i]))
            if own.policy.recurrent:
                factors = [("states", own.n_cells), ("bytes", own.policy.nbytes)]
            else:
                factors = [("heads", heads), ("cells", own.share), (f"bytes ({k} of a key, {v} of a value)", k + v)]
            times = (f"{OF_HEAD}: " if layer >= step.n_own else "") + (f"{s.n_seq} x " if s.n_seq > 1 else "")
            items.append(PlanItem.product(device, "kv", times + own.policy.about(own.slots), factors, layer))
            for part in step.parts.get(step.layers[i], ()):
                full, (k, v) = step.groups[part], (dtype.size(head_dim) for dtype in step.formats(part))
                factors = [("heads", heads), ("cells", full.n_cells), (f"bytes ({k} of a key, {v} of a value)", k + v)]
                items.append(PlanItem.product(device, "kv", times + full.policy.about(full.slots), factors, layer))
            if own.policy.compressed and step.kinds:
                factors = [("heads", heads), ("cells", own.share), (f"float32 of {', '.join(step.kinds)}", 4 * len(step.kinds))]
                items.append(PlanItem.product(device, "kv", "sums of attention, by which cells are kept", factors, layer))
    return items


def lasting(prepared: Counted, device: str, items: Sequence[PlanItem]) -> PlanItem:
    """Count the tables of cells, and what aligning them and the caches (`items`) takes."""
    tables = [(t.name, aligned(t.nbytes_max)) for t in prepared.tables]
    rest = prepared.state_bytes - sum(i.nbytes for i in items) - sum(n for _, n in tables)
    return PlanItem.sum(device, "kv", "tables and alignment", [*tables, ("alignment", rest)])


def arena(prepared: Counted, device: str, step: Step) -> PlanItem:
    """Count what runs of the step share."""
    detail = f"{step.sizes.n_batch:,} tokens a step, logits for up to {step.sizes.n_head:,}; generation uses the same memory"
    return PlanItem.sum(device, "arena", detail, prepared.layout.busiest())


def transferred(prepared: Prepared, device: str, main: str, program: str = "step") -> list[PlanItem]:
    """Count what the host has of a program on a card, and what the driver takes there for itself; nothing of one on the CPU."""
    if not is_card(device):
        return []
    own = CONTEXT_BYTES if "-emulated" not in device and program == "step" else 0
    return [PlanItem(main, "arena", f"inputs, outputs and tables of {device}, which are copied", prepared.host_bytes, program=program),
            PlanItem(device, "overhead", "the driver's own: a guess, not measured on a card", own, program=program)]


def sampler(device: str, n_seq: int, vocab_size: int) -> PlanItem:
    """Count the candidates of each conversation's sampler."""
    return PlanItem.product(device, "sampler", "candidates", [("conversations", n_seq), ("bytes", sampler_bytes(vocab_size))])


def headers(files: Files, device: str, program: str = "step") -> PlanItem:
    """Count the headers of a model's files."""
    opened = [f for f in (files.model, files.mmproj, files.head, *(a.file for a in files.adapters)) if f]
    parts = [(path.name, min((t.offset for t in f.tensors.values() if t.part == i), default=0)) for f in opened for i, path in enumerate(f.paths)]
    return PlanItem.sum(device, "overhead", "headers of files", parts, program=program)


def overhead(files: Files, device: str) -> list[PlanItem]:
    """Count the process itself, and the headers of its files."""
    meta = files.model.metadata
    n_tokens = meta.count("tokenizer.ggml.tokens") if "tokenizer.ggml.tokens" in meta else 0
    parts = [("interpreter and libraries", PROCESS_BYTES), (f"tokenizer, {n_tokens} x {TOKEN_BYTES}", n_tokens * TOKEN_BYTES)]
    return [PlanItem.sum(device, "overhead", "the process itself", parts), headers(files, device)]


def input_bytes(prepared: Counted) -> list[tuple[str, int]]:
    """Count a run's inputs at their largest: (name and shape, bytes)."""
    return [(f"{n.name} {list(map(axis_max, n.outputs[0].shape))}", n.outputs[0].nbytes_max)
            for n in prepared.layout.leaves if n.kind == "input"]


def run_bytes(prepared: Counted) -> int:
    """Return what a run takes beside its weights."""
    return prepared.arena_bytes + sum(n for _, n in input_bytes(prepared))


def source(prepared: Counted, rows: int, device: str, main: str, kept: int) -> list[PlanItem]:
    """Count the encoder of an encoder-decoder's prompts: its weights and arena, and the encoded prompts that are kept."""
    return [*weights(prepared.residents.values(), device, "encoder", SOURCE_KINDS, "source"),
            PlanItem.sum(device, "encoder", f"arena, up to {rows:,} tokens of a prompt", prepared.layout.busiest(), program="source"),
            *transferred(prepared, device, main, "source"),
            PlanItem(main, "encoder", "encoded prompts kept, at most", kept, program="source")]


def pictures(prepared: Counted, device: str, program: str) -> list[PlanItem]:
    """Count what a picture takes on the host while it is processed, and the library that reads it."""
    numbers = sum(n.outputs[0].nbytes_max for n in prepared.layout.leaves if n.kind == "input" and n.outputs[0].dtype.name == "F32")
    host = [*input_bytes(prepared), *[("pixels", numbers // 4)] * PIXEL_COPIES]            # a byte for each number of the patches
    return [PlanItem.sum(device, "images", "library, from the first picture on", [("Pillow", PICTURE_BYTES)], program=program),
            PlanItem.sum(device, "images", "a picture's patches and pixels, while it is processed", host, program=program)]


def encoder(kind: str, prepared: Counted, rows: int, device: str, main: str, image_cache: int) -> list[PlanItem]:
    """Count an encoder: its weights and arena, the image cache, and what a picture takes on the host while it is processed."""
    library, pixels = pictures(prepared, main if is_card(device) else device, kind)
    return [*weights(prepared.residents.values(), device, "encoder", ENCODER_KINDS, kind),
            PlanItem.sum(device, "encoder", f"arena, up to {rows:,} image tokens a run", prepared.layout.busiest(), program=kind),
            replace(library, device=main),
            *transferred(prepared, device, main, kind),
            PlanItem(main, "images", "image cache: encoded pictures kept, at most", image_cache, program=kind),
            pixels]
