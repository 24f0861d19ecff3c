"""Hidden states and vectors of prompts: a `Reading` is worked on like a request, beside whatever else is, and gives no text.

Each prompt is read in a conversation of its own, which goes when it is read. Its rows do not go through the output head.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from pyengine.arguments import switch
from pyengine.engine.prompts import Prompts
from pyengine.engine.request import Job, Report
from pyengine.engine.runner import Runner
from pyengine.engine.scheduler import Scheduler
from pyengine.errors import ContextOverflowError, RequestError, shown, UnsupportedModelError
from pyengine.files.hparams import Hparams
from pyengine.nn.texts import pooling_of
from pyengine.programs.rows import lay_out_rows, Rows, Segment, TokenSegment

POOLINGS = "mean", "cls", "last"
_LEAST_NORM = 1e-12                  # torch.nn.functional.normalize's: a row of zeros stays one


def unit(x: np.ndarray) -> np.ndarray:
    """Give vectors [.., d] length 1, in float64; those of zeros stay."""
    x = x.astype(np.float64)
    return x / np.maximum(np.sqrt(np.sum(x * x, axis=-1, keepdims=True)), _LEAST_NORM)


class Reading(Job):
    """One prompt on its way to its last hidden states: all of them, or one row as `pooling` says.

    mean   of all rows, added one after the other in float64, so that it does not depend on how the prompt was cut
    cls, last   the row of the first position, and that of the last one
    """

    hidden: ClassVar[bool] = True

    def __init__(self, rows: Rows, pooling: str | None = None):
        self._n = n = len(rows) if rows.source is None else len(rows.source.embedding)
        super().__init__(rows, Report(n_prompt=n, finish="stop"))
        self.pooling = pooling
        self._wanted = {"cls": range(1), "last": range(n - 1, n)}.get(pooling or "", range(n))
        self._left = len(self._wanted)                       # of these, how many have not come
        self._rows: list[np.ndarray] = []
        self._sum: np.ndarray | float = 0.0

    def join(self, runner: Runner) -> None:
        """Take an empty conversation; the states of an encoder are there at once. Raises: PlanError when all are in use."""
        self.conversation = runner.cells.new(self.rows.adapters, self.rows.compression)
        if self.rows.source is not None:
            self.take(np.asarray(self.rows.source.embedding)[self._wanted.start : self._wanted.stop])

    def wanted(self, start: int, stop: int) -> np.ndarray:
        """Return those of rows [start, stop) that the result is made of."""
        return np.arange(max(start, self._wanted.start), min(stop, self._wanted.stop), dtype=np.int32) - np.int32(start)

    def take(self, given: np.ndarray) -> None:
        """Take last hidden states [n, d_model] of the wanted rows of a step."""
        if self.pooling == "mean":
            for row in given:
                self._sum = self._sum + row.astype(np.float64)
        else:
            self._rows.append(given.copy())
        self._left -= len(given)
        if not self._left:
            self.report.prompt_seconds, self.finished = time.perf_counter() - self.started, True

    def leave(self, runner: Runner) -> None:
        """Drop the conversation."""
        super().leave(runner)
        runner.cells.drop(self.conversation)

    def states(self) -> np.ndarray:
        """Return all rows, float32 [n, d_model]. Raises: what ended it before they came."""
        self._check()
        return self._rows[0] if len(self._rows) == 1 else np.concatenate(self._rows)

    def vector(self, normalize: bool = True, size: int | None = None) -> np.ndarray:
        """Return the one row of a pooling, float32 [d_model], or its first `size` numbers; `normalize` gives it length 1.

        Raises: what ended it before that came.
        """
        self._check()
        x = self._sum / self._n if self.pooling == "mean" else self._rows[0][0].astype(np.float64)
        x = x[:size]
        return (unit(x) if normalize else x).astype(np.float32)

    def _check(self) -> None:
        if self.error is not None:
            raise self.error
        if self._left:
            raise RequestError("the prompt was not read to its end: it was cancelled, or is still being read")


class Vectors:
    """What makes readings for one model, and runs them.

    h   keys of its file, which may say how vectors are made of hidden states
    adapters   their scales; compression: of all conversations, where a part of their tokens has cells
    """

    def __init__(self, prompts: Prompts, scheduler: Scheduler, h: Hparams, adapters: tuple[float, ...] = (), compression: Any = None):
        self.prompts, self.scheduler, self.h, self.adapters, self.compression = prompts, scheduler, h, adapters, compression

    def pooling(self, asked: str | None = None) -> str:
        """Return the pooling: what is asked for, or what the file says, or "last", as decoders see what came before only; "mean" of an encoder's.

        Raises: RequestError for one that is none, and where the file is of a model that ranks; UnsupportedModelError for a file's
        that is not known.
        """
        if asked is not None:
            if not isinstance(asked, str) or asked not in POOLINGS:
                raise RequestError(f"pooling must be one of {', '.join(POOLINGS)}, got {shown(asked)}")
            return asked
        said, key, instead = pooling_of(self.h), self.h.key("pooling_type"), f"give pooling=, one of {', '.join(POOLINGS)}"
        if said == "rank":
            raise RequestError(f"{key} is rank: the model scores pairs of texts and gives no vectors; for vectors of its hidden states {instead}")
        if said and said not in POOLINGS:
            raise UnsupportedModelError(f"{key} is {said}, which is not known; {instead}")
        return said or ("last" if self.prompts.sources is None else "mean")

    def states(self, prompt: Any) -> np.ndarray:
        """Compute last hidden states of a prompt, float32 [n_positions, d_model]."""
        reading = self._reading(self.prompts.made_of(prompt)[0], None)
        return self._run([reading], Reading.states)[0]

    def embed(self, x: Any, normalize: bool = True, pooling: str | None = None, prompt: str | None = None) -> np.ndarray:
        """Compute the vector of an input, float32 [d], or those of a list of inputs [n, d]: see `Model.embed`."""
        normalize, pooling, before = switch("normalize", normalize), self.pooling(pooling), self.prompts.language.prefixes.before(prompt)
        many = isinstance(x, (list, tuple))
        if before:
            x = [before + item if isinstance(item, str) else item for item in x] if many else before + x if isinstance(x, str) else x
        found = self._run(self._each(x, pooling) if many else [self.reading(x, pooling)], lambda r: r.vector(normalize))
        if not many:
            return found[0]
        return np.stack(found) if found else np.empty((0, self.scheduler.runner.step.model.config.d_model), np.float32)

    def _each(self, x: Iterable[Any], pooling: str) -> Iterator[Reading]:
        """Make readings when they are asked for, so that not all pictures of a long list are held at once."""
        for i, item in enumerate(x):
            try:
                yield self.reading(item, pooling)
            except (RequestError, ContextOverflowError) as error:
                raise type(error)(f"x[{i}]: {error}") from error

    def reading(self, item: Any, pooling: str, cut: bool = False) -> Reading:
        """Make a reading of a text, a picture or a prompt in parts; `cut` shortens a text, or ids, to what the context holds; a text is
        shortened to what the file says.

        Raises: ContextOverflowError, RequestError, ImageError.
        """
        if item is None or isinstance(item, (bool, int, float, complex, np.generic, Mapping)):
            raise RequestError(f"a text, a picture or a prompt in parts was expected, not {type(item).__name__}; token ids are a list in the list")
        if isinstance(item, (str, list, tuple)):
            segments = self.prompts.made_of(item)[0]
        else:
            segments = self.prompts.made_of("", [item])[0]
        most = self.prompts.language.prefixes.max_tokens if isinstance(item, str) else 0
        return self._reading([self._shortened(segments, most)] if cut or most else segments, pooling)

    def _shortened(self, segments: list[Segment], most: int = 0) -> TokenSegment:
        """Cut a prompt of tokens at the end of the context, or after the most tokens, before the token that the tokenizer puts at an end."""
        ids = [i for s in segments for i in s.ids]
        n, end = min(most or self.scheduler.n_ctx, self.scheduler.n_ctx), self.prompts.tokenizer.eos_id
        tail = [end] if self.prompts.tokenizer.add_eos and ids[-1:] == [end] else []
        return TokenSegment(tuple(ids if len(ids) <= n else [*ids[: n - len(tail)], *tail]))

    def _reading(self, segments: list[Segment], pooling: str | None) -> Reading:
        rows = lay_out_rows(self.prompts.asked(segments), self.scheduler.runner.axes)
        rows.adapters, rows.compression = self.adapters, self.compression
        reading = Reading(rows, pooling)
        self.scheduler.check(reading)
        return reading

    def _run(self, readings: Iterable[Reading], give: Callable[[Reading], np.ndarray]) -> list[np.ndarray]:
        """Run readings side by side, as many as there are conversations, and return what each gives. Raises: what ended one of them."""
        out: dict[int, np.ndarray] = {}
        running: dict[int, Reading] = {}
        try:
            for i, reading in enumerate(readings):
                running[i] = reading
                with self.scheduler.turn():
                    self.scheduler.submit(reading)
                while len(running) >= self.scheduler.runner.cells.n_seq:
                    self._advance(running, out, give)
            while running:
                self._advance(running, out, give)
        finally:
            for reading in running.values():
                self.scheduler.cancel(reading)
        return [out[i] for i in range(len(out))]

    def _advance(self, running: dict[int, Reading], out: dict[int, np.ndarray], give: Callable[[Reading], np.ndarray]) -> None:
        """Run one step for all that is worked on, and move what has ended from `running` to `out`."""
        with self.scheduler.turn():
            if not any(r.finished for r in running.values()):                  # another thread may have moved them on
                self.scheduler.advance()
        for i in [i for i, r in running.items() if r.finished]:
            out[i] = give(running.pop(i))
        self.scheduler.give_way()
