"""Sizes that fit: a search over layouts of one bound model, alternatives where nothing fits, and the plan that says all this.

    files -> bind -> ModelLayout at the settings, again with other contexts where they must be smaller -> MemoryPlan

The programs that are counted here are those that `engine` loads and runs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from pyengine import hardware
from pyengine.arguments import takes
from pyengine.backends.base import check_kernels, said
from pyengine.errors import PlanError, UnsupportedModelError
from pyengine.files.model_files import open_files
from pyengine.media.views import MAX_DECODING
from pyengine.memory import held as others
from pyengine.memory.devices import choices, named, with_devices
from pyengine.memory.held import Held
from pyengine.memory.layout import ModelLayout
from pyengine.memory.plan import Alternative, amount, Headroom, MemoryPlan, MIB
from pyengine.memory.settings import is_card, Settings
from pyengine.memory.towers import plan_towers, shorter, TowersLayout
from pyengine.programs.bound import bind, Bound, with_draft
from pyengine.programs.sizes import HEAD_BYTES, kv_dtypes, N_BATCH
from pyengine.records import NamedTuple

IN_PLACE = ("mmap: {} are read where the file is mapped, in each step; the same answers, generated slower than from packed "
            "weights, and much slower where memory cannot hold all of it")
N_SEQ_LIMIT = 64                     # most conversations that the search considers
DEFAULT_CTX = 32_768                 # most positions of a context that nobody asked for
MARGIN, MARGIN_SHARE = 1 << 30, 1 / 8                        # what such a context leaves: bytes, or less where little is free


class Fitted(NamedTuple):
    """A model laid out, nothing loaded, and the plan of it."""

    layout: ModelLayout | TowersLayout
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


def margin(free: int) -> int:
    """Return the bytes that a context which nobody asked for leaves free.

    1 GiB, as llama.cpp leaves of each device (its option --fit-target), or an eighth where less than 8 GiB are free. Memory
    that is free now is not all ours: other programs grow, the system keeps files in it, and reading a picture takes up to
    1 GiB for a moment (media/views: MAX_DECODING). A plan that takes all of it fits, and is killed when its caches fill up.
    """
    return min(MARGIN, int(MARGIN_SHARE * free))


def largest_context(m: ModelLayout) -> int | None:
    """Return the largest context that fits, up to the trained one; None if no step's rows do."""
    return _largest_of(m, m.bound.n_ctx_train or m.sizes.n_ctx, m.room)


def _least_context(m: ModelLayout) -> int:
    """Return the positions of one whole step: a batch, or the largest picture."""
    picture = max(m.sizes.runs.values(), default=1) if not m.sizes.across else 1
    return min(m.sizes.n_ctx, max(m.sizes.n_batch, picture))


def _largest_of(m: ModelLayout, high: int, room: int) -> int | None:
    return _largest(lambda n: m.total_at(n, m.sizes.n_seq), _least_context(m), high, room)


def most_conversations(m: ModelLayout, limit: int) -> int | None:
    """Return how many conversations of this context fit, at most `limit`; None if not one does."""
    return _largest(lambda n: m.total_at(m.sizes.n_ctx, n), 1, limit, m.room)


def headrooms(m: ModelLayout, total: int, overhead: int) -> Iterator[Headroom]:
    """Say for each device of the machine how many layers, the last ones first, fit beside the output head and an arena. The head that predicts
    further tokens is not counted: it is left out where layers are on several devices."""
    layered = [0] * m.step.n_own
    mine = [i for i in m.items if i.program == "step" and i.purpose in ("weights", "mapped", "kv", "arena")]
    for i in mine:
        if i.layer is not None and i.layer < len(layered):
            layered[i.layer] += i.nbytes
    everything = total - overhead + m.of_purposes("mapped")
    rest = sum(i.nbytes for i in mine if i.layer is None)
    rest += sum(i.nbytes for i in m.items if i.program != "step" and i.purpose == "mapped" and i.layer is None)
    for device in m.machine.devices:
        left, n = device.free - rest, 0
        while n < len(layered) and layered[-1 - n] <= left:
            left, n = left - layered[-1 - n], n + 1
        yield Headroom(device.id, device.name, device.free, device.unified, n, everything <= device.free)


