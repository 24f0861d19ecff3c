"""Many requests on one model: sequences join and leave between steps, and each gets the bits that it would get alone.

`Runner` runs one step on rows of several sequences: it fills the program's inputs and keeps the cells. `Scheduler` decides which
rows: one of every request that generates, and beside them a slice of the longest-waiting prompt, so that a long prompt does not
stall the others. Kernels compute a row with one order of operations whatever else is in the step, so results do not depend on
who else is being served.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Many
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pyengine.cache.cells import Cells, Copy, Group, group, Sequence
from pyengine.cache.policy import Cross, Policy, visible
from pyengine.cache.store import turn
from pyengine.dtype import DType, dtype as dtype_of
from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError, UnsupportedModelError
from pyengine.files.hparams import Hparams
from pyengine.files.model_files import Files, open_files
from pyengine.files.weights import Weights
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import axis_max, Dim, Tensor
from pyengine.models import architecture
from pyengine.nn.batch import Across, Batch
from pyengine.nn.cache import CrossCache, LayerCache
from pyengine.nn.rope import Rope
from pyengine.programs.encoder import encoder_graph
from pyengine.programs.rows import common, Rows
from pyengine.text.tokenizer import Tokenizer


class Work(NamedTuple):
    """Rows [start, stop) of a prompt, which follow what `sequence` has; `wanted` of them, from `start` on, give logits."""

    sequence: Sequence
    rows: Rows
    start: int
    stop: int
    wanted: np.ndarray


class Runner:
    """The program of one step, its inputs, and the caches.

    program  the compiled step; groups: cells of layers with the same policy, and the name of their inputs
    layers   number of each layer's group, None without a cache; ropes, formats: the rotation of each layer's keys, and what K and V
             are stored in
    """

    def __init__(self, program: Any, inputs: dict[str, Any], groups: Many[tuple[Group, str]], layers: Many[int | None], axes: int,
                 n_batch: int, n_head: int, ropes: Many[Rope], formats: tuple[DType, DType]):
        self.program, self.axes, self.n_batch, self.n_head = program, axes, n_batch, n_head
        self.names, self.layers = [name for _, name in groups], list(layers)
        self.cached = [(layer, number) for layer, number in enumerate(layers) if number is not None]
        self.ropes, self.formats = list(ropes), formats
        self.cells = Cells([g for g, _ in groups], [program.state(f"{name}.table") for _, name in groups])
        unused = {n: np.empty(t.nbytes_max // 4, np.int32) for n, t in inputs.items() if n not in program.inputs}
        self._flat = unused | {name: a.reshape(-1) for name, a in program.inputs.items()}
        self._across = next((i for i, (g, _) in enumerate(groups) if isinstance(g.policy, Cross)), None)
        self._n_across = axis_max(inputs["across"].shape[0]) if "across" in inputs else 0     # encoder rows of one run
        self._logits = program.outputs[0]
        self._head_step = program.first_step_reading("head")
        self._dims: dict[str, int] = {}
        self.n_steps = 0

    def step(self, work: Many[Work]) -> np.ndarray:
        """Run one step; returns logits of the first n_head wanted rows [l, vocab], valid until the next call.

        A step that fails, or is interrupted, adds nothing to its sequences; those whose cells may be half copied are dropped.
        """
        try:
            self._lay_out(work)
        except BaseException:                                # Ctrl-C too
            for part in work:
                if part.sequence in self.cells.sequences:
                    self.cells.sequences.remove(part.sequence)
            self.cells.recount()
            raise
        logits = self.head(0, first_step=0)
        for part in work:
            s = part.sequence
            for i, rows in part.rows.across(part.start, part.stop):
                s.pictures.append((len(s) + i - part.start, s.crossed() + len(rows)))
            s.next = part.rows.position(part.stop)
            s.keys.extend(part.rows.keys[part.start : part.stop])
            self.cells.touch(s)
        self.n_steps += 1
        return logits

    def _lay_out(self, work: Many[Work]) -> None:
        """Make cells for a step's rows and fill the program's inputs."""
        for part in work:
            pictures = [rows for _, rows in part.rows.across(part.start, part.stop)]
            self.copy(self.cells.extend(part.sequence, part.stop - part.start, sum(map(len, pictures))))
            self._cross(part.sequence, pictures)
        flat, m, w, e = self._flat, 0, 0, 0
        for part in work:
            n, s = part.stop - part.start, part.sequence
            index = np.arange(len(s), len(s) + n, dtype=np.int32)
            here, there, wanted = slice(m, m + n), slice(w, w + len(part.wanted)), part.wanted
            flat["ids"][here] = part.rows.ids[part.start : part.stop]
            for rows, embedding in part.rows.embeddings(part.start, part.stop):
                k, d = embedding.shape
                flat["ids"][m + rows.start : m + rows.stop] = np.arange(-1 - e, -1 - e - k, -1)
                flat["media"][e * d : (e + k) * d] = embedding.reshape(-1)
                e += k
            flat["seq"][here], flat["seq_wanted"][there] = s.row, s.row
            flat["wanted"][there] = wanted + m
            for i, (g, name) in enumerate(zip(self.cells.groups, self.names)):
                if i == self._across:
                    continue
                lo, hi = visible(g.policy, index, part.rows.span_end[part.start : part.stop])
                flat[f"{name}.cells"][here] = self.cells.cells_of(i, s, index)
                flat[f"{name}.lo"][here], flat[f"{name}.hi"][here] = lo, hi
                flat[f"{name}.lo_wanted"][there], flat[f"{name}.hi_wanted"][there] = lo[wanted], hi[wanted]
            m, w = m + n, w + len(wanted)
        at = 0
        for axis in range(self.axes):
            for part in work:
                n = part.stop - part.start
                flat["positions"][at : at + n] = part.rows.positions[axis, part.start : part.stop]
                at += n
        self._dims = {"m": m, "w": w, "e": e, "c": 0, "s": self._look_across(work)}

    def _cross(self, s: Sequence, pictures: Iterable[np.ndarray]) -> None:
        """Write encoder rows [n, d_model] to the caches of layers that attend across, in runs of the program without rows of text.

        So they cost one run's input, and no run of the steps that follow, however many there are.
        """
        first, name = s.crossed(), self.names[self._across] if self._across is not None else ""
        for rows in pictures:
            for start in range(0, len(rows), self._n_across):
                part = rows[start : start + self._n_across]
                self._flat["across"][: part.size] = part.reshape(-1)
                self._flat[f"{name}.cells"][: len(part)] = self.cells.cells_of(self._across, s, np.arange(first, first + len(part)))
                self.program.execute_named(m=0, w=0, e=0, l=0, s=0, c=len(part))
                first += len(part)

    def _look_across(self, work: Many[Work]) -> int:
        """Fill the inputs that say which rows of a step see which encoder rows; returns how many do."""
        if self._across is None:
            return 0
        flat, name, m, n = self._flat, self.names[self._across], 0, 0
        for part in work:
            lo, hi = part.rows.sees[:, part.start : part.stop]
            rows = np.arange(m, m + len(lo), dtype=np.int32)
            seeing = hi > lo
            here = slice(n, n + int(seeing.sum()))
            flat["across.rows"][here], flat[f"{name}.seq"][here] = rows[seeing], part.sequence.row
            flat[f"{name}.lo"][here], flat[f"{name}.hi"][here] = lo[seeing], hi[seeing]
            flat["across.back"][m : m + len(lo)] = np.where(seeing, n + np.cumsum(seeing) - 1, -1 - rows)
            m, n = m + len(lo), here.stop
        return n

    def head(self, done: int, first_step: int | None = None) -> np.ndarray:
        """Logits of the wanted rows of the last step from number `done` on, n_head at most."""
        n = min(self.n_head, self._dims["w"] - done)
        self._flat["head"][:n] = np.arange(done, done + n)
        self.program.execute_named(first_step=self._head_step if first_step is None else first_step, l=n, **self._dims)
        return self._logits[:n]

    def across(self, number: int) -> bool:
        """Whether a group's layers attend across."""
        return number == self._across

    @property
    def room_across(self) -> int:
        """Encoder rows that a conversation holds, at most."""
        return 0 if self._across is None else self.cells.groups[self._across].policy.n

    def check_across(self, rows: Rows) -> None:
        """Raises: ContextOverflowError for pictures that have more encoder rows than a conversation's caches."""
        n = sum(len(s.embedding) for _, s in rows.crossed)
        if n > self.room_across:
            raise ContextOverflowError(f"the prompt's {len(rows.crossed)} pictures have {n} encoder rows, but a conversation holds "
                                       f"{self.room_across}; load with images=(width, height, number) for a larger number of "
                                       "pictures, or make them smaller")

    # -- contents of the caches ---------------------------------------------------------------------------------------

    def storage(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of one layer's keys and of its values: uint8 [kv heads, cells, bytes of a cell]."""
        return self.program.state_bytes(f"blk.{layer}.k"), self.program.state_bytes(f"blk.{layer}.v")

    def copy(self, copies: Iterable[Copy]) -> None:
        """Copy cells in all layers of a group."""
        for number, source, target in copies:
            for layer in [i for i, g in self.cached if g == number]:
                for cache in self.storage(layer):
                    cache[:, target] = cache[:, source]

    def shift(self, s: Sequence, start: int, stop: int) -> None:
        """Remove tokens [start, stop) of an idle sequence; those behind move down, their keys turned back by as many positions.

        What moves is still the outcome of all that was read, so it is not what a prompt without those tokens would give: such a
        prompt goes on from the tokens before `start` only. Rotation is in float32, rounded once to the cache's format.
        Raises: RequestError where the model, the cache's format or the sequence does not allow it; PlanError.
        """
        if not 0 <= start < stop <= len(s) or s.active or s not in self.cells.sequences:
            raise RequestError(f"tokens {start} to {stop} cannot be removed: an idle conversation that has them is needed, this "
                               f"one has {len(s)}")
        if self.axes != 1:
            raise RequestError("tokens cannot be removed from the middle where positions have several axes (M-RoPE)")
        if self.formats[0].name not in ("F32", "F16", "BF16"):
            raise RequestError(f"tokens cannot be removed from the middle of a {self.formats[0]} cache: keys are turned in f32, f16 "
                               "and bf16 only")
        if any(isinstance(k, tuple) and isinstance(k[0], bytes) for k in s.keys[start:]):
            raise RequestError("tokens cannot be removed before or within a picture")
        moves = self.cells.shift(s, start, stop)
        try:
            for layer, number in [(i, g) for i, g in self.cached if g != self._across]:
                own = [(source, target) for i, source, target in moves if i == number]
                keys, values = self.storage(layer)
                held = [(keys[:, source], values[:, source]) for source, _ in own]           # read before anything is written
                *_, (k, v) = held
                held[-1] = turn(k, self.formats[0], self.ropes[layer], start - stop), v
                for (_, target), (k, v) in zip(own, held):
                    keys[:, target], values[:, target] = k, v
        except BaseException:                                # Ctrl-C: half moved
            self.cells.drop(s)
            raise
        s.keys[start:] = [(object(), k) for k in s.keys[start:]]                 # equal to no key of a prompt
        s.next = len(s)

    def resume(self, rows: Rows) -> tuple[Sequence, int]:
        """A sequence that has the longest useful beginning of `rows`, active, and the length of that beginning.

        An idle conversation is continued where it is when most of it is used, or when it is the one that had to go for a fork.
        Raises: PlanError when all rows are active.
        """
        cells, most = self.cells, len(rows) - 1
        best, kept = None, 0
        for s in sorted(cells.sequences, key=lambda s: s.active):
            n = rows.whole(min(common(s.keys, rows.keys), most))
            if n > kept and cells.reach(s, n):
                best, kept = s, n
        if best is None:
            return cells.new(), 0
        idle = [s for s in cells.sequences if not s.active]
        last = len(cells.sequences) == cells.n_seq and best is min(idle, key=lambda s: s.used, default=None)
        if not best.active and (2 * kept > len(best) or last):
            return cells.renew(best, kept), kept
        child, copies = cells.fork(best, kept)
        try:
            self.copy(copies)
        except BaseException:                                # Ctrl-C: its ring may be half copied
            cells.drop(child)
            raise
        return child, kept


KV_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_1": "Q4_1"}
N_BATCH = 512                        # rows of one step
ACROSS_PICTURES = 8                  # of the largest that layers which attend across hold for a conversation, at most
HEAD_BYTES = 32 << 20                # logits of at most this size are computed at once


@dataclass
class Built:
    """A model's graph with what is needed to feed it."""

    arch: Any
    vision: Any              # the media encoder, or None
    graph: Graph
    outputs: list[Tensor]
    groups: list[tuple[Group, str]]      # cells of layers with the same policy, and the name of their inputs
    layers: list[int | None]             # number of each layer's group; None for one without a cache
    kv_dtypes: tuple[DType, DType]
    n_ctx: int
    n_batch: int
    n_seq: int
    n_head: int

    def states(self, n_ctx: int, n_seq: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the states with other numbers of positions and conversations, of steps with the same number of rows."""
        c, shapes = self.arch.config, {}
        own = [group(g.policy, n_ctx, self.n_batch, n_seq) for g, _ in self.groups]
        for g, (_, name) in zip(own, self.groups):
            shapes[f"{name}.table"] = (n_seq, g.slots)
        for i, number in enumerate(self.layers):
            if number is not None:
                shapes[f"blk.{i}.k"] = shapes[f"blk.{i}.v"] = (c.n_kv_heads, own[number].n_cells, c.head_dim)
        return shapes

    @property
    def across(self) -> int:
        """Encoder rows of one conversation that layers which attend across hold; 0 without such layers."""
        return next((g.policy.n for g, _ in self.groups if isinstance(g.policy, Cross)), 0)


def _vision(arch: Any, h: Hparams, files: Files, weights: Weights, n_ctx: int) -> Any:
    """The model's media encoder, or None where the files have none or the architecture cannot run it."""
    source = files.mmproj or files.model
    if arch.Vision is None or (files.mmproj is None and "v" not in weights):
        if files.mmproj is not None:
            raise UnsupportedModelError(f"{source.path}: architecture {h.arch!r} has no media encoder here")
        return None

    @cache
    def tokenizer() -> Tokenizer:                            # for files without keys for the tokens; once for all of them
        return Tokenizer.from_metadata(files.model.metadata)

    def token(text: str) -> int:
        found = tokenizer().id_of(text)
        if found is None:
            raise InvalidModelError(f"{files.model.path}: no token {text!r} in the vocabulary, and no key that names it")
        return found

    own = weights if files.mmproj is None else Weights(files.mmproj)
    vision = arch.Vision(h, Hparams(source.metadata, "clip"), own, n_ctx, token)
    if files.mmproj is not None:
        own.finish()
    return vision


def step_rows(n_ctx: int, n_batch: int, n_seq: int, atomic_rows: int, vocab_size: int) -> tuple[int, int]:
    """(rows of one step, rows whose logits are computed at once)."""
    n_batch = min(max(n_batch, n_seq, atomic_rows), n_ctx * n_seq)
    return n_batch, max(n_seq, min(n_batch, HEAD_BYTES // (4 * vocab_size)))


def build(files: Files, n_ctx: int, n_batch: int, kv_dtype: str, n_seq: int = 1, pictures: bool = True,
          size: tuple[int, int] | None = None, n_pictures: int | None = None, room: int = 1 << 62) -> Built:
    """The graph of one step of this model; without `pictures`, as if it had no media encoder.

    size, n_pictures: width and height of the largest picture, and how many of those a conversation's layers that attend across
    hold; default the processor's largest, and as many as `room` bytes do.
    """
    h = Hparams(files.model.metadata)
    weights = Weights(files.model)
    arch = architecture(h.arch)(h, weights, n_ctx)
    vision = _vision(arch, h, files, weights, n_ctx) if pictures else None
    unread = ("rope_freqs", "rope_factors_long", "rope_factors_short", *(() if vision and not files.mmproj else ("v", "mm")))
    weights.finish(ignore=unread)
    c = arch.config
    n_batch, n_head = step_rows(n_ctx, n_batch, n_seq, vision.atomic_rows if vision else 0, c.vocab_size)
    k_dtype, v_dtype = kv_dtypes(kv_dtype)
    for dtype in (k_dtype, v_dtype):
        if c.head_dim % dtype.block:
            raise UnsupportedModelError(f"kv_dtype={kv_dtype}: blocks of {dtype.block} do not divide a head of {c.head_dim}; "
                                        "use f16")
    g = Graph()
    m, w, l = Dim("m", n_batch), Dim("w", n_batch), Dim("l", n_head)
    cell = c.n_kv_heads * (k_dtype.size(c.head_dim) + v_dtype.size(c.head_dim))
    policies = _with_encoder_rows(arch.cache_policies(), vision, cell, size, n_pictures, room)
    n_across = max((p.n for p in policies if isinstance(p, Cross)), default=0)
    added, seeing = Dim("c", min(n_across, n_batch)), Dim("s", n_batch)
    media = g.input("media", (Dim("e", n_batch), c.d_model)) if vision and not n_across else None
    across = Across(g.input("across", (added, c.d_model)), g.input("across.rows", (seeing,), "I32"),
                    g.input("across.back", (m,), "I32")) if n_across else None
    batch = Batch(m, g.input("ids", (m,), "I32"), g.input("positions", (arch.position_axes, m), "I32"),
                  g.input("wanted", (w,), "I32"), g.input("head", (l,), "I32"), media, across)
    seq, seq_wanted = g.input("seq", (m,), "I32"), g.input("seq_wanted", (w,), "I32")
    numbers: dict[Policy, int] = {}
    groups: list[tuple[Group, str]] = []
    shared: list[list[Tensor]] = []
    caches: list[LayerCache | CrossCache | None] = []
    layers: list[int | None] = []
    for i, policy in enumerate(policies):
        if policy is None:
            layers.append(None)
            caches.append(None)
            continue
        if policy not in numbers:
            numbers[policy] = len(groups)
            name = f"{type(policy).__name__.lower()}{len(groups)}"
            groups.append((group(policy, n_ctx, n_batch, n_seq), name))
            shared.append([
                g.input(f"{name}.cells", (added,), "I32"), g.state(f"{name}.table", (n_seq, groups[-1][0].slots), "I32"),
                *(g.input(f"{name}.{part}", (seeing,), "I32") for part in ("seq", "lo", "hi")),
            ] if isinstance(policy, Cross) else [
                g.input(f"{name}.cells", (m,), "I32"), g.state(f"{name}.table", (n_seq, groups[-1][0].slots), "I32"),
                g.input(f"{name}.lo", (m,), "I32"), g.input(f"{name}.hi", (m,), "I32"),
                g.input(f"{name}.lo_wanted", (w,), "I32"), g.input(f"{name}.hi_wanted", (w,), "I32"),
            ])
        layers.append(numbers[policy])
        own, _ = groups[numbers[policy]]
        shape = (c.n_kv_heads, own.n_cells, c.head_dim)
        k, v = g.state(f"blk.{i}.k", shape, k_dtype), g.state(f"blk.{i}.v", shape, v_dtype)
        if isinstance(policy, Cross):
            caches.append(CrossCache(k, v, *shared[numbers[policy]]))
        else:
            cells, table, lo, hi, lo_w, hi_w = shared[numbers[policy]]
            caches.append(LayerCache(k, v, cells, table, seq, lo, hi, seq_wanted, lo_w, hi_w))
    logits, hidden = arch.forward(batch, caches)
    return Built(arch, vision, g, [logits, hidden], groups, layers, (k_dtype, v_dtype), n_ctx, n_batch, n_seq, n_head)


def _with_encoder_rows(policies: list[Policy], vision: Any, cell: int, size: tuple[int, int] | None, n_pictures: int | None,
                       room: int) -> list[Policy | None]:
    """Layers' policies with the number of encoder rows that `Cross` holds; None for such layers where there is no encoder.

    cell: bytes of a key and a value of one layer; the rest as in `build`.
    """
    n_layers = sum(isinstance(p, Cross) for p in policies)
    rows = 0
    if vision and n_layers:
        largest = min(vision.max_rows, vision.rows(*size)) if size else vision.max_rows
        rows = largest * (n_pictures or max(1, min(ACROSS_PICTURES, room // (n_layers * largest * cell))))
    return [p if not isinstance(p, Cross) else Cross(rows) if rows else None for p in policies]


def kv_dtypes(name: str) -> tuple[DType, DType]:
    """Formats of keys and values: "q8_0" for both, "q8_0/q4_0" for each. Raises: RequestError naming those that there are."""
    k, _, v = name.partition("/")
    for part in (k, v or k):
        if part not in KV_DTYPES:
            raise RequestError(f"kv_dtype={name!r}: use one of {', '.join(KV_DTYPES)}, or two of them as keys/values")
    return dtype_of(KV_DTYPES[k]), dtype_of(KV_DTYPES[v or k])


def model_graph(name: str | Path, n_ctx: int = 4096, mmproj: str | Path | None = None, encoder: bool = False) -> list[Tensor]:
    """The outputs of a model's graph, or of its media encoder's, as its module wrote it."""
    files = open_files(name, mmproj)
    built = build(files, min(n_ctx, Hparams(files.model.metadata).size("context_length")), N_BATCH, "f16")
    if encoder and built.vision is None:
        raise UnsupportedModelError(f"{files.name}: no media encoder")
    return encoder_graph(built.vision) if encoder else built.outputs
