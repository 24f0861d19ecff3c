"""Load a model, plan its memory, run its steps, generate. The only place that sees models and backends.

    file -> Hparams, Weights -> Model.forward builds one graph -> backend plans and loads it -> steps replay it

One graph serves prompts and generation of all conversations: the number of rows, their positions and cells are run-time inputs.
`prompt` makes segments of texts and pictures (these by `media`, an encoder with a graph of its own), `schedule` decides which rows
are computed together, `cells` where their keys and values lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyengine import hardware
from pyengine.backends import backend
from pyengine.batch import Batch, MediaSegment, Rows, lay_out_rows
from pyengine.cells import Group, Sequence as Cached, group
from pyengine.codebooks import ensure_codebooks
from pyengine.dtype import DType, dtype as dtype_of
from pyengine.errors import InvalidModelError, PlanError, RequestError, UnsupportedModelError
from pyengine.gguf import GGUFFile
from pyengine.graph import Graph
from pyengine.hparams import Hparams
from pyengine.kvcache import LayerCache, Policy
from pyengine.locate import find_model
from pyengine.media import MediaEncoder, encoder_graph
from pyengine.memory import MemoryPlan, PlanItem
from pyengine.models import architecture
from pyengine.prompt import Prompt, Prompts
from pyengine.sampling import Sampler, SamplingParams, sampler_bytes
from pyengine.schedule import Report, Request, Runner, Scheduler, Stops, Work, check_room, token_rows
from pyengine.tensor import Dim, Tensor
from pyengine.tokenizer import Tokenizer
from pyengine.weights import Weights

if TYPE_CHECKING:
    from pyengine.template import ChatTemplate

KV_DTYPES = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0"}
HEAD_BYTES = 32 << 20                # logits of at most this size are computed at once
N_BATCH = 512                        # rows of one step


@dataclass
class _Built:
    """A model's graph with what is needed to feed it."""

    arch: Any
    vision: Any              # the media encoder, or None
    graph: Graph
    outputs: list[Tensor]
    groups: list[tuple[Group, str]]      # cells of layers with the same policy, and the name of their inputs
    layers: list[int]                    # number of each layer's group
    kv: list[PlanItem]
    n_ctx: int
    n_batch: int
    n_seq: int
    n_head: int


@dataclass(frozen=True)
class _Files:
    """A model's file, and the one that holds its media encoder (often the same)."""

    model: GGUFFile
    mmproj: GGUFFile | None

    @property
    def name(self) -> str:
        return Path(self.model.path).name


def _open(name: str | Path, mmproj: str | Path | None = None) -> _Files:
    paths = find_model(name)
    path, found = paths if isinstance(paths, list) else (paths, None)
    mmproj = mmproj or found
    files = _Files(GGUFFile(path), GGUFFile(mmproj) if mmproj else None)
    if files.mmproj and files.mmproj.metadata.need("general.architecture", str) != "clip":
        raise InvalidModelError(f"{mmproj}: general.architecture is {files.mmproj.metadata['general.architecture']!r}; a projector file has 'clip'")
    return files


def _vision(arch: Any, h: Hparams, files: _Files, weights: Weights, n_ctx: int) -> Any:
    """The model's media encoder, or None where the files have none or the architecture cannot run it."""
    source = files.mmproj or files.model
    if arch.Vision is None or (files.mmproj is None and "v" not in weights):
        if files.mmproj is not None:
            raise UnsupportedModelError(f"{source.path}: architecture {h.arch!r} has no media encoder here")
        return None

    def token(text: str) -> int:
        found = Tokenizer.from_metadata(files.model.metadata).id_of(text)
        if found is None:
            raise InvalidModelError(f"{files.model.path}: no token {text!r} in the vocabulary, and no key that names it")
        return found

    own = weights if files.mmproj is None else Weights(files.mmproj)
    vision = arch.Vision(h, Hparams(source.metadata, "clip"), own, n_ctx, token)
    if files.mmproj is not None:
        own.finish()
    return vision


