"""How a kind of layer sees: a policy owns the cells that it needs, the first key that a token sees, and what a step brings for it.

A query sees an interval of earlier tokens, so a mask is two numbers a row, and a cache is a ring of cells: token j of a
conversation lies in cell table[j % len(table)]. Layers that attend across, to an encoder's rows, number those rows instead.
Recurrent layers keep one state of fixed size, and copies of it that were left behind some tokens (`snapshots_in`, `thinned`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from pyengine.dtype import GROUP
from pyengine.records import dataclass, NamedTuple


class InputSpec(NamedTuple):
    """An int32 input of a step that belongs to the layers of one policy.

    axis  whose rows it describes: "m" all rows of the step, "c" encoder rows that are added, "s" rows that see encoder rows, "z" groups
          of tokens that are written
    """

    name: str
    axis: str


@dataclass(frozen=True)
class Policy:
    """What a layer keeps of a conversation. Layers whose policies are equal share a table of cells.

    paged      cells come from a pool of pages, and conversations with a common beginning share them; else each has a ring
    across     the cells hold an encoder's rows, not tokens
    recurrent  a cell holds a state: what all tokens up to one have left
    spans      rows of a non-causal span see it whole
    whole      every earlier token is seen
    compressed cells may be fewer than tokens: a cell is kept of some, and numbers of keys count those cells
    pooled     layers take their cells from one pool, each as many as it needs
    stays      what a ring holds is never written over
    """

    paged: ClassVar[bool] = True
    whole: ClassVar[bool] = False
    compressed: ClassVar[bool] = False
    pooled: ClassVar[bool] = False
    stays: ClassVar[bool] = False
    across: ClassVar[bool] = False
    recurrent: ClassVar[bool] = False
    spans: ClassVar[bool] = True

    @property
    def parts(self) -> tuple[Policy, ...]:
        """What else a layer keeps, by policies of its own: tokens in full beside those in groups."""
        return ()

    @property
    def drafted(self) -> int:
        """How many cells there are beside those of conversations, for tokens that may be taken back."""
        return 0

    @property
    def ring(self) -> bool:
        """Whether each conversation has a ring of cells of its own."""
        return not self.paged and not self.recurrent

    @property
    def name(self) -> str:
        """Its name within the names of inputs."""
        return type(self).__name__.lower()

    def slots(self, n_ctx: int, n_batch: int) -> int:
        """Return the cells of one conversation of at most n_ctx tokens, in steps of at most n_batch rows."""
        raise NotImplementedError

    def first(self, n: Any) -> Any:
        """Return the first token that token n sees, or of an array of numbers each one's: all else follows from this rule."""
        raise NotImplementedError

    def first_of(self, n: int) -> int:
        """Return `first` of a single token."""
        return int(self.first(n))

    def seen(self, n: int) -> np.ndarray:
        """Return the numbers of those of n tokens, or encoder rows, that later tokens may see."""
        return np.arange(self.first_of(n), n)

    def visible(self, index: np.ndarray, span_end: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Apply the one mask rule of self-attention: row i sees keys lo[i] <= j < hi[i]. int32 [m] each.

        index: number of each row's token in its conversation. span_end: for rows of a non-causal span (a picture that attends to
        itself in both directions) the number after its last token, else anything <= index + 1. The window limits backwards
        only, spans forwards only, as transformers does for Gemma 3 (`token_type_ids_mask_function`).
        """
        hi = index + 1 if span_end is None or not self.spans else np.maximum(index + 1, span_end)
        return self.first(index).astype(np.int32), hi.astype(np.int32)

    def inputs(self) -> tuple[InputSpec, ...]:
        """Return what a step brings for layers of this policy, besides the table of cells."""
        return InputSpec("cells", "m"), InputSpec("lo", "m"), InputSpec("hi", "m")

    def about(self, n: int) -> str:
        """Say in a user's words what a conversation's n cells hold."""
        raise NotImplementedError


@dataclass(frozen=True)
class Full(Policy):
    """A policy by which every earlier token is seen."""

    whole: ClassVar[bool] = True
    spans: bool = True

    def slots(self, n_ctx: int, n_batch: int) -> int:
        """Return a cell for each token."""
        return n_ctx

    def first(self, n: Any) -> Any:
        """Return zeros."""
        return np.zeros_like(n)

    def about(self, n: int) -> str:
        """Say that everything is kept."""
        return f"all {n:,} positions"


UNEVEN = 4               # times the mean that one layer may keep, where layers keep different numbers of cells


@dataclass(frozen=True)
class Compressed(Full):
    """A policy by which every earlier token is seen of which a cell was kept (`cache/compression`).

    most   cells of one conversation, the mean of all layers; 0: as many as it has tokens
    layer  which layer's, where layers keep different numbers of cells; None: all keep as many
    kinds  statistics of attention that are summed for each cell, by which those that stay are chosen: `ops.key_sums`
    """

    compressed: ClassVar[bool] = True
    most: int = 0
    kinds: tuple[str, ...] = ()
    layer: int | None = None

    @property
    def pooled(self) -> bool:                                # type: ignore[override]
        """Whether layers keep different numbers of cells."""
        return self.layer is not None

    def cells(self, n_ctx: int) -> int:
        """Return the cells of one conversation, in the mean of all layers."""
        return min(n_ctx, self.most or n_ctx)

    def slots(self, n_ctx: int, n_batch: int) -> int:
        """Return as many cells as a conversation ever has in one layer."""
        return min(n_ctx, UNEVEN * self.most or n_ctx) if self.pooled else self.cells(n_ctx)

    def about(self, n: int) -> str:
        """Say how many cells there are."""
        return f"{n:,} positions, of which some are kept"


IN_FULL = 128            # tokens that are in full, at least, where keys are quantized by channel
RECENT = {"Q4_1_CHANNELS": IN_FULL, "Q2_1_CHANNELS": 192}                      # by the format of those keys
PINNED = GROUP           # and so many of a conversation's beginning: all attend to them, and they are unlike the rest (arXiv:2401.18079)


def grouped(n: Any, recent: int) -> Any:
    """Return how many tokens before token n are read in groups by it: all whole groups but for the last `recent` tokens, itself among them."""
    return np.maximum(n + 1 - recent, 0) // GROUP * GROUP


def _groups(n: int) -> int:
    """Return the cells of as many whole groups as hold n."""
    return -(-n // GROUP) * GROUP


@dataclass(frozen=True)
class Grouped(Full):
    """A policy by which every earlier token is seen: in groups, whose keys are quantized by channel (`ops.cache_groups`), or in full.

    What token n sees depends on n alone, not on how a prompt is cut: of groups those between PINNED and `grouped(n, recent)`. A group is
    written in the step that first reads it, from the cells of `Recent`.

    recent  the last tokens, which are in full
    kept    where conversations are compressed: how many cells stay, and by what; numbers of tokens count those cells, here and in the parts
    """

    recent: int = IN_FULL
    kept: Compressed | None = None

    @property
    def compressed(self) -> bool:                            # type: ignore[override]
        """Whether cells may be fewer than tokens."""
        return self.kept is not None

    @property
    def pooled(self) -> bool:                                # type: ignore[override]
        """Whether layers keep different numbers of cells."""
        return self.kept is not None and self.kept.pooled

    @property
    def kinds(self) -> tuple[str, ...]:
        """Statistics of attention that are summed for each cell."""
        return self.kept.kinds if self.kept else ()

    @property
    def parts(self) -> tuple[Policy, ...]:
        """The last tokens and the first ones, in full; a layer that keeps another number of cells has its own."""
        return Recent(self.spans, self.recent, self.kept), Pinned(self.recent, self.kept.layer if self.kept else None)

    def cells(self, n_ctx: int) -> int:
        """Return the cells of one conversation, in the mean of all layers."""
        return _groups(self.kept.cells(n_ctx) if self.kept else n_ctx)

    def slots(self, n_ctx: int, n_batch: int) -> int:
        """Return a cell for each token, or for each that is kept, in whole groups."""
        return _groups(self.kept.slots(n_ctx, n_batch) if self.kept else n_ctx)

    def visible(self, index: np.ndarray, span_end: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the interval of tokens that each row sees in groups."""
        end = grouped(index, self.recent).astype(np.int32)
        return np.minimum(end, PINNED), end

    def inputs(self) -> tuple[InputSpec, ...]:
        """Return what rows see, and from and to which cells groups are written."""
        return InputSpec("lo", "m"), InputSpec("hi", "m"), InputSpec("source", "z"), InputSpec("target", "z")

    def about(self, n: int) -> str:
        """Say that everything is kept."""
        return f"{n:,} positions, of which some are kept, in groups" if self.kept else f"all {n:,} positions, in groups"


