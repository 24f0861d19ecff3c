"""Convolutions of VGG16 and of DaViT beside PyTorch's, one thread each, in turns, on the same numbers; checked in float64.

PyTorch gets its own layout and channels last, and the faster one of the two counts in each round. The clock is time on the core, so that other
work on the machine counts little. What the core computes at most is measured before and after our turn in each round: on machines that are
shared it changes by a third within a minute.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from pyengine import Graph, ops
from pyengine.backends.cpu import isa
from pyengine.native import lib

from .kernels import CONVOLUTIONS
from .machine import version
from .stats import summary

LAYERS = (
    ("vgg 1.1", 224, 3, 64, 3, 1, 1, 1), ("vgg 2.1", 112, 64, 128, 3, 1, 1, 1), ("vgg 2.2", 112, 128, 128, 3, 1, 1, 1),
    ("vgg 3.1", 56, 128, 256, 3, 1, 1, 1), ("vgg 4.1", 28, 256, 512, 3, 1, 1, 1), ("vgg 4.2", 28, 512, 512, 3, 1, 1, 1),
    ("davit 1", 192, 128, 256, 3, 2, 1, 1), ("davit 3", 48, 512, 1024, 3, 2, 1, 1), ("davit depthwise 0", 192, 128, 128, 3, 1, 1, 128),
    ("davit depthwise 1", 96, 256, 256, 3, 1, 1, 256), ("davit depthwise 3", 24, 1024, 1024, 3, 1, 1, 1024), *CONVOLUTIONS,
)
LIMIT = 1e-5                                                                   # largest error, as a share of the largest result


def _seconds(work: Callable[[], Any]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def fp32_peak(rounds: int = 1 << 19) -> float:
    """Return what one thread computes at most, in operations a second on the core."""
    begin = time.process_time()
    done = lib.pe_limit_fp32(isa().encode(), rounds)
    return float(done / (time.process_time() - begin))


def measure(layer: tuple[Any, ...], rounds: int, torch: Any) -> dict[str, Any]:
    """Time one layer in turns; `torch` is the module, or None."""
    what, side, c, o, k, stride, padding, groups = layer
    rng = np.random.default_rng(0)
    x, bias = rng.standard_normal((1, side, side, c), np.float32), rng.standard_normal(o, np.float32)
    w = rng.standard_normal((o, k, k, c // groups), np.float32) / np.float32(k * (c // groups) ** 0.5)
    with Graph() as g:
        y = ops.conv2d(g.input("x", x.shape), w.reshape(o, -1), bias, kernel=(k,), stride=(stride,), padding=(padding,), groups=groups)
        program = g.compile(y, n_threads=1, strict=True)
    got = program.run(x=x)
    result: dict[str, Any] = {"name": f"conv2d {what} F32 {side}x{side}x{c} {k}x{k}/{stride} {o}", "unit": "operations/s",
                              "operations": program.prepared.operations}
    run: dict[str, Callable[[], Any]] = {"pyengine": program.execute}
    if torch is not None:
        pixels, weight, b = torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(w).permute(0, 3, 1, 2), torch.tensor(bias)
        conv = lambda p, f, b: torch.nn.functional.conv2d(p, f, b, stride, padding, 1, groups)  # noqa: E731
        want = conv(pixels.double(), weight.double(), b.double()).permute(0, 2, 3, 1).numpy()
        result["error"] = float(np.abs(got - want).max() / np.abs(want).max())
        result["correct"] = result["error"] <= LIMIT
        first, filters = pixels.contiguous(), weight.contiguous()
        last, lasts = pixels.contiguous(memory_format=torch.channels_last), weight.contiguous(memory_format=torch.channels_last)
        run |= {"torch": lambda: conv(first, filters, b), "torch, channels last": lambda: conv(last, lasts, b)}
    for work in run.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in run}
    peaks = []
    for _ in range(rounds):
        before = fp32_peak()
        for name, work in run.items():
            seconds[name].append(_seconds(work))
            peaks += [(before + fp32_peak()) / 2] if name == "pyengine" else []
    result |= summary([result["operations"] / s for s in seconds["pyengine"]]) | {"n_threads": 1}
    result["share of fp32 peak"] = float(np.median([result["operations"] / s / p for s, p in zip(seconds["pyengine"], peaks)]))
    if torch is not None:
        peers = np.minimum(seconds["torch"], seconds["torch, channels last"])
        result["over torch by time on the cores"] = float(np.median(peers / seconds["pyengine"]))
        result["torch ms"] = 1e3 * float(np.median(peers))
    return result


def run(rounds: int, beside: bool) -> dict[str, Any]:
    """Measure all layers; `beside`: PyTorch too."""
    torch = import_module("torch") if beside else None
    if torch is not None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
    peak, results = max(fp32_peak() for _ in range(9)), []
    for layer in LAYERS:
        r = measure(layer, rounds, torch)
        results.append(r)
        ratio = f", {r['over torch by time on the cores']:.2f} x PyTorch, error {r['error']:.1e}" if beside else ""
        print(f"{r['name']:48} {1e3 * r['operations'] / r['median']:8.2f} ms, {r['share of fp32 peak']:.0%} of the fp32 peak{ratio}")
    return {"suite": "convolutions", "torch": version("torch"), "fp32 peak": peak, "results": results}
