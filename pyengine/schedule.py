"""Many requests on one model: sequences join and leave between steps, and each gets the bits that it would get alone.

`Runner` runs one step on rows of several sequences: it fills the program's inputs and keeps the cells. `Scheduler` decides which
rows: one of every request that generates, and beside them a slice of the longest-waiting prompt, so that a long prompt does not
stall the others. Kernels compute a row with one order of operations whatever else is in the step, so results do not depend on
who else is being served.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Hashable, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pyengine.batch import Rows
from pyengine.cells import Cells, Copy, Group, Sequence
from pyengine.dtype import DType
from pyengine.errors import ContextOverflowError, RequestError
from pyengine.kvcache import Cross, visible
from pyengine.media import MediaInfo
from pyengine.nn import Rope
from pyengine.ops.rope import rotate
from pyengine.sampling import Sampled, Sampler
from pyengine.tensor import axis_max

BESIDE = 128                 # rows of a prompt in a step that also generates: what the others wait for


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


def turn(cells: np.ndarray, dtype: DType, rope: Rope, by: int) -> np.ndarray:
    """Keys uint8 [heads, n, bytes] turned on by a number of positions."""
    bits = np.ascontiguousarray(cells).view(dtype.numpy)
    x = (bits.astype(np.uint32) << 16).view(np.float32) if dtype.name == "BF16" else bits.astype(np.float32)
    angle = np.float32(by) * rope.inv_freq.astype(np.float64)
    table = np.broadcast_to(np.concatenate([np.cos(angle), np.sin(angle)]).astype(np.float32), (len(x), 2 * len(angle)))
    y = rotate(x, table, rope.interleaved)
    if dtype.name == "BF16":                                 # round to nearest, ties to even
        u = y.view(np.uint32)
        return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16).view(np.uint8)
    return y.astype(dtype.numpy).view(np.uint8)


def common(a: Many[Hashable], b: Many[Hashable]) -> int:
    """Length of the common beginning."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


class Stops:
    """Holds text back while it may be the beginning of a stop string."""

    def __init__(self, stops: Many[str]):
        if any(not isinstance(s, str) or not s for s in stops):
            raise RequestError("stop: must be texts that are not empty")
        self.stops, self.held, self.found = list(stops), "", False

    def push(self, text: str) -> str:
        """Add text; returns what can be shown. After a stop string nothing more comes."""
        if self.found:
            return ""
        self.held += text
        ends = [(i, s) for s in self.stops if (i := self.held.find(s)) >= 0]
        if ends:
            self.found = True
            shown, self.held = self.held[: min(ends)[0]], ""
            return shown
        keep = max((n for s in self.stops for n in range(1, min(len(s), len(self.held) + 1)) if self.held.endswith(s[:n])), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        shown, self.held = self.held, ""
        return shown


@dataclass
class Report:
    """How an answer came about.

    tokens: ids; sampled: their log-probabilities (and the n best, where `logprobs` asked for them); finish: "stop" or "length";
    n_prompt, n_cached: prompt tokens, and those of them found in the cache; seconds: of the generation.
    media: what became of each picture or video. sequence: the conversation in the caches, as long as it is there.
    """

    tokens: list[int] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)
    finish: str = "length"
    n_prompt: int = 0
    n_cached: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0
    media: list[MediaInfo] = field(default_factory=list)
    sequence: Sequence | None = field(default=None, repr=False, compare=False)


