"""Load a model, plan its memory, run its steps, generate. The only place that sees models and backends.

    file -> Hparams, Weights -> Model.forward builds one graph -> backend plans and loads it -> steps replay it

One graph serves prompts and generation: the number of rows, their positions and cells are run-time inputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyengine import hardware
from pyengine.backends import backend
from pyengine.batch import Batch
from pyengine.codebooks import ensure_codebooks
from pyengine.dtype import dtype as dtype_of
from pyengine.errors import ContextOverflowError, PlanError, RequestError, UnsupportedModelError
from pyengine.gguf import GGUFFile
from pyengine.graph import Graph
from pyengine.hparams import Hparams
from pyengine.kvcache import LayerCache, Policy, Sliding, cache_bytes, visible
from pyengine.locate import find_model
from pyengine.memory import MemoryPlan, PlanItem
from pyengine.models import architecture
from pyengine.sampling import Sampled, Sampler, SamplingParams, sampler_bytes
from pyengine.tensor import Dim, Tensor
from pyengine.tokenizer import Tokenizer
from pyengine.weights import Weights

if TYPE_CHECKING:
    from pyengine.template import ChatTemplate

KV_DTYPES = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0"}
HEAD_BYTES = 32 << 20                # logits of at most this size are computed at once
N_BATCH = 512                        # rows of one step


@dataclass(frozen=True)
class _Group:
    """Layers with the same policy share the inputs that say where tokens lie and what each row sees."""

    policy: Policy
    slots: int
    name: str


@dataclass
class _Built:
    """A model's graph with what is needed to feed it."""

    arch: Any
    graph: Graph
    outputs: list[Tensor]
    groups: list[_Group]
    kv: list[PlanItem]
    n_ctx: int
    n_batch: int
    n_head: int


def _open(name: str | Path) -> tuple[GGUFFile, Path]:
    paths = find_model(name)
    path = paths[0] if isinstance(paths, list) else paths
    return GGUFFile(path), Path(path)