def plan_of(m: ModelLayout) -> MemoryPlan:
    """Make the plan of a layout, with what else would fit; on parts of memory that is not looked for."""
    whole, vocab, fallbacks = not m.want.parts, m.bound.model.config.vocab_size, m.prepared.fallbacks
    limit = max(m.want.n_seq, min(N_SEQ_LIMIT, HEAD_BYTES // (4 * vocab)))                     # with the same logits
    beside = [f"drafts are of {m.draft.bound.files.name}, {amount(sum(i.nbytes for i in m.items if i.program == 'draft'))} of this"] if m.draft else []
    if m.head_bytes:
        beside = [f"drafts are of the head in {Path(m.bound.files.head.path).name}, {amount(m.head_bytes)} of this"]
    in_place = [IN_PLACE.format(amount(m.of_purposes("mapped")))] if m.want.mmap else []
    notes = (*m.notes, *beside, *in_place, *compression_notes(m), *([f"{m.place} has no kernel for {said(fallbacks)}: the NumPy reference computes them, slowly"] if fallbacks else []))
    made = MemoryPlan(m.bound.files.name, m.sizes.n_ctx, m.sizes.n_batch, m.want.kv_dtype, tuple(i for i in m.items if i.nbytes),
                      m.free, m.sizes.n_seq, m.step.n_own, max(m.sizes.runs.values(), default=0),
                      cache(lambda: (largest_context(m), most_conversations(m, limit)) if whole else (None, None)), limit, notes=notes,
                      n_ctx_train=m.bound.n_ctx_train, decoding=MAX_DECODING if m.encoder else 0)
    return replace(made, rooms=tuple(headrooms(m, made.total, made.of("overhead"))))


def compression_notes(m: ModelLayout) -> Iterator[str]:
    """Say what conversations take that are compressed: while a prompt is read, and at rest."""
    policy, own = m.want.compress, m.sizes.compressed
    if own is None:
        return
    cell = sum(heads * (m.sizes.k.size(e) + m.sizes.v.size(e) + 4 * len(own.kinds)) for (heads, e), i in zip(m.step.shapes, m.step.layers)
               if i is not None and m.step.groups[i].policy.compressed)
    rest = policy.budget_of(m.sizes.n_ctx)
    if own.most:
        yield f"{policy.text}: a conversation of any length takes {own.most:,} cells at most, {amount(own.most * cell)}, and {rest:,} after each compression"
    else:
        yield (f"{policy.text}: a prompt of {m.sizes.n_ctx:,} tokens takes {amount(m.sizes.n_ctx * cell)} while it is read, then {rest:,} cells, {amount(rest * cell)}; "
               "what that frees is for other conversations")


def _largest(total: Callable[[int], int], low: int, high: int, room: int) -> int | None:
    """Find the largest n from low to high with total(n) <= room, for a total that does not fall; None if there is none.

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


def fit(bound: Bound, want: Settings, machine: hardware.Hardware | None = None, held: Sequence[Held] | None = None) -> Fitted:
    """Lay a model out and count it for this machine, beside what is `held`: by default by the other models of this process.

    Without `n_ctx`: the training context, DEFAULT_CTX positions at most, or what of it fits beside the `margin`, rounded down to 4,
    5, 6 or 7 times a power of two, so that a few bytes more or less free give the same number. Parts of memory are used to the
    last byte that they were given: there the first half, quarter ... that fits. A note of the plan says which of these it was.
    Raises: RequestError, UnsupportedModelError for settings that the model cannot have; GraphError under $PYENGINE_STRICT.
    """
    held = others.held() if held is None else held           # before free memory is measured: pages are touched meanwhile
    machine = others.beside(with_devices(machine or hardware.detect(), want), held)
    kept = () if want.parts else tuple((h.name, n) for h in held if (n := h.promised("cpu")) > 0)
    with _uncollected():
        notes: dict[str, None] = {}
        for choice in choices(want, machine, bool(bound.encoders) or bound.source is not None):
            if bound.towers and choice.parts and want.device == "auto":
                continue                                     # several devices are for layers of decoders
            try:
                found = _fitted(bound, choice, machine, kept)
            except UnsupportedModelError as error:           # what a card does not take
                if want.device != "auto" or choice.device == "cpu":
                    raise
                notes[str(error)] = None
                continue
            if found.plan.fits and (want.device != "auto" or not found.smaller):
                break
        on = [name for name in found.layout.places if is_card(name)]
        note = (f"on {', '.join(on)}, which has the memory; device='cpu' leaves it alone",) if want.device == "auto" and on else tuple(notes)
        return Fitted(found.layout, replace(found.plan, notes=(*note, *found.plan.notes)))


class _Found(NamedTuple):
    """What `Fitted` holds, and whether the context is smaller than it would be with more memory."""

    layout: ModelLayout | TowersLayout
    plan: MemoryPlan
    smaller: bool = False


def _fitted(bound: Bound, want: Settings, machine: hardware.Hardware, kept: tuple[tuple[str, int], ...]) -> _Found:
    """Lay a model out where settings say, with the context that they give or the largest that fits."""
    if bound.towers:
        towers = TowersLayout(bound, want, machine)
        return _Found(towers, plan_towers(towers, kept))

    def at(n_ctx: int) -> Fitted:
        layout = ModelLayout(bound, replace(want, n_ctx=n_ctx), machine)
        return Fitted(layout, replace(plan_of(layout), held=kept))

    found = at(want.n_ctx or min(bound.n_ctx_train, DEFAULT_CTX))
    check_kernels(found.layout.prepared, found.layout.place)
    if found.layout.draft is not None:
        check_kernels(found.layout.draft.prepared, found.layout.place)
    if want.n_ctx is not None:
        return _Found(*found)
    found, why = _of_parts(found, at) if want.parts else _beside_margin(found, at)
    n, trained = found.plan.n_ctx, bound.n_ctx_train
    note = f"context: {n:,} positions, as trained" if n == trained else f"context: {n:,} of the {trained:,} trained positions"
    note += f", {why}" if why else "" if n == trained else ", the most unless more is asked for"
    return _Found(found.layout, replace(found.plan, notes=(note, *found.plan.notes)), why != "")


def _of_parts(found: Fitted, at: Callable[[int], Fitted]) -> tuple[Fitted, str]:
    """Halve the context until it fits the given parts of memory; returns why it is what it is, "" for the default."""
    n_ctx = found.plan.n_ctx
    if found.plan.fits:
        return found, ""
    while not found.plan.fits and n_ctx > 512:
        n_ctx //= 2
        found = at(n_ctx)
    return found, "the first half, quarter .. that fits" if found.plan.fits else "which does not fit either"


def _beside_margin(found: Fitted, at: Callable[[int], Fitted]) -> tuple[Fitted, str]:
    """Make the context smaller until the margin stays free, or as small as a step; returns why it is what it is, "" for the default."""
    m, free = found.layout, found.layout.room
    if m.taken <= free - margin(free):
        return found, ""
    if n_ctx := _largest_of(m, m.sizes.n_ctx, free - margin(free)):
        return at(_rounded_down(n_ctx)), f"so that {amount(margin(free))} of the memory stay free"
    if m.total_at(_least_context(m), m.sizes.n_seq) <= free:
        return at(_least_context(m)), f"the least: not even with these {amount(margin(free))} of the memory stay free"
    return found, "and no smaller context of a whole step fits"


def _rounded_down(n_ctx: int) -> int:
    """Return the largest number of three binary digits up to n_ctx, which may have more zeros behind; n_ctx itself below 512."""
    unit = 1 << max(0, n_ctx.bit_length() - 3)
    return n_ctx // unit * unit if n_ctx >= 512 else n_ctx


def alternatives(bound: Bound, want: Settings, refused: Fitted, held: Sequence[Held] | None = None) -> list[Alternative]:
    """Find the three nearest settings that fit, each of them planned: one change first, then a smaller context with others.

    None has a context beyond the trained one; where that fits with nothing else changed, it is the only one.
    """
    found = _without_draft(bound, want, refused, held)
    smaller: list[dict[str, Any]] = []
    held = others.held() if held is None else held
    machine, was = hardware.detect(), refused.plan
    beyond = 0 < bound.n_ctx_train < was.n_ctx
    start: dict[str, Any] = {"n_ctx": bound.n_ctx_train} if beyond else {}

    def fits(**changes: Any) -> bool:
        """Plan with these changes, of the context as trained at most; note it if it fits."""
        settings = {**start, **changes}
        try:
            plan_ = fit(bound, replace(want, **{"n_ctx": was.n_ctx, **settings}), machine, held).plan
        except UnsupportedModelError:                        # a format of the cache that does not suit its heads
            return False
        if plan_.fits:
            found.append(Alternative(settings, plan_.total))
        elif plan_.max_ctx and "n_ctx" not in changes and changes:
            smaller.append({**changes, "n_ctx": _rounded_down(plan_.max_ctx)})
        return plan_.fits

    if beyond and fits(**start):
        return found
    experts = any(r.sparse for stage in refused.layout.stages for r in stage.prepared.residents.values())
    if experts and want.parts and len(want.parts) > 1 and want.expert_device is None:
        for where in want.parts:
            fits(expert_device=where)
    if was.max_ctx:
        fits(n_ctx=_rounded_down(was.max_ctx))
    for name in ("q8_0", "q4_0"):
        if _kv_bytes(name) < _kv_bytes(want.kv_dtype) and fits(kv_dtype=name):
            break
    if was.max_seq and was.max_seq < want.n_seq:
        fits(n_seq=was.max_seq)
    for rows in (was.n_batch // 4, was.n_batch // 16):
        if len(found) < 3 and rows >= 1 and fits(n_batch=rows):
            break
    image = refused.layout.bound.image
    for side in (s for s in (896, 448) if image and was.picture > image.n_rows(s, s)):
        if len(found) < 3 and fits(images=(side, side)):
            break
    if (cards := list(filter(is_card, named(want)))) and "cpu" not in named(want) and len(found) < 3:
        fits(device=dict.fromkeys([*cards, "cpu"]))
    for device in _larger(want.parts, was, machine.devices[0].free) if want.parts and not cards else ():
        if len(found) < 3 and fits(device=device):
            break
    for part in (2, 4, 8, 16) if want.parts else ():
        n_ctx = start.get("n_ctx", was.n_ctx) // part
        if len(found) < 3 and n_ctx >= 512 and fits(n_ctx=n_ctx):
            break
    for changes in smaller[:]:
        if len(found) < 3:
            fits(**changes)
    if len(found) < 3 and not want.mmap and not fits(mmap=True) and smaller and "mmap" in smaller[-1]:
        fits(**smaller[-1])
    return found[:3]


def _without_draft(bound: Bound, want: Settings, refused: Fitted, held: Sequence[Held] | None) -> list[Alternative]:
    """Say whether the model fits alone, where a draft model is to be beside it."""
    if bound.draft is None and bound.head is None:
        return []
    alone = fit(bound.without_draft(), replace(want, n_ctx=refused.plan.n_ctx), held=held).plan
    return [Alternative({"draft": None}, alone.total)] if alone.fits else []


def _others(bound: Bound, want: Settings, refused: Fitted, held: Sequence[Held] | None = None) -> list[Alternative]:
    """Find settings that fit: `alternatives` of a decoder; of towers shorter texts, or fewer at once."""
    if not bound.towers:
        return alternatives(bound, want, refused, held)
    plans = ((settings, fit(bound, settings).plan) for settings in shorter(want))
    changed = [({name: getattr(settings, name) for name in ("n_ctx", "n_batch") if getattr(settings, name) != getattr(want, name)}, found.total)
               for settings, found in plans if found.fits]
    return [Alternative(*change) for change in changed[:3]]


def _larger(parts: dict[str, int], was: MemoryPlan, free: int) -> Iterator[dict[str, int]]:
    """Give larger parts of memory in the same proportion, the least first, as far as the machine has them."""
    least = max(was.on(name) / parts[name] for name in parts)
    for times in (least, 1.05 * least, 1.25 * least, 1.5 * least, 2 * least):
        larger = {name: -int(-n * times // MIB) * MIB for name, n in parts.items()}
        if sum(larger.values()) <= free:
            yield larger


def _kv_bytes(name: str) -> float:
    """Return the bytes of a key's and a value's element together in this format."""
    return sum(d.nbytes / d.block for d in kv_dtypes(name))


def refusal(bound: Bound, want: Settings, refused: Fitted, held: Sequence[Held] | None = None) -> PlanError:
    """Make the error for a plan that does not fit: its table, and what would."""
    plan_ = replace(refused.plan, alternatives=tuple(_others(bound, want, refused, held)))
    return PlanError(plan_.refusal(), plan_)


@takes()
def plan(model: str | Path, n_ctx: int | None = None, device: Any = "auto", kv_dtype: str = "f16", n_batch: int = N_BATCH,
         n_threads: int | None = None, mmproj: str | Path | None = None, n_seq: int = 1, images: Any = None,
         nearest: bool = False, encoder_device: str | None = None, expert_device: str | None = None, mmap: bool = False,
         adapters: Any = None, compress: Any = None, speculate: Any = None, draft: str | Path | None = None) -> MemoryPlan:
    """Count what a model will take, per device and purpose; reads headers only. Arguments are those of `load`.

    What is available is what is free beside the models that this process has loaded.
    nearest: where it does not fit, look for `alternatives` too, which takes as long as some ten plans.
    Raises: ModelNotFoundError, InvalidModelError, UnsupportedModelError, RequestError.
    """
    want = Settings(n_ctx, n_batch, kv_dtype, n_seq, n_threads, images, device, encoder_device, expert_device, mmap, compress, speculate)
    want.check()
    bound = with_draft(bind(open_files(model, mmproj, adapters), want.pictures), draft)
    found = fit(bound, want)
    return replace(found.plan, alternatives=tuple(_others(bound, want, found))) if nearest and not found.plan.fits else found.plan
