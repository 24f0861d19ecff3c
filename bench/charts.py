"""PNG charts of result files: the roofline of kernels, bars of ratios and of shares. Needs matplotlib (extra "bench")."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend is chosen first
import numpy as np  # noqa: E402

COLOURS = {"linear": "tab:blue", "attention": "tab:orange", "matmul": "tab:green"}
SMALL = 64 << 10                                                               # bytes


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what fits a suite's result; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"kernels": lambda: [(f"roofline-{bound['isa']}", roofline(result, bound)) for bound in result["limits"]],
               "models": lambda: [("shares", bars(result, "share of the limit", 1.0))],
               "peers": lambda: [("ratios", bars(result, "pyengine / other engine", 1.0))],
               "vision": lambda: [("vision", bars(result, "share of the peaks; ratios of speeds", 1.0))],
               "cache": lambda: [("cache", kept(result))],
               "quality": lambda: [("quality", bars(result, "share of right answers; overlap of boxes", 1.0))]}
    paths = []
    for name, figure in figures[result["suite"]]():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths


def roofline(result: Mapping[str, Any], bound: Mapping[str, Any]) -> Any:
    """Draw operations/s over operations/byte of kernels that declare operations, below the limits measured in the same run.

    Jobs of less than SMALL bytes are left out: they measure how fast threads meet.
    """
    figure, axes = plt.subplots(figsize=(10, 6.5), layout="constrained")
    points = [r for r in result["results"] if r["isa"] == bound["isa"] and r["operations"] and r["bytes"] >= SMALL]
    x = np.array([r["operations"] / r["bytes"] for r in points] or [1.0])
    span = np.array([min(0.1, x.min() / 2), x.max() * 3])
    grid = np.geomspace(*span, 200)
    for kind, style in (("int8", "-"), ("fp32", "--")):
        axes.plot(grid, np.minimum(grid * bound["read"], bound[kind]) / 1e9, style, color="black", lw=1.2,
                  label=f"memory {bound['read'] / 1e9:.0f} GB/s, {kind} {bound[kind] / 1e9:.0f} GOP/s")
    seen = set()
    for r in sorted(points, key=lambda r: (r["op"], r["cache"])):              # the legend's order
        kind, cold = r["op"] if r["op"] in COLOURS else "other", r["cache"] == "cold"
        label = f"{kind}, {'cold' if cold else 'hot'}"
        axes.plot(r["operations"] / r["bytes"], r["gops"], "o" if cold else "^", ms=5, alpha=0.75,
                  color=COLOURS.get(kind, "tab:gray"), mfc=None if cold else "none", label=None if label in seen else label)
        seen.add(label)
    axes.set(xscale="log", yscale="log", xlabel="operations / byte", ylabel="GOP/s",
             title=f"{result['machine']['cpu']}, {bound['isa']}, {bound['n_threads']} threads")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    return figure


def bars(result: Mapping[str, Any], label: str, line: float) -> Any:
    """Draw the score of each result, its spread as a whisker, and a line at `line`."""
    rows = result["results"][::-1]
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.36 * len(rows)), layout="constrained")
    values = np.array([r["score"]["median"] for r in rows])
    spans = np.array([r.get("interval") or np.percentile(r["score"]["samples"], [25, 75]) for r in rows])
    low, high = np.abs(spans.T - values)
    colours = ["tab:green" if v >= line else "tab:orange" for v in values]
    names = [r["name"].replace(".gguf", "") for r in rows]
    drawn = axes.barh(names, values, xerr=[low, high], color=colours, height=0.7, capsize=3)
    axes.bar_label(drawn, [f"{v:.2f}" for v in values], padding=6, fontsize=9)
    axes.axvline(line, color="black", lw=1)
    what = "intervals of 95%" if "interval" in rows[0] else "medians of interleaved rounds"
    axes.set(xlabel=label, xlim=(0, max(line, float((values + high).max())) * 1.12),
             title=f"{result['machine']['cpu']}, {result['machine']['threads']} threads, {what}")
    axes.grid(True, axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure


def kept(result: Mapping[str, Any]) -> Any:
    """Draw right answers over the bytes of the cache, a line for each policy, and the full cache as a band."""
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    full = next(r for r in result["results"] if r["ratio"] == 1)
    axes.axhspan(*full["interval"], color="black", alpha=0.1)
    axes.axhline(full["score"]["median"], color="black", lw=1, label="full cache")
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for r in result["results"]:
        if r["ratio"] < 1:
            lines.setdefault(r["policy"], []).append(r)
    for i, (name, rows) in enumerate(lines.items()):
        rows.sort(key=lambda r: r["bytes"])
        y = np.array([r["score"]["median"] for r in rows])
        low, high = np.abs(np.array([r["interval"] for r in rows]).T - y)
        axes.errorbar([r["bytes"] / 1024 for r in rows], y, yerr=[low, high], marker=".", capsize=2, lw=1.2, label=name,
                      ls="-" if i < 10 else "--")            # there are ten colours
    axes.set(xscale="log", xlabel="KiB of the cache", ylabel="share of right answers", ylim=(0, 1.02),
             title=f"{result['file']}, cache {result['kv']}, pictures of {result['tokens']} tokens; intervals of 95%")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    return figure
