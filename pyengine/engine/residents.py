"""Several models in one process: loaded when they are asked for by name, unloaded by plan.

    with residents.using("smollm2") as model: ...            loaded if it is not; stays at least until the block ends
    residents.lease("smollm2")                               the same as a future, for those who may not wait

One thread loads, one model at a time; requests for loaded models do not wait for it. Where the plan of a new model does not fit, models go
that nobody uses, the one used longest ago first, and no more of them than must. One that is working goes when its requests have ended; those
that come for it meanwhile wait behind the new one, so that none waits for ever. A model that is kept for ever only goes when it is told to.

The context is the one that the plan gives to the model when all go that may: it does not depend on what happens to be loaded.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pyengine import hardware
from pyengine.engine.load import Candidate, fill
from pyengine.engine.model import Model
from pyengine.errors import PlanError, RequestError, shown
from pyengine.hardware.facts import Hardware
from pyengine.memory import held
from pyengine.memory.fit import Fitted
from pyengine.memory.held import Held

KEEP_ALIVE = 300.0                   # seconds, as Ollama's default (its FAQ, "How do I keep a model loaded in memory")
FOR_EVER = math.inf
IDLE_SECONDS = 2.0                   # the thread ends after so long without anything to load or to wait for
MOST_WAIT = 3600.0                   # seconds at once
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = r"(\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h)"
_TIME = re.compile(rf"([+-]?)(?:(\d+)|((?:{_PART})+))", re.ASCII)


def keep_alive_of(value: Any) -> float:
    """Return seconds of a time in one of Ollama's forms: 300, "300", "5m", "1h30m"; what is below 0 is for ever. Raises: RequestError."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value):
        return FOR_EVER if value < 0 or value > 1e15 else float(value)
    found = _TIME.fullmatch(value.strip()) if isinstance(value, str) and len(value) < 64 else None
    if found is None:
        raise RequestError(f"keep_alive: must be seconds, or a time as \"5m\" or \"1h30m\"; -1 is for ever, 0 at once; got {shown(value)}")
    sign, whole, parts = found[1], found[2], found[3]
    return FOR_EVER if sign == "-" else float(whole) if whole else sum(float(n) * _UNITS[unit] for n, unit in re.findall(_PART, parts, re.ASCII))


class Residency(NamedTuple):
    """A model that is in memory. keep: seconds that it stays after a use; expires: those that are left; both inf for ever."""

    name: str
    model: Model
    loaded: float                    # seconds since 1970
    users: int
    keep: float
    expires: float


@dataclass(eq=False)
class _Resident:
    """See `Residency`. used: the clock at the end of the last use; leaving: nobody gets it any more, and it goes when its users have gone."""

    name: str
    model: Model
    loaded: float
    keep: float
    used: float
    users: int = 0
    leaving: bool = False
    closing: bool = False            # somebody closes it

    @property
    def due(self) -> float:
        return self.used + self.keep


class Lease:
    """A model's stay in memory for somebody who uses it, until `release`, the end of a `with`, or nobody holds the lease any more.

    waited: seconds that it took until the model was there; next to none where it was loaded already
    """

    def __init__(self, residents: Residents, resident: _Resident, waited: float):
        self.name, self.model, self.waited = resident.name, resident.model, waited
        self._residents, self._resident, self._held = residents, resident, True

    def release(self) -> None:
        """End the stay; may be called again."""
        if self._held:
            self._held = False
            self._residents._release(self._resident)

    def __enter__(self) -> Model:
        return self.model

    def __exit__(self, *exc: object) -> None:
        self.release()

    def __del__(self) -> None:
        if getattr(self, "_held", False):
            self.release()


@dataclass(eq=False)
class _Wish:
    """Somebody who waits for a model."""

    name: str
    keep: float | None
    began: float
    future: Future[Lease] = field(default_factory=Future)