@dataclass(frozen=True)
class Recent(Policy):
    """The last tokens in full, of layers that keep the others in groups: from `grouped(n, recent)` on. Arguments are those of `Grouped`."""

    paged: ClassVar[bool] = False
    spans: bool = True
    recent: int = IN_FULL
    kept: Compressed | None = None

    def slots(self, n_ctx: int, n_batch: int) -> int:
        """Return what the oldest row of a batch sees, the group that it reads first, and the batch."""
        most = self.kept.slots(n_ctx, n_batch) if self.kept else n_ctx
        return min(_groups(most), _groups(self.recent + GROUP - 1 + n_batch))

    def first(self, n: Any) -> Any:
        """Return the first tokens that are in no group."""
        return grouped(n, self.recent)

    def first_of(self, n: int) -> int:
        """Return the first token that the step needs which begins with token n: earlier ones are in groups already."""
        return int(grouped(n - 1, self.recent))

    def about(self, n: int) -> str:
        """Name the tokens that are in full, and the positions kept, which are a batch more."""
        return f"the last {self.recent} in full: {n:,} positions"


@dataclass(frozen=True)
class Pinned(Policy):
    """The first PINNED tokens in full, of layers that keep the others in groups. Written as groups are, read when `Recent` ends behind them.

    recent  as in `Grouped`
    layer   whose, where layers keep different numbers of cells
    """

    paged: ClassVar[bool] = False
    stays: ClassVar[bool] = True
    recent: int
    layer: int | None = None

    def slots(self, n_ctx: int, n_batch: int) -> int:
        """Return a cell for each of them."""
        return PINNED

    def first(self, n: Any) -> Any:
        """Return zeros."""
        return np.zeros_like(n)

    def seen(self, n: int) -> np.ndarray:
        """Return the numbers of the first tokens."""
        return np.arange(min(n, PINNED))

    def visible(self, index: np.ndarray, span_end: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the interval of tokens that each row sees here: all or none."""
        end = np.minimum(grouped(index, self.recent), PINNED).astype(np.int32)
        return np.zeros_like(end), end

    def inputs(self) -> tuple[InputSpec, ...]:
        """Return what rows see, and to which cells a group is written."""
        return InputSpec("lo", "m"), InputSpec("hi", "m"), InputSpec("target", "z")

    def about(self, n: int) -> str:
        """Name them."""
        return f"the first {n:,} positions in full"


@dataclass(frozen=True)
class Sliding(Policy):
    """The last `window` tokens are seen, the query itself included."""

    paged: ClassVar[bool] = False
    window: int

    def slots(self, n_ctx: int, n_batch: int) -> int:
        """Return the window of the oldest row of a batch, and the batch."""
        return min(n_ctx, self.window + n_batch)

    def first(self, n: Any) -> Any:
        """Return the beginnings of the windows."""
        return np.maximum(n - self.window + 1, 0)

    def about(self, n: int) -> str:
        """Name the window, and the positions kept, which are a batch more."""
        return f"window of {self.window:,}: {n:,} positions"


@dataclass(frozen=True)
class Chunked(Policy):
    """Tokens of the query's own chunk are seen: those from the last multiple of `size` (Llama 4)."""

    paged: ClassVar[bool] = False
    size: int

    def slots(self, n_ctx: int, n_batch: int) -> int:
        """Return a chunk, and the batch that may begin the next one."""
        return min(n_ctx, self.size + n_batch)

    def first(self, n: Any) -> Any:
        """Return the beginnings of the chunks."""
        return n // self.size * self.size

    def about(self, n: int) -> str:
        """Name the chunk, and the positions kept, which are a batch more."""
        return f"chunks of {self.size:,}: {n:,} positions"


@dataclass(frozen=True)
class Cross(Policy):
    """Rows of an encoder are seen, not tokens (`seen_across`); a conversation holds at most `n`, which the plan decides.

    everywhere  every row of a step sees some: the decoder of an encoder-decoder
    """

    across: ClassVar[bool] = True
    n: int = 0
    everywhere: bool = False

    def slots(self, n_ctx: int, n_batch: int) -> int:
        """Return a cell for each encoder row."""
        return self.n

    def holding(self, n: int) -> Cross:
        """Return the same for conversations that hold n encoder rows."""
        return replace(self, n=n)

    def first(self, n: Any) -> Any:
        """Return zeros: all rows of a conversation stay."""
        return np.zeros_like(n)

    def about(self, n: int) -> str:
        """Name what is kept, which are no positions of the context."""
        return f"{'the source' if self.everywhere else 'pictures'}: {n:,} rows"

    def inputs(self) -> tuple[InputSpec, ...]:
        """Return where encoder rows are written, and what the rows that see any of them see."""
        if self.everywhere:
            return InputSpec("cells", "c"), InputSpec("lo", "m"), InputSpec("hi", "m")
        return InputSpec("cells", "c"), InputSpec("seq", "s"), InputSpec("lo", "s"), InputSpec("hi", "s")


SNAPSHOTS = 4            # states of one conversation that are kept behind earlier tokens
INTERVAL = 256           # tokens between those, at least
DRAFTED = 8              # states for tokens that may be taken back, of all conversations together, unless told otherwise
TAIL = 8                 # tokens of a prompt's end, the start of an answer, that the next prompt of a conversation may lack


@dataclass(frozen=True)
class Recurrent(Policy):
    """A state is kept, not tokens: arrays of float32, `shapes` (heads, elements) of each.

    A conversation has one behind its last token, one that the next step leaves, and `SNAPSHOTS` behind earlier tokens. All together have
    `drafts` more: a step leaves one behind each token that may be taken back.
    """

    paged: ClassVar[bool] = False
    recurrent: ClassVar[bool] = True
    shapes: tuple[tuple[int, int], ...]
    drafts: int = 0

    def holding(self, n: int) -> Recurrent:
        """Return the same with n states for tokens that may be taken back."""
        return replace(self, drafts=n)

    @property
    def drafted(self) -> int:
        """Return their number."""
        return self.drafts

    @property
    def nbytes(self) -> int:
        """Bytes of one state."""
        return sum(4 * heads * elements for heads, elements in self.shapes)

    def slots(self, n_ctx: int, n_batch: int) -> int:
        """Return the states of one conversation, whatever its length."""
        return 2 + SNAPSHOTS

    def first(self, n: Any) -> Any:
        """Return the token before: the state behind it is all that is seen of the past."""
        return np.maximum(n - 1, 0)

    def inputs(self) -> tuple[InputSpec, ...]:
        """Return the cells of the states before and after each row (`ops.recurrent`)."""
        return InputSpec("before", "m"), InputSpec("after", "m")

    def about(self, n: int) -> str:
        """Say that states do not grow with the context."""
        beside = f"; and {self.drafts} for drafts" if self.drafts else ""
        return f"states: {n} of {self.nbytes:,} bytes, {SNAPSHOTS} of them behind earlier tokens{beside}"


def snapshots_in(first: int, last: int, end: int) -> list[int]:
    """Return the numbers of tokens first < n <= last behind which a state is worth keeping, in a prompt that has `end` tokens.

    These are multiples of INTERVAL, and TAIL tokens before the prompt's end: the next prompt of a conversation goes on from there,
    and so does one that asks the same again.
    """
    found = set(range(first // INTERVAL * INTERVAL + INTERVAL, last + 1, INTERVAL))
    return sorted(found | {tail_of(end)} if first < tail_of(end) <= last else found)


def tail_of(end: int) -> int:
    """Return the number of tokens before the end of a prompt's that the next one may lack."""
    return end - TAIL


def thinned(places: Sequence[int], last: int, keep: int) -> list[int]:
    """Choose SNAPSHOTS of the ascending `places` of states in a conversation of `last` tokens; the place `keep` stays.

    Those go whose loss leaves the shortest stretch without one, so places are spread over the conversation, whatever its length.
    """
    left = list(places)
    while len(left) > SNAPSHOTS:
        edges = [0, *left, last + INTERVAL]
        stretches = [(np.inf if n == keep else after - before, n) for before, n, after in zip(edges, left, edges[2:])]
        left.remove(min(stretches)[1])
    return left


def seen_across(pictures: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the encoder rows lo <= j < hi that a token after these pictures sees: those of the last run of adjacent pictures.

    pictures: (number of its token, encoder rows up to its end) of each; rows are counted through the whole conversation. The
    same as transformers' `get_cross_attention_token_mask` says from the pictures' side.
    """
    if not pictures:
        return 0, 0
    first = len(pictures) - 1
    while first and pictures[first - 1][0] == pictures[first][0] - 1:
        first -= 1
    return pictures[first - 1][1] if first else 0, pictures[-1][1]
