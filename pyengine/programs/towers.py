"""Runs of towers: declared for the largest one, and filled with texts side by side or with one picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyengine.backends.base import Declared, Program
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Dim
from pyengine.models.architecture import HIDDEN, ImageTower, LOGITS, TextTower
from pyengine.nn.texts import Seen, Texts
from pyengine.programs.sizes import HEAD_BYTES
from pyengine.records import NamedTuple

WANTED = "wanted"                        # the input that says whose logits are computed, and the entry at which it is first read
ENDS = "lo", "hi", "lo.run", "hi.run"   # inputs of `Seen`
N_TEXTS = 256                            # of one run, at most


class Text(NamedTuple):
    """A text for a run: its ids, and the first of those that are a pair's second part, their number where there is none."""

    ids: tuple[int, ...]
    second: int


def heads(tower: TextTower, rows: int) -> int:
    """Return of how many rows logits are computed at once."""
    return max(1, min(rows, HEAD_BYTES // (4 * tower.n_logits))) if tower.n_logits else 1


class Declaration(NamedTuple):
    """A tower's program, and what its outputs are."""

    declared: Declared
    outputs: tuple[str, ...]


def _named(outputs: dict[str, object]) -> tuple[str, ...]:
    """Return the outputs' names, hidden states first."""
    return HIDDEN, *(name for name in outputs if name != HIDDEN)


def declare_texts(tower: TextTower, longest: int, rows: int) -> Declaration:
    """Declare a run of texts of at most `longest` rows each, and `rows` together."""
    g = Graph()
    m, p, n = Dim("m", rows), Dim("p", min(rows, N_TEXTS)), Dim("l", heads(tower, rows))
    ids, positions, types, seq = (g.input(name, (m,), "I32") for name in ("ids", "positions", "types", "seq"))
    first, end, at = (g.input(name, (p,), "I32") for name in ("first", "end", "at"))

    def seen(mark: str) -> Seen:
        return Seen(*(g.input(f"{name}{mark}", (m,), "I32") for name in ENDS))

    outputs = tower.declare(Texts(ids, positions, types, seq, g.input("table", (p, longest), "I32"), seen(""), {w: seen(f".{w}") for w in tower.windows},
                                  first, end, at, g.input(WANTED, (n,), "I32")))
    names = _named(outputs)
    return Declaration(Declared([outputs[name] for name in names], {WANTED: (WANTED,)} if LOGITS in outputs else {}), names)


def declare_picture(tower: ImageTower, rows: int) -> Declaration:
    """Declare a run of a picture of at most `rows` rows."""
    outputs = tower.declare(Graph(), rows)
    names = _named(outputs)
    return Declaration(Declared([outputs[name] for name in names]), names)


class TextRun:
    """A tower's program for texts, loaded."""

    def __init__(self, tower: TextTower, program: Program, names: Sequence[str], rows: int):
        self.tower, self.program, self.rows = tower, program, rows
        self.numbers = {name: i for i, name in enumerate(names)}
        self._m = self._p = 0

    def fits(self, texts: Sequence[Text], another: Text) -> bool:
        """Say whether another text goes into the run of these."""
        return len(texts) < min(self.rows, N_TEXTS) and sum(len(t.ids) for t in texts) + len(another.ids) <= self.rows

    def run(self, texts: Sequence[Text]) -> None:
        """Compute texts that fit."""
        tower, lengths = self.tower, np.array([len(t.ids) for t in texts], np.int32)
        ends = np.cumsum(lengths, dtype=np.int32)
        firsts = ends - lengths
        rows = np.arange(ends[-1], dtype=np.int32)
        start, length = np.repeat(firsts, lengths), np.repeat(lengths, lengths)
        positions = rows - start
        self._put("ids", np.concatenate([np.array(t.ids, np.int32) for t in texts]))
        self._put("positions", positions)
        self._put("types", np.concatenate([np.arange(len(t.ids)) >= t.second for t in texts]))
        self._put("seq", np.repeat(np.arange(len(texts), dtype=np.int32), lengths))
        if "table" in self.program.inputs:
            for line, first, n in zip(self.program.inputs["table"], firsts, lengths):
                line[:n] = np.arange(first, first + n, dtype=np.int32)
        for width in (0, *tower.windows):
            lo = np.maximum(0, positions - width) if width else np.zeros_like(positions)
            hi = np.minimum(length, positions + width + 1) if width else length
            hi = np.minimum(hi, positions + 1) if tower.causal else hi
            for name, values in zip(ENDS, (lo, hi, lo + start, hi + start)):
                self._put(f"{name}.{width}" if width else name, values)
        self._put("first", firsts)
        self._put("end", ends)
        self._put("at", firsts + np.array([tower.place(t.ids) for t in texts], np.int32))
        self._m, self._p = int(ends[-1]), len(texts)
        self.program.execute(m=self._m, p=self._p, l=0)

    def _put(self, name: str, values: np.ndarray) -> None:
        if name in self.program.inputs:                      # what the model never reads is left out of its program
            self.program.inputs[name][: len(values)] = values

    def logits(self, row: int, n: int) -> np.ndarray:
        """Compute the logits of n rows of the last run, as many at once as the program has room for, [n, n_logits]."""
        step, out = heads(self.tower, self.rows), []
        for start in range(row, row + n, step):
            part = np.arange(start, min(start + step, row + n), dtype=np.int32)
            self._put(WANTED, part)
            self.program.execute(WANTED, m=self._m, p=self._p, l=len(part))
            out.append(self.program.read(self.numbers[LOGITS], 0, len(part)).copy())
        return np.concatenate(out) if out else np.empty((0, self.tower.n_logits), np.float32)

    def read(self, name: str, first: int, n: int) -> np.ndarray:
        """Return rows of an output of the last run, valid until the next one."""
        return self.program.read(self.numbers[name], first, n)
