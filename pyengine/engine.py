"""Load a model, plan its memory, run its steps, generate. The only place that sees models and backends.

    file -> Hparams, Weights -> Model.forward builds one graph -> backend plans and loads it -> steps replay it

One graph serves prompts and generation: the number of rows, their positions and cells are run-time inputs. A prompt is a list of
segments (`batch.TokenSegment`, `batch.MediaSegment`); pictures become segments in `media`, by an encoder with a graph of its own.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyengine import hardware
from pyengine.backends import backend
from pyengine.batch import Batch, MediaSegment, Rows, Segment, TokenSegment, lay_out_rows
from pyengine.codebooks import ensure_codebooks
from pyengine.dtype import dtype as dtype_of
from pyengine.errors import ContextOverflowError, InvalidModelError, PlanError, RequestError, UnsupportedModelError
from pyengine.gguf import GGUFFile
from pyengine.graph import Graph
from pyengine.hparams import Hparams
from pyengine.kvcache import LayerCache, Policy, Sliding, cache_bytes, visible
from pyengine.locate import find_model
from pyengine.media import MediaEncoder, MediaInfo, Part, encoder_graph, merged
from pyengine.memory import MemoryPlan, PlanItem
from pyengine.models import architecture
from pyengine.sampling import Sampled, Sampler, SamplingParams, sampler_bytes
from pyengine.tensor import Dim, Tensor
from pyengine.tokenizer import Tokenizer
from pyengine.weights import Weights

if TYPE_CHECKING:
    from pyengine.image import Image, Video
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
    vision: Any              # the media encoder, or None
    graph: Graph
    outputs: list[Tensor]
    groups: list[_Group]
    kv: list[PlanItem]
    n_ctx: int
    n_batch: int
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


def _build(files: _Files, n_ctx: int, n_batch: int, kv_dtype: str) -> _Built:
    """The graph of one step of this model."""
    h = Hparams(files.model.metadata)
    weights = Weights(files.model)
    arch = architecture(h.arch)(h, weights, n_ctx)
    vision = _vision(arch, h, files, weights, n_ctx)
    unread = ("rope_freqs", "rope_factors_long", "rope_factors_short", *(() if vision and not files.mmproj else ("v", "mm")))
    weights.finish(ignore=unread)
    c = arch.config
    n_batch = min(max(n_batch, vision.atomic_rows if vision else 0), n_ctx)
    n_head = max(1, min(n_batch, HEAD_BYTES // (4 * c.vocab_size)))
    dtype = dtype_of(KV_DTYPES[kv_dtype])
    if c.head_dim % dtype.block:
        raise UnsupportedModelError(f"kv_dtype={kv_dtype}: blocks of {dtype.block} do not divide a head of {c.head_dim}; use f16")
    g = Graph()
    m, w, l = Dim("m", n_batch), Dim("w", n_batch), Dim("l", n_head)
    media = g.input("media", (Dim("e", n_batch), c.d_model)) if vision else None
    batch = Batch(m, g.input("ids", (m,), "I32"), g.input("positions", (arch.position_axes, m), "I32"),
                  g.input("wanted", (w,), "I32"), g.input("head", (l,), "I32"), media)
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
    return _Built(arch, vision, g, [logits, hidden], list(groups.values()), kv, n_ctx, n_batch, n_head)


def model_graph(name: str | Path, n_ctx: int = 4096, mmproj: str | Path | None = None, encoder: bool = False) -> list[Tensor]:
    """The outputs of a model's graph, or of its media encoder's, as its module wrote it."""
    files = _open(name, mmproj)
    built = _build(files, min(n_ctx, Hparams(files.model.metadata).size("context_length")), N_BATCH, "f16")
    if encoder and built.vision is None:
        raise UnsupportedModelError(f"{files.name}: no media encoder")
    return encoder_graph(built.vision) if encoder else built.outputs


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


@dataclass(frozen=True)
class _Planned:
    """A model laid out, nothing loaded: its step, its media encoder's run (or None), and the count of both."""

    built: _Built
    step: Any
    encoder: Any
    image_cache: int         # bytes
    plan: MemoryPlan


