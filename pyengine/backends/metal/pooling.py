"""Launches of csrc/metal/pooling.metal: one thread a number of the result."""

from __future__ import annotations

from typing import Any

from pyengine.backends.metal.launch import Launch, launches, spread, Step


def _each(kernel: str, s: Step, args: dict[str, Any], **constants: bool) -> list[Launch]:
    x, out = s.need("x"), s.outputs[0]
    if out.size == 0:
        return []
    (_, h, w, c), (_, rows, columns, _) = x.shape, out.shape
    grid, threads = spread(out.size)
    return [Launch(kernel, dict(n=out.size, h=h, w=w, c=c, rows=rows, columns=columns, **args), {"x": x, "out": out}, grid, threads,
                   constants=constants)]


@launches
def pool2d(s: Step) -> list[Launch]:
    """Launch windows that are strided."""
    p = s.params
    (kh, kw), (sy, sx) = ((n[0], n[-1]) for n in (p.kernel, p.stride))
    top, bottom, left, right = p.padding if len(p.padding) == 4 else (p.padding[0], p.padding[0], p.padding[-1], p.padding[-1])
    args = dict(kh=kh, kw=kw, sy=sy, sx=sx, top=top, bottom=bottom, left=left, right=right, count_padding=int(p.count_padding))
    return _each("pool_windows", s, args, MEAN=p.kind == 1)


@launches
def adaptive_pool2d(s: Step) -> list[Launch]:
    """Launch windows that divide the picture."""
    none = dict.fromkeys(("kh", "kw", "sy", "sx", "top", "bottom", "left", "right", "count_padding"), 0)
    return _each("pool_windows", s, none, MEAN=s.params.kind == 1, EVEN=True)


@launches
def resize2d(s: Step) -> list[Launch]:
    """Launch pixels of the result."""
    p = s.params
    return _each("resize_pixels", s, dict(kind=p.kind, corners=int(p.align_corners), antialias=int(p.antialias)))
