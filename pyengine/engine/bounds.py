"""When conversations are compressed: after each prompt, or whenever the cells that their policy leaves them are taken.

Both are places in a conversation that no cut of its prompt into steps, and nobody who is served beside it, can move. While a prompt is
read, cells are let go of between pictures, not within one (structure-aware, picture by picture: arXiv:2604.16734): where the cells that are
left do not hold the next picture, they are compressed before it. A picture that needs more than a compression frees is cut where
they are taken.
"""

from __future__ import annotations

from typing import NamedTuple, TYPE_CHECKING

from pyengine.cache import eviction
from pyengine.cache.cells import Conversation
from pyengine.cache.store import Store
from pyengine.errors import ContextOverflowError, RequestError
from pyengine.programs.rows import Rows
from pyengine.programs.sizes import cells_of_budget
from pyengine.programs.step import Step, Work

if TYPE_CHECKING:
    from pyengine.cache.compression.base import Compression

UNBOUNDED = 1 << 30


class Section(NamedTuple):
    """A part of a prompt that is read between two compressions of a conversation that grows.

    due   whether one comes before its first row
    stop  the row before which the next one comes, which may be behind the prompt's end
    """

    due: bool
    stop: int


class Bounds:
    """The cells of conversations that are compressed, by n_threads."""

    def __init__(self, step: Step, store: Store, n_threads: int):
        self.sizes, self.store, self.atom, self.n_threads = step.sizes, store, step.sizes.atomic_rows, n_threads
        self.groups = [i for i, g in enumerate(step.groups) if g.policy.compressed]

    @property
    def bounded(self) -> bool:
        """Whether there are fewer cells than positions for a conversation, so that each is compressed as it grows."""
        return self.sizes.compressed is not None and self.sizes.compressed.most > 0

    def _count(self, rows: Rows) -> None:
        """Note in a prompt how much its rows count in sums of attention."""
        rows.counts = eviction.prompt_counts(rows.compression, self.sizes.compressed.kinds, rows.ids >= 0)

    def running(self, s: Conversation) -> bool:
        """Say whether a conversation is compressed as it grows, and not after its prompts."""
        policy: Compression | None = s.compression           # type: ignore[assignment]
        return policy is not None and (self.bounded or policy.when == "always")

    def serves(self, policy: Compression) -> bool:
        """Say whether the step makes what a policy reads, and layers can keep different numbers of cells if it wants them to."""
        there = self.sizes.compressed
        return there is not None and eviction.columns(policy, there.kinds) is not None and (there.pooled or not policy.uneven)

    def check(self, policy: Compression) -> None:
        """Check that a conversation can be compressed so in the cells that there are. Raises: RequestError."""
        budget, most = policy.budget_of(self.sizes.n_ctx), self.room(None)
        if most < self.sizes.n_ctx and budget + max(1, self.atom) > most:
            read = f", {self.atom} of them for a picture that is read in one step" if self.atom > 1 else ""
            raise RequestError(f"compress={policy!r}: leaves {budget} cells, and the model was loaded with {most} a conversation{read}; give a smaller budget")

    def room(self, policy: Compression | None) -> int:
        """Return how many tokens a conversation may have that is compressed so: where there are cells for a part of them only, the others are as many."""
        return self.sizes.n_ctx if policy is not None or not self.bounded else self.sizes.compressed.cells(self.sizes.n_ctx)

    def check_prompt(self, rows: Rows) -> None:
        """Check that a prompt can be read in the cells that there are. Raises: ContextOverflowError; RequestError where the model was laid out anew for
        another policy since it was asked for."""
        if rows.compression is not None:
            if not self.serves(rows.compression):
                raise RequestError(f"compress={rows.compression!r}: the model has been laid out for other policies since this was asked for; ask again")
            self.check(rows.compression)
        elif len(rows) > self.room(None):
            raise ContextOverflowError(f"{len(rows)} cells are needed, and a conversation has {self.room(None)}: ask with a policy of compression, or for less")

    def limit(self, s: Conversation) -> tuple[int, int]:
        """Return (cells that a growing conversation may have, those that a compression leaves)."""
        budget = s.compression.budget_of(self.sizes.n_ctx)   # type: ignore[union-attr]
        return min(self.sizes.compressed.cells(self.sizes.n_ctx), cells_of_budget(budget, self.atom)), budget

    def filled(self, s: Conversation) -> int:
        """Return how many cells of each layer a conversation has, in the mean."""
        return sum(self.store.cells.filled(i, s) for i in self.groups) // len(self.groups)

    def section(self, s: Conversation, rows: Rows, start: int) -> Section:
        """Find the section that the rows from `start` on are of, in a conversation that has all before. It is the same for all of its rows."""
        limit, budget = self.limit(s)
        filled = self.filled(s)
        due = filled > budget and filled + next((len(m) for first, m in rows.media if first == start), 1) > limit
        filled = budget if due else filled
        stop = start + limit - filled
        for first, m in rows.media:                          # compressed before it, where that frees cells
            if start < first < stop < first + len(m) and filled + first - start > budget:
                stop = first
        return Section(due, stop)

    def most(self, s: Conversation, rows: Rows, start: int) -> int:
        """Return how many rows from `start` on the next step may add to a conversation."""
        return self.section(s, rows, start).stop - start if self.running(s) else UNBOUNDED

    def counted(self, part: Work) -> Work:
        """Make room for a part of a step where a conversation is compressed as it grows; returns the part with what its rows count in sums of attention."""
        s, kinds = part.conversation, self.sizes.compressed.kinds
        if not len(s):
            eviction.clear(self.store, s)
        if not self.running(s):
            if part.rows.compression is None:                # of an answer
                return part
            if part.rows.counts is None or part.rows.counts.shape[1] != len(kinds):
                self._count(part.rows)
            return part._replace(counts=part.rows.counts[part.start : part.stop])
        due, stop = self.section(s, part.rows, part.start)
        if due:
            limit, budget = self.limit(s)
            eviction.compress(self.store, s, s.compression, budget, self.n_threads, limit - budget)
        picture = max((first for first, _ in part.rows.media if first < stop), default=0)
        counts = eviction.running_counts(s.compression, kinds, part.rows.ids >= 0, stop, picture)
        return part._replace(counts=counts[part.start : part.stop])

    def after_prompt(self, s: Conversation) -> None:
        """Let go of cells of a conversation that is compressed after its prompts."""
        if s.compression is not None and not self.running(s):
            eviction.compress(self.store, s, s.compression, s.compression.budget_of(len(s)), self.n_threads)
