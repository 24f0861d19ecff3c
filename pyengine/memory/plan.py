"""The memory plan of a model: bytes by device and purpose, before anything is loaded.

Purposes: weights (packed or copied), mapped (read where the file is mapped; the system may drop and read them again, so they
are no part of the total), kv, arena, sampler, encoder (weights and arena of the media encoder, from the first picture on), images
(encoded pictures that are kept, and the patches of one on the host), overhead (the process itself, and the headers of its files).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, field
from math import prod
from typing import Any

from pyengine.records import dataclass

MIB = 2**20
PURPOSES = "weights", "kv", "arena", "sampler", "encoder", "images", "overhead", "mapped"      # in the order of a table
SMALL = MIB // 10                    # rows below this, and below a thousandth of the total, are one row of a table


def amount(nbytes: int) -> str:
    """Return a number of bytes as a plan writes it: "241.4 MiB", and from 1 GiB on "15.26 GiB"."""
    for unit, size, digits in (("GiB", 2**30, 2), ("MiB", MIB, 1), ("KiB", 2**10, 1)):
        if nbytes >= size:
            return f"{nbytes / size:.{digits}f} {unit}"
    return f"{nbytes} bytes"


@dataclass(frozen=True)
class PlanItem:
    """`nbytes` on `device` for a `purpose`.

    layer     of the program's model, where the item belongs to one; program: "step", or the kind of an encoder
    parts     (name, bytes) that add up to `nbytes`; factors: (name, number) whose product it is; either may be empty
    """

    device: str
    purpose: str
    detail: str
    nbytes: int
    layer: int | None = None
    parts: tuple[tuple[str, int], ...] = ()
    factors: tuple[tuple[str, int], ...] = ()
    program: str = "step"

    @classmethod
    def sum(cls, device: str, purpose: str, detail: str, parts: Sequence[tuple[str, int]], layer: int | None = None,
            program: str = "step") -> PlanItem:
        """Make an item that is the sum of its parts."""
        return cls(device, purpose, detail, sum(n for _, n in parts), layer, parts=tuple(parts), program=program)

    @classmethod
    def product(cls, device: str, purpose: str, detail: str, factors: Sequence[tuple[str, int]],
                layer: int | None = None) -> PlanItem:
        """Make an item that is the product of its factors."""
        return cls(device, purpose, detail, prod(n for _, n in factors), layer, factors=tuple(factors))


@dataclass(frozen=True)
class Headroom:
    """A device of this machine and how much of the model it could hold.

    device     "cpu", "cuda:0"; unified: its memory is the CPU's
    n_layers   the model's last layers, each with its weights and its part of the caches, that fit beside the head and an arena
    whole      whether everything would fit
    """

    device: str
    name: str
    free: int
    unified: bool
    n_layers: int
    whole: bool


@dataclass(frozen=True)
class Alternative:
    """Other settings, planned and found to fit: `settings` are arguments of `plan` and `load`."""

    settings: dict[str, Any]
    total: int

    def __str__(self) -> str:
        return f"{', '.join(f'{k}={v!r}' for k, v in self.settings.items())}: {amount(self.total)}"

    def options(self) -> str:
        """Say the same in options of the command: "--ctx 34560: 15.26 GiB"."""
        return f"{' '.join(_option(k, v) for k, v in self.settings.items())}: {amount(self.total)}"


def _option(name: str, value: Any) -> str:
    if name == "device":
        parts = {value: None} if isinstance(value, str) else value
        return " ".join(f"--device {part}" + (f"={nbytes / MIB:.0f}MiB" if nbytes else "") for part, nbytes in parts.items())
    if name == "draft":
        return "without --draft"
    if name == "images":
        return f"--picture {value[0]}x{value[1]}"
    if value is True:
        return f"--{name}"
    return f"--{ {'n_ctx': 'ctx', 'n_seq': 'seq', 'n_batch': 'batch'}.get(name, name.replace('_', '-'))} {value}"


@dataclass(frozen=True)
class MemoryPlan:
    """What a model takes with these settings.

    available   bytes that each device used could give when the plan was made
    picture     most soft tokens of one run of the encoder: 0 without one
    search      finds `max_ctx` and `max_seq` when they are first asked for: a model answers sooner
    seq_limit   as far as `max_seq` is looked for
    rooms       all devices of the machine and what they could hold
    notes       what was chosen because it was not given, and why
    alternatives  of a plan that was refused: the nearest settings that fit
    n_ctx_train positions that the model was trained for
    decoding    most bytes that reading a picture's file takes for a moment, no part of `total`; 0 where there are no pictures
    held        other models of this process, and bytes that look free and are kept for each by its own plan: no part of `available`
    """

    model: str
    n_ctx: int
    n_batch: int
    kv_dtype: str
    items: tuple[PlanItem, ...]
    available: dict[str, int]
    n_seq: int = 1
    n_layers: int = 0
    picture: int = 0
    search: Callable[[], tuple[int | None, int | None]] = field(default=lambda: (None, None), repr=False, compare=False)
    seq_limit: int = 1
    rooms: tuple[Headroom, ...] = ()
    notes: tuple[str, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    n_ctx_train: int = 0
    decoding: int = 0
    held: tuple[tuple[str, int], ...] = ()

    def __repr__(self) -> str:
        free = sum(self.available.values())
        sizes = f"context {self.n_ctx}{f' x {self.n_seq}' if self.n_seq > 1 else ''}, kv {self.kv_dtype}" if self.kv_dtype else f"texts of {self.n_ctx}"
        return (f"MemoryPlan({self.model}: {sizes}, {self.total / MIB:.1f} of {free / MIB:.0f} MiB, {'fits' if self.fits else 'does not fit'})")

    @property
    def max_ctx(self) -> int | None:
        """The largest context, up to the trained one, that fits with all else as it is, the largest picture too; None if none does."""
        return self.search()[0]

    @property
    def max_seq(self) -> int | None:
        """Conversations that fit so, at most `seq_limit`."""
        return self.search()[1]

    @property
    def total(self) -> int:
        """All bytes that are taken; mapped weights are not, the system may drop and read them again."""
        return sum(i.nbytes for i in self.items if i.purpose != "mapped")

    def of(self, purpose: str, device: str | None = None) -> int:
        """Sum the bytes of one purpose, on one device or on all."""
        return sum(i.nbytes for i in self.items if i.purpose == purpose and device in (None, i.device))

    def on(self, device: str) -> int:
        """Sum all bytes that are taken on a device."""
        return sum(i.nbytes for i in self.items if i.purpose != "mapped" and i.device == device)

    @property
    def devices(self) -> list[str]:
        """The devices that hold something, in the order in which they were given."""
        holding = {i.device for i in self.items}
        return [d for d in self.available if d in holding]

    @property
    def fits(self) -> bool:
        """Whether each device has enough free memory."""
        return all(self.on(d) <= self.available[d] for d in self.devices)

    def to_json(self) -> dict[str, Any]:
        """Return plain data for `--json`."""
        found = {name: value for name, value in asdict(self).items() if name != "search"}
        return {**found, "max_ctx": self.max_ctx, "max_seq": self.max_seq, "total": self.total, "fits": self.fits}

    def lines(self) -> list[tuple[str, str, int, str]]:
        """Return (device, purpose, bytes, detail) with the layers of the same kind added up."""
        groups: dict[tuple[str, str, str], list[PlanItem]] = {}
        for i in self.items:
            groups.setdefault((i.device, i.purpose, i.detail), []).append(i)
        return [(*where, sum(i.nbytes for i in same), detail + (f" ({n} layer{'s' * (n > 1)})" if same[0].layer is not None else ""))
                for (*where, detail), same in groups.items() for n in [len({i.layer for i in same})]]

    def table(self) -> str:
        """Format the plan as text: whether it fits, one line a purpose, then what else would fit and where."""
        lines = [f"  {line}" for line in (*self._rows(), *self._what_fits(), *self.notes)]
        return "\n".join([self.heading(), self.verdict(), *lines])

    def heading(self) -> str:
        """Name the model and the settings; a model without caches (kv_dtype "") has none of a decoder's."""
        if not self.kv_dtype:
            texts = [f"texts of up to {self.n_ctx:,} tokens, {self.n_batch:,} a run"] if self.n_ctx else []
            return f"{self.model}: {'; '.join([*texts, *(['pictures'] if self.picture else [])])}"
        times = f" x {self.n_seq} conversations" if self.n_seq > 1 else ""
        return f"{self.model}: context {self.n_ctx:,}{times}, batch {self.n_batch:,}, kv {self.kv_dtype}"

    def verdict(self) -> str:
        """Say whether it fits, in what room: "fits: 10.12 GiB of 17.04 GiB available"."""
        each = [f"{d} {amount(self.on(d))} of {amount(self.available[d])}" for d in self.devices]
        if len(each) == 1:
            room = self.available[self.devices[0]]
            each = [f"{amount(self.total)} of {amount(room)} {'available' if self.devices[0] == 'cpu' else f'on {self.devices[0]}'}"]
        return f"{'fits' if self.fits else 'does not fit'}: {', '.join(each)}"

    def _rows(self) -> Iterator[str]:
        """Give the rows of bytes; a purpose is named once, and what is too small to matter is one row a device."""
        shown: dict[str, list[tuple[str, int, str]]] = {d: [] for d in self.devices}
        small: dict[str, list[tuple[int, str]]] = {d: [] for d in self.devices}
        for device, purpose, n, detail in self.lines():
            if n < SMALL and n * 1000 < self.total:
                small[device].append((0 if purpose == "mapped" else n, detail))
            else:
                shown[device].append((purpose, n, detail))
        for device, rows in shown.items():
            rows.sort(key=lambda row: PURPOSES.index(row[0]))
            if rest := small[device]:
                rows.append(("rest", sum(n for n, _ in rest), "; ".join(detail for _, detail in rest)))
            last = ""
            for purpose, n, detail in rows:
                where = f"{device:6} " if len(shown) > 1 else ""
                aside = " (read in place: not counted)" if purpose == "mapped" else ""
                yield f"{where}{'' if purpose == last else purpose:8} {amount(n):>11}  {detail}{aside}"
                last = purpose
        yield f"{'' if len(shown) < 2 else ' ' * 7}{'total':8} {amount(self.total):>11}"

    def _what_fits(self) -> Iterator[str]:
        if self.picture:
            yield f"image tokens at once: up to {self.picture:,}"
        if self.decoding:
            left = max(0, min(self.available[d] - self.on(d) for d in self.devices))
            yield (f"reading a picture takes more for a moment, about 7 bytes a pixel of its file, at most {amount(self.decoding)} "
                   f"(not counted; {amount(left)} left)")
        if self.held:
            yield f"available beside the other models of this process, for which {self._kept()} more are kept"
        trained = self.n_ctx_train
        if 0 < trained < self.n_ctx and self.kv_dtype:
            yield f"a context of {self.n_ctx:,} is more than the {trained:,} positions that the model was trained for: expect nonsense beyond"
        if self.max_ctx is not None:
            yield (f"largest context that fits: {self.max_ctx:,}"
                   + (", all that the model was trained for" if self.max_ctx == trained else
                      f", of the {trained:,} that the model was trained for" if self.max_ctx < trained else ""))
        if self.max_seq:
            yield f"parallel conversations that fit: {self.max_seq}{'+' if self.max_seq == self.seq_limit else ''}"
        for room in self.rooms:
            holds = "all of it" if room.whole else f"{room.n_layers} of {self.n_layers} layers"
            if room.device not in self.available and (room.whole or self.n_layers):
                yield f"{room.device} ({room.name}, {amount(room.free)} available) could hold {holds}"

    def _kept(self) -> str:
        """Say what is kept for others: "1.50 GiB (a: 1.20 GiB, b: 307.2 MiB)"."""
        return f"{amount(sum(n for _, n in self.held))} ({', '.join(f'{name}: {amount(n)}' for name, n in self.held)})"

    def advice(self, options: bool = False) -> str:
        """Say what would fit, if that was searched for; "" for a plan that fits. options: in options of the command."""
        if self.fits:
            return ""
        if self.alternatives:
            return "\n".join(["these would fit:", *(f"  {a.options() if options else a}" for a in self.alternatives)])
        small = [f"{d} has {amount(self.available[d])} and needs {amount(self.on(d))}" for d in self.devices if self.on(d) > self.available[d]]
        parts = f"the parts of memory that were given are too small: {', '.join(small)}; " if set(self.available) != {"cpu"} else ""
        alone = f"its weights alone take {amount(self.of('weights'))}: " if self.of("weights") > sum(self.available.values()) else ""
        return f"{parts}no setting near it fits; {alone}take a smaller model, or a file with fewer bits a weight"

    def refusal(self, options: bool = False) -> str:
        """Say all of this of a model that is not loaded. options: in options of the command."""
        return f"{self.table()}\n{self.advice(options)}"

    def explain(self) -> str:
        """Show the arithmetic, term by term: each item's parts or factors, equal layers once, then the sum of the items."""
        lines: list[str] = []
        for same in self._equal():
            i = same[0]
            layers = "" if i.layer is None else f", layer{'s' * (len(same) > 1)} {_ranges([j.layer or 0 for j in same])}"
            where, each = f"{i.device} {i.purpose}, {i.detail}{layers}", " each" if len(same) > 1 else ""
            parts = _of_any_layer(i) if each else i.parts
            if i.factors:
                lines.append(f"{where}: {' x '.join(f'{n} {name}' for name, n in i.factors)} = {i.nbytes}{each}")
            elif len(parts) == 1:
                lines.append(f"{where}: {parts[0][0]} = {i.nbytes}{each}")
            elif parts:
                lines += [f"{where}:", *(f"{n:>16}  {name}" for name, n in parts), f"{i.nbytes:>16}  = sum{each}"]
            else:
                lines.append(f"{where}: {i.nbytes}{each}")
        for device in self.devices:
            taken = [(n, f"{purpose}, {detail}") for d, purpose, n, detail in self.lines() if d == device and purpose != "mapped"]
            lines += [f"{device}, all bytes that are taken:", *(f"{n:>16}  {what}" for n, what in taken)]
            lines.append(f"{self.on(device):>16}  = sum")
        return "\n".join(lines)

    def _equal(self) -> list[list[PlanItem]]:
        """Group the items that differ in nothing but their layer."""
        groups: dict[Any, list[PlanItem]] = {}
        for at, i in enumerate(self.items):
            key = at if i.layer is None else (i.device, i.purpose, i.detail, i.program, i.factors, _of_any_layer(i))
            groups.setdefault(key, []).append(i)
        return list(groups.values())


def _of_any_layer(item: PlanItem) -> tuple[tuple[str, int], ...]:
    """Return an item's parts with N in place of its layer's number: "blk.N.attn_q.weight"."""
    return tuple((name.replace(f".{item.layer}.", ".N.", 1), n) for name, n in item.parts)


def _ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers shortly: "0, 2, 4-7"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], n]
        else:
            runs.append([n])
    return ", ".join("-".join(map(str, run)) for run in runs)