class Request:
    """One prompt on its way to an answer: `pieces` are texts that nobody has taken yet."""

    def __init__(self, rows: Rows, sampler: Sampler, decoder: Any, stops: Stops, max_tokens: int | None, eog: Collection[int], report: Report):
        self.rows, self.sampler, self.decoder, self.stops = rows, sampler, decoder, stops
        self.max_tokens, self.eog, self.report = max_tokens, eog, report
        self.sequence: Sequence | None = None
        self.done = 0                                        # rows of the prompt in the cache
        self.pending: int | None = None                      # the token that the next step appends
        self.pieces: deque[str] = deque()
        self.finished = False
        self.error: BaseException | None = None
        self.started = self.prompted = time.perf_counter()

    @property
    def media(self) -> frozenset[bytes]:
        """Digests of its pictures."""
        return frozenset(bytes.fromhex(info.digest) for info in self.report.media)

    def take(self, logits: np.ndarray) -> None:
        """Sample from logits [vocab] after the last row, and decide whether to go on."""
        run, now = self.report, time.perf_counter()
        if self.pending is None:
            self.prompted = now
            run.prompt_seconds = now - self.started
        self.pending = None
        if self.max_tokens == 0:
            return self._end(run.finish)
        drawn = self.sampler.sample(logits)
        if drawn.token in self.eog:
            return self._end("stop")
        self.sampler.accept(drawn.token)
        run.tokens.append(drawn.token)
        run.sampled.append(drawn)
        self._show(self.stops.push(self.decoder.push(drawn.token)))
        run.seconds = time.perf_counter() - self.prompted
        if self.stops.found:
            run.finish, self.finished = "stop", True
        elif len(run.tokens) == self.max_tokens:
            self._end("length")
        else:
            self.pending = drawn.token

    def _end(self, finish: str) -> None:
        tail = self.stops.push(self.decoder.flush()) + self.stops.flush()
        self.report.finish = "stop" if self.stops.found else finish
        self._show(tail)
        self.report.seconds = time.perf_counter() - self.prompted
        self.finished = True

    def _show(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)


