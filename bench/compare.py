"""Two result files: which scores fell by more than noise.

A score is a ratio or a share of a limit measured in the same run, higher is better, so files of different days can be compared.
A score has fallen when its median lost more than twice both spreads together, and more than 5%.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LEAST = 0.05                                                                   # a smaller loss is never a regression
SPREADS = 2.0


@dataclass(frozen=True)
class Change:
    """One result in both files; `loss` is the part of the old score that is gone, `noise` what may be chance."""

    name: str
    old: float
    new: float
    noise: float

    @property
    def loss(self) -> float:
        return 1 - self.new / self.old

    @property
    def regressed(self) -> bool:
        return self.loss > max(LEAST, self.noise)


@dataclass(frozen=True)
class Comparison:
    """What two files say about the same names, and names that only one of them has."""

    changes: tuple[Change, ...]
    only_old: tuple[str, ...]
    only_new: tuple[str, ...]
    wrong: tuple[str, ...]                                                     # results that failed their check in the new file

    @property
    def regressions(self) -> list[Change]:
        return sorted((c for c in self.changes if c.regressed), key=lambda c: -c.loss)

    @property
    def failed(self) -> bool:
        return bool(self.regressions or self.wrong or self.only_old)

    def text(self) -> str:
        """Format the comparison for a person: regressions first, then what is missing or wrong."""
        lines = [f"regressed {c.name}: {c.old:.3f} -> {c.new:.3f} (-{c.loss:.1%}, noise {c.noise:.1%})" for c in self.regressions]
        lines += [f"wrong result: {name}" for name in self.wrong]
        lines += [f"no longer measured: {name}" for name in self.only_old]
        better = sum(-c.loss > max(LEAST, c.noise) for c in self.changes)
        lines.append(f"{len(self.changes)} compared, {len(self.regressions)} regressed, {better} better, {len(self.only_new)} new")
        return "\n".join(lines)


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Comparison:
    """Compare the results of two files of the same suite. Raises ValueError for different suites."""
    if old["suite"] != new["suite"]:
        raise ValueError(f"one file is of suite '{old['suite']}', the other of '{new['suite']}'")
    before, after = ({r["name"]: r for r in f["results"]} for f in (old, new))
    changes = []
    for name, r in after.items():
        if name in before:
            a, b = before[name]["score"], r["score"]
            changes.append(Change(name, a["median"], b["median"], SPREADS * (a["spread"] + b["spread"])))
    return Comparison(tuple(changes), tuple(n for n in before if n not in after), tuple(n for n in after if n not in before),
                      tuple(n for n, r in after.items() if not r.get("correct", True)))
