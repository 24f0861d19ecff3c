"""The memory plan of a model: bytes by device and purpose, before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PlanItem:
    """`nbytes` on `device` for a `purpose`: weights, mapped (read where the file is mapped), kv, arena."""

    device: str
    purpose: str
    detail: str
    nbytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """What a model takes with these settings. `available` is what the devices could give when the plan was made."""

    model: str
    n_ctx: int
    n_batch: int
    kv_dtype: str
    items: tuple[PlanItem, ...]
    available: dict[str, int]

    @property
    def total(self) -> int:
        """All bytes that are allocated; mapped weights are not, the system may drop and read them again."""
        return sum(i.nbytes for i in self.items if i.purpose != "mapped")

    def of(self, purpose: str) -> int:
        """Bytes of one purpose on all devices."""
        return sum(i.nbytes for i in self.items if i.purpose == purpose)

    @property
    def fits(self) -> bool:
        """Whether each device has room."""
        need: dict[str, int] = {}
        for i in self.items:
            if i.purpose != "mapped":
                need[i.device] = need.get(i.device, 0) + i.nbytes
        return all(n <= self.available[d] for d, n in need.items())

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {**asdict(self), "items": [asdict(i) for i in self.items], "total": self.total, "fits": self.fits}

    def table(self) -> str:
        """The plan as text, one line a purpose; layers of the same kind are added up."""
        groups: dict[tuple[str, str, str], list[int]] = {}
        for i in self.items:
            groups.setdefault((i.device, i.purpose, i.detail), []).append(i.nbytes)
        lines = [f"{self.model}: context {self.n_ctx}, batch {self.n_batch}, kv {self.kv_dtype}"]
        for (device, purpose, detail), sizes in groups.items():
            times = f" ({len(sizes)} layers)" if purpose == "kv" else ""
            lines.append(f"  {device:6} {purpose:8} {sum(sizes) / 2**20:10.1f} MiB  {detail}{times}")
        lines.append(f"  total           {self.total / 2**20:10.1f} MiB  of " +
                     ", ".join(f"{n / 2**20:.0f} MiB free on {d}" for d, n in self.available.items()))
        return "\n".join(lines)