def _plan(files: _Files, n_ctx: int | None, n_batch: int, kv_dtype: str, n_threads: int | None) -> _Planned:
    """Build, lay out and count; without `n_ctx`, the training context or what fits of it."""
    trained = Hparams(files.model.metadata).size("context_length")
    available = {"cpu": hardware.available_memory()}
    size = n_ctx or trained
    while True:
        built = _build(files, size, n_batch, kv_dtype)
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
                 PlanItem("cpu", "sampler", "candidates", sampler_bytes(built.arch.config.vocab_size)), *extra]
        plan_ = MemoryPlan(files.name, size, built.n_batch, kv_dtype, tuple(i for i in items if i.nbytes), available)
        if plan_.fits or n_ctx is not None or size <= 256:
            return _Planned(built, prepared, encoder, image_cache, plan_)
        size //= 2


def plan(model: str | Path, n_ctx: int | None = None, device: str = "auto", kv_dtype: str = "f16", n_batch: int = N_BATCH,
         n_threads: int | None = None, mmproj: str | Path | None = None) -> MemoryPlan:
    """Count what a model will take, per device and purpose; reads headers only.

    Raises: ModelNotFoundError, InvalidModelError, UnsupportedModelError, RequestError.
    """
    _check_settings(device, n_ctx, n_batch, kv_dtype)
    return _plan(_open(model, mmproj), n_ctx, n_batch, kv_dtype, n_threads).plan


def load(model: str | Path, mmproj: str | Path | None = None, device: str = "auto", n_ctx: int | None = None, kv_dtype: str = "f16",
         n_threads: int | None = None, n_batch: int = N_BATCH, progress: Callable[[int, int], None] | None = None) -> Model:
    """Load a model from a GGUF file, or by a name that `pyengine-run list` shows.

    mmproj: the file of the media encoder, for models in two files (found by itself where `model` is a name).
    n_ctx: positions of the context; default the training context, or what of it fits the memory. kv_dtype: f32, f16 or q8_0.
    n_batch: most rows of one step; it grows to the largest picture that must not be cut. progress(done_bytes, all_bytes) is called while weights are read.
    Raises: ModelNotFoundError, InvalidModelError, UnsupportedModelError, RequestError; PlanError if it does not fit.
    """
    _check_settings(device, n_ctx, n_batch, kv_dtype)
    files = _open(model, mmproj)
    planned = _plan(files, n_ctx, n_batch, kv_dtype, n_threads)
    if not planned.plan.fits:
        raise PlanError(f"{files.name} does not fit; a smaller n_ctx or kv_dtype='q8_0' takes less\n{planned.plan.table()}", planned.plan)
    ensure_codebooks(t.dtype for file in (files.model, files.mmproj) if file for t in file.tensors.values())
    media = MediaEncoder(planned.built.vision, planned.encoder, planned.image_cache, progress) if planned.encoder else None
    return Model(files.model, planned.built, planned.step.load(progress), media, planned.plan)