def _build(file: GGUFFile, n_ctx: int, n_batch: int, kv_dtype: str) -> _Built:
    """The graph of one step of this model."""
    h = Hparams(file.metadata)
    weights = Weights(file)
    arch = architecture(h.arch)(h, weights, n_ctx)
    weights.finish(ignore=("rope_freqs", "rope_factors_long", "rope_factors_short"))
    c = arch.config
    n_batch = min(n_batch, n_ctx)
    n_head = max(1, min(n_batch, HEAD_BYTES // (4 * c.vocab_size)))
    dtype = dtype_of(KV_DTYPES[kv_dtype])
    if c.head_dim % dtype.block:
        raise UnsupportedModelError(f"kv_dtype={kv_dtype}: blocks of {dtype.block} do not divide a head of {c.head_dim}; use f16")
    g = Graph()
    m, w, l = Dim("m", n_batch), Dim("w", n_batch), Dim("l", n_head)
    batch = Batch(m, g.input("ids", (m,), "I32"), g.input("positions", (1, m), "I32"), g.input("wanted", (w,), "I32"),
                  g.input("head", (l,), "I32"), None)
    seq, seq_wanted = g.input("seq", (m,), "I32"), g.input("seq_wanted", (w,), "I32")
    groups: dict[Policy, _Group] = {}
    shared: dict[Policy, list[Tensor]] = {}
    caches, kv = [], []
    for i, policy in enumerate(arch.cache_policies()):
        if policy not in groups:
            name = f"{type(policy).__name__.lower()}{len(groups)}"
            slots = policy.slots(n_ctx, n_batch)
            groups[policy] = _Group(policy, slots, name)
            shared[policy] = [
                g.input(f"{name}.cells", (m,), "I32"), g.state(f"{name}.table", (1, slots), "I32"),
                g.input(f"{name}.lo", (m,), "I32"), g.input(f"{name}.hi", (m,), "I32"),
                g.input(f"{name}.lo_wanted", (w,), "I32"), g.input(f"{name}.hi_wanted", (w,), "I32"),
            ]
        cells, table, lo, hi, lo_w, hi_w = shared[policy]
        shape = (c.n_kv_heads, groups[policy].slots, c.head_dim)
        k, v = g.state(f"blk.{i}.k", shape, dtype), g.state(f"blk.{i}.v", shape, dtype)
        caches.append(LayerCache(k, v, cells, table, seq, lo, hi, seq_wanted, lo_w, hi_w))
        nbytes = 2 * cache_bytes(policy, n_ctx, n_batch, c.n_kv_heads, c.head_dim, dtype)
        kv.append(PlanItem("cpu", "kv", f"{policy} x {groups[policy].slots} cells", nbytes))
    logits, hidden = arch.forward(batch, caches)
    return _Built(arch, g, [logits, hidden], list(groups.values()), kv, n_ctx, n_batch, n_head)


def model_graph(name: str | Path, n_ctx: int = 4096) -> list[Tensor]:
    """The outputs of a model's graph, as its module wrote it."""
    file, _ = _open(name)
    return _build(file, min(n_ctx, Hparams(file.metadata).size("context_length")), N_BATCH, "f16").outputs


def _check_settings(device: str, n_ctx: int | None, n_batch: int, kv_dtype: str) -> str:
    if kv_dtype not in KV_DTYPES:
        raise RequestError(f"kv_dtype={kv_dtype!r}: use one of {', '.join(KV_DTYPES)}")
    if n_ctx is not None and n_ctx < 1:
        raise RequestError(f"n_ctx={n_ctx}: must be at least 1")
    if n_batch < 1:
        raise RequestError(f"n_batch={n_batch}: must be at least 1")
    if device not in ("auto", "cpu"):
        raise RequestError(f"device={device!r}: models run on 'cpu' ('auto' picks it)")
    return "cpu"


def _plan(file: GGUFFile, path: Path, n_ctx: int | None, n_batch: int, kv_dtype: str, n_threads: int | None) -> tuple[_Built, Any, MemoryPlan]:
    """Build, lay out and count; without `n_ctx`, the training context or what fits of it."""
    trained = Hparams(file.metadata).size("context_length")
    available = {"cpu": hardware.available_memory()}
    size = n_ctx or trained
    while True:
        built = _build(file, size, n_batch, kv_dtype)
        prepared = backend("cpu", n_threads=n_threads).prepare(built.outputs)
        tables = prepared.state_bytes - sum(i.nbytes for i in built.kv)
        items = [PlanItem("cpu", "weights", "resident", prepared.weight_bytes), PlanItem("cpu", "mapped", "file pages", prepared.mapped_bytes),
                 *built.kv, PlanItem("cpu", "kv", "tables and alignment", tables),
                 PlanItem("cpu", "arena", f"{built.n_batch} rows a step", prepared.arena_bytes),
                 PlanItem("cpu", "sampler", "candidates", sampler_bytes(built.arch.config.vocab_size))]
        plan_ = MemoryPlan(path.name, size, built.n_batch, kv_dtype, tuple(i for i in items if i.nbytes), available)
        if plan_.fits or n_ctx is not None or size <= 256:
            return built, prepared, plan_
        size //= 2


def plan(model: str | Path, n_ctx: int | None = None, device: str = "auto", kv_dtype: str = "f16", n_batch: int = N_BATCH,
         n_threads: int | None = None) -> MemoryPlan:
    """Count what a model will take, per device and purpose; reads headers only.

    Raises: ModelNotFoundError, InvalidModelError, UnsupportedModelError, RequestError.
    """
    _check_settings(device, n_ctx, n_batch, kv_dtype)
    file, path = _open(model)
    return _plan(file, path, n_ctx, n_batch, kv_dtype, n_threads)[2]


def load(model: str | Path, mmproj: str | Path | None = None, device: str = "auto", n_ctx: int | None = None, kv_dtype: str = "f16",
         n_threads: int | None = None, n_batch: int = N_BATCH, progress: Callable[[int, int], None] | None = None) -> Model:
    """Load a model from a GGUF file, or by a name that `pyengine-run list` shows.

    n_ctx: positions of the context; default the training context, or what of it fits the memory. kv_dtype: f32, f16 or q8_0.
    n_batch: most rows of one step. progress(done_bytes, all_bytes) is called while weights are read.
    Raises: ModelNotFoundError, InvalidModelError, UnsupportedModelError, RequestError; PlanError if it does not fit.
    """
    _check_settings(device, n_ctx, n_batch, kv_dtype)
    if mmproj is not None:
        raise UnsupportedModelError("mmproj: media encoders are not supported by the architectures of this version")
    file, path = _open(model)
    built, prepared, plan_ = _plan(file, path, n_ctx, n_batch, kv_dtype, n_threads)
    if not plan_.fits:
        raise PlanError(f"{path.name} does not fit; a smaller n_ctx or kv_dtype='q8_0' takes less\n{plan_.table()}", plan_)
    ensure_codebooks(t.dtype for t in file.tensors.values())
    return Model(file, built, prepared.load(progress), plan_)


@dataclass
class Report:
    """How an answer came about.

    tokens: ids; sampled: their log-probabilities (and the n best, where `logprobs` asked for them); finish: "stop" or "length";
    n_prompt, n_cached: prompt tokens, and those of them found in the cache; seconds: of the generation.
    """

    tokens: list[int] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)
    finish: str = "length"
    n_prompt: int = 0
    n_cached: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0


class Answer(str):
    """Generated text; the fields of its `report` can be read from it directly."""

    report: Report

    def __new__(cls, text: str, report: Report) -> Answer:
        answer = super().__new__(cls, text)
        answer.report = report
        return answer

    def __getattr__(self, name: str) -> Any:
        if name in Report.__dataclass_fields__:
            return getattr(self.report, name)
        raise AttributeError(name)


class Stream(Iterator[str]):
    """Pieces of an answer as they come; `report` grows with them."""

    def __init__(self, pieces: Iterator[str], report: Report):
        self._pieces, self.report = pieces, report

    def __next__(self) -> str:
        return next(self._pieces)

    def answer(self) -> Answer:
        """Take all that is left as one text."""
        return Answer("".join(self._pieces), self.report)


class Model:
    """A loaded model with one conversation's cache. Made by `load`; not for several threads at once."""

    def __init__(self, file: GGUFFile, built: _Built, program: Any, plan_: MemoryPlan):
        self.file, self.plan, self.program = file, plan_, program
        self.config = built.arch.config
        self.n_ctx, self.n_batch, self.n_vocab = built.n_ctx, built.n_batch, self.config.vocab_size
        self._n_head, self._groups = built.n_head, built.groups
        self._cached: list[int] = []                                           # tokens whose keys and values are in the cache
        self._tokenizer: Tokenizer | None = None
        self._template: ChatTemplate | None = None
        unused = {n: np.empty(t.nbytes_max // 4, np.int32) for n, t in built.graph.inputs.items() if n not in program.inputs}
        self._flat = unused | {name: a.reshape(-1) for name, a in program.inputs.items()}
        self._logits = program.outputs[0]
        self._head_step = program.first_step_reading("head")
        for g in self._groups:
            program.state(f"{g.name}.table")[0] = np.arange(g.slots, dtype=np.int32)
        self._flat["seq"][:] = 0
        self.stats: dict[str, int] = {"prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0, "steps": 0}

    # -- text ---------------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """Built from the file when it is first needed."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_metadata(self.file.metadata)
        return self._tokenizer

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a text; `add_special` adds BOS and EOS where the model wants them."""
        return self.tokenizer.tokenize(text, add_special=add_special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        return self.tokenizer.detokenize(ids)

    def _ids(self, prompt: str | Sequence[Any], images: Sequence[Any] = ()) -> list[int]:
        """Token ids of a prompt: a text (BOS is added where the model wants it), or parts (nothing is added)."""
        if images:
            raise RequestError("this model takes no images")
        if isinstance(prompt, str):
            return self.tokenize(prompt)
        ids: list[int] = []
        for part in prompt:
            if isinstance(part, str):
                ids += self.tokenizer.tokenize(part, add_special=False)
            elif isinstance(part, (int, np.integer)) and not isinstance(part, bool):
                ids.append(int(part))
            else:
                raise RequestError(f"a part of a prompt is {type(part).__name__}; this model takes ints and strings")
        for i in ids:
            if not 0 <= i < self.n_vocab:
                raise RequestError(f"token id {i} is outside the vocabulary of {self.n_vocab}")
        return ids

    def encode_image(self, image: Any) -> np.ndarray:
        """Refuse: the architectures of this version have no image encoder. Raises: UnsupportedModelError."""
        raise UnsupportedModelError(f"{self.file.path}: this model has no image encoder")

    # -- steps --------------------------------------------------------------------------------------------------------

    def _rewind(self, n: int) -> int:
        """Keep the first n cached tokens, or fewer where a sliding layer has overwritten what they need; returns how many."""
        for g in self._groups:
            lost = len(self._cached) - g.slots                                 # tokens before this one have been overwritten
            if n < len(self._cached) and lost > (max(0, n - g.policy.window + 1) if isinstance(g.policy, Sliding) else 0):
                n = 0
        del self._cached[n:]
        return n

    def reset(self) -> None:
        """Forget the conversation."""
        self._cached.clear()

    def step(self, ids: Sequence[int], wanted: np.ndarray, n_head: int) -> np.ndarray:
        """Run one step on at most n_batch ids, which follow the cached tokens.

        wanted: numbers of the rows that the last layer computes, of which the first n_head go through the output head.
        Returns logits [n_head, vocab], valid until the next step.
        """
        start, m, w = len(self._cached), len(ids), len(wanted)
        flat, index = self._flat, np.arange(start, start + m, dtype=np.int32)
        flat["ids"][:m] = ids
        flat["positions"][:m] = index
        flat["wanted"][:w] = wanted
        flat["head"][:n_head] = np.arange(n_head)
        flat["seq"][:m] = 0
        flat["seq_wanted"][:w] = 0
        for g in self._groups:
            lo, hi = visible(g.policy, index)
            flat[f"{g.name}.cells"][:m] = index % g.slots
            flat[f"{g.name}.lo"][:m], flat[f"{g.name}.hi"][:m] = lo, hi
            flat[f"{g.name}.lo_wanted"][:w], flat[f"{g.name}.hi_wanted"][:w] = lo[wanted], hi[wanted]
        try:
            self.program.execute_named(l=n_head, m=m, w=w)
            self._cached.extend(ids)
        except BaseException:                                                  # Ctrl-C too: the cache may hold part of the step
            self.reset()
            raise
        self.stats["steps"] += 1
        return self._logits[:n_head]

    def _prefill(self, ids: Sequence[int]) -> tuple[np.ndarray, int]:
        """Bring the cache to `ids`; returns logits of the last one [vocab] and the number of tokens found in the cache."""
        if not ids:
            raise RequestError("the prompt is empty")
        if len(ids) > self.n_ctx:
            raise ContextOverflowError(f"the prompt has {len(ids)} tokens, but the context holds {self.n_ctx}; load with a larger n_ctx")
        common = 0
        for a, b in zip(self._cached, ids):
            if a != b:
                break
            common += 1
        kept = self._rewind(min(common, len(ids) - 1))
        for start in range(kept, len(ids), self.n_batch):
            part = ids[start : start + self.n_batch]
            logits = self.step(part, np.array([len(part) - 1], np.int32), 1)
        self.stats["prompt_tokens"] += len(ids)
        self.stats["cached_tokens"] += kept
        return logits[0], kept

    def logits(self, prompt: Sequence[Any] | str) -> np.ndarray:
        """Logits after each position of a prompt, float32 [n_positions, n_vocab]; nothing of an earlier cache is used.

        Raises: ContextOverflowError, RequestError.
        """
        ids = self._ids(prompt)
        out = np.empty((len(ids), self.n_vocab), np.float32)
        for start, rows in self.logit_blocks(ids):
            out[start : start + len(rows)] = rows
        return out

    def logit_blocks(self, ids: Sequence[int], first: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """The rows of `logits` from position `first` on, in blocks (position, [n, vocab]) that are valid until the next one is
        asked for."""
        if len(ids) > self.n_ctx:
            raise ContextOverflowError(f"the prompt has {len(ids)} tokens, but the context holds {self.n_ctx}; load with a larger n_ctx")
        self.reset()
        for start in range(0, len(ids), self.n_batch):
            part = ids[start : start + self.n_batch]
            m, skip = len(part), min(max(first - start, 0), len(part))
            wanted = np.arange(skip, m, dtype=np.int32)
            n = min(len(wanted), self._n_head)
            logits = self.step(part, wanted, n)
            if n:
                yield start + skip, logits
            for done in range(n, len(wanted), self._n_head):
                n = min(self._n_head, len(wanted) - done)
                self._flat["head"][:n] = np.arange(done, done + n)
                self.program.execute_named(first_step=self._head_step, l=n, m=m, w=len(wanted))
                yield start + skip + done, self._logits[:n]

    # -- generation ---------------------------------------------------------------------------------------------------

    def generate(self, prompt: str | Sequence[Any], images: Sequence[Any] = (), max_tokens: int | None = 512,
                 stop: str | Sequence[str] = (), **sampling: Any) -> Answer:
        """Continue a prompt. See `stream` for the arguments; returns the whole text."""
        return self.stream(prompt, images, max_tokens, stop, **sampling).answer()

    def stream(self, prompt: str | Sequence[Any], images: Sequence[Any] = (), max_tokens: int | None = 512,
               stop: str | Sequence[str] = (), **sampling: Any) -> Stream:
        """Continue a prompt, yielding pieces of whole characters.

        max_tokens: None goes on until the model ends or the context is full. stop: texts that end the answer; they are not
        part of it. sampling: fields of `SamplingParams` (temperature=0 is greedy; top_k, top_p, min_p, seed ...).
        Raises: ContextOverflowError when the context is full, RequestError.
        """
        return self._stream(self._ids(prompt, images), max_tokens, stop, sampling, at_start=False)

    def _stream(self, ids: list[int], max_tokens: int | None, stop: str | Sequence[str], sampling: dict[str, Any],
                at_start: bool) -> Stream:
        run = Report()
        return Stream(self._pieces(ids, max_tokens, stop, sampling, at_start, run), run)

    def _pieces(self, ids: list[int], max_tokens: int | None, stop: str | Sequence[str], sampling: dict[str, Any], at_start: bool,
                run: Report) -> Iterator[str]:
        if max_tokens is not None and max_tokens < 0:
            raise RequestError(f"max_tokens={max_tokens}: must not be negative")
        sampler = Sampler(SamplingParams(**sampling), self.n_vocab)
        stops = _Stops([stop] if isinstance(stop, str) else list(stop))
        decoder = self.tokenizer.decoder(skip_special=True, at_start=at_start)
        started = time.perf_counter()
        logits, run.n_cached = self._prefill(ids)
        run.n_prompt = len(ids)
        for token in ids:
            sampler.accept(token)
        run.prompt_seconds = time.perf_counter() - started
        while max_tokens is None or len(run.tokens) < max_tokens:
            drawn = sampler.sample(logits)
            if drawn.token in self.tokenizer.eog_ids:
                run.finish = "stop"
                break
            sampler.accept(drawn.token)
            run.tokens.append(drawn.token)
            run.sampled.append(drawn)
            self.stats["generated_tokens"] += 1
            piece = stops.push(decoder.push(drawn.token))
            run.seconds = time.perf_counter() - started - run.prompt_seconds
            if piece:
                yield piece
            if stops.found:
                run.finish = "stop"
                return
            if max_tokens is not None and len(run.tokens) == max_tokens:
                break
            if len(self._cached) == self.n_ctx:
                raise ContextOverflowError(f"the context of {self.n_ctx} tokens is full after {len(run.tokens)} generated ones; load with a larger n_ctx")
            logits = self.step([drawn.token], np.zeros(1, np.int32), 1)[0]
        run.seconds = time.perf_counter() - started - run.prompt_seconds
        tail = stops.push(decoder.flush()) + stops.flush()
        if stops.found:
            run.finish = "stop"
        if tail:
            yield tail

    @property
    def template(self) -> ChatTemplate:
        """The file's chat template, or a default for its kind of vocabulary; compiled when it is first needed."""
        if self._template is None:
            from pyengine.template import ChatTemplate                         # jinja2 takes 25 ms to import

            self._template = ChatTemplate.from_metadata(self.file.metadata, self.tokenizer)
        return self._template

    def chat_ids(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None) -> list[int]:
        """Token ids of a conversation in the model's own chat format, ready for the answer."""
        kinds = {part.get("type", "text") for m in messages if isinstance(m.get("content"), list) for part in m["content"]}
        if kinds - {"text"}:
            raise RequestError(f"this model takes no {', '.join(sorted(kinds - {'text'}))} in messages")
        text = self.template.render(messages, tools=tools, add_generation_prompt=True)
        bos = self.tokenizer.bos_id
        ids = self.tokenizer.tokenize(text, add_special=True)
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def chat(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None, stream: bool = False,
             max_tokens: int | None = 512, stop: str | Sequence[str] = (), **sampling: Any) -> Any:
        """Answer a conversation of OpenAI-style messages. Returns an Answer, or an iterator of pieces with stream=True.

        Raises: TemplateError, ContextOverflowError, RequestError.
        """
        pieces = self._stream(self.chat_ids(messages, tools), max_tokens, stop, sampling, at_start=True)
        return pieces if stream else pieces.answer()


class _Stops:
    """Holds text back while it may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]):
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
