"""The memory plan of a model: bytes by device and purpose, before anything is loaded.

Purposes: weights (packed or copied), mapped (read where the file is mapped; the system may drop and read them again, so they
are no part of the total), kv, arena, sampler, encoder (weights and arena of the media encoder, from the first picture on), images
(encoded pictures that are kept, and the patches of one on the host), overhead (the process itself, and the headers of its files).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

MIB = 2**20


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
        return f"{', '.join(f'{k}={v!r}' for k, v in self.settings.items())}: {self.total / MIB:.1f} MiB"


@dataclass(frozen=True)
class MemoryPlan:
    """What a model takes with these settings.

    available   bytes that each device used could give when the plan was made
    picture     most soft tokens of one run of the encoder: 0 without one
    max_ctx     largest context, up to the trained one, that fits with all else as it is, the largest picture too; None if none does
    max_seq     conversations that fit so, at most `seq_limit`, which is as far as was looked
    rooms       all devices of the machine and what they could hold
    notes       what was chosen because it was not given, and why
    alternatives  of a plan that was refused: the nearest settings that fit
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
    max_ctx: int | None = None
    max_seq: int | None = None
    seq_limit: int = 1
    rooms: tuple[Headroom, ...] = ()
    notes: tuple[str, ...] = ()
    alternatives: tuple[Alternative, ...] = ()

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
        """The devices that hold something, in the order of the items."""
        return list(dict.fromkeys(i.device for i in self.items))

    @property
    def fits(self) -> bool:
        """Whether each device has enough free memory."""
        return all(self.on(d) <= self.available[d] for d in self.devices)

    def to_json(self) -> dict[str, Any]:
        """Return plain data for `--json`."""
        return {**asdict(self), "total": self.total, "fits": self.fits}

    def lines(self) -> list[tuple[str, str, int, str]]:
        """Return (device, purpose, bytes, detail) with the layers of the same kind added up."""
        groups: dict[tuple[str, str, str], list[PlanItem]] = {}
        for i in self.items:
            groups.setdefault((i.device, i.purpose, i.detail), []).append(i)
        return [(*where, sum(i.nbytes for i in same), detail + (f" ({len(same)} layers)" if same[0].layer is not None else ""))
                for (*where, detail), same in groups.items()]

    def table(self) -> str:
        """Format the plan as text: one line a purpose, then what fits and where."""
        times = f" x {self.n_seq} conversations" if self.n_seq > 1 else ""
        lines = [f"{self.model}: context {self.n_ctx}{times}, batch {self.n_batch}, kv {self.kv_dtype}"]
        lines += [f"  {device:6} {purpose:8} {n / MIB:10.1f} MiB  {detail}" for device, purpose, n, detail in self.lines()]
        free = ", ".join(f"{n / MIB:.0f} MiB free on {d}" for d, n in self.available.items())
        lines.append(f"  total           {self.total / MIB:10.1f} MiB  of {free}")
        return "\n".join([*lines, *(f"  {line}" for line in self._what_fits()), *(f"  {note}" for note in self.notes)])

    def _what_fits(self) -> Iterator[str]:
        if self.max_ctx is not None:
            pictures = f", with up to {self.picture} soft tokens of a picture at once" if self.picture else ""
            yield f"largest context that fits: {self.max_ctx}{pictures}"
        if self.max_seq:
            yield f"conversations that fit: {self.max_seq}" + (" or more" if self.max_seq == self.seq_limit else "")
        for room in self.rooms:
            holds = "all of it" if room.whole else f"{room.n_layers} of {self.n_layers} layers"
            if room.device not in self.available:
                yield f"{room.device} ({room.name}, {room.free / MIB:.0f} MiB free) could hold {holds}"

    def explain(self) -> str:
        """Show the arithmetic, term by term: each item's parts or factors, then the sum of the items."""
        lines: list[str] = []
        for i in self.items:
            where = f"{i.device} {i.purpose}, {i.detail}" + ("" if i.layer is None else f", layer {i.layer}")
            if i.factors:
                lines.append(f"{where}: {' x '.join(f'{n} {name}' for name, n in i.factors)} = {i.nbytes}")
            elif len(i.parts) == 1:
                lines.append(f"{where}: {i.parts[0][0]} = {i.nbytes}")
            elif i.parts:
                lines += [f"{where}:", *(f"{n:>16}  {name}" for name, n in i.parts), f"{i.nbytes:>16}  = sum"]
            else:
                lines.append(f"{where}: {i.nbytes}")
        for device in self.devices:
            taken = [(n, f"{purpose}, {detail}") for d, purpose, n, detail in self.lines() if d == device and purpose != "mapped"]
            lines += [f"{device}, all bytes that are taken:", *(f"{n:>16}  {what}" for n, what in taken)]
            lines.append(f"{self.on(device):>16}  = sum")
        return "\n".join(lines)

    def verdict(self) -> str:
        """Say whether it fits, and what would if that was searched for."""
        if self.fits:
            return "  fits"
        if not self.alternatives:
            return "  does not fit; nothing near does: take a smaller model, or a file with fewer bits a weight"
        return "\n".join(["  does not fit; these would:", *(f"    {a}" for a in self.alternatives)])