@dataclass
class Report:
    """How an answer came about.

    tokens: ids; sampled: their log-probabilities (and the n best, where `logprobs` asked for them); finish: "stop" or "length";
    n_prompt, n_cached: prompt tokens, and those of them found in the cache; seconds: of the generation.
    media: what became of each picture or video.
    """

    tokens: list[int] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)
    finish: str = "length"
    n_prompt: int = 0
    n_cached: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0
    media: list[MediaInfo] = field(default_factory=list)


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

    def __init__(self, file: GGUFFile, built: _Built, program: Any, media: MediaEncoder | None, plan_: MemoryPlan):
        self.file, self.plan, self.program, self.media = file, plan_, program, media
        self.config = built.arch.config
        self.n_ctx, self.n_batch, self.n_vocab = built.n_ctx, built.n_batch, self.config.vocab_size
        self._n_head, self._groups = built.n_head, built.groups
        self._axes = built.arch.position_axes
        self._cached: list[Hashable] = []                                      # rows whose keys and values are in the cache
        self._next = 0                                                         # position of the row after them
        self._in_use: frozenset[bytes] = frozenset()                           # digests of the conversation's media
        self._tokenizer: Tokenizer | None = None
        self._template: ChatTemplate | None = None
        unused = {n: np.empty(t.nbytes_max // 4, np.int32) for n, t in built.graph.inputs.items() if n not in program.inputs}
        self._flat = unused | {name: a.reshape(-1) for name, a in program.inputs.items()}
        self._logits = program.outputs[0]
        self._head_step = program.first_step_reading("head")
        for g in self._groups:
            program.state(f"{g.name}.table")[0] = np.arange(g.slots, dtype=np.int32)
        self._flat["seq"][:] = 0
        self._stats: dict[str, int] = {"prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0, "steps": 0}

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
        return {**self._stats, **(self.media.stats if self.media else {})}

    # -- prompts ------------------------------------------------------------------------------------------------------

    def _tokens(self, ids: Sequence[int]) -> TokenSegment:
        for i in ids:
            if not 0 <= i < self.n_vocab:
                raise RequestError(f"token id {i} is outside the vocabulary of {self.n_vocab}")
        return TokenSegment(tuple(ids))

    def _media(self, source: Any, kind: str = "") -> tuple[tuple[Part, ...], MediaInfo]:
        """What stands in the prompt for a picture or video; see `media_of` for the arguments."""
        self._need_encoder()
        return self.media.get(media_of(source, kind), self._in_use)

    def _need_encoder(self) -> None:
        if self.media is None:
            raise RequestError(f"{Path(self.file.path).name} has no media encoder, so it takes no pictures; where it is in a file of its own, "
                               "load with mmproj=")

    def _segments(self, parts: Sequence[Part]) -> list[Segment]:
        """Texts become tokens, neighbouring texts as one; nothing is added."""
        out: list[Segment] = []
        for p in merged(parts):
            if isinstance(p, MediaSegment):
                out.append(p)
            else:
                out.append(self._tokens([p] if isinstance(p, int) else self.tokenizer.tokenize(p, add_special=False)))
        return out

    def _prompt(self, prompt: str | Sequence[Any], images: Sequence[Any] = ()) -> tuple[list[Segment], list[MediaInfo]]:
        """Segments of a prompt: a text (BOS is added where the model wants it) with pictures, or parts (nothing is added)."""
        if isinstance(prompt, str):
            return self._text(prompt, [("", i) for i in images])
        if images:
            raise RequestError("images= goes with a text; in a prompt in parts the pictures are parts")
        segments: list[Segment] = []
        infos: list[MediaInfo] = []
        for part in prompt:
            if isinstance(part, str):
                segments += self._segments([part])
            elif isinstance(part, (int, np.integer)) and not isinstance(part, bool):
                segments += [self._tokens([int(part)])]
            elif part is None or isinstance(part, (bool, float, dict)):
                raise RequestError(f"a part of a prompt is {type(part).__name__}; ints, strings, pictures and lists of frames are parts")
            else:
                parts, info = self._media(part)
                segments += self._segments(parts)
                infos.append(info)
        return segments, infos

    def _markers(self) -> dict[str, str]:
        """What a template writes for a picture and for a video; empty where the vocabulary lacks those tokens."""
        vision = self.media.vision if self.media else None
        ids = {"image": vision.image_marker, "video": vision.video_marker} if vision else {}
        return {kind: b"".join(map(self.tokenizer.piece, i)).decode("utf-8", "replace") for kind, i in ids.items() if i}

    def _text(self, text: str, media: Sequence[tuple[str, Any]]) -> tuple[list[Segment], list[MediaInfo]]:
        """A text with as many markers as media (kind, source), or with none: then the media come first. BOS as for any text."""
        if not media:
            ids = self.tokenize(text)
            return [self._tokens(ids[1:] if self.tokenizer.bos_id is not None and ids[:2] == [self.tokenizer.bos_id] * 2 else ids)], []
        found = [self._media(source, kind) for kind, source in media]
        markers = [m for m in self._markers().values() if m]
        pieces = re.split("|".join(map(re.escape, markers)), text) if markers else [text]
        if len(pieces) == 1:
            pieces = [""] * len(found) + [text]
        if len(pieces) != len(found) + 1:
            raise RequestError(f"the prompt has {len(pieces) - 1} places for pictures ({', '.join(map(repr, markers))}), but {len(found)} were given")
        parts: list[Part] = [pieces[0]]
        for (own, _), piece in zip(found, pieces[1:]):
            parts += [*own, piece]
        segments = self._segments([p for p in parts if p != ""])
        special = self.tokenize("")
        lead = special[:1] if self.tokenizer.add_bos else []
        first = segments[0].ids[:1] if isinstance(segments[0], TokenSegment) else ()
        if lead and list(first) != lead:
            segments.insert(0, self._tokens(lead))
        if special[len(lead):]:
            segments.append(self._tokens(special[len(lead):]))
        return segments, [info for _, info in found]

    def encode_image(self, image: Any) -> np.ndarray:
        """Soft tokens of a picture (or of a list of frames), as the decoder receives them: float32 [n, d_model].

        Without start, end or row-break tokens; after the projector, before any multiplier of the decoder. Kept in the image
        cache. Raises: UnsupportedModelError without an encoder, ImageError.
        """
        if self.media is None:
            raise UnsupportedModelError(f"{self.file.path}: this model has no image encoder; where it is in a file of its own, load with mmproj=")
        parts, _ = self._media(image)
        return np.concatenate([p.embedding for p in parts if isinstance(p, MediaSegment)])

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
        """Forget the conversation; encoded pictures stay in the image cache."""
        self._cached.clear()
        self._next = 0

    def step(self, rows: Rows, start: int, stop: int, wanted: np.ndarray, n_head: int) -> np.ndarray:
        """Run one step on rows [start, stop), at most n_batch, which follow the cached ones.

        wanted: numbers, from `start` on, of the rows that the last layer computes, of which the first n_head go through the output
        head. Returns logits [n_head, vocab], valid until the next step.
        """
        first, m, w = len(self._cached), stop - start, len(wanted)
        flat, index = self._flat, np.arange(first, first + m, dtype=np.int32)
        ids, e = flat["ids"], 0
        ids[:m] = rows.ids[start:stop]
        for where, embedding in rows.embeddings(start, stop):
            n = len(embedding)
            ids[where] = np.arange(-1 - e, -1 - e - n, -1)
            flat["media"][e * embedding.shape[1] : (e + n) * embedding.shape[1]] = embedding.reshape(-1)
            e += n
        for axis in range(self._axes):
            flat["positions"][axis * m : (axis + 1) * m] = rows.positions[axis, start:stop]
        flat["wanted"][:w] = wanted
        flat["head"][:n_head] = np.arange(n_head)
        flat["seq"][:m] = 0
        flat["seq_wanted"][:w] = 0
        for g in self._groups:
            lo, hi = visible(g.policy, index, rows.span_end[start:stop])
            flat[f"{g.name}.cells"][:m] = index % g.slots
            flat[f"{g.name}.lo"][:m], flat[f"{g.name}.hi"][:m] = lo, hi
            flat[f"{g.name}.lo_wanted"][:w], flat[f"{g.name}.hi_wanted"][:w] = lo[wanted], hi[wanted]
        try:
            self.program.execute_named(l=n_head, m=m, w=w, e=e)
            self._cached.extend(rows.keys[start:stop])
        except BaseException:                                                  # Ctrl-C too: the cache may hold part of the step
            self.reset()
            raise
        self._stats["steps"] += 1
        return self._logits[:n_head]

    def _check_room(self, rows: Rows) -> None:
        if not len(rows):
            raise RequestError("the prompt is empty")
        if len(rows) > self.n_ctx:
            raise ContextOverflowError(f"the prompt has {len(rows)} tokens, but the context holds {self.n_ctx}; load with a larger n_ctx")

    def _prefill(self, rows: Rows) -> tuple[np.ndarray, int]:
        """Bring the cache to `rows`; returns logits of the last one [vocab] and the number of rows found in the cache."""
        self._check_room(rows)
        common = 0
        for a, b in zip(self._cached, rows.keys):
            if a != b:
                break
            common += 1
        kept = self._rewind(rows.whole(min(common, len(rows) - 1)))
        for start, stop in rows.steps(kept, self.n_batch):
            logits = self.step(rows, start, stop, np.array([stop - start - 1], np.int32), 1)
        self._next = rows.next
        self._stats["prompt_tokens"] += len(rows)
        self._stats["cached_tokens"] += kept
        return logits[0], kept

    def feed(self, ids: Sequence[int], n_batch: int | None = None) -> np.ndarray:
        """Append tokens to the conversation in steps of at most n_batch; returns logits after the last one, [vocab]."""
        n = len(ids)
        positions = np.broadcast_to(np.arange(self._next, self._next + n, dtype=np.int32), (self._axes, n))
        rows = Rows(list(ids), np.array(ids, np.int32), positions, np.zeros(n, np.int32), [], self._next + n)
        for start, stop in rows.steps(0, n_batch or self.n_batch):
            logits = self.step(rows, start, stop, np.array([stop - start - 1], np.int32), 1)
        self._next = rows.next
        return logits[0]

    def logits(self, prompt: Sequence[Any] | str) -> np.ndarray:
        """Logits after each position of a prompt, float32 [n_positions, n_vocab]; nothing of an earlier cache is used.

        Raises: ContextOverflowError, RequestError, ImageError.
        """
        rows = lay_out_rows(self._prompt(prompt)[0], self._axes)
        out = np.empty((len(rows), self.n_vocab), np.float32)
        for start, block in self.logit_blocks(rows):
            out[start : start + len(block)] = block
        return out

    def logit_blocks(self, prompt: Rows | Sequence[int], first: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """The rows of `logits` from position `first` on, in blocks (position, [n, vocab]) that are valid until the next one is
        asked for."""
        rows = prompt if isinstance(prompt, Rows) else lay_out_rows([TokenSegment(tuple(prompt))], self._axes)
        if len(rows) > self.n_ctx:
            raise ContextOverflowError(f"the prompt has {len(rows)} tokens, but the context holds {self.n_ctx}; load with a larger n_ctx")
        self.reset()
        for start, stop in rows.steps(0, self.n_batch):
            m, skip = stop - start, min(max(first - start, 0), stop - start)
            wanted = np.arange(skip, m, dtype=np.int32)
            n = min(len(wanted), self._n_head)
            logits = self.step(rows, start, stop, wanted, n)
            if n:
                yield start + skip, logits
            for done in range(n, len(wanted), self._n_head):
                n = min(self._n_head, len(wanted) - done)
                self._flat["head"][:n] = np.arange(done, done + n)
                self.program.execute_named(first_step=self._head_step, l=n, m=m, w=len(wanted), e=0)
                yield start + skip + done, self._logits[:n]
        self._next = rows.next

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
        return self._stream(self._prompt(prompt, images), max_tokens, stop, sampling, at_start=False)

    def _stream(self, prompt: tuple[list[Segment], list[MediaInfo]], max_tokens: int | None, stop: str | Sequence[str],
                sampling: dict[str, Any], at_start: bool) -> Stream:
        segments, media = prompt
        run = Report(media=media)
        return Stream(self._pieces(lay_out_rows(segments, self._axes), max_tokens, stop, sampling, at_start, run), run)

    def _pieces(self, rows: Rows, max_tokens: int | None, stop: str | Sequence[str], sampling: dict[str, Any], at_start: bool,
                run: Report) -> Iterator[str]:
        if max_tokens is not None and max_tokens < 0:
            raise RequestError(f"max_tokens={max_tokens}: must not be negative")
        sampler = Sampler(SamplingParams(**sampling), self.n_vocab)
        stops = _Stops([stop] if isinstance(stop, str) else list(stop))
        decoder = self.tokenizer.decoder(skip_special=True, at_start=at_start)
        started = time.perf_counter()
        self._in_use = frozenset(bytes.fromhex(info.digest) for info in run.media)
        logits, run.n_cached = self._prefill(rows)
        run.n_prompt = len(rows)
        for token in rows.ids.tolist():
            if token >= 0:
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
            self._stats["generated_tokens"] += 1
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
            logits = self.feed([drawn.token])
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

    def _chat(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> tuple[list[Segment], list[MediaInfo]]:
        """A conversation in the model's own chat format, ready for the answer."""
        shown, media = _without_media(messages)
        if not media:
            return self._text(self.template.render(shown, tools=tools, add_generation_prompt=True), [])
        self._need_encoder()
        markers = self._markers()
        text = self.template.render(shown, tools=tools, add_generation_prompt=True, media_marker=markers.get("image"))
        if sum(text.count(m) for m in markers.values()) != len(media):         # a template that knows of no pictures
            flat = [m if isinstance(m.get("content"), str) else {**m, "content": _flattened(m.get("content") or (), markers)} for m in shown]
            text = self.template.render(flat, tools=tools, add_generation_prompt=True)
        return self._text(text, media)

    def chat_ids(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None) -> list[int]:
        """Token ids of a conversation in the model's own chat format; -1 for each soft token of a picture."""
        return lay_out_rows(self._chat(messages, tools)[0], self._axes).ids.tolist()

    def chat(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None, stream: bool = False,
             max_tokens: int | None = 512, stop: str | Sequence[str] = (), **sampling: Any) -> Any:
        """Answer a conversation of OpenAI-style messages. Returns an Answer, or an iterator of pieces with stream=True.

        Parts of a content: {"type": "text", "text": ..}, {"type": "image", "image": ..}, {"type": "image_url", "image_url":
        {"url": ..}}, {"type": "video", "video": [frames] or a file}, or a picture as it is; a message may also have "images".
        Raises: TemplateError, ContextOverflowError, RequestError, ImageError.
        """
        pieces = self._stream(self._chat(messages, tools), max_tokens, stop, sampling, at_start=True)
        return pieces if stream else pieces.answer()


def media_of(source: Any, kind: str = "") -> Image | Video:
    """A picture from anything that `open_image` reads; a list of frames, a Video, or whatever kind "video" names, is a video."""
    from pyengine.image import Video, open_image, open_video                   # Pillow takes 20 ms to import

    if isinstance(source, Video):
        return source
    return open_video(source) if kind == "video" or isinstance(source, (list, tuple)) else open_image(source)


def _without_media(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[tuple[str, Any]]]:
    """Messages as a template sees them ({"type": "image"} without the data), and their media in order: (kind, source)."""
    shown: list[dict[str, Any]] = []
    media: list[tuple[str, Any]] = []
    for message in messages:
        if not isinstance(message, dict):
            raise RequestError("a message must be a mapping with a role")
        content, extra = message.get("content"), message.get("images") or ()
        if extra and not isinstance(content, (list, tuple)):                   # Ollama's form: pictures first
            content = [{"type": "text", "text": content}] if content else []
        if isinstance(content, (list, tuple)):
            parts: list[Any] = []
            for part in [*extra, *content]:
                kind, source = _media_part(part)
                parts.append(part if source is None else {"type": kind})
                media += [] if source is None else [(kind, source)]
            content = parts
        shown.append({**{k: v for k, v in message.items() if k != "images"}, "content": content})
    return shown, media


def _media_part(part: Any) -> tuple[str, Any]:
    """(kind, source) of one part of a message's content; (.., None) for what is no picture or video."""
    if isinstance(part, str):
        return "text", None
    if not isinstance(part, dict):
        return "video" if isinstance(part, (list, tuple)) or type(part).__name__ == "Video" else "image", part
    kind = part.get("type")
    if kind not in ("image", "image_url", "input_image", "video", "video_url"):
        return str(kind), None
    source = next((part[k] for k in (kind, "image", "image_url", "video", "url", "path") if part.get(k) is not None), None)
    source = source.get("url") if isinstance(source, dict) else source
    if source is None:
        raise RequestError(f"a part of type {kind!r} holds no {'video' if kind.startswith('video') else 'picture'}")
    return "video" if kind.startswith("video") else "image", source


def _flattened(parts: Sequence[Any], markers: dict[str, str]) -> str:
    """A content as one text, with markers for media: for templates that take strings only."""
    return "\n".join(p if isinstance(p, str) else p.get("text", "") if p.get("type") == "text" else markers.get(str(p.get("type")), "")
                     for p in parts)


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
