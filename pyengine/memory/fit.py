"""What a model will take, before a byte of its weights is read: the graph of its step, laid out and counted.

    file -> Hparams, Weights -> Model.forward builds one graph -> the backend lays it out -> MemoryPlan

The program that is counted here is the one that `engine` loads and runs.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pyengine import hardware
from pyengine.backends import backend
from pyengine.backends.chain import StagedPlan
from pyengine.compiler.arena import aligned
from pyengine.compiler.cut import cut
from pyengine.errors import PlanError, RequestError, UnsupportedModelError
from pyengine.files.hparams import Hparams
from pyengine.files.model_files import Files, open_files
from pyengine.graph.tensor import axis_max
from pyengine.memory.placement import spread
from pyengine.memory.plan import Alternative, MemoryPlan, MIB, PlanItem, Room
from pyengine.programs.encoder import encoder_graph
from pyengine.programs.step import build, Built, HEAD_BYTES, KV_DTYPES, kv_dtypes, N_BATCH, step_rows
from pyengine.text.sampling import sampler_bytes

N_SEQ_LIMIT = 64                     # how far it is looked for conversations that fit

# Unless told otherwise, the largest picture's share of a device's memory (arena of the encoder, and patches), and the image cache's
PICTURE_SHARE, IMAGE_CACHE_SHARE = 1 / 8, 1 / 64
# and that of one conversation's pictures in layers that attend across
ACROSS_SHARE = 1 / 16
LEAST_PICTURE = 256                  # soft tokens: pictures are not planned smaller than this unless they are told to be

# The process itself, measured as resident memory on x86-64 Linux, CPython 3.11 (tests/test_plan.py holds these to RSS):
PROCESS_BYTES = 44 * MIB             # interpreter, NumPy, kernels, the graph as objects
TOKEN_BYTES = 64                     # per token of the vocabulary, for the tokenizer
PIXEL_COPIES = 3                     # of a picture in bytes while its patches are made: decoded, resized, cut
PICTURE_BYTES = 8 * MIB              # Pillow, and what it keeps


@dataclass(frozen=True)
class Settings:
    """What is asked of a plan. n_ctx None: the training context, or what of it fits.

    device   "cpu", or parts of main memory that are kept apart: {"cpu:0": bytes, "cpu:1": bytes}; layers are spread over them by
             their room, caches and the output head follow
    encoder_device  the part that holds the media encoder; None: the first
    expert_device   the part that holds the experts' weights and computes with them; layers go to the others. None: with their layer
    images   (width, height) of the largest picture, a number of such pictures that the image cache keeps, or (width, height,
             number); 0: no pictures at all; None: the processor's largest, or one that takes PICTURE_SHARE of the memory.
             Where layers attend across, a conversation holds that number of pictures; None: ACROSS_SHARE of the memory
    """

    n_ctx: int | None = None
    n_batch: int = N_BATCH
    kv_dtype: str = "f16"
    n_seq: int = 1
    n_threads: int | None = None
    images: Any = None
    device: Any = "auto"
    encoder_device: str | None = None
    expert_device: str | None = None

    @property
    def parts(self) -> dict[str, int] | None:
        """Bytes of each part of memory, where there are several."""
        return self.device if isinstance(self.device, dict) else None

    def check(self) -> None:
        """Raises: RequestError for what no model can have."""
        kv_dtypes(self.kv_dtype)
        for name in ("n_seq", "n_ctx", "n_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name}={value}: must be at least 1")
        for name, room in (self.parts or {}).items():
            if not re.fullmatch(r"cpu:\d+", str(name)) or not isinstance(room, int) or room < 1:
                raise RequestError(f"device: {name!r}: {room!r} is no part of main memory; give {{'cpu:0': bytes, 'cpu:1': bytes}}")
        if not self.parts and self.device not in ("auto", "cpu"):
            raise RequestError(f"device={self.device!r}: models run on 'cpu' ('auto' picks it), or on parts of it: {{'cpu:0': bytes, ..}}")
        for name in ("encoder_device", "expert_device"):
            where = getattr(self, name)
            if where is not None and where not in (self.parts or {}):
                raise RequestError(f"{name}={where!r}: is none of {', '.join(self.parts or ['cpu'])}")
        self.largest_picture()

    def largest_picture(self) -> tuple[tuple[int, int] | None, int | None]:
        """(width and height, number of pictures), each None where it is not given."""
        asked = self.images
        if asked is None:
            return None, None
        numbers = (asked,) if isinstance(asked, int) else tuple(asked) if isinstance(asked, (tuple, list)) else ()
        whole = all(isinstance(n, int) for n in numbers) and 1 <= len(numbers) <= 3
        if not whole or min(numbers) < (len(numbers) > 1):                       # 0 is no size, but a number of pictures
            raise RequestError(f"images={asked!r}: give (width, height) of the largest picture, the number of pictures to keep, or "
                               "(width, height, number)")
        return (numbers[:2] if len(numbers) > 1 else None), (numbers[-1] if len(numbers) != 2 else None)


class Planned(NamedTuple):
    """A model laid out, nothing loaded: its step, its media encoder's run (or None), and the count of both."""

    built: Built
    step: Any
    encoder: Any
    image_cache: int         # bytes
    plan: MemoryPlan


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the garbage collector still: a graph is 50,000 objects that all live, and walking them again doubles the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class _Count:
    """One model at given settings, laid out; and what it would take with other numbers of positions and conversations."""

    def __init__(self, files: Files, want: Settings, machine: hardware.Hardware):
        self.files, self.want, self.host = files, want, machine.devices[0]
        self.machine = machine
        self.trained = Hparams(files.model.metadata).size("context_length")
        self.n_ctx = want.n_ctx or self.trained
        self.size, self.n_pictures = want.largest_picture()
        self.built = build(files, self.n_ctx, want.n_batch, want.kv_dtype, want.n_seq, pictures=self.n_pictures != 0,
                           size=self.size, n_pictures=self.n_pictures, room=int(ACROSS_SHARE * self.host.total))
        if want.images and not self.built.vision:
            raise RequestError(f"images={want.images!r}: {files.name} has no media encoder; where it is in a file of its own, give mmproj=")
        self.step = backend("cpu", n_threads=want.n_threads).prepare(self.built.outputs)
        self.notes: list[str] = []
        self.main, self.free = "cpu", {"cpu": self.host.free}
        stages = [("cpu", self.step, list(range(len(self.built.layers))))]     # (device, program laid out, its layers)
        if want.parts:
            self.main, self.free = next(iter(want.parts)), dict(want.parts)
            stages = self._placed()
        self.items = [item for device, step, layers in stages for item in (
            *self._weights(step, device, "weights", ("layers", "experts of layers", "embedding, head and norms")),
            *self._kv(step, device, layers), self._arena(step, device))]
        self.items += [self._sampler(), *self._overhead()]
        self.encoder, self.image_cache = None, 0
        if self.built.vision:
            self.encoder = self._encoder()
            self.image_cache = self._cache_bytes(self.n_ctx)
            self.items += self._pictures()

    # -- items --------------------------------------------------------------------------------------------------------

    def _placed(self) -> list[tuple[str, Any, list[int]]]:
        """Cut the step over the parts of memory, layers in proportion to their room; `step` becomes what they compute."""
        names, layered, rest = list(self.free), [0] * len(self.built.layers), 0
        where = self.want.expert_device
        apart = {r.tensor.name for r in self.step.residents.values() if where and _is_experts(r.tensor.name)}
        if where and not apart:
            raise RequestError(f"expert_device={where!r}: {self.files.name} has no experts")
        for r in self.step.residents.values():
            layer, nbytes = _layer(r.tensor.name or ""), 0 if r.form == "mapped" else aligned(r.nbytes)
            if r.tensor.name in apart:
                continue
            if layer is None:
                rest += nbytes
            else:
                layered[layer] += nbytes
        for item in self._kv(self.step, self.main, range(len(layered))):
            if item.layer is not None:
                layered[item.layer] += item.nbytes
        fixed = sum(i.nbytes for i in (self._sampler(), *self._overhead()) if i.purpose != "mapped")
        rooms = [max(1, n - self.step.arena_bytes - (fixed if name == self.main else 0)) for name, n in self.free.items()]
        if where and len(names) > 1:
            rooms[names.index(where)] = 0                    # layers stay away from their experts
        found, times = None, 1
        while found is None:                                 # what does not fit is laid out too, and refused with its table
            found, times = spread(layered, [n * times for n in rooms], last=rest), 2 * times
        used = sorted({*found, *([names.index(where)] if where else [])})
        devices: list[int] = []                              # of each stage: runs of layers, between them the experts of one
        stages: dict[tuple[int, bool], int] = {}             # (layer, its experts) -> stage
        for layer, device in enumerate(found):
            for experts in (False, True):
                on = used.index(names.index(where) if where and experts else device)
                if not devices or (devices[-1] != on and (not experts or any(_layer(n) == layer for n in apart))):
                    devices.append(on)
                stages[layer, experts] = len(devices) - 1
        if devices[-1] != used.index(found[-1]):
            devices.append(used.index(found[-1]))            # the output head is where the last layer is

        def stage_of(name: str) -> int | None:
            layer = _layer(name)
            if layer is None:
                return len(devices) - 1 if name == "head" or name.startswith("output") else None
            return stages[layer, name in apart]

        parts = cut(self.built.outputs, stage_of, devices)
        self.step = StagedPlan.lay_out(parts, backend("cpu", n_threads=self.want.n_threads).prepare)
        self.notes.append("layers: " + ", ".join(f"{found.count(d)} on {names[d]}" for d in used if d in found)
                          + (f", their experts on {where}" if where else ""))
        return [(names[d], p, [i for i, on in enumerate(found) if on == d]) for d, p in zip(used, self.step.prepared)]

    def _weights(self, prepared: Any, device: str, purpose: str, kinds: tuple[str, str, str]) -> list[PlanItem]:
        """Weights by layer, and by whether they are copied or read where the file is mapped. kinds: what to call those of layers,
        of their experts, and the rest."""
        groups: dict[tuple[bool, int, int], list[tuple[str, int]]] = {}
        for r in prepared.residents.values():
            name, mapped, layer = r.tensor.name or "computed constant", r.form == "mapped", _layer(r.tensor.name or "")
            part = name, r.nbytes if mapped else aligned(r.nbytes)
            kind = 2 if layer is None else int(_is_experts(name))
            groups.setdefault((mapped, -1 if layer is None else layer, kind), []).append(part)
        return [PlanItem.sum(device, "mapped" if mapped else purpose, kinds[kind], parts, None if kind == 2 else layer)
                for (mapped, layer, kind), parts in sorted(groups.items(), key=lambda g: g[0])]

    def _kv(self, step: Any, device: str, layers: Iterable[int]) -> list[PlanItem]:
        """Caches of some layers, and the tables of their cells."""
        b, c = self.built, self.built.arch.config
        k, v = (d.size(c.head_dim) for d in b.kv_dtypes)
        items = []
        for i in layers:
            if b.layers[i] is None:
                continue
            own, _ = b.groups[b.layers[i]]
            factors = [("heads", c.n_kv_heads), ("cells", own.n_cells), (f"bytes ({k} of a key, {v} of a value)", k + v)]
            times = f"{b.n_seq} x " if b.n_seq > 1 else ""
            items.append(PlanItem.product(device, "kv", f"{own.policy}: {times}{own.slots} cells", factors, i))
        tables = [(t.name, aligned(t.nbytes_max)) for t in step.states if t.dtype.name == "I32"]
        rest = step.state_bytes - sum(i.nbytes for i in items) - sum(n for _, n in tables)
        return [*items, PlanItem.sum(device, "kv", "tables and alignment", [*tables, ("alignment", rest)])]

    def _arena(self, step: Any, device: str) -> PlanItem:
        b = self.built
        detail = f"{b.n_batch} rows a step, {b.n_head} of them with logits; decoding uses the same memory"
        return PlanItem.sum(device, "arena", detail, step.layout.busiest())

    def _sampler(self) -> PlanItem:
        each = sampler_bytes(self.built.arch.config.vocab_size)
        return PlanItem.product(self.main, "sampler", "candidates", [("conversations", self.built.n_seq), ("bytes", each)])

    def _overhead(self) -> list[PlanItem]:
        opened = [f for f in (self.files.model, self.files.mmproj) if f]
        headers = [(path.name, min((t.offset for t in f.tensors.values() if t.part == i), default=0))
                   for f in opened for i, path in enumerate(f.paths)]
        meta = self.files.model.metadata
        n_tokens = meta.count("tokenizer.ggml.tokens") if "tokenizer.ggml.tokens" in meta else 0
        parts = [("interpreter and libraries", PROCESS_BYTES), (f"tokenizer, {n_tokens} x {TOKEN_BYTES}", n_tokens * TOKEN_BYTES)]
        return [PlanItem.sum(self.main, "overhead", "the process itself", parts),
                PlanItem.sum(self.main, "mapped", "headers of files", headers)]

    def _encoder(self) -> Any:
        """The encoder laid out for the largest picture that is asked for, or that takes its share of the memory."""
        vision, prepare = self.built.vision, backend("cpu", n_threads=self.want.n_threads).prepare
        most = vision.max_rows
        if self.size:
            vision.max_rows = min(most, max(1, vision.rows(*self.size)))
        encoder = prepare(encoder_graph(vision))
        if self.size or vision.atomic_rows:
            return encoder
        limit = int(PICTURE_SHARE * self.host.total)
        while _run_bytes(encoder) > limit and vision.max_rows > LEAST_PICTURE:
            fits = int(vision.max_rows * limit / _run_bytes(encoder)) // 64 * 64               # the arena is nearly linear in rows
            vision.max_rows = max(LEAST_PICTURE, min(vision.max_rows - 64, fits))
            smaller = prepare(encoder_graph(vision))
            if _run_bytes(smaller) >= _run_bytes(encoder):   # a run takes the same whatever the picture's size
                vision.max_rows = most
                break
            encoder = smaller
        if vision.max_rows < most:
            self.notes.append(f"pictures of up to {vision.max_rows} soft tokens: the processor allows {most}, which would take "
                              f"more than 1/{1 / PICTURE_SHARE:.0f} of the memory; images=(width, height) sets another size")
        return encoder

    def _cache_bytes(self, n_ctx: int) -> int:
        """Embeddings that are kept: as many as asked for, or a context full of them within a share of the memory."""
        row = 4 * self.built.arch.config.d_model
        if self.n_pictures is not None:
            vision = self.built.vision                       # a picture in tiles has more rows than a run
            return self.n_pictures * max(vision.max_rows, min(vision.rows(*self.size), n_ctx) if self.size else 0) * row
        most = max(n_ctx, self.built.across) * row
        return min(most, max(self.built.vision.max_rows * row, int(IMAGE_CACHE_SHARE * self.host.total)))

    def _pictures(self) -> list[PlanItem]:
        rows, e, where = self.built.vision.max_rows, self.encoder, self.want.encoder_device or self.main
        inputs = [(f"{n.name} {list(map(axis_max, n.outputs[0].shape))}", n.outputs[0].nbytes_max)
                  for n in e.layout.leaves if n.kind == "input"]
        pixels = sum(n for name, n in inputs if name.startswith("patches")) // 4
        host = [*inputs, *[("pixels", pixels)] * PIXEL_COPIES]
        layers, rest = "weights of layers, from the first picture on", "weights of patches, norms and projector"
        return [*self._weights(e, where, "encoder", (layers, layers, rest)),
                PlanItem.sum(where, "encoder", f"arena, up to {rows} soft tokens a run", e.layout.busiest()),
                PlanItem.sum(self.main, "images", "library, from the first picture on", [("Pillow", PICTURE_BYTES)]),
                PlanItem(self.main, "images", "encoded pictures that are kept, at most", self.image_cache),
                PlanItem.sum(where, "images", "a picture's patches and pixels, while it is processed", host)]

    # -- other numbers ------------------------------------------------------------------------------------------------

    def total_at(self, n_ctx: int, n_seq: int) -> int:
        """All bytes with these numbers and all else as it is."""
        b, vision = self.built, self.built.vision
        atomic, vocab = vision.atomic_rows if vision else 0, b.arch.config.vocab_size
        if step_rows(n_ctx, self.want.n_batch, n_seq, atomic, vocab) != (b.n_batch, b.n_head):
            other = _Count(self.files, replace(self.want, n_ctx=n_ctx, n_seq=n_seq), self.machine)
            return sum(i.nbytes for i in other.items if i.purpose != "mapped")
        arena, states = self.step.resized(b.states(n_ctx, n_seq))
        fixed = sum(i.nbytes for i in self.items if i.purpose in ("weights", "overhead"))
        return fixed + arena + states + n_seq * sampler_bytes(vocab) + self._picture_bytes(n_ctx)

    def _picture_bytes(self, n_ctx: int) -> int:
        kept = sum(i.nbytes for i in self.items if i.purpose in ("encoder", "images"))
        return kept - self.image_cache + self._cache_bytes(n_ctx) if self.encoder else 0

    def largest_context(self) -> int | None:
        """The largest context that fits, up to the trained one (or a larger one that was asked for); None if no step's rows do."""
        picture = self.built.vision.max_rows if self.built.vision and not self.built.across else 1
        least = min(self.n_ctx, max(self.built.n_batch, picture))
        return _largest(lambda n: self.total_at(n, self.built.n_seq), least, max(self.trained, self.n_ctx), self.host.free)

    def most_conversations(self, limit: int) -> int | None:
        """How many conversations of this context fit, at most `limit`; None if not one does."""
        return _largest(lambda n: self.total_at(self.n_ctx, n), 1, limit, self.host.free)

    def rooms(self, plan_: MemoryPlan) -> Iterator[Room]:
        """Each device of the machine: how many layers, the last ones first, fit beside the head and an arena."""
        layered = [0] * len(self.built.layers)
        for i in self.items:
            if i.layer is not None and i.purpose in ("weights", "mapped", "kv") and not i.detail.startswith("weights of"):
                layered[i.layer] += i.nbytes
        everything = plan_.total - plan_.of("overhead") + sum(i.nbytes for i in self.items if i.purpose == "mapped")
        rest = sum(i.nbytes for i in self.items if i.purpose in ("weights", "mapped", "kv", "arena") and i.layer is None)
        for device in self.machine.devices:
            left, n = device.free - rest, 0
            while n < len(layered) and layered[-1 - n] <= left:
                left, n = left - layered[-1 - n], n + 1
            yield Room(device.id, device.name, device.free, device.unified, n, everything <= device.free)

    def planned(self) -> Planned:
        """The plan, with what fits."""
        b, whole = self.built, not self.want.parts           # on parts of memory what else would fit is not looked for
        limit = max(self.want.n_seq, min(N_SEQ_LIMIT, HEAD_BYTES // (4 * b.arch.config.vocab_size)))     # with the same logits
        plan_ = MemoryPlan(self.files.name, self.n_ctx, b.n_batch, self.want.kv_dtype, tuple(i for i in self.items if i.nbytes),
                           self.free, b.n_seq, len(b.layers), b.vision.max_rows if b.vision else 0,
                           self.largest_context() if whole else None, self.most_conversations(limit) if whole else None, limit, notes=tuple(self.notes))
        return Planned(b, self.step, self.encoder, self.image_cache, replace(plan_, rooms=tuple(self.rooms(plan_))))


def _layer(name: str) -> int | None:
    """The layer that a tensor's name speaks of: 3 of "blk.3.attn_q.weight" and of "v.blk.3.ln1.bias"."""
    parts = name.split(".")
    number = parts[parts.index("blk") + 1] if "blk" in parts[:-1] else ""
    return int(number) if number.isdigit() else None


def _is_experts(name: str | None) -> bool:
    """Whether a tensor holds a matrix for each expert of a layer, of which a row reads some: "blk.3.ffn_up_exps.weight"."""
    return name is not None and "_exps." in name


def _run_bytes(encoder: Any) -> int:
    """What a run of the encoder takes beside its weights."""
    return encoder.arena_bytes + sum(n.outputs[0].nbytes_max for n in encoder.layout.leaves if n.kind == "input")


def _largest(total: Callable[[int], int], low: int, high: int, room: int) -> int | None:
    """The largest n from low to high with total(n) <= room, for a total that does not fall; None if there is none.

    Interpolates, for totals are nearly linear, and halves every other time, for steps in them.
    """
    if total(high) <= room:
        return high
    at_low, at_high, halve = total(low), total(high), False
    if at_low > room:
        return None
    while high - low > 1:
        guess = (low + high) // 2 if halve else low + (room - at_low) * (high - low) // max(1, at_high - at_low)
        guess, halve = min(max(guess, low + 1), high - 1), not halve
        at = total(guess)
        if at <= room:
            low, at_low = guess, at
        else:
            high, at_high = guess, at
    return low


def lay_out_model(files: Files, want: Settings, machine: hardware.Hardware | None = None) -> Planned:
    """Build, lay out and count a model for this machine; without `n_ctx`, the training context or the largest that fits."""
    machine = machine or hardware.detect()
    with _uncollected():
        count = _Count(files, want, machine)
        planned = count.planned()
        if want.n_ctx is not None:
            return planned
        note, n_ctx = f"context: {count.trained} positions, as trained", count.trained
        while want.parts and not planned.plan.fits and n_ctx > 512:
            n_ctx //= 2
            planned = _Count(files, replace(want, n_ctx=n_ctx), machine).planned()
            note = f"context: {n_ctx} of the {count.trained} trained positions, the first half, quarter .. that fits"
        if not planned.plan.fits and not want.parts:
            note = f"context: as trained, {count.trained} positions; no context of a whole step fits"
            if planned.plan.max_ctx:
                planned = _Count(files, replace(want, n_ctx=_rounded(planned.plan.max_ctx)), machine).planned()
                note = f"context: {planned.plan.n_ctx} of the {count.trained} trained positions are what fits"
        return planned._replace(plan=replace(planned.plan, notes=(note, *planned.plan.notes)))


def _rounded(n_ctx: int) -> int:
    """A context that people would choose: whole multiples of 256 from 512 on."""
    return n_ctx // 256 * 256 if n_ctx >= 512 else n_ctx


def alternatives(files: Files, want: Settings, refused: MemoryPlan) -> list[Alternative]:
    """The three nearest settings that fit, each of them planned: one change first, then a smaller context with others."""
    found: list[Alternative] = []
    machine = hardware.detect()

    def fits(**changes: Any) -> bool:
        """Plan with these changes; note it if it fits."""
        try:
            plan_ = lay_out_model(files, replace(want, **{"n_ctx": refused.n_ctx, **changes}), machine).plan
        except UnsupportedModelError:                        # a format of the cache that does not suit its heads
            return False
        if plan_.fits:
            found.append(Alternative(changes, plan_.total))
        elif plan_.max_ctx and "n_ctx" not in changes and changes:
            smaller.append({**changes, "n_ctx": _rounded(plan_.max_ctx)})
        return plan_.fits

    smaller: list[dict[str, Any]] = []
    experts = want.parts and want.expert_device is None and any(_is_experts(name) for name in files.model.tensors)
    for where in (want.parts or {}) if experts and len(want.parts) > 1 else ():
        fits(expert_device=where)
    if refused.max_ctx:
        fits(n_ctx=_rounded(refused.max_ctx))
    for name in ("q8_0", "q4_0"):
        if name in KV_DTYPES and kv_bytes(name) < kv_bytes(want.kv_dtype) and fits(kv_dtype=name):
            break
    if refused.max_seq and refused.max_seq < want.n_seq:
        fits(n_seq=refused.max_seq)
    for rows in (refused.n_batch // 4, refused.n_batch // 16):
        if len(found) < 3 and rows >= 1 and fits(n_batch=rows):
            break
    for side in (896, 448):
        if len(found) < 3 and refused.picture * 28 * 28 > side * side and fits(images=(side, side)):
            break
    for changes in smaller:
        if len(found) < 3:
            fits(**changes)
    return found[:3]


def kv_bytes(name: str) -> float:
    """Bytes of a key's and a value's element in this format."""
    return sum(d.nbytes / d.block for d in kv_dtypes(name))


def refusal(files: Files, want: Settings, plan_: MemoryPlan) -> PlanError:
    """The error for a plan that does not fit: its table, and what would."""
    near = alternatives(files, want, plan_)
    plan_ = replace(plan_, alternatives=tuple(near))
    return PlanError(f"{files.name} does not fit\n{plan_.table()}\n{plan_.verdict()}", plan_)


def plan(model: str | Path, n_ctx: int | None = None, device: Any = "auto", kv_dtype: str = "f16", n_batch: int = N_BATCH,
         n_threads: int | None = None, mmproj: str | Path | None = None, n_seq: int = 1, images: Any = None,
         nearest: bool = False, encoder_device: str | None = None, expert_device: str | None = None) -> MemoryPlan:
    """Count what a model will take, per device and purpose; reads headers only. Arguments are those of `load`.

    nearest: where it does not fit, look for `alternatives` too, which takes as long as some ten plans.
    Raises: ModelNotFoundError, InvalidModelError, UnsupportedModelError, RequestError.
    """
    want = Settings(n_ctx, n_batch, kv_dtype, n_seq, n_threads, images, device, encoder_device, expert_device)
    want.check()
    files = open_files(model, mmproj)
    found = lay_out_model(files, want).plan
    return replace(found, alternatives=tuple(alternatives(files, want, found))) if nearest and not found.fits else found
