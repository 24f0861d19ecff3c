"""A model of towers laid out at given settings: its programs declared and prepared, the items that they add up to, and the plan.

It has no caches, and no context beyond one text: each program's largest run says all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from pyengine import hardware
from pyengine.backends import backend
from pyengine.backends.base import check_kernels, said
from pyengine.backends.prepared import Counted
from pyengine.errors import RequestError, UnsupportedModelError
from pyengine.media.views import MAX_DECODING
from pyengine.memory import count
from pyengine.memory.plan import Headroom, MemoryPlan, PlanItem
from pyengine.memory.settings import is_card, Settings
from pyengine.models.architecture import Towers
from pyengine.programs.bound import Bound
from pyengine.programs.towers import declare_picture, declare_texts, Declaration
from pyengine.records import NamedTuple


class TowerProgram(NamedTuple):
    """One tower's program. rows: of its largest run; names: what its outputs are."""

    prepared: Counted
    rows: int
    names: tuple[str, ...]


class TowersLayout:
    """See the module's docstring. place: the device that has it all; n_ctx: the longest text, in tokens, 0 without texts."""

    def __init__(self, bound: Bound, want: Settings, machine: hardware.Hardware):
        if want.parts:
            raise RequestError(f"device={want.device!r}: a model without layers of a decoder is on one device")
        if bound.adapters:
            raise UnsupportedModelError(f"{bound.files.name}: adapters are for decoders")
        if want.n_seq > 1:
            raise RequestError(f"n_seq={want.n_seq}: {bound.files.name} has no conversations; texts go side by side in runs of up to n_batch tokens")
        if want.compress is not None:
            raise RequestError(f"compress: {bound.files.name} has no conversations")
        if want.n_ctx is not None and bound.model.text is None:
            raise RequestError(f"n_ctx={want.n_ctx}: {bound.files.name} reads pictures only, and has no context")
        self.bound, self.want, self.machine = bound, want, machine
        self.place = "cpu" if want.device == "auto" else want.device
        there = {d.id: d.free for d in machine.devices}
        if self.place not in there:
            raise RequestError(f"device={self.place!r}: this machine has {', '.join(there)}")
        self.free = {self.place: there[self.place], "cpu": there["cpu"]}
        self.places = [self.place]
        own = {} if is_card(self.place) else {"in_place": want.mmap}
        self._backend = backend(self.place, n_threads=want.n_threads, **own)
        self.n_ctx, self.programs = 0, {}
        model = self.model
        if model.text is not None:
            self.n_ctx = self._longest(model.text.n_ctx, model.text.padded)
            rows = max(self.n_ctx, want.n_batch)
            self.programs["text"] = self._prepared(declare_texts(model.text, self.n_ctx, rows), rows)
        size, number = want.largest_picture()
        if model.image is not None and number != 0:
            rows = model.image.n_rows(*size) if size else model.image.most_rows()
            self.programs["image"] = self._prepared(declare_picture(model.image, rows), rows)
        elif want.images:
            raise RequestError(f"images={want.images!r}: {bound.files.name} reads texts only")
        if not self.programs:
            raise RequestError(f"images=0: {bound.files.name} reads pictures only")
        self.items = self._items()

    @property
    def model(self) -> Towers:
        """The bound model."""
        return self.bound.model

    def _longest(self, trained: int, padded: str) -> int:
        """Return the longest text: as asked for, at most what positions there are for. Raises: RequestError."""
        if padded and self.want.n_ctx not in (None, trained):
            raise RequestError(f"n_ctx is {self.want.n_ctx}, but the model reads every text as {trained} tokens")
        if self.want.n_ctx is not None and self.want.n_ctx > trained:
            raise RequestError(f"n_ctx is {self.want.n_ctx}, but the model reads texts of at most {trained} tokens")
        return self.want.n_ctx or trained

    def _prepared(self, declaration: Declaration, rows: int) -> TowerProgram:
        return TowerProgram(self._backend.prepare(declaration.declared), rows, declaration.outputs)

    def _items(self) -> list[PlanItem]:
        items: list[PlanItem] = []
        for kind, (prepared, rows, _) in self.programs.items():
            own = f"{rows:,} {'tokens' if kind == 'text' else 'rows of a picture'} a run"
            kinds = (f"layers of the {kind} encoder",) * 2 + (f"embeddings, norms and heads of the {kind} encoder",)
            items += count.weights(prepared.residents.values(), self.place, "weights", kinds, kind)
            items += [PlanItem.sum(self.place, "arena", f"up to {own}", prepared.layout.busiest(), program=kind),
                      *count.transferred(prepared, self.place, "cpu", kind if kind in list(self.programs)[1:] else "step")]
            if kind == "image":
                items += count.pictures(prepared, "cpu", kind)
        return [*items, *count.overhead(self.bound.files, "cpu")]

    @cached_property
    def taken(self) -> int:
        """Bytes that are taken of the place."""
        return sum(i.nbytes for i in self.items if i.purpose != "mapped" and i.device == self.place)


def plan_towers(m: TowersLayout, held: tuple[tuple[str, int], ...]) -> MemoryPlan:
    """Make the plan of a layout. Raises: GraphError under $PYENGINE_STRICT for a step without a kernel."""
    notes: list[str] = []
    for program in m.programs.values():
        check_kernels(program.prepared, m.place)
        if program.prepared.fallbacks:
            notes.append(f"{m.place} has no kernel for {said(program.prepared.fallbacks)}: the NumPy reference computes them, slowly")
    rows = {kind: program.rows for kind, program in m.programs.items()}
    made = MemoryPlan(m.bound.files.name, m.n_ctx, rows.get("text", 0), "", tuple(i for i in m.items if i.nbytes), m.free,
                      picture=rows.get("image", 0), notes=tuple(dict.fromkeys(notes)), n_ctx_train=m.model.text.n_ctx if m.model.text else 0,
                      decoding=MAX_DECODING if "image" in rows else 0, held=held)
    rooms = tuple(Headroom(d.id, d.name, d.free, d.unified, 0, made.total - made.of("overhead") <= d.free) for d in m.machine.devices)
    return replace(made, rooms=rooms)


def shorter(want: Settings) -> Sequence[Settings]:
    """Return settings that take less, the nearest first."""
    texts = [replace(want, n_ctx=n, n_batch=min(want.n_batch, n)) for n in (512, 256, 128) if want.n_ctx is None or n < want.n_ctx]
    return [*(replace(want, n_batch=n) for n in (want.n_batch // 4,) if n), *texts]
