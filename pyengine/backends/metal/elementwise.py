"""Launches of csrc/metal/elementwise.metal."""

from __future__ import annotations

from pyengine.backends.metal.launch import elements, Launch, launches, spread, Step, View


def _stretched(view: View, shape: tuple[int, ...]) -> list[int]:
    """Return strides in elements along six axes of the result, 0 where the argument is stretched."""
    strides = [0 if n == 1 else s for n, s in zip(view.shape, elements(view))]
    return [0] * (6 - len(strides)) + strides


@launches
def binary(s: Step) -> list[Launch]:
    """Launch one thread an element of the result."""
    x, y, out = s.need("x"), s.need("y"), s.outputs[0]
    if out.size == 0:
        return []
    grid, threads = spread(out.size)
    args = {"n": out.size, "shape": [1] * (6 - len(out.shape)) + list(out.shape), "x_stride": _stretched(x, out.shape),
            "y_stride": _stretched(y, out.shape)}
    return [Launch("combine_elements", args, {"x": x, "y": y, "out": out}, grid, threads, constants={"KIND": s.params.kind})]


def _each(kernel: str, s: Step, **args: float) -> list[Launch]:
    x, out = s.need("x"), s.outputs[0]
    if x.size == 0:
        return []
    grid, threads = spread(x.size, 4)
    constants = {"KIND": s.params.kind} if hasattr(s.params, "kind") else {}
    return [Launch(kernel, {"n": x.size, **args}, {"x": x, "out": out}, grid, threads, constants=constants)]


@launches
def unary(s: Step) -> list[Launch]:
    """Launch a thread for four elements."""
    return _each("apply_activation", s)


@launches
def scale(s: Step) -> list[Launch]:
    """Launch a thread for four elements."""
    return _each("scale_elements", s, factor=s.params.factor, offset=s.params.offset)


@launches
def softcap(s: Step) -> list[Launch]:
    """Launch a thread for four elements."""
    return _each("cap_elements", s, cap=s.params.cap)
