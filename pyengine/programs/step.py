"""A decoder's step: its inputs, tables and caches are declared here and filled here, and their names stand in no other file.

    Step.declare  graph of one step for given sizes, rows that nobody wants left out
    Step.fill     rows of several conversations into the inputs of a loaded program
    Step.run, Step.head    replay it; the head alone, for more of the wanted rows: `Logits`
    Step.hidden   what the head reads: last hidden states of the wanted rows
    Step.ahead    the head that predicts further tokens, alone, for tokens that are drafted: it goes on with the states that `Conversation.last`
                  has of the last tokens; with caches of its own it reads in every step the rows that the layers read
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from pyengine.backends.base import Declared, Program
from pyengine.cache.cells import Cells, Conversation, Group, groups_of
from pyengine.cache.policy import Full, Grouped, grouped, PINNED, Policy, RECENT
from pyengine.cache.store import Layer, Rotation
from pyengine.compiler.wanted import only
from pyengine.dtype import DType, dtype as dtype_of, GROUP
from pyengine.files.adapters import Adapter
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Dim, Tensor
from pyengine.models.architecture import Architecture
from pyengine.nn.ahead import Ahead
from pyengine.nn.batch import Across, Batch, Inner
from pyengine.nn.cache import CrossCache, GroupedCache, LayerCache, Part, RecurrentCache
from pyengine.ops import rows as take, top_k
from pyengine.ops.top import MOST
from pyengine.programs.adapters import adapted
from pyengine.programs.rows import Rows
from pyengine.programs.sizes import Sizes
from pyengine.records import NamedTuple

FLOAT = dtype_of("F32")                  # of states
FULL = dtype_of("F16")                   # of tokens in full
LOGITS, HIDDEN, LARGEST = 0, 1, 2        # numbers of outputs
AHEAD = "ahead"                          # begins the names of inputs of the head that predicts further tokens; the entry at which it begins
HEAD = "head"                            # the input that says whose logits are computed, and the entry at which it is first read
ADAPTERS = "lora_scales"                 # of each row; those of encoder rows are "across.lora_scales"
COUNTS = "counts"                        # how much each row counts in sums of attention


class Work(NamedTuple):
    """Rows [start, stop) of a prompt, which follow what `conversation` has; `wanted` of them, from `start` on, give logits.

    hidden: they give last hidden states only, and do not go through the output head. counts: float32 [n, kinds], how much the rows count in
    sums of attention; None: nothing. drafted: of the tokens that the conversation has then, how many of the last may be taken back
    """

    conversation: Conversation
    rows: Rows
    start: int
    stop: int
    wanted: np.ndarray
    hidden: bool = False
    counts: np.ndarray | None = None
    drafted: int = 0


class Step:
    """One model's step for given sizes.

    groups   cells of caches with the same policy; layers: the number of each cache's group, None for a layer without a cache
    parts    of groups of layers whose tokens are in groups: the numbers of those with the last and the first ones in full
    shapes   (key/value heads, elements of a head) of each cache; owned: its layer
    ahead    the head that predicts further tokens; None: the step has none. beside: one that is not in the model's own file
    """

    def __init__(self, model: Architecture, sizes: Sizes, adapters: Sequence[Adapter] = (), beside: Ahead | None = None):
        self.model, self.sizes, self.adapters, self.shapes = model, sizes, tuple(adapters), model.cache_shapes()
        self.owned = model.cached_layers()
        self.ahead = (beside or model.ahead) if sizes.ahead else None
        own, more = policies(model, sizes), self.ahead.own if self.ahead else ()
        own, self.shapes = [*own, *[Full()] * len(more)], [*self.shapes, *more]               # further layers, which see everything
        self.owned = [*self.owned, *(max(self.owned) + 1 + j for j in range(len(more)))]
        kinds = dict.fromkeys(p for p in own if p is not None)
        kinds |= dict.fromkeys(part for p in kinds for part in p.parts)
        numbers = {policy: i for i, policy in enumerate(kinds)}
        self.groups = groups_of(list(numbers), sizes.n_ctx, sizes.n_batch, sizes.n_seq)
        self.layers = [None if policy is None else numbers[policy] for policy in own]
        self.parts = {i: tuple(numbers[part] for part in p.parts) for p, i in numbers.items() if p.parts}
        self.across = next((i for i, g in enumerate(self.groups) if g.policy.across), None)
        self.n_across = min(sizes.across, sizes.n_batch)                       # encoder rows of one run

    @property
    def n_layers(self) -> int:
        """Layers, which may have several caches each."""
        return max(self.owned) + 1

    @property
    def n_own(self) -> int:
        """Layers of the decoder: all but that of a head with caches of its own."""
        return self.n_layers - (len(self.ahead.own) if self.ahead else 0)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The statistics of attention that are summed for each key (`ops.key_sums`)."""
        return self.sizes.compressed.kinds if self.sizes.compressed else ()

    @cached_property
    def summed(self) -> dict[int, int]:
        """Of groups with tokens in full whose sums of attention lie beside those of the tokens in groups: the numbers of the latter."""
        return {part: i for i, parts in self.parts.items() if self.kinds and self.groups[i].policy.compressed for part in parts}

    @cached_property
    def names(self) -> list[str]:
        """What the names of each group's inputs begin with."""
        return [f"{g.policy.name}{i}" for i, g in enumerate(self.groups)]

    # -- declared -----------------------------------------------------------------------------------------------------

    def declare(self) -> Declared:
        """Build the graph: logits [l, vocab] of some of the wanted rows, and last hidden states of all of them [w, d_model].

        With n_tokens in the sizes both stay on the device until they are asked for, and what `top_k` finds in the logits comes back.
        """
        g, s, model = Graph(), self.sizes, self.model
        m, w, d_model = Dim("m", s.n_batch), Dim("w", s.n_batch), model.config.d_model
        added, seeing = Dim("c", self.n_across), Dim("s", s.n_batch)
        axes = {"m": m, "c": added, "s": seeing, "z": Dim("z", max(1, (s.n_batch + (GROUP - 1) * s.n_seq) // GROUP))}
        media, inner = g.input("media", (Dim("e", s.n_batch), model.media_width)) if s.runs and not s.source else None, Inner([], []) if self.ahead else None
        places, texts = (None if media is None else g.input(name, (m,), "I32") for name in ("places", "texts"))
        across = Across(g.input("across", (added, d_model)), g.input("across.rows", (seeing,), "I32"),
                        g.input("across.back", (m,), "I32")) if self.across is not None else None
        batch = Batch(s.n_ctx, g.input("ids", (m,), "I32"), g.input("positions", (model.position_axes, m), "I32"), media, across, places, texts, inner)
        wanted, head = g.input("wanted", (w,), "I32"), g.input(HEAD, (Dim("l", s.n_head),), "I32")
        seq, chosen = g.input("seq", (m,), "I32"), {"seq": g.input("seq_wanted", (w,), "I32")}
        shared: list[dict[str, Tensor]] = []
        for own, name in zip(self.groups, self.names):
            shared.append({} if own.policy.recurrent else {"table": g.table(f"{name}.table", (s.n_seq, own.slots)), "seq": seq})
            if (number := self.summed.get(len(shared) - 1)) is not None:
                shared[-1]["whole"] = g.table(f"{name}.whole", (s.n_seq, self.groups[number].slots))
            for spec in own.policy.inputs():
                shared[-1][spec.name] = g.input(f"{name}.{spec.name}", (axes[spec.axis],), "I32")
            if any(spec == ("lo", "m") for spec in own.policy.inputs()):
                chosen |= {f"{name}.{end}": g.input(f"{name}.{end}_wanted", (w,), "I32") for end in ("lo", "hi")}
        summed: list[list[Tensor]] = []                      # sums of attention after each reading of a cache
        counts = g.input(COUNTS, (m, len(self.kinds))) if self.kinds else None
        caches: list[LayerCache | GroupedCache | CrossCache | RecurrentCache | None] = []
        for i, number in enumerate(self.layers):
            if number is None:
                caches.append(None)
                continue
            pooled = self.groups[number].policy.pooled
            states = [g.state(name, shape, dtype, f"pool{name[-2:]}" if pooled and name[-2:] in (".k", ".v") else None)
                      for name, (shape, dtype) in self._states(i, self.groups, self.sizes.n_seq).items()]
            if self.groups[number].policy.recurrent:
                caches.append(RecurrentCache(tuple(states), **shared[number]))
            elif number == self.across:
                caches.append(CrossCache(*states, **shared[number]))
            else:
                n, own = 2 + 2 * len(self.parts.get(number, ())), {}
                if states[n:]:
                    summed.append([])
                    own = {"sums": states[n], "weights": counts, "kinds": self.kinds, "changed": summed[-1]}
                caches.append(self._grouped(states, shared, number, own) if number in self.parts else LayerCache(*states[:2], **shared[number], **own))
        last = model.forward(batch, caches[: len(caches) - (len(self.ahead.own) if self.ahead else 0)])
        hidden = take(last, wanted)
        outputs = [model.logits(take(hidden, head)), hidden]
        if self.adapters:
            outputs = self._adapted(g, outputs, batch, wanted, head)
        largest = top_k(outputs[LOGITS], n=s.n_tokens, k=min(s.n_tokens, MOST)) if s.n_tokens else ()
        asked = frozenset({LOGITS, HIDDEN}) if s.n_tokens else frozenset()
        outputs += largest
        if self.ahead is None:
            return Declared(only([*outputs, *(each[-1] for each in summed if each)], wanted, chosen), {HEAD: (HEAD,)}, asked)
        more, own, of_own = self._ahead(g, batch, last, hidden, caches)
        asked |= {len(outputs) + i for i in range(3)} if s.n_tokens else asked
        return Declared(only(only([*outputs, *more], wanted, chosen), own, of_own), {HEAD: (HEAD,), AHEAD: tuple(f"{AHEAD}.{name}" for name in ("ids", "before", "carry"))}, asked)

    def _ahead(self, g: Graph, batch: Batch, last: Tensor, hidden: Tensor, caches: Sequence[Any]) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
        """Build the head that predicts further tokens: outputs states [k, width] of rows that are kept for it, its logits [x, ..], the states
        [x, width] of its own rows and what `top_k` finds; which of its rows are wanted; what those have in place of inputs.

        Its h rows have inputs of their own: those of a step, but for a conversation's first, or tokens that are drafted. `before`: the row of
        the step before each; -1-j: row j of `carry`. Without caches of its own it has no row in a step, and keeps states of wanted rows.
        """
        s, head, name, first = self.sizes, self.ahead, AHEAD, len(caches) - len(self.ahead.own)
        h, x = Dim("h", s.n_batch if head.own else s.n_seq), Dim("x", s.n_seq)
        kept, carry = g.input(f"{name}.kept", (Dim("k", s.n_batch),), "I32"), g.input(f"{name}.carry", (Dim("p", s.n_seq) if head.own else h, head.width))
        ids, positions = g.input(f"{name}.ids", (h,), "I32"), g.input(f"{name}.positions", (self.model.position_axes, h), "I32")
        if head.own:
            states, read = head.states(last, batch.inner.states), caches[first:]
            before = take(states, g.input(f"{name}.before", (h,), "I32"), carry)
        else:
            states, read, before = head.states(hidden, ()), [batch.inner.caches[i] for i in head.reads], carry
        seq, chosen = g.input(f"{name}.seq", (h,), "I32"), {f"{name}.seq": g.input(f"{name}.seq_wanted", (x,), "I32")}
        for i, cache in enumerate(read):
            ends = {end: g.input(f"{name}.{i}.{end}", (h,), "I32") for end in (("cells",) if head.own else ()) + ("lo", "hi")}
            chosen |= {f"{name}.{i}.{end}": g.input(f"{name}.{i}.{end}_wanted", (x,), "I32") for end in ("lo", "hi")}
            read[i] = cache._replace(seq=seq, **ends)
        wanted = g.input(f"{name}.wanted", (x,), "I32")
        made = take(head(batch._replace(ids=ids, positions=positions, inner=None), before, read), wanted)
        logits = head.logits(made)
        return [take(states, kept), logits, head.following(made), *(top_k(logits, n=min(s.n_tokens, head.n_logits), k=1) if s.n_tokens else ())], wanted, chosen

    def _grouped(self, states: Sequence[Tensor], shared: Sequence[dict[str, Tensor]], number: int, sums: Mapping[str, Any]) -> GroupedCache:
        """Return the cache of a layer with its parts, whose states follow one another."""
        own, recent, pinned = (shared[i] for i in (number, *self.parts[number]))
        parts = [Part(*states[2 * i : 2 * i + 2], *(part.get(name) for name in ("table", "lo", "hi", "whole"))) for i, part in enumerate((own, recent, pinned))]
        return GroupedCache(*parts, recent["cells"], own["seq"], own["source"], own["target"], pinned["target"], **sums)

    def _adapted(self, g: Graph, outputs: list[Tensor], batch: Batch, wanted: Tensor, head: Tensor) -> list[Tensor]:
        """Add what adapters change, by the scales of each row."""
        n, across = len(self.adapters), batch.across
        own = g.input(ADAPTERS, (batch.ids.shape[0], n))
        scales = {"m": own, "l": take(take(own, wanted), head)}
        if across is not None:
            scales |= {"s": take(own, across.rows), "c": g.input(f"across.{ADAPTERS}", (across.states.shape[0], n))}
        owners = self.model.cache_owners()                   # layers that read another one's cache are there
        absent = [f"blk.{self.owned[i]}." for i, number in enumerate(self.layers) if number is None and owners[i] == i]
        return adapted(outputs, self.adapters, scales, absent)

    def formats(self, number: int) -> tuple[DType, DType]:
        """Return the formats of keys and values of a group; what is beside tokens in groups is in full."""
        return (FULL, FULL) if self.sizes.k.by_channel and number not in self.parts else (self.sizes.k, self.sizes.v)

    def _states(self, layer: int, groups: Sequence[Group], n_seq: int) -> dict[str, tuple[tuple[int, int, int], DType]]:
        """Return shapes [heads, cells, elements] and formats of what a layer keeps, by name: keys and values, or states."""
        number, name = self.layers[layer], f"blk.{self.owned[layer]}"
        if number is None:
            return {}
        own = groups[number]
        if own.policy.recurrent:
            return {f"{name}.state{j}": ((heads, own.n_cells, n), FLOAT) for j, (heads, n) in enumerate(own.policy.shapes)}
        heads, head_dim = self.shapes[layer]
        shape, two = (heads, own.n_cells, head_dim), (".cross_k", ".cross_v") if own.policy.across else (".k", ".v")
        states = {name + kind: (shape, dtype) for kind, dtype in zip(two, self.formats(number))}
        for part, two in zip(self.parts.get(number, ()), ((".recent_k", ".recent_v"), (".pinned_k", ".pinned_v"))):
            states |= {name + kind: ((heads, groups[part].n_cells, head_dim), dtype) for kind, dtype in zip(two, self.formats(part))}
        if own.policy.compressed and self.kinds:
            states[name + ".sums"] = (heads, n_seq * own.slots, len(self.kinds)), FLOAT
        return states

    def lasting_shapes(self, n_ctx: int, n_seq: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of tables and caches with other numbers of positions and conversations, but as many rows of a step."""
        groups = groups_of([g.policy for g in self.groups], n_ctx, self.sizes.n_batch, n_seq)
        shapes: dict[str, tuple[int, ...]] = {f"{name}.table": (n_seq, g.slots) for g, name in zip(groups, self.names)
                                              if not g.policy.recurrent}
        shapes |= {f"{self.names[part]}.whole": (n_seq, groups[number].slots) for part, number in self.summed.items()}
        for i in range(len(self.layers)):
            shapes |= {name: shape for name, (shape, _) in self._states(i, groups, n_seq).items()}
        return shapes

    # -- of a loaded program ------------------------------------------------------------------------------------------

    def cells(self, program: Program) -> Cells:
        """Return the cells of the program's caches, none of them in use."""
        for part, number in self.summed.items():             # where a ring has each of all tokens
            own, every = self.groups[part].slots, np.arange(self.groups[number].slots)
            program.tables[f"{self.names[part]}.whole"][:] = np.arange(self.sizes.n_seq)[:, None] * own + every % own
        return Cells(self.groups, [None if g.policy.recurrent else program.tables[f"{name}.table"] for g, name in zip(self.groups, self.names)])

    def caches(self, program: Program) -> list[Layer]:
        """Return the states of each layer that has a cache."""
        ropes, owners, made = self.model.ropes(self.sizes.n_ctx), self.model.cache_owners(), []
        own = len(self.layers) - len(owners)                 # of the head that predicts further tokens
        if own:
            ropes, owners = [*ropes, *self.ahead.ropes(self.sizes.n_ctx)], [*owners, *range(len(owners), len(self.layers))]
        for i, number in enumerate(self.layers):
            if number is not None:
                recurrent, states = self.groups[number].policy.recurrent, [program.states[name] for name in self._states(i, self.groups, self.sizes.n_seq)]
                turned = None if recurrent else Rotation(ropes[i].inv_freq, ropes[i].interleaved)
                sums = states.pop() if self.groups[number].policy.compressed and self.kinds else None
                parts = tuple(Layer(self.owned[i], part, (*states[2 * j + 2 : 2 * j + 4],), turned) for j, part in enumerate(self.parts.get(number, ())))
                whole = (*states[: len(states) - 2 * len(parts)],)
                made += [*reversed(parts), Layer(self.owned[i], number, whole, turned, sums, max(1, self.model.config.n_heads // self.shapes[i][0]), owners.count(i), parts,
                                                 i >= len(self.layers) - own)]
        return made


def stage_of(name: str, last: int) -> int | None:
    """Return `last` for inputs that belong to the output head, None for those that any layer may read."""
    return last if name == HEAD else None


def policies(model: Architecture, sizes: Sizes) -> list[Policy | None]:
    """Return each layer's policy with the encoder rows that it holds; None for layers that attend across where no encoder is, and for
    those that read another one's cache. Where conversations are compressed, layers that see everything keep some of it. Recurrent ones have
    states for drafts."""
    own = [p if not p.across else p.holding(sizes.across) if sizes.across else None for p in model.policies()]
    own = [p.holding(sizes.drafted) if p is not None and p.recurrent else p for p in own]
    if sizes.compressed:
        each = sizes.compressed.pooled
        own = [replace(sizes.compressed, spans=p.spans, layer=i if each else None) if p.whole else p for i, p in enumerate(own)]
    if sizes.k.by_channel:
        own = [Grouped(p.spans, RECENT[sizes.k.name], p if p.compressed else None) if p.whole else p for p in own]
    return [p if owner == i else None for i, (p, owner) in enumerate(zip(own, model.cache_owners()))]


class Row:
    """Logits after one row of a run, valid until the next one. output, largest: numbers of the outputs that have them, and what was found."""

    def __init__(self, program: Program, number: int, finds: bool, output: int = LOGITS, largest: int = LARGEST):
        self._program, self._number, self._finds, self._output, self._largest = program, number, finds, output, largest

    @property
    def largest(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """What `top_k` found in it, where the device looks for that: (logits, tokens, sums of weights)."""
        if not self._finds:
            return None
        values, tokens, sums = (a[self._number] for a in self._program.outputs[self._largest : self._largest + 3])
        return values, tokens, sums

    def whole(self) -> np.ndarray:
        """Return all logits [vocab]."""
        return self._program.read(self._output, self._number, 1)[0]


class Logits:
    """Logits after rows of a run, `self[i]` of each, valid until the next one."""

    def __init__(self, program: Program, n: int, finds: bool):
        self._program, self._n, self._finds = program, n, finds

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> Row:
        return Row(self._program, i, self._finds)

    def whole(self) -> np.ndarray:
        """Return all of them [l, vocab]."""
        return self._program.read(LOGITS, 0, self._n)


class StepProgram:
    """A step's program, loaded: fills its inputs and runs it.

    What stands in the inputs of the last run is known, so that `head` can go on from there.
    """

    def __init__(self, step: Step, program: Program, cells: Cells):
        self.step, self.program, self.cells = step, program, cells
        self._flat: Mapping[str, np.ndarray] = {name: a.reshape(-1) for name, a in program.inputs.items()}
        self._dims: dict[str, int] = {}
        self._heads = np.empty(0, np.int32)                  # of the wanted rows, the numbers of those that give logits
        self._kept: list[tuple[Conversation, int, int]] = []         # of a run: of whom, from which token on, and how many states are kept
        self._more = dict.fromkeys("hxk" + "p" * bool(step.ahead.own), 0) if step.ahead else {}      # axes of the head that predicts further tokens, where it does nothing

    def _put(self, name: str, where: slice, values: Any) -> None:
        """Write values of rows into an input; one that the model never reads is left out of its program."""
        if name in self._flat:
            self._flat[name][where] = values

    def _put_scales(self, name: str, first: int, n: int, s: Conversation) -> None:
        """Write a conversation's scales of adapters for n rows."""
        if self.step.adapters:
            width = len(self.step.adapters)
            self._put(name, slice(first * width, (first + n) * width), np.tile(np.array(s.adapters or [0.0] * width, np.float32), n))

    def fill(self, work: Sequence[Work]) -> None:
        """Lay the rows of several conversations side by side in the inputs. Their cells, and what they see across, are there."""
        m, w, e = 0, 0, 0
        heads: list[np.ndarray] = []
        for part in work:
            n, s = part.stop - part.start, part.conversation
            index = np.arange(len(s), len(s) + n, dtype=np.int32)
            here, there, wanted = slice(m, m + n), slice(w, w + len(part.wanted)), part.wanted
            self._put("ids", here, part.rows.ids[part.start : part.stop])
            self._put("places", here, 0)
            self._put("texts", here, part.rows.ids[part.start : part.stop])
            for rows, embedding in part.rows.embeddings(part.start, part.stop):
                k, d = embedding.shape
                for name in ("ids", "places"):
                    self._put(name, slice(m + rows.start, m + rows.stop), np.arange(-1 - e, -1 - e - k, -1))
                self._put("texts", slice(m + rows.start, m + rows.stop), self.step.model.media_id)
                self._put("media", slice(e * d, (e + k) * d), embedding.reshape(-1))
                e += k
            self._put("seq", here, s.row)
            self._put("seq_wanted", there, s.row)
            self._put_scales(ADAPTERS, m, n, s)
            if kinds := len(self.step.kinds):
                self._put(COUNTS, slice(m * kinds, (m + n) * kinds), 0 if part.counts is None else part.counts.reshape(-1))
            self._put("wanted", there, wanted + m)
            for i, (g, name) in enumerate(zip(self.step.groups, self.step.names)):
                if g.policy.recurrent:
                    for end, values in zip(("before", "after"), self.cells.states_of(s, n)):
                        self._put(f"{name}.{end}", here, values)
                elif not g.policy.across:
                    gone = s.gone.get(i, 0)                  # numbers count the cells that were kept
                    lo, hi = g.policy.visible(index - gone, part.rows.span_end[part.start : part.stop] - gone)
                    self._put(f"{name}.cells", here, self.cells.cells_of(i, s, index - gone))
                    for end, values in (("lo", lo), ("hi", hi)):
                        self._put(f"{name}.{end}", here, values)
                        self._put(f"{name}.{end}_wanted", there, values[wanted])
            if not part.hidden:
                heads.append(np.arange(w, w + len(wanted), dtype=np.int32))
            m, w = m + n, w + len(wanted)
        self._heads = np.concatenate(heads) if heads else np.empty(0, np.int32)
        at = 0
        for axis in range(self.step.model.position_axes):
            for part in work:
                n = part.stop - part.start
                self._put("positions", slice(at, at + n), part.rows.positions[axis, part.start : part.stop])
                at += n
        self._dims = {"m": m, "w": w, "e": e, "c": 0, "s": self._look_across(work), "z": self._group(work), **self._more}
        if self.step.ahead:
            self._dims |= self._look_ahead(work)

    def _look_ahead(self, work: Sequence[Work]) -> dict[str, int]:
        """Fill the inputs of the head that predicts further tokens: with caches of its own it reads all rows, but for a conversation's first, which
        has none before it."""
        m, h, p, k, w = 0, 0, 0, 0, 0
        self._kept = []
        for part in work:
            s, n = part.conversation, part.stop - part.start
            rows = np.arange(n - 1 - min(part.drafted, n - 1), n)              # those that may be the last one
            if self.step.ahead.own:
                begins = int(len(s) == 0)
                h, p = self._follow(s, m, n, begins, h, p)
                first, kept = rows[0], m + rows
            else:                                            # of those that are wanted
                at = np.flatnonzero(np.isin(part.wanted, rows))
                first, kept = (part.wanted[at[0]], w + at) if len(at) else (0, at)
            if len(kept):
                self._put(f"{AHEAD}.kept", slice(k, k + len(kept)), kept)
                self._kept.append((s, len(s) + int(first), len(kept)))
            m, w, k = m + n, w + len(part.wanted), k + len(kept)
        at = 0
        for axis in range(self.step.model.position_axes if self.step.ahead.own else 0):
            for part in work:
                begins = int(len(part.conversation) == 0)
                n = part.stop - part.start - begins
                self._put(f"{AHEAD}.positions", slice(at, at + n), part.rows.positions[axis, part.start + begins : part.stop])
                at += n
        return {"h": h, "p": p, "k": k} if self.step.ahead.own else {"h": h, "k": k}

    def _follow(self, s: Conversation, m: int, n: int, begins: int, h: int, p: int) -> tuple[int, int]:
        """Let the head read n rows of a conversation, which are from number m on in a step, but for the first where it begins. h, p: rows and
        states that other conversations have; returned with these."""
        before, d, here = np.arange(m - 1, m + n - 1)[begins:], self.step.ahead.width, slice(h, h + n - begins)
        if not begins:
            before[0] = -1 - p
            carry = self.last(s)
            self._put(f"{AHEAD}.carry", slice(p * d, (p + 1) * d), 0 if carry is None else carry)
            p += 1
        self._put(f"{AHEAD}.before", here, before)
        self._put(f"{AHEAD}.ids", here, self._flat["ids"][m + begins : m + n])
        self._put_ahead(here, s, np.arange(len(s) + begins, len(s) + n, dtype=np.int32))
        return here.stop, p

    def _put_ahead(self, here: slice, s: Conversation, index: np.ndarray, *ends: str) -> None:
        """Fill in where that head's rows of these tokens are written, and what they see: what it has read, or, without caches of its own, what the
        decoder has. ends: of the names of inputs."""
        head, step = self.step.ahead, self.step
        numbers = step.layers[len(step.layers) - len(head.own) :] if head.own else [step.layers[i] for i in head.reads]
        for i, number in enumerate(numbers):
            gone = s.gone.get(number, 0)                     # numbers count the cells that were kept
            at = index - gone
            if head.own:
                values = {"cells": self.cells.cells_of(number, s, at), "lo": np.minimum(max(1, s.ahead - gone), at), "hi": at + 1}
            else:
                values = {"lo": step.groups[number].policy.first(at), "hi": at}
            for name, value in values.items():
                for end in ("", *ends):
                    self._put(f"{AHEAD}.{i}.{name}{end}", here, value)
        for end in ("", *ends):
            self._put(f"{AHEAD}.seq{end}", here, s.row)

    def last(self, s: Conversation) -> np.ndarray | None:
        """Return the state [width] of a conversation's last token for that head, None where it was not kept."""
        if s.last is None or not 0 <= len(s) - 1 - s.last[0] < len(s.last[1]):
            return None
        return s.last[1][len(s) - 1 - s.last[0]]

    def ahead(self, rows: Sequence[tuple[Conversation, int, int, np.ndarray]]) -> tuple[list[Row], np.ndarray]:
        """Run that head alone on a token of each of some conversations: (it, how many stand between its last one and this one, the token, the
        state [width] before it); there are cells. Returns logits and states [x, width] of each, valid until the next run."""
        n, head, axes, kept = len(rows), self.step.ahead, self.step.model.position_axes, self._kept_output
        d, before = head.width, {"p": n} if head.own else {}
        for i, (s, between, token, state) in enumerate(rows):
            between = between if head.own else 0             # all of a draft stands where its first token does
            self._put_ahead(slice(i, i + 1), s, np.array([len(s) + between], np.int32), "_wanted")
            self._put(f"{AHEAD}.ids", slice(i, i + 1), token)
            self._put(f"{AHEAD}.before", slice(i, i + 1), -1 - i)
            self._put(f"{AHEAD}.carry", slice(i * d, (i + 1) * d), state)
            self._put(f"{AHEAD}.wanted", slice(i, i + 1), i)
            for axis in range(axes):
                self._put(f"{AHEAD}.positions", slice(axis * n + i, axis * n + i + 1), s.next + between)
        self._heads = np.empty(0, np.int32)
        self.program.execute(AHEAD, **dict.fromkeys(("m", "w", "e", "c", "s", "z", "l", "k"), 0), h=n, x=n, **before)
        return [Row(self.program, i, self.step.sizes.n_tokens > 0, kept + 1, kept + 3) for i in range(n)], self.program.read(kept + 2, 0, n)

    @property
    def _kept_output(self) -> int:
        """The number of the output with states that are kept for the head; behind it are its logits, its own states and what `top_k` found."""
        return LARGEST + 3 * (self.step.sizes.n_tokens > 0)

    def _keep(self) -> None:
        """Keep the states of a run's last tokens with their conversations."""
        at = 0
        for s, first, n in self._kept:
            s.last = first, self.program.read(self._kept_output, at, n).copy()
            at += n

    def _group(self, work: Sequence[Work]) -> int:
        """Fill the inputs that say which tokens become groups in a step: those that its rows are the first to read so. Returns their number, the
        largest of all layers; others write none in the places that are left."""
        names, made = self.step.names, {}
        for number, (recent, pinned) in self.step.parts.items():
            columns = [np.empty((3, 0), np.int64)]
            for part in work:
                s, n = part.conversation, self.cells.filled(number, part.conversation)
                first = np.arange(*(grouped(n + rows - 1, self.step.groups[number].policy.recent) for rows in (0, part.stop - part.start)), GROUP)
                columns.append(np.stack([self.cells.cells_of(recent, s, first), self.cells.cells_of(number, s, first),
                                         np.where(first < PINNED, self.cells.cells_of(pinned, s, first), -1)]))
            made[number, pinned] = np.concatenate(columns, axis=1)
        z = max((columns.shape[1] for columns in made.values()), default=0)
        for (number, pinned), columns in made.items():
            source, target, first = np.pad(columns, ((0, 0), (0, z - columns.shape[1])), constant_values=-1)
            for name, cells in ((f"{names[number]}.source", np.maximum(source, 0)), (f"{names[number]}.target", target), (f"{names[pinned]}.target", first)):
                self._put(name, slice(0, z), cells)
        return z

    def _look_across(self, work: Sequence[Work]) -> int:
        """Fill the inputs that say which rows of a step see which encoder rows; returns how many do."""
        if self.step.across is None:
            return 0
        name, m, n, w = self.step.names[self.step.across], 0, 0, 0
        everywhere = self.step.groups[self.step.across].policy.everywhere
        for part in work:
            lo, hi = part.rows.sees[:, part.start : part.stop]
            if everywhere:
                for end, values in (("lo", lo), ("hi", hi)):
                    self._put(f"{name}.{end}", slice(m, m + len(lo)), values)
                    self._put(f"{name}.{end}_wanted", slice(w, w + len(part.wanted)), values[part.wanted])
                m, w = m + len(lo), w + len(part.wanted)
                continue
            rows = np.arange(m, m + len(lo), dtype=np.int32)
            seeing = hi > lo
            here = slice(n, n + int(seeing.sum()))
            self._put("across.rows", here, rows[seeing])
            self._put(f"{name}.seq", here, part.conversation.row)
            self._put(f"{name}.lo", here, lo[seeing])
            self._put(f"{name}.hi", here, hi[seeing])
            self._put("across.back", slice(m, m + len(lo)), np.where(seeing, n + np.cumsum(seeing) - 1, -1 - rows))
            m, n = m + len(lo), here.stop
        return n

    def cross(self, s: Conversation, pictures: Iterable[np.ndarray]) -> None:
        """Write encoder rows [n, d_model] to the caches of layers that attend across, in runs of the program without rows of text.

        So they cost one run's input, and no run of the steps that follow, however many there are.
        """
        first, number = s.crossed(), self.step.across
        for rows in map(np.asarray, pictures):               # a prompt's are made now
            for start in range(0, len(rows), self.step.n_across):
                part = rows[start : start + self.step.n_across]
                cells = self.cells.cells_of(number, s, np.arange(first, first + len(part)))
                self._put("across", slice(0, part.size), part.reshape(-1))
                self._put(f"{self.step.names[number]}.cells", slice(0, len(part)), cells)
                self._put_scales(f"across.{ADAPTERS}", 0, len(part), s)
                self.program.execute(m=0, w=0, e=0, l=0, s=0, z=0, c=len(part), **self._more)
                first += len(part)

    def run(self) -> Logits:
        """Run what `fill` has laid out; returns logits of the first n_head rows that give some, valid until the next run."""
        logits = self._run(0, None)
        if self.step.ahead:
            self._keep()
        return logits

    def head(self, done: int) -> Logits:
        """Return logits of the last run's rows that give some, from number `done` on, n_head at most."""
        return self._run(done, HEAD)

    @property
    def hidden(self) -> np.ndarray:
        """Last hidden states of all wanted rows of the last run [w, d_model], valid until the next run."""
        return self.program.read(HIDDEN, 0, self._dims["w"])

    def _run(self, done: int, entry: str | None) -> Logits:
        heads = self._heads[done : done + self.step.sizes.n_head]
        n = len(heads)
        self._put(HEAD, slice(0, n), heads)
        self.program.execute(entry, l=n, **(self._dims if entry is None else self._dims | self._more))
        return Logits(self.program, n, self.step.sizes.n_tokens > 0)
