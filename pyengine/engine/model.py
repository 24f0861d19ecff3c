"""A loaded model: plain steps, conversations, generation.

One graph serves prompts and generation of all conversations: the number of rows, their positions and cells are run-time inputs.
`prompts` makes segments of texts and pictures (these by `encoded`, an encoder with a program of its own), `scheduler` decides which
rows are computed together, `runner` runs them, `cache.cells` says where their keys and values lie.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TYPE_CHECKING

import numpy as np

from pyengine.arguments import INT32_MAX, iterates, number, switch, takes, whole
from pyengine.backends.base import Program, Progress
from pyengine.cache.cells import Conversation
from pyengine.cache.store import Cached, cached
from pyengine.engine.anew import fitted_anew
from pyengine.engine.answer import Answer, Stream, Streams
from pyengine.engine.closed import Closed, weights_in_words
from pyengine.engine.language import Language, ReadsText
from pyengine.engine.prompts import Prompt, Prompts, token_ids
from pyengine.engine.request import Marking, Report, Request, Stops
from pyengine.engine.runner import Runner
from pyengine.engine.saving import Saves
from pyengine.engine.scheduler import alone, check_room, Scheduler
from pyengine.engine.searching import rules_of, searches
from pyengine.engine.wishes import SHAPES, Wishes, WISHES
from pyengine.errors import PlanError, RequestError, shown, UnsupportedModelError
from pyengine.files.hparams import Hparams
from pyengine.memory.fit import Fitted
from pyengine.memory.held import forget, Held, planned_bytes, register
from pyengine.programs.rows import lay_out_rows, MediaSegment, Rows, Segment, token_rows
from pyengine.programs.step import Work
from pyengine.text.sampling import Sampler, sampling_params, SamplingParams
from pyengine.text.search import SEARCH

if TYPE_CHECKING:
    from pyengine.cache.compression.base import Compression
    from pyengine.chat.template import ChatTemplate
    from pyengine.engine.encoded import EncodedMedia
    from pyengine.engine.guide import Guide
    from pyengine.engine.loop import Handle, Loop
    from pyengine.engine.proposing import Source
    from pyengine.engine.ranks import Ranked
    from pyengine.engine.sources import Sources
    from pyengine.engine.vectors import Vectors
    from pyengine.media.policy import MediaPolicy


SAMPLING = tuple(SamplingParams.__dataclass_fields__)
OF_CACHE = ("adapters", "compress")      # what a conversation's cells depend on
WRITING = (*SAMPLING, *SEARCH, *SHAPES, *OF_CACHE, "speculate")   # what may be set for a prompt, and for a reply in a conversation
REPLYING = (*SAMPLING, *SEARCH, *WISHES, *OF_CACHE, "speculate")


class Model(ReadsText, Saves):
    """A loaded model with the caches of `n_seq` conversations. Made by `load`; `with` closes it at its end.

    Several threads may use it: each call, and each piece of a stream, waits for the one before it.
    """

    writes = True                    # text; other models make vectors and scores

    def __init__(self, fitted: Fitted, program: Program, progress: Progress | None = None):
        layout = fitted.layout
        self.closed = False
        bound, sizes, image = layout.bound, layout.sizes, layout.bound.image
        self._files, self.file, self.config = bound.files, bound.files.model, bound.model.config
        self.n_ctx, self.n_batch, self.n_seq, self.n_vocab = sizes.n_ctx, sizes.n_batch, sizes.n_seq, self.config.vocab_size
        self._n_ids, self._ropes = bound.model.n_ids, bound.model.ropes(sizes.n_ctx)
        self._adapters, self._ranks = {a.name: a.scale for a in bound.adapters}, bound.ranks
        self._compression = layout.want.compress
        self._run_on(fitted, program)
        self._scheduler = Scheduler(self._runner, self.n_ctx, layout.want.speculate, _source(fitted, self._runner))
        self._lock = self._scheduler.lock
        self._loop: Loop | None = None
        self.media: EncodedMedia | None = None
        if image is not None:
            from pyengine.engine.encoded import EncodedMedia                   # models without pictures load faster
            from pyengine.media.views import Limits

            limits = Limits(sizes.n_ctx, sizes.runs[image.kind])
            own = (bound.files.mmproj or self.file).metadata
            reads = Language(own.below(f"{image.vocabulary}.")) if image.vocabulary else None
            self.media = EncodedMedia(image, layout.encoder, limits, layout.image_cache, self._runner.cells, progress, reads)
        self.sources: Sources | None = None
        if layout.source is not None:
            from pyengine.engine.sources import Sources

            self.sources = Sources(bound.source, layout.source.load(progress), sizes.source, layout.source_cache)
        self._language = Language(self.file.metadata, bound.files.modelfile)
        self._prompts = Prompts(bound.files.name, self._n_ids, self._language, self.media, left_out=bound.left_out, sources=self.sources)
        self._axes = self._runner.axes
        self._title = f"{bound.files.name}: {Hparams(self.file.metadata).arch}, {weights_in_words(bound.files.opened)} weights"
        self._fed: Conversation | None = None                                  # the conversation of `feed`, and what it holds
        self._fed_ids: list[int] = []
        self._fed_moved = False
        self._fingerprint = b""
        register(self)

    def _run_on(self, fitted: Fitted, program: Program) -> None:
        """Take a program of the model's steps; there are no conversations in its caches."""
        self._fitted, self.plan, self.program = fitted, fitted.plan, program
        self._runner = Runner(fitted.layout.step, program)

    def __repr__(self) -> str:
        many = f" x {self.n_seq}" if self.n_seq > 1 else ""
        return f"Model({self._title}, {'closed' if self.closed else f'context {self.n_ctx}{many}'})"

    def __enter__(self) -> Model:
        if self.closed:
            raise self._runner.error
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the memory of weights and caches, and the files. Streams end with a RequestError, as does every later use.

        Waits for the step that another thread is running; what `submit` queued is cancelled. A closed model may be closed again.
        """
        with self._lock:
            self._scheduler.check_idle("close")
        if self._loop is not None:
            self._loop.close()                               # its thread ends, for which it may need the lock
        self._release()

    def held(self) -> Held | None:
        """Return what the model holds by its plan and how much of that is resident; None once it is closed. Waits for nobody."""
        program, media, sources = self.program, self.media, self.sources
        if self.closed or isinstance(program, Closed) or isinstance(media, Closed) or isinstance(sources, Closed):
            return None
        planned = planned_bytes(self.plan)
        source = self._scheduler.speculation.source
        drafting = source.resident() if source is not None else 0
        there = {"cpu": program.resident() + drafting + (media.resident() if media is not None else 0) + (sources.resident() if sources is not None else 0)}
        for device in planned.keys() - {"cpu"}:              # a card's memory is taken when a program is loaded, and counted in full
            coming = self.plan.of("encoder", device) if media is not None and not media.loaded else 0
            there[device] = planned[device] - coming
        return Held(self.plan.model, planned, there)

    @alone
    def _release(self) -> None:
        if self.closed:
            return
        fitting = self.plan.search()                         # while the files are open; the plan can be read later, and does not keep them
        self.plan = replace(self.plan, search=lambda: fitting)
        gone: Any = Closed(self.plan.model)
        self._scheduler.close(gone)
        self.closed, self._fed = True, None
        self.program = self.file = self._files = self._fitted = self._runner = self._language = self._prompts = gone
        self.media = None if self.media is None else gone
        self.sources = None if self.sources is None else gone
        forget(self)
        gc.collect()                                         # programs with steps that the reference computes refer to themselves

    # -- text ---------------------------------------------------------------------------------------------------------

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """Fields of `SamplingParams` that the model's files recommend; arguments of a request go before them. Models that turn one text into
        another write what is most probable, unless their files say otherwise."""
        return {**({"temperature": 0.0} if self.sources is not None else {}), **self._language.sampling_defaults}

    @property
    def stop_defaults(self) -> tuple[str, ...]:
        """Texts that end an answer of which the request says nothing."""
        return self._language.stop_defaults

    @property
    def system_default(self) -> str:
        """The system text of conversations that have none of their own; "" if there is none."""
        return self._language.system_default

    @property
    def stats(self) -> dict[str, int]:
        """Counts since the model was loaded: tokens, steps, and hits and misses of the image cache."""
        return {**self._scheduler.stats, "steps": self._runner.n_steps, **(self.media.stats if self.media else {}),
                **(self.sources.stats if self.sources else {})}

    @takes()
    def encode_image(self, image: Any) -> np.ndarray:
        """Return the soft tokens of a picture (or of a list of frames), as the decoder receives them: float32 [n, d_model].

        Without start, end or row-break tokens; after the projector, before any multiplier of the decoder. Kept in the image
        cache. Raises: UnsupportedModelError without an encoder, RequestError where it was left out, ImageError.
        """
        self._need_image_encoder()
        parts, _ = self._prompts.encoded(image)
        return np.concatenate([p.embedding[:, : self.config.d_model] for p in parts if isinstance(p, MediaSegment)])

    @takes()
    def attention(self, x: Any) -> dict[str, np.ndarray]:
        """Return what an encoder's queries attended to in a picture, after softmax: float32 [heads, queries, keys] by name and layer
        ("qformer.0"); keys are the class token and the patches, line by line. Computed anew each time, and when it is asked for only.
        x: a picture, or [picture, text] for an encoder that reads the prompt's text.

        Raises: UnsupportedModelError for a model that shows none; as `encode_image`.
        """
        self._need_image_encoder()
        return self._prompts.attention(x)

    def _need_image_encoder(self) -> None:
        if self.media is None and not self._prompts.left_out:
            raise UnsupportedModelError(f"{self.file.path}: this model has no image encoder; where it is in a file of its own, load with mmproj=")

    # -- adapters -----------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> dict[str, float]:
        """The scale of each adapter, by its name, in requests that say nothing of them."""
        return dict(self._adapters)

    @takes()
    def use_adapters(self, adapters: Any) -> None:
        """Set the scales of requests that come from now on and say nothing: as a request gives them; others are not used."""
        self._adapters = dict(zip(self._adapters, self._scales({} if adapters is None else adapters)))

    def _scales(self, adapters: Any) -> tuple[float, ...]:
        """Return the scale of each adapter in a request: those that are named or numbered, 0 for others; None: the usual ones. Raises: RequestError."""
        if adapters is None:
            return tuple(self._adapters.values())
        names = list(self._adapters)
        if not isinstance(adapters, (str, list, tuple, Mapping)):
            raise RequestError(f"adapters: must be a mapping of names to scales, or names, got {shown(adapters)}")
        plain = [adapters] if isinstance(adapters, str) else adapters
        scales = dict.fromkeys(names, 0.0)
        for key, scale in plain.items() if isinstance(plain, Mapping) else ((name, 1.0) for name in plain):
            name = names[key] if type(key) is int and 0 <= key < len(names) else key
            if not isinstance(name, str) or name not in scales:
                raise RequestError(f"adapters: there is no {shown(key)}; loaded are {', '.join(names) or 'none: load with adapters='}")
            scales[name] = number(f"adapters: the scale of {shown(name)}", scale) + 0.0
        return tuple(scales.values())

    def _lay_out(self, segments: Sequence[Segment], adapters: Any = None, compression: Compression | None = None) -> Rows:
        """Lay a prompt out for a request with these adapters, whose cells are compressed so."""
        rows = lay_out_rows(segments, self._axes)
        rows.adapters, rows.compression = self._scales(adapters), compression
        return rows

    # -- compression --------------------------------------------------------------------------------------------------

    @property
    def compression(self) -> Compression | None:
        """How the cells of conversations are compressed where a request says nothing of it."""
        return self._compression

    def _compression_of(self, asked: Any, fixed: bool = False) -> Compression | None:
        """Return how a request's conversation is compressed: None as usual, False not at all. fixed: the model stays laid out as it is. Raises: RequestError."""
        policy = self._compression
        if asked is not None and asked is not policy:
            from pyengine.cache.compression.written import compression_of

            policy = None if asked is False else compression_of(asked)
        if policy is None:
            return None
        self._runner.bounds.check(policy)
        if not self._runner.bounds.serves(policy):
            if fixed:
                raise self._not_laid_out(policy, "others ask it too")
            self._run_anew(policy)
        return policy

    @alone
    def _run_anew(self, policy: Compression) -> None:
        """Lay the model out anew, so that conversations can be compressed by a policy too; those that there are go.

        Raises: RequestError while requests are worked on; PlanError if that does not fit.
        """
        if (self._loop is not None and not self._loop.idle or self._scheduler.active or self._scheduler.waiting
                or any(s.active for s in self._runner.cells.conversations)):
            raise self._not_laid_out(policy, "is at work")
        was, n_steps = self._fitted, self._runner.n_steps
        fitted = fitted_anew(was, policy, self._compression, self)
        self._fed = self.program = self._runner = self._scheduler.runner = self._scheduler.speculation.source = None         # type: ignore[assignment]
        gc.collect()
        try:
            self._run_on(fitted, fitted.layout.prepared.load())
            self._scheduler.speculation.source = _source(fitted, self._runner)
        except BaseException:                                # Ctrl-C, or no memory: as it was, without conversations
            self._run_on(was, was.layout.prepared.load())
            self._scheduler.speculation.source = _source(was, self._runner)
            raise
        finally:
            if self._runner is not None:
                self._runner.n_steps, self._scheduler.runner = n_steps, self._runner
                if self.media is not None:
                    self.media.cells = self._runner.cells

    def _not_laid_out(self, policy: Compression, why: str) -> RequestError:
        there = self._fitted.layout.want.compress
        return RequestError(f"compress={policy!r}: the model was loaded {f'for {there!r}' if there else 'without compression'}, and {why}; load it with "
                            f"compress={policy!r}")

    @alone
    def cells_held(self) -> Cached | None:
        """Return how much of the caches the conversation used last takes; None if there is none."""
        return cached(self._runner.store)

    @property
    def _always(self) -> Compression | None:
        """How all conversations are compressed, plain steps too: there are no cells for the others."""
        return self._compression if self._runner.bounds.bounded else None

    # -- hidden states and vectors ------------------------------------------------------------------------------------

    @property
    def vectors(self) -> Vectors:
        """What `hidden` and `embed` rest on; its readings can also be queued in `loop`."""
        from pyengine.engine.vectors import Vectors

        return Vectors(self._prompts, self._scheduler, Hparams(self.file.metadata), self._scales(None), self._always)

    @takes()
    def hidden(self, x: Sequence[Any] | str) -> np.ndarray:
        """Compute the last hidden states of a prompt, after the final norm: float32 [n_positions, d_model].

        Raises: ContextOverflowError, RequestError, ImageError; PlanError when every conversation is in use.
        """
        return self.vectors.states(x)

    @takes()
    def embed(self, x: Any, normalize: bool = True, pooling: str | None = None, prompt: str | None = None) -> np.ndarray:
        """Compute the vector of a text or picture, float32 [d_model], or of each in a list, [n, d_model], side by side as n_seq allows.

        x: texts get the special tokens of any prompt, a picture is a prompt of its own; a list in the list is a prompt in parts, as ids.
        normalize: to length 1. pooling: which last hidden states it is made of: "mean", "cls" (the first) or "last"; None: what the
        file says, or else the last. prompt: the name of what the file puts before texts ("query", ..); None: what it puts there by itself;
        "": nothing. Raises: as `hidden`.
        """
        return self.vectors.embed(x, normalize, pooling, prompt)

    @takes()
    def rerank(self, query: str, documents: Sequence[str]) -> np.ndarray:
        """Compute how well each document answers a query: float32 [n], the higher the better.

        For a file of a decoder that was made for it (Qwen3-Reranker): its logit of "yes" less that of "no", or the score of its head. Their sigmoid is the probability of "yes"
        beside "no", which llama.cpp and sentence-transformers give. Raises: UnsupportedModelError for other files; otherwise as `hidden`.
        """
        return self.ranked(query, documents).scores

    def ranked(self, query: str, documents: Sequence[str]) -> Ranked:
        """Do what `rerank` does, and count the tokens."""
        from pyengine.engine.ranks import check_asked, ranked

        return ranked(self.vectors, self._ranks, self.plan.model, query, check_asked(query, documents))

    # -- plain steps --------------------------------------------------------------------------------------------------

    @alone
    def reset(self) -> None:
        """Forget all conversations that nobody works on; encoded pictures stay in the image cache."""
        for s in [s for s in self._runner.cells.conversations if not s.active]:
            self._runner.cells.drop(s)
        self._scheduler.speculation.reset()
        self._fed, self._fed_ids, self._fed_moved = None, [], False

    @alone
    @takes()
    def feed(self, ids: Sequence[int], n_batch: int | None = None) -> np.ndarray:
        """Append tokens to a conversation of its own, in steps of at most n_batch; returns logits after the last one, [vocab].

        A conversation that has gone for others is computed anew. `reset` begins another one.
        Raises: ContextOverflowError, RequestError, PlanError when every conversation is in use.
        """
        ids = token_ids(ids, self._n_ids)
        if not ids:
            raise RequestError("feed: there are no tokens")
        most = self.n_batch if n_batch is None else min(whole("n_batch", n_batch, 1), self.n_batch)
        self._runner.check_across(token_rows(ids, 0, self._axes))
        cells, s, held = self._runner.cells, self._fed, [*self._fed_ids, *ids]
        check_room(len(held), self.n_ctx)
        self._fed = None                                                       # what fails or is interrupted is computed anew
        if s not in cells.conversations:
            if self._fed_moved:
                raise PlanError("the conversation of `feed` has gone for others; tokens were removed from it, so it cannot be "
                                "computed anew: reset")
            s = cells.new(self._scales(None), self._always)
        rows = token_rows(held[len(s) :], len(s), self._axes)
        try:
            s.active = True
            for start, stop in self._runner.steps(s, rows, 0, most):
                logits = self._runner.run([Work(s, rows, start, stop, np.array([stop - start - 1], np.int32))])
        finally:
            s.active = False
        self._fed, self._fed_ids = s, held
        return logits.whole()[0].copy()

    @alone
    @takes()
    def shift(self, start: int, stop: int) -> None:
        """Remove tokens [start, stop) from the conversation of `feed`; those behind move down and keep what they know of them.

        Raises: RequestError where the model or the cache's format does not allow it.
        """
        start, stop, s = whole("start", start, -INT32_MAX), whole("stop", stop, -INT32_MAX), self._fed
        if s not in self._runner.cells.conversations:
            raise RequestError("shift: there is no conversation of `feed`, or it has gone for others")
        self._runner.shift(s, start, stop)
        del self._fed_ids[start:stop]
        self._fed_moved = True

    @alone
    @takes()
    def logits(self, prompt: Sequence[Any] | str, adapters: Any = None, source: Sequence[Any] | str | None = None, compress: Any = None) -> np.ndarray:
        """Compute logits after each position of a prompt, float32 [n_positions, n_vocab]; nothing of an earlier cache is used.

        adapters, compress: as in `stream`; what compresses after a prompt changes none of these. source: of an encoder-decoder, what its encoder reads, a text or a prompt in parts; `prompt` are then ids of
        the decoder, from the token on that it starts with.
        Raises: ContextOverflowError, RequestError, ImageError; PlanError when every conversation is in use.
        """
        if source is None and self.sources is not None:
            raise RequestError("logits: an encoder reads this model's prompts; give source=, and ids of the decoder, which begin with "
                               f"{self.sources.encoder.start}")
        segments = self._prompts.prompt(prompt).segments if source is None else self._prompts.following(source, prompt)
        rows = self._lay_out(segments, adapters, self._always if compress is None else self._compression_of(compress))
        out = np.empty((len(rows), self.n_vocab), np.float32)
        for start, block in self.logit_blocks(rows):
            out[start : start + len(block)] = block
        return out

    @takes()
    def logit_blocks(self, prompt: Rows | Sequence[int], first: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the rows of `logits` from position `first` on, in blocks (position, [n, vocab]) that are valid until the next one is
        asked for.

        Raises: RequestError if another step is run in between, by this thread or another one; else as `logits`.
        """
        first = whole("first", first)
        rows = prompt if isinstance(prompt, Rows) else token_rows(token_ids(prompt, self._n_ids), 0, self._axes)
        check_room(len(rows), self.n_ctx)
        self._runner.check_across(rows)
        with self._lock:
            given = isinstance(prompt, Rows)
            s = self._runner.cells.new(rows.adapters if given else self._scales(None), rows.compression if given else self._always)
        try:
            for start, stop in self._runner.steps(s, rows, 0, self.n_batch):
                skip = min(max(first - start, 0), stop - start)
                wanted = np.arange(skip, stop - start, dtype=np.int32)
                with self._lock:
                    done, logits = 0, self._runner.run([Work(s, rows, start, stop, wanted)]).whole()
                    step = self._runner.n_steps
                while len(logits):
                    yield start + skip + done, logits
                    done += len(logits)
                    with self._lock:
                        if self._runner.n_steps != step:
                            raise RequestError("logit_blocks: another step of the model was run while its blocks were read")
                        logits = self._runner.head(done).whole() if done < len(wanted) else logits[:0]
        finally:
            with self._lock:
                if not self.closed:
                    self._runner.cells.drop(s)

    # -- generation ---------------------------------------------------------------------------------------------------

    @takes(WRITING)
    def generate(self, prompt: str | Sequence[Any], images: Sequence[Any] = (), max_tokens: int | None = 512,
                 stop: str | Sequence[str] | None = None, **sampling: Any) -> Answer:
        """Continue a prompt. See `stream` for the arguments; returns the whole text."""
        return self.stream(prompt, images, max_tokens, stop, **sampling).answer()

    @takes(WRITING)
    def generate_many(self, prompts: Sequence[str | Sequence[Any]], max_tokens: int | None = 512, stop: str | Sequence[str] | None = None,
                      **sampling: Any) -> list[Answer]:
        """Continue several prompts side by side, `n_seq` at once. Each answer is the one that `generate` gives."""
        return self.stream_many(prompts, max_tokens, stop, **sampling).answers()

    @takes(WRITING)
    def stream_many(self, prompts: Sequence[str | Sequence[Any]], max_tokens: int | None = 512, stop: str | Sequence[str] | None = None,
                    **sampling: Any) -> Streams:
        """Continue several prompts side by side, yielding (number of the prompt, piece) as they come; its `answers()` are whole."""
        if isinstance(prompts, (str, bytes, bytearray, memoryview, Mapping)) or not iterates(prompts):
            raise RequestError(f"prompts must be a list, got {shown(prompts)}")
        return Streams([self.stream(p, (), max_tokens, stop, **sampling) for p in prompts])

    @takes(WRITING)
    def stream(self, prompt: str | Sequence[Any], images: Sequence[Any] = (), max_tokens: int | None = 512,
               stop: str | Sequence[str] | None = None, **sampling: Any) -> Stream:
        """Continue a prompt, yielding pieces of whole characters.

        max_tokens: None goes on until the model ends or the context is full. stop: texts that end the answer; they are not
        part of it. sampling: fields of `SamplingParams` (temperature=0 is greedy; top_k, top_p, min_p, seed ...). What is not
        given is what the model's files recommend (`sampling_defaults`, `stop_defaults`), or else the default of `SamplingParams`.
        Also one of format (a JSON schema, or "json"), regex, grammar (Lark, or GBNF): nothing else is written then. adapters: the scales of
        LoRA adapters by name, or names; those that are not named are not used. None: as they were loaded. compress: how the conversation's
        cells are compressed, a policy such as `pe.LookM(ratio=0.2)` or its text; None: as the model was loaded; False: not at all.
        Raises: ContextOverflowError when the context is full, RequestError, ImageError.
        """
        return self._stream(lambda: self._prompts.prompt(prompt, images), max_tokens, stop, sampling)

    @takes(REPLYING)
    def submit(self, prompt: str | Sequence[Any] | None = None, images: Sequence[Any] = (), messages: Sequence[dict[str, Any]] | None = None,
               tools: Sequence[dict[str, Any]] | None = None, max_tokens: int | None = 512, stop: str | Sequence[str] | None = None,
               client: str = "", media_policy: MediaPolicy | None = None, template_options: Mapping[str, Any] | None = None,
               prompt_logprobs: int | None = None, **sampling: Any) -> Handle:
        """Queue a prompt or a conversation for a thread that works on all that is queued; returns at once what the answer comes in.

        prompt, images: as in `stream`; messages, tools, template_options: as in `chat`; one of the two. Pictures are read and encoded before it returns.
        sampling: those of `stream`, and those of `chat` where there are messages.
        client: who asks; those who ask much do not keep others waiting. media_policy: which files of this machine may be shown, where
        somebody else wrote the messages; then the model is not laid out anew for `compress` either. prompt_logprobs: log-probabilities of the prompt's tokens are wanted too, and so many of the most
        probable ones in the place of each (`report.prompted`). The answer is the one that `generate` or `chat` gives.
        Raises: BusyError when too many requests wait; ContextOverflowError, RequestError, TemplateError, ImageError.
        """
        if (prompt is None) == (messages is None):
            raise RequestError("submit: give a prompt or messages, one of them")
        for name in ("think", "tool_choice", "parallel_tool_calls") if messages is None else ():
            if name in sampling or tools:
                raise RequestError(f"submit: {'tools' if tools else name} needs messages: a prompt is continued as it is")
        if not isinstance(client, str):
            raise RequestError(f"submit: client is a text, not {type(client).__name__}")
        loop = self.loop
        if media_policy is not None:
            self._compression_of(sampling.get("compress"), fixed=True)
        prompts, wishes = self._prompts_under(media_policy), _wishes(sampling)
        request = self._request(lambda: prompts.prompt(prompt, images) if prompt is not None else prompts.chat(messages, tools, template_options, wishes),
                                max_tokens, stop, sampling, None if messages is None else wishes)
        if prompt_logprobs is not None:
            if self.sources is not None:
                raise RequestError("prompt_logprobs: an encoder reads this model's prompts, and foretells nothing")
            n_best = whole("prompt_logprobs", prompt_logprobs, 0, None)
            request.scorer = Sampler(SamplingParams(temperature=0, logprobs=n_best), min(self.n_vocab, self.tokenizer.vocab_size))
        return loop.submit(request, client)

    @property
    def loop(self) -> Loop:
        """The thread that serves what `submit` queues, and its queue."""
        if self._loop is None:
            from pyengine.engine.loop import Loop

            with self._lock:
                self._loop = self._loop or Loop(self._scheduler)
        return self._loop

    def _stream(self, prompt: Callable[[], Prompt], max_tokens: int | None, stop: str | Sequence[str] | None, sampling: dict[str, Any],
                wishes: Wishes | None = None) -> Stream:
        return Stream(self._request(prompt, max_tokens, stop, sampling, wishes), self._scheduler)

    def _request(self, prompt: Callable[[], Prompt], max_tokens: int | None, stop: str | Sequence[str] | None, sampling: dict[str, Any],
                 wishes: Wishes | None) -> Request:
        """Make a request; `prompt` encodes pictures, so what is cheap to refuse is refused before. wishes: of a reply in a conversation."""
        adapters, compression = sampling.get("adapters"), self._compression_of(sampling.get("compress"))
        self._scales(adapters)
        talks, wishes = wishes is not None, wishes or _wishes(sampling)
        most = None if max_tokens is None else whole("max_tokens", max_tokens, 0, None)
        params = sampling_params(self.sampling_defaults, {k: v for k, v in sampling.items() if k in SAMPLING})
        rules = rules_of(self.sources, self.file.metadata, self.tokenizer.eog_ids, sampling)
        stops, shape = Stops(self.stop_defaults if stop is None else stop), wishes.shape
        sampler = Sampler(params, min(self.n_vocab, self.tokenizer.vocab_size), self.tokenizer.piece)
        made = prompt()
        guide, marks = self._guide(made, wishes, shape) if talks or shape else (None, ())
        decoder = self.tokenizer.decoder(skip_special=True, at_start=talks or self.sources is not None, marks=marks)
        report = Report(media=made.media, naming=made.naming)
        if made.naming is not None:
            decoder = Marking(decoder, self.tokenizer.decoder(skip_special=False, at_start=True), report)
        kind: type[Request] = Request
        if rules is not None and searches(rules.search, sampling, guide is not None, self.n_seq):
            from pyengine.engine.beams import BeamRequest as kind
        request = kind(self._lay_out(made.segments, adapters, compression), sampler, decoder, stops, (most, self.tokenizer.eog_ids), report, guide, rules)
        request.drafts = self._scheduler.speculation.drafts(request, sampling.get("speculate"))
        return request

    def _guide(self, prompt: Prompt, wishes: Wishes, shape: str | None) -> tuple[Guide | None, Sequence[int]]:
        from pyengine.engine.guide import guide_of                             # plain texts begin sooner

        return guide_of(self._language, prompt, wishes, shape)

    @property
    def template(self) -> ChatTemplate:
        """The file's chat template, or a default for its kind of vocabulary; compiled when it is first needed."""
        return self._language.template

    @takes()
    def chat_ids(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None,
                 media_policy: MediaPolicy | None = None) -> list[int]:
        """Return a conversation's token ids in the model's own chat format; -1 for each position of a picture's soft token.

        media_policy: which files of this machine may be shown, where somebody else wrote the messages.
        """
        return lay_out_rows(self._prompts_under(media_policy).chat(messages, tools).segments, self._axes).ids.tolist()

    def _prompts_under(self, policy: MediaPolicy | None) -> Prompts:
        return self._prompts if policy is None else self._prompts.under(policy)

    @takes(REPLYING)
    def chat(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None = None, stream: bool = False,
             max_tokens: int | None = 512, stop: str | Sequence[str] | None = None, template_options: Mapping[str, Any] | None = None,
             run_tools: bool = False, **sampling: Any) -> Any:
        """Answer a conversation of OpenAI-style messages. Returns an Answer, or an iterator of pieces with stream=True.

        Parts of a content: {"type": "text", "text": ..}, {"type": "image", "image": ..}, {"type": "image_url", "image_url":
        {"url": ..}}, {"type": "video", "video": [frames] or a file}, or a picture as it is; a message may also have "images".
        tools: Python functions with type hints, or in OpenAI's form; what the answer calls of them is in its `tool_calls`.
        run_tools: calls of functions are run, and the model is asked again with their results: see `tools.run_tools`.
        template_options: variables of the model's chat template.
        sampling: those of `stream`, and think, tool_choice, parallel_tool_calls: see `wishes.Wishes`.
        Raises: TemplateError, ContextOverflowError, RequestError, ImageError.
        """
        wanted, wishes = switch("stream", stream), _wishes(sampling)

        def begin(messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None, wishes: Wishes = wishes) -> Stream:
            return self._stream(lambda: self._prompts.chat(messages, tools, template_options, wishes), max_tokens, stop, sampling, wishes)

        if not switch("run_tools", run_tools):
            pieces: Any = begin(messages, tools)
        else:
            from pyengine.engine.tools import ToolStream

            pieces = ToolStream(begin, messages, tools, later=lambda messages, tools: begin(messages, tools, wishes.after_calls()))
        return pieces if wanted else pieces.answer()


def _source(fitted: Fitted, runner: Runner) -> Source | None:
    """Load the draft model of a plan that has one, or take the model's own head."""
    if fitted.layout.sizes.ahead:
        from pyengine.engine.ahead import Head

        return Head(fitted.layout, runner)
    if fitted.layout.draft is None:
        return None
    from pyengine.engine.draft_model import DraftModel

    return DraftModel(fitted.layout)


def _wishes(given: Mapping[str, Any]) -> Wishes:
    """Take what is asked of a reply out of a request's settings. Raises: RequestError."""
    return Wishes(**{name: given[name] for name in WISHES if name in given})
