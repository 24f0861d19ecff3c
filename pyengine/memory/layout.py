"""A model laid out at given settings: its sizes, its programs declared and prepared, and the items that they add up to.

    Bound + Settings + machine -> Sizes -> declared -> prepared -> items

Nothing here changes the model; another context or number of conversations is another layout of the same bound model.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from pyengine import hardware
from pyengine.backends import backend
from pyengine.backends.base import Backend, Prepared
from pyengine.backends.chain import PreparedChain
from pyengine.backends.prepared import Counted
from pyengine.cache.policy import Compressed, DRAFTED
from pyengine.dtype import DType
from pyengine.errors import RequestError, UnsupportedModelError
from pyengine.files.weights import files_of
from pyengine.memory import count
from pyengine.memory.placement import demand, place
from pyengine.memory.plan import PlanItem
from pyengine.memory.settings import is_card, Settings
from pyengine.models.architecture import Encoder
from pyengine.programs import encoder as encoders
from pyengine.programs.bound import Bound
from pyengine.programs.sizes import cells_of_budget, check_heads, Sizes, step_rows
from pyengine.programs.step import Step
from pyengine.records import NamedTuple
from pyengine.text.lookup import most_drafted

# Unless told otherwise, the largest picture's share of a device's memory (arena of the encoder, and patches), and the image cache's
PICTURE_SHARE, IMAGE_CACHE_SHARE = 1 / 8, 1 / 64
# and that of one conversation's pictures in layers that attend across, which hold at most this many of the largest
ACROSS_SHARE, ACROSS_PICTURES = 1 / 16, 8
LEAST_PICTURE = 256                  # soft tokens: pictures are not planned smaller than this unless they are told to be


class Stage(NamedTuple):
    """What one device does of the step."""

    device: str
    prepared: Counted
    layers: list[int]


class ModelLayout:
    """See the module's docstring. main: the device that holds what is the process's own; free: bytes of each device.

    place  where the whole step is, or what comes first of several
    """

    def __init__(self, bound: Bound, want: Settings, machine: hardware.Hardware):
        self.size, self.n_pictures = want.largest_picture()
        self.bound = bound.without_encoders() if self.n_pictures == 0 else bound
        self.want, self.machine, self.host = want, machine, machine.devices[0]
        if want.images and not self.bound.encoders:
            raise RequestError(f"images={want.images!r}: {bound.files.name} has no media encoder; where it is in a file of its own, give mmproj=")
        self.notes: list[str] = []
        if want.n_seq < bound.n_seq_least:
            self.want = replace(want, n_seq=bound.n_seq_least)
            self.notes.append(f"{bound.n_seq_least} conversations side by side: as many as an answer that is searched for has beams")
        self._devices = {d.id: d for d in machine.devices}
        self.free = self._free()
        self.place = next(iter(self.free))
        cards = any(map(is_card, self.free))
        self.main = "cpu" if cards else self.place
        self.places = dict(self.free)                        # of layers
        self.encoder_place = want.encoder_device or (self.place if cards else self.main)
        if cards:
            self.free.setdefault("cpu", self.host.free)
        self._backends: dict[str, Backend] = {}
        self._backend = self._backend_of(self.place)
        self.encoder: Counted | None = None
        self.source: Counted | None = None                   # of a prompt, where there is an encoder for it
        self.sizes = self._sizes(want.n_ctx or self.bound.n_ctx_train)
        self.step = Step(self.bound.model, self.sizes, self.bound.adapters, self.bound.head)
        self.image_cache = self._image_cache(self.sizes.n_ctx)
        self.draft = None if self.bound.draft is None else self._beside(self.bound.draft)
        self.stages, self.prepared = self._prepared()
        self.items = self._items()

    def _free(self) -> dict[str, int]:
        """Return the bytes of each device or part of memory that layers may go to. Raises: RequestError for one that is not there."""
        wanted = self.want.parts or {"cpu" if self.want.device == "auto" else self.want.device: None}
        there = {name: d.free for name, d in self._devices.items()}
        for name in wanted:
            if not name.startswith("cpu:") and name not in there:
                raise RequestError(f"device={name!r}: this machine has {', '.join(there)}")
        return {name: there[name] if room is None else room for name, room in wanted.items()}

    def _backend_of(self, place: str) -> Backend:
        """Return the backend of a device; parts of main memory are one."""
        name = place if is_card(place) else "cpu"
        if name not in self._backends:
            own = {} if is_card(name) else {"in_place": self.want.mmap}
            self._backends[name] = backend(name, n_threads=self.want.n_threads, **own)
        return self._backends[name]

    def total_of(self, place: str) -> int:
        """Return all bytes that a device has, free or not."""
        return self._devices[place].total if place in self._devices else self.host.total

    # -- sizes --------------------------------------------------------------------------------------------------------

    def _sizes(self, n_ctx: int) -> Sizes:
        """Decide all sizes; the encoder is laid out for the largest picture on the way."""
        want, c = self.want, self.bound.model.config
        heads = [head_dim for _, head_dim in self.bound.model.cache_shapes()]
        k, v = check_heads(want.kv_dtype, heads)
        ahead = self._ahead(k, v)
        heads += [head_dim for _, head_dim in self.bound.ahead.own] if ahead else []
        for name in filter(is_card, self.places):
            own = self._backend_of(name)
            for what, most, n in (("attention there takes heads of {} elements", own.widest, max(heads, default=0)),
                                  ("a row there chooses from {} experts", own.experts, getattr(c, "n_experts", 0))):
                if most is not None and n > most:
                    raise UnsupportedModelError(f"device={name!r}: {what.format(most)} at most, and this model has {n}; give device='cpu'")
        n_batch, n_head = step_rows(n_ctx, want.n_batch, want.n_seq, self.bound.atomic_rows, c.vocab_size)
        image, runs, across = self.bound.image, {}, 0
        if image is not None:
            across = self._encoder_rows(image, n_ctx, c.n_kv_heads * (k.size(c.head_dim) + v.size(c.head_dim)))
            runs[image.kind], self.encoder = self._largest_run(image, n_ctx)
        sizes = Sizes(n_ctx, n_batch, want.n_seq, n_head, k, v, runs, across, self._n_tokens(), compressed=self._compressed(),
                      atomic_rows=self.bound.atomic_rows, drafted=self._states(n_batch), ahead=ahead)
        if self.bound.source is None:
            return sizes
        sizes = sizes.with_(across=n_ctx, source=n_ctx)
        self.source = self._backend_of(self.encoder_place).prepare(encoders.declare_source(self.bound.model, sizes))
        return sizes

    def _states(self, n_batch: int) -> int:
        """Return how many states there are for drafted tokens, where layers keep some."""
        if not any(p.recurrent for p in self.bound.model.policies()):
            return 0
        return min(most_drafted(None if self.want.speculate is True else self.want.speculate, DRAFTED), n_batch - 1)

    def _ahead(self, k: DType, v: DType) -> bool:
        """Say whether the step has the model's head that predicts further tokens: where it may draft, and nothing else keeps it from it."""
        drafts = self.bound.drafts or self.bound.draft is not None                   # the one of both that does is a small model
        if most_drafted(self.want.speculate, 1) == 0 or drafts:
            return False
        if self.bound.head is None and self.bound.model.without:
            self.notes.append(self.bound.model.without)
        if self.bound.ahead is None:
            return False
        why = ("adapters would have to change it" if self.bound.adapters else "conversations are compressed" if self.want.compress is not None else
               "keys are kept by channel" if k.by_channel else "layers are on several devices" if self.want.parts else
               f"its heads are no whole blocks of kv_dtype={self.want.kv_dtype}" if any(n % dtype.block for dtype in (k, v) for _, n in self.bound.ahead.own) else "")
        if why:
            self.notes.append(f"the head that predicts further tokens is left out: {why}")
        return not why

    def _compressed(self) -> Compressed | None:
        """Return what stands in place of `Full` where conversations are compressed. Raises: UnsupportedModelError where no layer sees everything."""
        policy = self.want.compress
        if policy is None:
            return None
        if self.bound.source is not None or not any(p.whole for p in self.bound.model.policies()):
            raise UnsupportedModelError(f"compress={policy!r}: {self.bound.files.name} has no layers that see all tokens of a conversation")
        most = cells_of_budget(policy.budget_of(self.bound.n_ctx_train), self.bound.atomic_rows) if policy.when == "always" else 0
        if policy.uneven and len({shape for shape, p in zip(self.bound.model.cache_shapes(), self.bound.model.policies()) if p.whole}) > 1:
            raise UnsupportedModelError(f"compress={policy!r}: layers of {self.bound.files.name} that see everything have heads of different sizes, so they "
                                        "cannot share cells; use a policy that keeps as many of each layer")
        if policy.uneven and self.want.parts:
            raise UnsupportedModelError(f"compress={policy!r}: layers share their cells, and are on several devices; use a policy that keeps as many of each layer")
        return Compressed(most=most, kinds=tuple(kind for _, kind in policy.channels), layer=0 if policy.uneven else None)

    def _n_tokens(self) -> int:
        """Return how many tokens there are, for a device that finds the largest logits of each row; 0: logits are in the host's memory."""
        meta = self.bound.files.model.metadata
        if not self._backend.apart or "tokenizer.ggml.tokens" not in meta:
            return 0
        return min(self.bound.model.config.vocab_size, meta.count("tokenizer.ggml.tokens"))

    def _encoder_rows(self, image: Encoder, n_ctx: int, cell: int) -> int:
        """Count the encoder rows of a conversation in layers that attend across. cell: bytes of a key and a value of one layer."""
        n_layers, most = sum(p.across for p in self.bound.model.policies()), image.across_rows(n_ctx)
        if not n_layers:
            return 0
        largest = min(most, image.n_rows(*self.size)) if self.size else most
        share = int(ACROSS_SHARE * self.total_of(self.place))
        return largest * (self.n_pictures or max(1, min(ACROSS_PICTURES, share // (n_layers * largest * cell))))

    def _largest_run(self, image: Encoder, n_ctx: int) -> tuple[int, Counted]:
        """Find the rows of a run, and its program, for the largest picture that is asked for, or that fits its share of memory."""
        def laid_out(rows: int) -> Counted:
            return encoders.prepare(self._backend_of(self.encoder_place), image, rows)

        most = image.most_rows(n_ctx)
        rows = min(most, max(1, image.n_rows(*self.size))) if self.size else most
        found, limit = laid_out(rows), int(PICTURE_SHARE * self.total_of(self.encoder_place))
        if self.size or image.atomic_rows:
            return rows, found
        while count.run_bytes(found) > limit and rows > LEAST_PICTURE:
            fits = int(rows * limit / count.run_bytes(found)) // 64 * 64       # the arena is nearly linear in rows
            fewer = max(LEAST_PICTURE, min(rows - 64, fits))
            smaller = laid_out(fewer)
            if count.run_bytes(smaller) >= count.run_bytes(found):             # a run takes the same whatever the picture's size
                return most, found
            rows, found = fewer, smaller
        if rows < most:
            self.notes.append(f"pictures of up to {rows:,} image tokens: the processor allows {most:,}, which would take more than "
                              f"1/{1 / PICTURE_SHARE:.0f} of the memory; images=(width, height) sets another size")
        return rows, found

    def _image_cache(self, n_ctx: int) -> int:
        """Count the bytes of embeddings to keep: as many as asked for, or a context full of them within a share of the memory."""
        image = self.bound.image
        if image is None:
            return 0
        row, run = 4 * self.bound.model.media_width, self.sizes.runs[image.kind]
        if self.n_pictures is not None:                      # a picture in tiles has more rows than a run
            return self.n_pictures * max(run, min(image.n_rows(*self.size), n_ctx) if self.size else 0) * row
        return min(max(n_ctx, self.sizes.across) * row, max(run * row, int(IMAGE_CACHE_SHARE * self.host.total)))

    # -- programs -----------------------------------------------------------------------------------------------------

    def _beside(self, draft: Bound) -> ModelLayout:
        """Lay a draft model out for as many conversations, on the first device. Its caches have the formats of the model's, f16 where its heads
        do not allow them, or keys are kept by channel; its context is no longer than it was trained for."""
        heads = [head_dim for _, head_dim in draft.model.cache_shapes()]
        plain = self.sizes.k.by_channel or any(n % dtype.block for dtype in (self.sizes.k, self.sizes.v) for n in heads)
        device = {self.place: self.free[self.place]} if self.place.startswith("cpu:") else self.place
        want = replace(self.want, n_ctx=self._drafted(self.sizes.n_ctx), kv_dtype="f16" if plain else self.want.kv_dtype, n_seq=self.sizes.n_seq, images=None,
                       device=device, encoder_device=None, expert_device=None, compress=None)
        return ModelLayout(draft, want, self.machine)

    def _drafted(self, n_ctx: int) -> int:
        """Return the positions that a draft model has of a context."""
        return min(n_ctx, self.bound.draft.n_ctx_train or n_ctx)

    def _prepared(self) -> tuple[list[Stage], Prepared | PreparedChain]:
        """Lay the step out, on one device or divided over parts of memory."""
        declared, n_layers = self.step.declare(), self.step.n_layers
        whole = self._backend.prepare(declared)
        if not self.want.parts:
            return [Stage(self.place, whole, list(range(n_layers)))], whole
        cached = dict.fromkeys(range(n_layers), 0)
        for i in count.caches(self.step, self.main, range(n_layers)):
            cached[i.layer] += i.nbytes
        fixed: dict[str, int] = {}
        beside = [*self._own(), *self._encoder_items(), *self._draft_items(), *(i for name in self.places for i in count.transferred(whole, name, self.main))]
        for i in beside if any(map(is_card, self.places)) else [*self._own(), *self._draft_items()]:
            fixed[i.device] = fixed.get(i.device, 0) + (i.nbytes if i.purpose != "mapped" else 0)
        owners = self.bound.model.cache_owners() if len(self.step.layers) == n_layers else range(n_layers)
        need = demand(whole, cached, owners, self.want.expert_device is not None)
        placed = place(declared, need, self.places, fixed, self.want.expert_device, self._backend_of)
        self.notes.append(placed.note)
        return [Stage(*s) for s in zip(placed.devices, placed.prepared.prepared, placed.layers)], placed.prepared

    @property
    def whole(self) -> Counted:
        """The step on one device."""
        return self.stages[0].prepared

    # -- items --------------------------------------------------------------------------------------------------------

    def _own(self) -> list[PlanItem]:
        """List what is on the main device whatever the placement."""
        return [count.sampler(self.main, self.sizes.n_seq, self.bound.model.config.vocab_size), *count.overhead(self.bound.files, self.main)]

    def _items(self) -> list[PlanItem]:
        return [*self._step_items(), *self._own(), *self._encoder_items(), *self._draft_items()]

    def _step_items(self, program: str = "step") -> list[PlanItem]:
        items: list[PlanItem] = []
        for device, prepared, layers in self.stages:
            items += count.weights(prepared.residents.values(), device, "weights", count.STEP_KINDS, n_own=self.step.n_own)
            caches = count.caches(self.step, device, layers)
            items += [*caches, count.lasting(prepared, device, caches), count.arena(prepared, device, self.step)]
            items += count.transferred(prepared, device, self.main, program)
        return items

    def _draft_items(self) -> list[PlanItem]:
        """List what the draft model takes: the process and its driver are there already."""
        own = self.draft
        if own is None:
            return []
        sampler = count.sampler(self.main, 1, own.bound.model.config.vocab_size)
        items = [*own._step_items("draft"), sampler, count.headers(own.bound.files, self.main)]
        return [replace(i, detail=f"draft model's {i.detail}", program="draft") for i in items]

    @property
    def head_bytes(self) -> int:
        """Bytes of the weights of a head in a file of its own; 0 where there is none, or it is left out."""
        head, residents = self.bound.files.head, self.whole.residents.values()
        return sum(r.nbytes if r.form == "mapped" else r.held for r in residents if head in files_of([r.tensor.node.source])) if head else 0

    def _encoder_items(self) -> list[PlanItem]:
        items: list[PlanItem] = []
        if self.source:
            items += count.source(self.source, self.sizes.source, self.encoder_place, self.main, self.source_cache)
        if self.encoder:
            kind = self.bound.image.kind
            items += count.encoder(kind, self.encoder, self.sizes.runs[kind], self.encoder_place, self.main, self.image_cache)
        return items

    @property
    def source_cache(self) -> int:
        """Bytes of encoded prompts to keep: one for each conversation."""
        return self._source_cache(self.sizes.n_seq)

    def _source_cache(self, n_seq: int) -> int:
        return n_seq * self.sizes.source * 4 * self.bound.model.config.d_model

    @cached_property
    def total(self) -> int:
        """All bytes that are taken; mapped weights are not."""
        return sum(i.nbytes for i in self.items if i.purpose != "mapped")

    def of_purposes(self, *purposes: str, device: str | None = None) -> int:
        """Sum the bytes of some purposes, on one device or on all."""
        return sum(i.nbytes for i in self.items if i.purpose in purposes and device in (None, i.device))

    @property
    def room(self) -> int:
        """Bytes that the device of the whole step has free."""
        return self.free[self.place]

    @property
    def taken(self) -> int:
        """Bytes that are taken there."""
        return sum(i.nbytes for i in self.items if i.purpose != "mapped" and i.device == self.place)

    def total_at(self, n_ctx: int, n_seq: int) -> int:
        """Return all bytes on the device of the whole step with these numbers and all else as it is."""
        vocab = self.bound.model.config.vocab_size
        rows = step_rows(n_ctx, self.want.n_batch, n_seq, self.bound.atomic_rows, vocab)
        if self.source and n_ctx != self.sizes.n_ctx or rows != (self.sizes.n_batch, self.sizes.n_head) or self.sizes.ahead and n_seq != self.sizes.n_seq:
            return ModelLayout(self.bound, replace(self.want, n_ctx=n_ctx, n_seq=n_seq), self.machine).taken
        arena, lasting = self.whole.resized(self.step.lasting_shapes(n_ctx, n_seq))
        rest = self.of_purposes("weights", "overhead", "encoder", "images", device=self.place) + arena + lasting
        if self.draft:
            rest += self.draft._growing(self._drafted(n_ctx), n_seq)
        if self.place == self.main:
            rest += sum(i.nbytes for i in self._draft_items() if i.purpose == "sampler")
            rest += count.sampler(self.main, n_seq, vocab).nbytes + self._image_cache(n_ctx) - self.image_cache
            rest += self._source_cache(n_seq) - self.source_cache
        return rest

    def _growing(self, n_ctx: int, n_seq: int) -> int:
        """Return the bytes of the step's arena, tables and caches on its device with these numbers."""
        rows = step_rows(n_ctx, self.want.n_batch, n_seq, self.bound.atomic_rows, self.bound.model.config.vocab_size)
        if rows != (self.sizes.n_batch, self.sizes.n_head):
            return ModelLayout(self.bound, replace(self.want, n_ctx=n_ctx, n_seq=n_seq), self.machine)._growing(n_ctx, n_seq)
        return sum(self.whole.resized(self.step.lasting_shapes(n_ctx, n_seq)))
