"""What is asked of a plan, and what of that no model can have."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pyengine.arguments import INT32_MAX, whole
from pyengine.errors import RequestError, shown
from pyengine.programs.sizes import kv_dtypes, N_BATCH

MAX_THREADS = 1024                     # of a pool


@dataclass(frozen=True)
class Settings:
    """What is asked of a plan. n_ctx None: the training context, or what of it fits.

    device   "cpu", or parts of main memory that are kept apart: {"cpu:0": bytes, "cpu:1": bytes}; layers are divided in proportion
             to the free memory of each; caches and the output head follow
    encoder_device  the part that holds the media encoder; None: the first
    expert_device   the part that holds the experts' weights and computes with them; layers go to the others. None: with their layer
    mmap     weights are read where the file is mapped, instead of being packed into memory
    images   (width, height) of the largest picture, a number of such pictures that the image cache keeps, or (width, height,
             number); 0: no pictures at all; None: the processor's largest, or one that takes PICTURE_SHARE of the memory.
             Where layers attend across, a conversation holds that number of pictures; None: ACROSS_SHARE of the memory
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

    @property
    def parts(self) -> dict[str, int] | None:
        """Bytes of each part of memory, where there are several."""
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
        for name, free in (self.parts or {}).items():
            if not isinstance(name, str) or not re.fullmatch(r"cpu:\d+", name) or not isinstance(free, int) or not 1 <= free < 1 << 63 or free is True:
                raise RequestError(f"device: {shown(name)}: {shown(free)} is no part of main memory; give {{'cpu:0': bytes, 'cpu:1': bytes}}")
        if not self.parts and (not isinstance(self.device, str) or self.device not in ("auto", "cpu")):
            raise RequestError(f"device={shown(self.device)}: models run on 'cpu' ('auto' picks it), or on parts of it: {{'cpu:0': bytes, ..}}")
        for name in ("encoder_device", "expert_device"):
            where = getattr(self, name)
            if where is not None and (not isinstance(where, str) or where not in (self.parts or {})):
                raise RequestError(f"{name}={shown(where)}: is none of {', '.join(self.parts or ['cpu'])}")
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
