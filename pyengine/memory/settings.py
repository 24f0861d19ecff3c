"""What is asked of a plan, and what of that no model can have."""

from __future__ import annotations

import os
import re
from typing import Any

from pyengine.arguments import INT32_MAX, switch, whole
from pyengine.backends import CARDS, parsed
from pyengine.errors import RequestError, shown
from pyengine.programs.sizes import kv_dtypes, N_BATCH
from pyengine.records import dataclass
from pyengine.text.lookup import DRAFTED, most_drafted

MAX_THREADS = 1024                     # of a pool


@dataclass(frozen=True)
class Settings:
    """What is asked of a plan. n_ctx None: the training context, or what of it fits.

    device   "cpu"; a card, "cuda" or "cuda:1"; several of these, ["cuda:0", "cpu"], with bytes of each {"cuda:0": bytes, "cpu": None}
             (None: what is free): cards are filled first, the CPU takes the first layers where they are full; or parts of main memory
             that are kept apart: {"cpu:0": bytes, "cpu:1": bytes}. Layers are divided in proportion to the free memory of each of a
             kind; caches and the output head follow. "auto": the cards that there are if they can be used, else the CPU;
             $PYENGINE_DEVICE names another default, several with commas
    encoder_device  the device or part that holds the media encoder; None: the card, if it fits there beside the rest, or the first part
    expert_device   the one that holds the experts' weights and computes with them; layers go to the others. None: with their layer
    speculate  how many tokens are drafted at most: see `engine.speculation`
    mmap     weights are read where the file is mapped, instead of being packed into memory
    images   (width, height) of the largest picture, a number of such pictures that the image cache keeps, or (width, height,
             number); 0: no pictures at all; None: the processor's largest, or one that takes PICTURE_SHARE of the memory.
             Where layers attend across, a conversation holds that number of pictures; None: ACROSS_SHARE of the memory
    compress by which policy the cells of conversations are compressed (`cache/compression`), or its text; None: they are not
    """

    n_ctx: int | None = None
    n_batch: int = N_BATCH
    kv_dtype: str = "f16"
    n_seq: int = 1
    n_threads: int | None = None
    images: Any = None
    device: Any = "auto"
    encoder_device: str | None = None
    expert_device: str | None = None
    mmap: bool = False
    compress: Any = None
    speculate: Any = None

    @property
    def parts(self) -> dict[str, int | None] | None:
        """Bytes of each device or part of memory, where there are several, or limits."""
        return self.device if isinstance(self.device, dict) else None

    @property
    def pictures(self) -> bool:
        """Whether an encoder is wanted."""
        return self.largest_picture()[1] != 0

    def check(self) -> None:
        """Refuse what no model can have; numbers become ints. Raises: RequestError."""
        kv_dtypes(self.kv_dtype)
        for name in ("n_seq", "n_ctx", "n_batch", "n_threads"):
            value = getattr(self, name)
            if value is not None or name in ("n_seq", "n_batch"):
                object.__setattr__(self, name, whole(name, value, 1, MAX_THREADS if name == "n_threads" else INT32_MAX))
        if (self.n_ctx or 1) * self.n_seq > INT32_MAX:
            raise RequestError(f"n_ctx={self.n_ctx}, n_seq={self.n_seq}: together they must be at most {INT32_MAX} positions")
        object.__setattr__(self, "mmap", switch("mmap", self.mmap))
        most_drafted(self.speculate, DRAFTED)
        object.__setattr__(self, "device", _devices(self.device))
        if self.compress is not None:
            from pyengine.cache.compression.written import compression_of      # plans without load faster

            object.__setattr__(self, "compress", compression_of(self.compress))
        there = list(self.parts or [self.device])
        for name in ("encoder_device", "expert_device"):
            where = getattr(self, name)
            if where is None:
                continue
            object.__setattr__(self, name, where := _named(where) if isinstance(where, str) else where)
            beside = name == "encoder_device" and where == "cpu" and any(is_card(d) for d in there)
            if not isinstance(where, str) or where not in there and not beside or where == "cpu" and there == ["cpu"]:
                raise RequestError(f"{name}={shown(where)}: is none of {', '.join(d for d in there if d != 'auto') or 'cpu'}")
        self.largest_picture()

    def largest_picture(self) -> tuple[tuple[int, int] | None, int | None]:
        """Return (width and height, number of pictures), each None where it is not given."""
        asked = self.images
        if asked is None:
            return None, None
        numbers = (asked,) if isinstance(asked, int) else tuple(asked) if isinstance(asked, (tuple, list)) else ()
        ints = 1 <= len(numbers) <= 3 and all(isinstance(n, int) and not isinstance(n, bool) and n <= INT32_MAX for n in numbers)
        if not ints or min(numbers) < (len(numbers) > 1):                       # 0 is no size, but a number of pictures
            raise RequestError(f"images={shown(asked)}: give (width, height) of the largest picture, the number of pictures to keep, or "
                               "(width, height, number)")
        return (numbers[:2] if len(numbers) > 1 else None), (numbers[-1] if len(numbers) != 2 else None)


def is_card(device: str) -> bool:
    """Say whether a device has memory of its own: all but the CPU and its parts."""
    return device.partition(":")[0] != "cpu"


def _named(device: str) -> str:
    """Return a device under the name that plans have for it: "cuda:0" for "cuda"."""
    return f"{device}:0" if re.fullmatch(r"[a-z]+(-emulated)?", device) and device not in ("cpu", "auto") else device


def _devices(given: Any) -> str | dict[str, int | None]:
    """Return a device, or those that are given with their bytes. Raises: RequestError."""
    if given is None or isinstance(given, str) and given == "auto":
        given = os.environ.get("PYENGINE_DEVICE") or "auto"
        given = given.split(",") if "," in given else given
    if isinstance(given, str) and (given in ("auto", "cpu") or _card(given)):
        return _named(given)
    if isinstance(given, (list, tuple)) and given and all(isinstance(d, str) for d in given):
        given = dict.fromkeys(given)
    if not isinstance(given, dict) or not given:
        raise RequestError(f"device={shown(given)}: models run on 'cpu' ('auto' picks it), or on parts of it: {{'cpu:0': bytes, ..}}; "
                           "or on a card, 'cuda:0', or several, ['cuda:0', 'cpu']")
    found: dict[str, int | None] = {}
    for name, room in given.items():
        part = isinstance(name, str) and re.fullmatch(r"cpu:\d+", name) is not None
        if not part and not (isinstance(name, str) and (name == "cpu" or _card(name))) or not (
                room is None and not part or isinstance(room, int) and room is not True and 1 <= room < 1 << 63):
            raise RequestError(f"device: {shown(name)}: {shown(room)} is no part of main memory; give {{'cpu:0': bytes, 'cpu:1': bytes}}")
        found[_named(name)] = room
    if "cpu" in found and any(name.startswith("cpu:") for name in found) or any(map(is_card, found)) and any(n.startswith("cpu:") for n in found):
        raise RequestError(f"device={shown(given)}: parts of main memory are for themselves; beside cards there is 'cpu'")
    return next(iter(found)) if len(found) == 1 and not any(found.values()) else found


def _card(device: str) -> bool:
    """Say whether this names a device that an installation may have, besides the CPU."""
    found = parsed(device)
    return found is not None and found[0] in CARDS