def _build(files: _Files, n_ctx: int, n_batch: int, kv_dtype: str, n_seq: int = 1) -> _Built:
    """The graph of one step of this model."""
    h = Hparams(files.model.metadata)
    weights = Weights(files.model)
    arch = architecture(h.arch)(h, weights, n_ctx)
    vision = _vision(arch, h, files, weights, n_ctx)
    unread = ("rope_freqs", "rope_factors_long", "rope_factors_short", *(() if vision and not files.mmproj else ("v", "mm")))
    weights.finish(ignore=unread)
    c = arch.config
    n_batch = min(max(n_batch, n_seq, vision.atomic_rows if vision else 0), n_ctx * n_seq)
    n_head = max(n_seq, min(n_batch, HEAD_BYTES // (4 * c.vocab_size)))
    k_dtype, v_dtype = kv_dtypes(kv_dtype)
    for dtype in (k_dtype, v_dtype):
        if c.head_dim % dtype.block:
            raise UnsupportedModelError(f"kv_dtype={kv_dtype}: blocks of {dtype.block} do not divide a head of {c.head_dim}; use f16")
    g = Graph()
    m, w, l = Dim("m", n_batch), Dim("w", n_batch), Dim("l", n_head)
    media = g.input("media", (Dim("e", n_batch), c.d_model)) if vision else None
    batch = Batch(m, g.input("ids", (m,), "I32"), g.input("positions", (arch.position_axes, m), "I32"),
                  g.input("wanted", (w,), "I32"), g.input("head", (l,), "I32"), media)
    seq, seq_wanted = g.input("seq", (m,), "I32"), g.input("seq_wanted", (w,), "I32")
    numbers: dict[Policy, int] = {}
    groups: list[tuple[Group, str]] = []
    shared: list[list[Tensor]] = []
    caches, kv, layers = [], [], []
    for i, policy in enumerate(arch.cache_policies()):
        if policy not in numbers:
            numbers[policy] = len(groups)
            name = f"{type(policy).__name__.lower()}{len(groups)}"
            groups.append((group(policy, n_ctx, n_batch, n_seq), name))
            shared.append([
                g.input(f"{name}.cells", (m,), "I32"), g.state(f"{name}.table", (n_seq, groups[-1][0].slots), "I32"),
                g.input(f"{name}.lo", (m,), "I32"), g.input(f"{name}.hi", (m,), "I32"),
                g.input(f"{name}.lo_wanted", (w,), "I32"), g.input(f"{name}.hi_wanted", (w,), "I32"),
            ])
        layers.append(numbers[policy])
        own, _ = groups[layers[-1]]
        cells, table, lo, hi, lo_w, hi_w = shared[layers[-1]]
        shape = (c.n_kv_heads, own.n_cells, c.head_dim)
        k, v = g.state(f"blk.{i}.k", shape, k_dtype), g.state(f"blk.{i}.v", shape, v_dtype)
        caches.append(LayerCache(k, v, cells, table, seq, lo, hi, seq_wanted, lo_w, hi_w))
        nbytes = c.n_kv_heads * own.n_cells * (k_dtype.size(c.head_dim) + v_dtype.size(c.head_dim))
        times = f"{n_seq} x " if n_seq > 1 else ""
        kv.append(PlanItem("cpu", "kv", f"{policy}: {times}{own.slots} cells", nbytes))
    logits, hidden = arch.forward(batch, caches)
    return _Built(arch, vision, g, [logits, hidden], groups, layers, kv, n_ctx, n_batch, n_seq, n_head)


def kv_dtypes(name: str) -> tuple[DType, DType]:
    """Formats of keys and values: "q8_0" for both, "q8_0/q4_0" for each. Raises: RequestError naming those that there are."""
    k, _, v = name.partition("/")
    for part in (k, v or k):
        if part not in KV_DTYPES:
            raise RequestError(f"kv_dtype={name!r}: use one of {', '.join(KV_DTYPES)}, or two of them as keys/values")
    return dtype_of(KV_DTYPES[k]), dtype_of(KV_DTYPES[v or k])


def model_graph(name: str | Path, n_ctx: int = 4096, mmproj: str | Path | None = None, encoder: bool = False) -> list[Tensor]:
    """The outputs of a model's graph, or of its media encoder's, as its module wrote it."""
    files = _open(name, mmproj)
    built = _build(files, min(n_ctx, Hparams(files.model.metadata).size("context_length")), N_BATCH, "f16")
    if encoder and built.vision is None:
        raise UnsupportedModelError(f"{files.name}: no media encoder")
    return encoder_graph(built.vision) if encoder else built.outputs


def _check_settings(device: str, n_ctx: int | None, n_batch: int, kv_dtype: str, n_seq: int) -> str:
    kv_dtypes(kv_dtype)
    if n_seq < 1:
        raise RequestError(f"n_seq={n_seq}: must be at least 1")
    if n_ctx is not None and n_ctx < 1:
        raise RequestError(f"n_ctx={n_ctx}: must be at least 1")
    if n_batch < 1:
        raise RequestError(f"n_batch={n_batch}: must be at least 1")
    if device not in ("auto", "cpu"):
        raise RequestError(f"device={device!r}: models run on 'cpu' ('auto' picks it)")
    return "cpu"


@dataclass(frozen=True)
class _Planned:
    """A model laid out, nothing loaded: its step, its media encoder's run (or None), and the count of both."""

    built: _Built
    step: Any
    encoder: Any
    image_cache: int         # bytes
    plan: MemoryPlan


def _plan(files: _Files, n_ctx: int | None, n_batch: int, kv_dtype: str, n_threads: int | None, n_seq: int) -> _Planned:
    """Build, lay out and count; without `n_ctx`, the training context or what fits of it."""
    trained = Hparams(files.model.metadata).size("context_length")
    available = {"cpu": hardware.available_memory()}
    size = n_ctx or trained
    while True:
        built = _build(files, size, n_batch, kv_dtype, n_seq)
        prepared = backend("cpu", n_threads=n_threads).prepare(built.outputs)
        encoder, image_cache = None, 0
        extra: list[PlanItem] = []
        if built.vision:
            encoder = backend("cpu", n_threads=n_threads).prepare(encoder_graph(built.vision))
            image_cache = 4 * size * built.arch.config.d_model                 # embeddings of a context full of pictures
            extra = [PlanItem("cpu", "encoder", "weights, from the first picture on", encoder.weight_bytes),
                     PlanItem("cpu", "mapped", "file pages of the encoder", encoder.mapped_bytes),
                     PlanItem("cpu", "encoder", f"arena, {built.vision.max_rows} soft tokens at most", encoder.arena_bytes),
                     PlanItem("cpu", "images", "image cache, at most", image_cache)]
        tables = prepared.state_bytes - sum(i.nbytes for i in built.kv)
        items = [PlanItem("cpu", "weights", "resident", prepared.weight_bytes), PlanItem("cpu", "mapped", "file pages", prepared.mapped_bytes),
                 *built.kv, PlanItem("cpu", "kv", "tables and alignment", tables),
                 PlanItem("cpu", "arena", f"{built.n_batch} rows a step", prepared.arena_bytes),
                 PlanItem("cpu", "sampler", "candidates", n_seq * sampler_bytes(built.arch.config.vocab_size)), *extra]
        plan_ = MemoryPlan(files.name, size, built.n_batch, kv_dtype, tuple(i for i in items if i.nbytes), available)
        if plan_.fits or n_ctx is not None or size <= 256:
            return _Planned(built, prepared, encoder, image_cache, plan_)
        size //= 2


def plan(model: str | Path, n_ctx: int | None = None, device: str = "auto", kv_dtype: str = "f16", n_batch: int = N_BATCH,
         n_threads: int | None = None, mmproj: str | Path | None = None, n_seq: int = 1) -> MemoryPlan:
    """Count what a model will take, per device and purpose; reads headers only.

    Raises: ModelNotFoundError, InvalidModelError, UnsupportedModelError, RequestError.
    """
    _check_settings(device, n_ctx, n_batch, kv_dtype, n_seq)
    return _plan(_open(model, mmproj), n_ctx, n_batch, kv_dtype, n_threads, n_seq).plan


def load(model: str | Path, mmproj: str | Path | None = None, device: str = "auto", n_ctx: int | None = None, kv_dtype: str = "f16",
         n_threads: int | None = None, n_batch: int = N_BATCH, n_seq: int = 1, progress: Callable[[int, int], None] | None = None) -> Model:
    """Load a model from a GGUF file, or by a name that `pyengine-run list` shows.

    mmproj: the file of the media encoder, for models in two files (found by itself where `model` is a name).
    n_ctx: positions of the context; default the training context, or what of it fits the memory. n_seq: conversations
    that are served at once, each of up to n_ctx positions. kv_dtype: f32, f16, q8_0, or "keys/values".
    n_batch: most rows of one step; it grows to the largest picture that must not be cut. progress(done_bytes, all_bytes) is
    called while weights are read.
    Raises: ModelNotFoundError, InvalidModelError, UnsupportedModelError, RequestError; PlanError if it does not fit.
    """
    _check_settings(device, n_ctx, n_batch, kv_dtype, n_seq)
    files = _open(model, mmproj)
    planned = _plan(files, n_ctx, n_batch, kv_dtype, n_threads, n_seq)
    if not planned.plan.fits:
        raise PlanError(f"{files.name} does not fit; a smaller n_ctx or kv_dtype='q8_0' takes less\n{planned.plan.table()}", planned.plan)
    ensure_codebooks(t.dtype for file in (files.model, files.mmproj) if file for t in file.tensors.values())
    media = MediaEncoder(planned.built.vision, planned.encoder, planned.image_cache, progress) if planned.encoder else None
    return Model(files.model, planned.built, planned.step.load(progress), media, planned.plan)


class Answer(str):
    """Generated text; the fields of its `report` can be read from it directly."""

    report: Report

    def __new__(cls, text: str, report: Report) -> Answer:
        answer = super().__new__(cls, text)
        answer.report = report
        return answer

    @property
    def boxes(self) -> list[Any]:
        """Boxes and points that the text names, in pixels of the last picture's original; see `boxes_in`."""
        return self.boxes_in(-1) if self.report.media else []

    def boxes_in(self, number: int) -> list[Any]:
        """Boxes and points (`grounding.Box`, `grounding.Point`) that the text names, in pixels of the original of one picture.

        A text does not say which of several pictures it speaks of, so the caller does. Raises: IndexError.
        """
        from pyengine.grounding import find_boxes                              # Pillow takes 20 ms to import

        n = range(len(self.report.media))[number]
        return find_boxes(self, self.report.media[n].size, self.report.media[n].processed, image=n)

    def __getattr__(self, name: str) -> Any:
        if name in Report.__dataclass_fields__:
            return getattr(self.report, name)
        raise AttributeError(name)


class Stream(Iterator[str]):
    """Pieces of an answer as they come; `report` grows with them.

    Work on the request begins with the first piece that is asked for. Streams of one model may be read side by side: whichever
    is read moves all of them on. One that is closed, or forgotten, is no longer worked on.
    """

    def __init__(self, request: Request, scheduler: Scheduler):
        self._request, self._scheduler, self._begun = request, scheduler, False
        self.report = request.report

    def __next__(self) -> str:
        r = self._request
        self.begin()
        while not r.pieces and not r.finished:
            self._scheduler.advance()
        if r.pieces:
            return r.pieces.popleft()
        if r.error is not None:
            error, r.error = r.error, None
            raise error
        raise StopIteration

    def begin(self) -> None:
        """Queue the request, if it is not yet."""
        if not self._begun:
            self._begun = True
            self._scheduler.submit(self._request)

    def answer(self) -> Answer:
        """Take all that is left as one text."""
        return Answer("".join(self), self.report)

    def close(self) -> None:
        """Stop working on the request; its conversation stays in the cache."""
        self._scheduler.cancel(self._request)

    def __del__(self) -> None:
        self.close()


class Model:
    """A loaded model with the caches of `n_seq` conversations. Made by `load`; not for several threads at once."""

    def __init__(self, file: GGUFFile, built: _Built, program: Any, media: MediaEncoder | None, plan_: MemoryPlan):
        self.file, self.plan, self.program, self.media = file, plan_, program, media
        self.config = built.arch.config
        self.n_ctx, self.n_batch, self.n_seq, self.n_vocab = built.n_ctx, built.n_batch, built.n_seq, self.config.vocab_size
        self._axes = built.arch.position_axes
        self._runner = Runner(program, built.graph.inputs, built.groups, built.layers, self._axes, self.n_batch, built.n_head)
        self._scheduler = Scheduler(self._runner, self.n_ctx)
        self._prompts = Prompts(Path(file.path).name, self.n_vocab, lambda: self.tokenizer, lambda: self.template, media, self._scheduler.in_use)
        self._fed: Cached | None = None                                        # the conversation of `feed`
        self._tokenizer: Tokenizer | None = None
        self._template: ChatTemplate | None = None

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

    @property
    def stats(self) -> dict[str, int]:
        """Counts since the model was loaded: tokens, steps, and hits and misses of the image cache."""
        return {**self._scheduler.stats, "steps": self._runner.n_steps, **(self.media.stats if self.media else {})}

    def encode_image(self, image: Any) -> np.ndarray:
        """Soft tokens of a picture (or of a list of frames), as the decoder receives them: float32 [n, d_model].

        Without start, end or row-break tokens; after the projector, before any multiplier of the decoder. Kept in the image
        cache. Raises: UnsupportedModelError without an encoder, ImageError.
        """
        if self.media is None:
            raise UnsupportedModelError(f"{self.file.path}: this model has no image encoder; where it is in a file of its own, load with mmproj=")
        parts, _ = self._prompts.encoded(image)
        return np.concatenate([p.embedding for p in parts if isinstance(p, MediaSegment)])

    # -- plain steps --------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all conversations that nobody works on; encoded pictures stay in the image cache."""
        for s in [s for s in self._runner.cells.sequences if not s.active]:
            self._runner.cells.drop(s)

    def feed(self, ids: Sequence[int], n_batch: int | None = None) -> np.ndarray:
        """Append tokens to a conversation of its own, in steps of at most n_batch; returns logits after the last one, [vocab].

        `reset` begins anew. Raises: ContextOverflowError, PlanError when every conversation is in use.
        """
        cells = self._runner.cells
        if self._fed not in cells.sequences:
            self._fed = cells.new()
        s = self._fed
        check_room(len(s) + len(ids), self.n_ctx)
        rows = token_rows(ids, s.next, self._axes)
        try:
            s.active = True
            for start, stop in rows.steps(0, n_batch or self.n_batch):
                logits = self._runner.step([Work(s, rows, start, stop, np.array([stop - start - 1], np.int32))])
        finally:
            s.active = False
        return logits[0]

    def logits(self, prompt: Sequence[Any] | str) -> np.ndarray:
        """Logits after each position of a prompt, float32 [n_positions, n_vocab]; nothing of an earlier cache is used.

        Raises: ContextOverflowError, RequestError, ImageError; PlanError when every conversation is in use.
        """
        rows = lay_out_rows(self._prompts.prompt(prompt)[0], self._axes)
        out = np.empty((len(rows), self.n_vocab), np.float32)
        for start, block in self.logit_blocks(rows):
            out[start : start + len(block)] = block
        return out

    def logit_blocks(self, prompt: Rows | Sequence[int], first: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """The rows of `logits` from position `first` on, in blocks (position, [n, vocab]) that are valid until the next one is
        asked for."""
        rows = prompt if isinstance(prompt, Rows) else token_rows(prompt, 0, self._axes)
        check_room(len(rows), self.n_ctx)
        s = self._runner.cells.new()
        try:
            for start, stop in rows.steps(0, self.n_batch):
                skip = min(max(first - start, 0), stop - start)
                wanted = np.arange(skip, stop - start, dtype=np.int32)
                done, logits = 0, self._runner.step([Work(s, rows, start, stop, wanted)])
                while len(logits):
                    yield start + skip + done, logits
                    done += len(logits)
                    logits = self._runner.head(done) if done < len(wanted) else logits[:0]
        finally:
            self._runner.cells.drop(s)

    # -- generation ---------------------------------------------------------------------------------------------------

    def generate(self, prompt: str | Sequence[Any], images: Sequence[Any] = (), max_tokens: int | None = 512,
                 stop: str | Sequence[str] = (), **sampling: Any) -> Answer:
        """Continue a prompt. See `stream` for the arguments; returns the whole text."""
        return self.stream(prompt, images, max_tokens, stop, **sampling).answer()

    def generate_many(self, prompts: Sequence[str | Sequence[Any]], max_tokens: int | None = 512, stop: str | Sequence[str] = (),
                      **sampling: Any) -> list[Answer]:
        """Continue several prompts side by side, `n_seq` at once. Each answer is the one that `generate` gives."""
        streams = [self.stream(p, (), max_tokens, stop, **sampling) for p in prompts]
        for s in streams:
            s.begin()
        return [s.answer() for s in streams]

    def stream(self, prompt: str | Sequence[Any], images: Sequence[Any] = (), max_tokens: int | None = 512,
               stop: str | Sequence[str] = (), **sampling: Any) -> Stream:
        """Continue a prompt, yielding pieces of whole characters.

        max_tokens: None goes on until the model ends or the context is full. stop: texts that end the answer; they are not
        part of it. sampling: fields of `SamplingParams` (temperature=0 is greedy; top_k, top_p, min_p, seed ...).
        Raises: ContextOverflowError when the context is full, RequestError, ImageError.
        """
        return self._stream(self._prompts.prompt(prompt, images), max_tokens, stop, sampling, at_start=False)

    def _stream(self, prompt: Prompt, max_tokens: int | None, stop: str | Sequence[str], sampling: dict[str, Any], at_start: bool) -> Stream:
        if max_tokens is not None and max_tokens < 0:
            raise RequestError(f"max_tokens={max_tokens}: must not be negative")
        segments, media = prompt
        request = Request(lay_out_rows(segments, self._axes), Sampler(SamplingParams(**sampling), self.n_vocab),
                          self.tokenizer.decoder(skip_special=True, at_start=at_start), Stops([stop] if isinstance(stop, str) else list(stop)),
                          max_tokens, self.tokenizer.eog_ids, Report(media=media))
        return Stream(request, self._scheduler)

    @property
    def template(self) -> ChatTemplate:
        """The file's chat template, or a default for its kind of vocabulary; compiled when it is first needed."""
        if self._template is None:
            from pyengine.template import ChatTemplate                         # jinja2 takes 25 ms to import

            self._template = ChatTemplate.from_metadata(self.file.metadata, self.tokenizer)
        return self._template

    def chat_ids(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None) -> list[int]:
        """Token ids of a conversation in the model's own chat format; -1 for each soft token of a picture."""
        return lay_out_rows(self._prompts.chat(messages, tools)[0], self._axes).ids.tolist()

    def chat(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None, stream: bool = False,
             max_tokens: int | None = 512, stop: str | Sequence[str] = (), **sampling: Any) -> Any:
        """Answer a conversation of OpenAI-style messages. Returns an Answer, or an iterator of pieces with stream=True.

        Parts of a content: {"type": "text", "text": ..}, {"type": "image", "image": ..}, {"type": "image_url", "image_url":
        {"url": ..}}, {"type": "video", "video": [frames] or a file}, or a picture as it is; a message may also have "images".
        Raises: TemplateError, ContextOverflowError, RequestError, ImageError.
        """
        pieces = self._stream(self._prompts.chat(messages, tools), max_tokens, stop, sampling, at_start=True)
        return pieces if stream else pieces.answer()