class Scheduler:
    """Serves requests in the order in which they came, as many at once as there are rows of sequences."""

    def __init__(self, runner: Runner, n_ctx: int):
        self.runner, self.n_ctx = runner, n_ctx
        self.waiting: deque[Request] = deque()
        self.active: list[Request] = []
        self._stepping = False
        self.stats = {"prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0}

    def submit(self, request: Request) -> None:
        """Queue a request. Raises: RequestError for an empty prompt, ContextOverflowError for one that no context holds."""
        if not len(request.rows):
            raise RequestError("the prompt is empty")
        check_room(len(request.rows), self.n_ctx)
        self.runner.check_across(request.rows)
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Stop working on a request; what it has computed stays as an idle conversation.

        May come in the middle of a step, when a stream that nobody holds is collected: the step then ends first.
        """
        request.finished = True
        if not self._stepping:
            self._sweep()

    def in_use(self) -> frozenset[bytes]:
        """Digests of pictures that conversations in the caches hold."""
        return frozenset().union(*(s.media for s in self.runner.cells.sequences))

    def advance(self) -> None:
        """Run one step for those that are served. Raises what the step raises; all requests in it have then ended with that error."""
        if self._stepping:
            raise RequestError("a step is being run: one model must not be used by several threads at once")
        self._stepping, served = True, []
        try:
            self._admit()
            work = self._compose()
            served = [r for r, _ in work]
            if work:
                self._take(work, self.runner.step([w for _, w in work]))
        except BaseException as error:                       # Ctrl-C too, wherever it comes
            for request in served:
                if not request.finished:
                    request.error, request.finished = error, True
            raise
        finally:
            self._stepping = False
            self._sweep()

    def _take(self, work: Many[tuple[Request, Work]], logits: np.ndarray) -> None:
        """Hand out a step's logits: the wanted row of each request that has one, in order."""
        row = 0
        for request, w in work:
            if request.pending is None:
                request.done = w.stop
            if len(w.wanted) and not request.finished:
                before = len(request.report.tokens)
                try:
                    request.take(logits[row])
                except Exception as error:                   # of the sampler: this request's own
                    request.error, request.finished = error, True
                self.stats["generated_tokens"] += len(request.report.tokens) - before
            row += len(w.wanted)

    def _admit(self) -> None:
        """Give rows to those that wait, as far as there are any; the first one that waits for nobody learns that there are none."""
        cells = self.runner.cells
        while self.waiting and (sum(s.active for s in cells.sequences) < cells.n_seq or not self.active):
            request = self.waiting.popleft()
            try:
                self._join(request)
            except BaseException as error:                   # no row, or Ctrl-C
                if request.sequence is not None:
                    request.sequence.active = False
                request.error, request.finished = error, True
                if not isinstance(error, Exception):
                    raise

    def _join(self, request: Request) -> None:
        request.started = time.perf_counter()
        for token in request.rows.ids.tolist():
            if 0 <= token < request.sampler.n_vocab:         # the others are never sampled
                request.sampler.accept(token)
        request.sequence, request.done = self.runner.resume(request.rows)
        request.sequence.media = request.media
        run = request.report
        run.n_prompt, run.n_cached, run.sequence = len(request.rows), request.done, request.sequence
        self.stats["prompt_tokens"] += run.n_prompt
        self.stats["cached_tokens"] += run.n_cached
        self.active.append(request)

    def _sweep(self) -> None:
        """Let go of requests that have ended."""
        for request in [r for r in self.active if r.finished]:
            request.sequence.active = False
        self.active = [r for r in self.active if not r.finished]
        self.waiting = deque(r for r in self.waiting if not r.finished)

    def _compose(self) -> list[tuple[Request, Work]]:
        """The rows of the next step."""
        work: list[tuple[Request, Work]] = []
        for r in [r for r in self.active if r.pending is not None]:
            if len(r.sequence) == self.n_ctx:
                r.error = ContextOverflowError(f"the context of {self.n_ctx} tokens is full after {len(r.report.tokens)} generated "
                                               "ones; load with a larger n_ctx")
                r.finished = True
                continue
            row = token_rows([r.pending], r.sequence.next, self.runner.axes, r.sequence.sees)
            work.append((r, Work(r.sequence, row, 0, 1, _FIRST)))
        left = self.runner.n_batch - len(work)
        limit, first = min(left, BESIDE) if work else left, True
        for r in [r for r in self.active if r.pending is None]:
            part = self._slice(r, limit, left if first else limit)
            if part is None:
                if first:                                    # a picture with no room beside the others has a step of its own
                    return [(r, self._slice(r, 0, self.runner.n_batch))]
                break
            work.append((r, part))
            limit, first = limit - (part.stop - part.start), False
            if limit <= 0:
                break
        return work

    def _slice(self, r: Request, limit: int, most: int) -> Work | None:
        """The next rows of a prompt: at most `limit`, or one picture that must not be cut of at most `most`; None without room."""
        start = r.done
        stop = r.rows.cut(start, limit)
        if stop == start:
            stop = r.rows.cut(start, r.rows.atom(start))
            if stop - start > most:
                return None
        wanted = np.array([stop - start - 1], np.int32) if stop == len(r.rows) else _NONE
        return Work(r.sequence, r.rows, start, stop, wanted)


_FIRST, _NONE = np.zeros(1, np.int32), np.empty(0, np.int32)


def check_room(n: int, n_ctx: int) -> None:
    """Raises: ContextOverflowError for a prompt that exceeds the context."""
    if n > n_ctx:
        raise ContextOverflowError(f"the prompt has {n} tokens, but the context holds {n_ctx}; load with a larger n_ctx")


def token_rows(ids: Many[int], position: int, axes: int, sees: tuple[int, int] = (0, 0)) -> Rows:
    """Rows of tokens that follow at `position` and see these encoder rows."""
    n, array = len(ids), np.array(ids, np.int32)
    positions = np.broadcast_to(np.arange(position, position + n, dtype=np.int32), (axes, n))
    return Rows(array.tolist(), array, positions, np.zeros(n, np.int32), [], position + n,
                np.repeat(np.array(sees, np.int32)[:, None], n, axis=1))