class Residents:
    """The models of this process by name. May be used by several threads.

    open        opens a model by its name, before anything of it is loaded; its errors are those of `lease`
    keep_alive  seconds that a model stays after its last use, unless a request says otherwise
    clock       seconds, for tests
    """

    def __init__(self, open: Callable[[str], Candidate], keep_alive: float = KEEP_ALIVE, clock: Callable[[], float] = time.monotonic):
        self.keep_alive = keep_alive
        self._open, self._clock = open, clock
        self._state = threading.Condition(threading.RLock())        # a lease that is collected may be released by the thread that holds it
        self._there: dict[str, _Resident] = {}
        self._wishes: deque[_Wish] = deque()
        self._thread: threading.Thread | None = None
        self._closed = False

    # -- asking -------------------------------------------------------------------------------------------------------

    def lease(self, name: str, keep: float | None = None) -> Future[Lease]:
        """Ask for a model; the future is done at once where it is loaded. keep: seconds that it stays afterwards; None: as before.

        The future raises: PlanError for one that does not fit, with its plan, and what would have to go; RequestError once closed; what
        opening and loading raise. Cancelling it takes the wish back.
        """
        wish = _Wish(name, keep, self._clock())
        with self._state:
            if self._closed:
                raise RequestError("the models are closed")
            if not self._give(wish):
                self._wishes.append(wish)
                self._wake()
        return wish.future

    def lease_now(self, name: str, keep: float | None = None) -> Lease | None:
        """Return a model as `lease` does if it is loaded, else None. Raises: RequestError once closed."""
        began = self._clock()
        with self._state:
            if self._closed:
                raise RequestError("the models are closed")
            resident = self._present(name)
            return None if resident is None else self._let(resident, keep, began)

    @contextmanager
    def using(self, name: str, keep: float | None = None) -> Iterator[Model]:
        """Use a model within a block, loaded if it is not. Raises as `lease`'s future."""
        with self.lease(name, keep).result() as model:
            yield model

    def adopt(self, name: str, model: Model, keep: float = FOR_EVER) -> None:
        """Take over a model that is loaded already: from now on it goes when its time is up, and is closed with the others."""
        with self._state:
            self._there[name] = _Resident(name, model, time.time(), keep, self._clock())
            self._wake()

    def stop(self, name: str) -> bool:
        """Let a model go: at once where nobody uses it, or else when its requests have ended. False if it is not loaded."""
        with self._state:
            found = self._there.get(name)
            if found is None:
                return False
            found.leaving = True
            if found.users:
                self._wake()
                return True
        self._unload(found)
        return True

    def ps(self) -> list[Residency]:
        """Return the models that are in memory, the one used last first."""
        with self._state:
            there, now = list(self._there.values()), self._clock()
        there.sort(key=lambda r: (r.users > 0, r.used), reverse=True)
        return [Residency(r.name, r.model, r.loaded, r.users, r.keep, r.keep if r.users else max(0.0, r.due - now)) for r in there]

    def close(self) -> None:
        """Close all models, whoever uses them, and take no more wishes."""
        with self._state:
            self._closed = True
            wishes, self._wishes = list(self._wishes), deque()
            self._state.notify_all()
            thread = self._thread
        for wish in wishes:
            if wish.future.set_running_or_notify_cancel():
                wish.future.set_exception(RequestError("the models are closed"))
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._state:
            there, self._there = list(self._there.values()), {}
        for resident in there:
            resident.model.close()

    def __enter__(self) -> Residents:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- giving -------------------------------------------------------------------------------------------------------

    def _give(self, wish: _Wish) -> bool:
        """Hand out a model that is there, or say that it has to be loaded; the caller holds `_state`."""
        resident = self._present(wish.name)
        if resident is None:
            return False
        if wish.future.set_running_or_notify_cancel():
            wish.future.set_result(self._let(resident, wish.keep, wish.began))
        return True

    def _present(self, name: str) -> _Resident | None:
        """Return a model that is loaded and stays; the caller holds `_state`."""
        resident = self._there.get(name)
        return None if resident is None or resident.leaving else resident

    def _let(self, resident: _Resident, keep: float | None, began: float) -> Lease:
        """Count one more user, who has waited since `began`; the caller holds `_state`."""
        resident.users += 1
        resident.used = self._clock()
        if keep is not None:
            resident.keep = keep
        return Lease(self, resident, resident.used - began)

    def _release(self, resident: _Resident) -> None:
        with self._state:
            resident.users -= 1
            resident.used = self._clock()
            if not resident.users and (self._wishes or resident.leaving or resident.keep < FOR_EVER):     # else nobody waits for this
                self._wake()

    def _wake(self) -> None:
        """Let the thread look at what there is to do; it begins where there is none. The caller holds `_state`."""
        if self._closed:
            return
        if (self._thread is None or not self._thread.is_alive()) and (self._wishes or self._left() < FOR_EVER):         # also in a child of fork
            self._thread = threading.Thread(target=self._work, name="pyengine residents", daemon=True)
            self._thread.start()
        self._state.notify_all()

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        """Load what is wished for, one model after the other, and unload what is due, until there is nothing of both."""
        while True:
            self.expire()
            with self._state:
                if self._closed:
                    return
                left = 0.0 if self._wishes else self._left()
                if left > 0 and not self._state.wait(IDLE_SECONDS if left == FOR_EVER else min(left, MOST_WAIT)) and left == FOR_EVER:
                    if not self._wishes and self._left() == FOR_EVER:
                        self._thread = None
                        return
                if not self._wishes:
                    continue
                wish = self._wishes[0]
                if wish.future.cancelled() or self._give(wish):
                    self._wishes.popleft()
                    continue
            self._fulfil(wish.name)

    def _left(self) -> float:
        """Return the seconds until a model has to go; those that are used are told of when they are not. The caller holds `_state`."""
        idle = [r for r in self._there.values() if not r.users and not r.closing]
        return min((0.0 if r.leaving else max(0.0, r.due - self._clock()) for r in idle), default=FOR_EVER)

    def _fulfil(self, name: str) -> None:
        """Load a model and give it to all who wait for it, or tell them why not."""
        try:
            resident = self._load(name)
        except Exception as error:
            with self._state:
                failed = [w for w in self._wishes if w.name == name]
                self._wishes = deque(w for w in self._wishes if w.name != name)
            for wish in failed:
                if wish.future.set_running_or_notify_cancel():
                    wish.future.set_exception(error)
            return
        with self._state:
            self._there[name] = resident
            self._wishes = deque(w for w in self._wishes if w.name != name or not self._give(w))
            resident.used = self._clock()

    def expire(self) -> None:
        """Close the models whose time is up and that nobody uses."""
        while True:
            with self._state:
                now = self._clock()
                due = next((r for r in self._there.values() if not r.users and not r.closing and (r.leaving or r.due <= now)), None)
                if due is None:
                    return
                due.leaving = due.closing = True
            self._remove(due)

    def _unload(self, resident: _Resident) -> None:
        """Let a model go once its requests have ended, and wait for that."""
        with self._state:
            resident.leaving = True
            while not self._closed and (resident.users or resident.closing) and self._there.get(resident.name) is resident:
                self._state.wait()
            if self._closed or self._there.get(resident.name) is not resident:
                return
            resident.closing = True
        self._remove(resident)

    def _remove(self, resident: _Resident) -> None:
        """Close a model that nobody uses any more; the caller has marked it so."""
        try:
            resident.model.close()
        finally:
            with self._state:
                if self._there.get(resident.name) is resident:
                    del self._there[resident.name]
                self._state.notify_all()

    def _load(self, name: str) -> _Resident:
        """Load a model; others go where it does not fit beside them."""
        with self._state:
            before = self._there.get(name)                   # it is leaving
        if before is not None:
            self._unload(before)
        candidate = self._open(name)
        with ExitStack() as until_loaded:
            while True:
                with held.deciding:
                    fitted, going = self._decide(candidate)
                    if not going:
                        until_loaded.enter_context(held.promised(fitted.plan))
                        break
                for resident in going:
                    self._unload(resident)
                if self._closed:
                    raise RequestError("the models are closed")
            return _Resident(name, fill(fitted), time.time(), self.keep_alive, self._clock())

    def _decide(self, candidate: Candidate) -> tuple[Fitted, list[_Resident]]:
        """Plan a model, and choose who goes before it is loaded: they are leaving from now on.

        Raises: PlanError for one that does not fit though all go that may.
        """
        with self._state:
            there = list(self._there.values())
        may_go = sorted((r for r in there if r.keep < FOR_EVER or r.leaving), key=lambda r: (r.users > 0, r.used))
        holdings, machine = _Holdings(there), hardware.detect()
        best = candidate.fit(machine, holdings.without(may_go))
        if not best.plan.fits:
            stay = sorted((r for r in there if r not in may_go), key=lambda r: r.used)
            raise self._refusal(candidate, best, machine, holdings, may_go, stay)
        for n in range(len(may_go)):
            fitted = candidate.fit(machine, holdings.without(may_go[:n]))
            if fitted.plan.fits and fitted.plan.n_ctx == best.plan.n_ctx:
                best, may_go = fitted, may_go[:n]
                break
        with self._state:
            for resident in may_go:
                resident.leaving = True
        return best, may_go

    @staticmethod
    def _refusal(candidate: Candidate, refused: Fitted, machine: Hardware, holdings: _Holdings, may_go: list[_Resident],
                 stay: list[_Resident]) -> PlanError:
        """Make the error for a model that does not fit: by itself, or beside those that stay, with what would have to go."""
        for n in range(1, len(stay) + 1):
            if candidate.fit(machine, holdings.without([*may_go, *stay[:n]])).plan.fits:
                names = ", ".join(f"{r.name!r}" for r in stay[:n])
                return PlanError(f"{refused.plan.table()}\nwhat would have to go is kept for ever: {names}; stop it first "
                                 "(`pyengine-run stop`, or keep_alive 0)", refused.plan)
        return candidate.refusal(refused, holdings.without(may_go))


class _Holdings:
    """What the residents hold at one moment, and what else of this process does."""

    def __init__(self, residents: Sequence[_Resident]):
        self._others = held.held(without=[r.model for r in residents])
        self._own = [(r, found) for r in residents if (found := r.model.held()) is not None]

    def without(self, going: Sequence[_Resident]) -> list[Held]:
        """Return all that is held, where some go before."""
        return [*self._others, *(h.gone() if r in going else h for r, h in self._own)]
