"""Whole image encoders of true size by the models' own graphs: speed beside other engines, memory beside the plan, two turns.

Weights are random and the same for all engines (bench/checkpoints.py). Each engine is a process of its own; in every round the
limits and each engine are measured once, in an order that turns around from round to round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from . import checkpoints, limits
from .checkpoints import ENCODERS, Encoder
from .engines import LLAMA, OURS, Process
from .stats import summary

FORMATS = ("F32", "F16", "BF16", "Q8_0")
# Relative RMS of the rows against transformers in float32 on the unrounded weights. Roundings add up over layers; anything that
# is computed wrongly gives about 1.
TOLERANCE = {"F32": 1e-4, "F16": 1e-2, "BF16": 1e-1, "Q8_0": 1e-1}
TORCH = {"torch": "F32", "torch-bf16": "BF16"}                                 # peer -> format
MIB = 1 << 20


def run(names: Sequence[str], n_threads: int, layers: int | None, rounds: int, peers: Sequence[str], formats: Sequence[str],
        measure: Sequence[str], text_layers: int | None, files: Path | None,
        known: Mapping[str, Encoder] = ENCODERS) -> dict[str, Any]:
    """Measure `speed`, `memory` and `turns` of encoders by name. `layers`: fewer than all, to save time; `files`: kept there."""
    found: dict[str, Any] = {"suite": "vision", "results": [], "limits": [], "encoders": {}}
    with _folder(files) as base:
        for name in names:
            e = known[name]
            n = layers or e.depth
            if n % e.period or n > e.depth:
                raise SystemExit(f"bench: {name} has {e.depth} layers with a period of {e.period}: --layers must be a multiple")
            facts = found["encoders"][name] = {"layers": n, "of": e.depth, "size": e.size}
            if {"speed", "memory"} & set(measure):
                folder = _write(base / f"{name}-{n}", e, n, formats, 0)
            if "speed" in measure:
                speed = facts["speed"] = speeds(name, e, n, folder, n_threads, rounds, peers, formats)
                found["results"] += speed.pop("results")
                found["limits"].append(speed["limits"])
            if "memory" in measure:
                facts["memory"] = [memory(name, e, folder, f, n_threads) for f in formats]
                found["results"] += facts["memory"]
            if "turns" in measure:
                depth = text_layers or int(e.text["num_hidden_layers"])
                folder = _write(base / f"{name}-{n}-text{depth}", e, n, formats[-1:], depth)
                found["results"].append(turns(name, e, folder, formats[-1], depth, n_threads, rounds))
    return found


@contextmanager
def _folder(files: Path | None) -> Iterator[Path]:
    if files is not None:
        yield files.resolve()
        return
    with TemporaryDirectory(prefix="pyengine-encoders-") as made:
        yield Path(made)


def _write(folder: Path, e: Encoder, layers: int, formats: Sequence[str], text_layers: int) -> Path:
    checkpoints.write(e, folder, layers, tuple(formats), text_layers)
    np.save(folder / "picture.npy", checkpoints.picture(e))
    return folder


def start(engine: str, e: Encoder, folder: Path, format_name: str, n_threads: int) -> Process:
    """A worker with one engine and one of the folder's files."""
    picture = folder / "picture.npy"
    return Process(engine, "encoder_worker", engine, folder, format_name, picture, "-t", n_threads, "--ctx", e.n_ctx)


# ---- speed ----------------------------------------------------------------------------------------------------------------


def speeds(name: str, e: Encoder, layers: int, folder: Path, n_threads: int, rounds: int, peers: Sequence[str],
           formats: Sequence[str]) -> dict[str, Any]:
    """Interleaved encodings by all engines; the first of each, which is not timed, is compared with transformers in float32."""
    jobs = [(OURS, f) for f in formats] + [(LLAMA, f) for f in formats if LLAMA in peers]
    jobs += [("torch", f) for peer, f in TORCH.items() if peer in peers or peer == "torch"]
    with ExitStack() as stack:
        running = {job: stack.enter_context(start(job[0], e, folder, job[1], n_threads)) for job in jobs}
        rows = {}
        for job, process in running.items():
            process.call("encode", file=str(folder / "rows.npy"))
            rows[job] = np.load(folder / "rows.npy")
        want = rows["torch", "F32"]
        errors = {job: relative_rms(got, want) for job, got in rows.items()}
        if "torch" not in peers:
            running.pop(("torch", "F32")).__exit__(None, None, None)
        operations = {f: running[OURS, f].ready["operations"] for f in formats}
        isa = running[OURS, formats[0]].ready["isa"]
        for f in formats:
            running[OURS, f].call("profile", on=True)
        bounds: dict[str, list[float]] = {"int8": [], "fp32": []}
        samples: dict[tuple[str, str], dict[str, list[float]]] = {job: {"seconds": [], "cpu": []} for job in running}
        for r in range(rounds):
            for kind, values in bounds.items():
                values.append(limits.peak(kind, isa, n_threads, repeat=5))
            for job in list(running)[:: 1 if r % 2 == 0 else -1]:
                for kind, value in running[job].call("encode").items():
                    samples[job][kind].append(value)
        steps = {f: running[OURS, f].call("steps") for f in formats}
    best = {kind: max(values) for kind, values in bounds.items()}              # nothing is faster than a limit
    results = _judged(name, e, layers, samples, operations, best, errors, steps, n_threads)
    tables = {f: _table(s, rounds) for f, s in steps.items()}
    _print(name, e, layers, n_threads, rounds, isa, best, results, tables, operations)
    return {"results": results, "limits": {"isa": isa, "n_threads": n_threads, **best}, "operations": operations, "steps": tables,
            "samples": {f"{engine} {f}": s for (engine, f), s in samples.items()}}


def relative_rms(got: np.ndarray, want: np.ndarray) -> float:
    """Root of squared error / squared result."""
    return float(np.sqrt(np.sum(np.square(got - want, dtype=np.float64)) / np.sum(np.square(want, dtype=np.float64))))


def ideal_seconds(operations: Mapping[str, float], int8: float, fp32: float) -> float:
    """Time at the machine's peaks: products of bytes at int8's, everything else at fp32's."""
    return (operations["int8"] + operations["attention_int8"]) / int8 + (operations["float"] + operations["attention"]) / fp32


def _judged(name: str, e: Encoder, layers: int, samples: Mapping[tuple[str, str], Mapping[str, list[float]]],
            operations: Mapping[str, Mapping[str, float]], best: Mapping[str, float], errors: Mapping[tuple[str, str], float],
            steps: Mapping[str, Sequence[Any]], n_threads: int) -> list[dict[str, Any]]:
    """Each engine's share of the limits, then ratios of ours to the others round by round, by wall time and by time on CPUs."""
    out: list[dict[str, Any]] = []
    exact = next(iter(operations.values()))
    floats = {"int8": 0.0, "float": exact["int8"] + exact["float"], "attention": exact["attention"] + exact["attention_int8"],
              "attention_int8": 0.0}
    for (engine, f), s in samples.items():
        ideal = ideal_seconds(floats if engine == "torch" else operations[f], **best)
        result = {"name": f"{name} {engine} {f} share of the peaks", "score": summary([ideal / v for v in s["seconds"]]),
                  "seconds": summary(s["seconds"]), "cpu_share": ideal * n_threads / float(np.median(s["cpu"])),
                  "relative_rms": errors[engine, f]}
        if engine == OURS:                                                     # others are reported, not judged
            once = sum(seconds for _, inside, seconds in steps[f] if not inside) / len(s["seconds"])
            result["picture_seconds"] = once + (result["seconds"]["median"] - once) * e.depth / layers
            result["correct"] = errors[engine, f] <= TOLERANCE[f]
        out.append(result)
    for (engine, f), ours in samples.items():
        for (other, g), theirs in samples.items() if engine == OURS else ():
            if other == "torch" or (other == LLAMA and g == f):
                ratios = {kind: [b / a for a, b in zip(ours[kind], theirs[kind])] for kind in ours}
                out.append({"name": f"{name} {f} / {other}{' ' + g if other == 'torch' else ''}",
                            "score": summary(ratios["seconds"]), "cpu_ratio": summary(ratios["cpu"])})
    return out


def _table(steps: Sequence[Any], rounds: int) -> dict[str, float]:
    """Seconds of an encoding by kind of step; those outside the layers as `once ...`."""
    table: dict[str, float] = {}
    for label, inside, seconds in steps:
        key = label if inside else f"once {label}"
        table[key] = table.get(key, 0.0) + seconds / rounds
    return table


def _print(name: str, e: Encoder, layers: int, n_threads: int, rounds: int, isa: str, best: Mapping[str, float],
           results: Sequence[Mapping[str, Any]], tables: Mapping[str, Mapping[str, float]],
           operations: Mapping[str, Mapping[str, float]]) -> None:
    scaled = f"; 's a picture' is scaled to {e.depth}" if layers < e.depth else ""
    print(f"\n{name}, {e.size[0]} x {e.size[1]}: {layers} of {e.depth} layers{scaled}; {isa}, {n_threads} threads, "
          f"{rounds} rounds: int8 {best['int8'] / 1e9:.0f} GOP/s, fp32 {best['fp32'] / 1e9:.0f} GOP/s\n"
          f"{'':20}{'share':>14} {'of CPU time':>12} {'s a run':>9} {'s a picture':>12}  relative RMS")
    for r in results:
        score, label = r["score"], r["name"].removeprefix(name + " ").removesuffix(" share of the peaks")
        if "seconds" in r:
            picture = f"{r['picture_seconds']:12.2f}" if "picture_seconds" in r else " " * 12
            print(f"{label:20}{score['median']:7.1%} +-{score['spread']:4.1%} {r['cpu_share']:12.1%} {r['seconds']['median']:9.2f} "
                  f"{picture}  {r['relative_rms']:.1e}" + ("" if r.get("correct", True) else "  WRONG"))
        else:
            print(f"{label:20}{score['median']:6.2f} x +-{score['spread']:4.1%}   on CPUs {r['cpu_ratio']['median']:5.2f} x")
    for f, work in operations.items():
        print(f"{f}: GFLOP " + ", ".join(f"{kind} {n / 1e9:.0f}" for kind, n in work.items()))
    print(f"{'ms of a run':40}" + "".join(f"{f:>10}" for f in tables))
    for step in dict.fromkeys(k for t in tables.values() for k in t):
        print(f"{step:40}" + "".join(f"{t.get(step, 0.0) * 1e3:10.1f}" for t in tables.values()))


# ---- memory ---------------------------------------------------------------------------------------------------------------


def memory(name: str, e: Encoder, folder: Path, format_name: str, n_threads: int) -> dict[str, Any]:
    """What a first and a second picture add to a loaded model's own memory, at its peak, beside the plan's items for them.

    Planned: all items for pictures, but of the image cache, which is a bound, the rows that it holds. `score` is planned / found.
    """
    with start("whole", e, folder, format_name, n_threads) as process:
        plan, found = process.ready["plan"], process.call("memory")
    planned: dict[str, int] = {}
    for i in plan:                                                             # layers have an item each
        if i["purpose"] == "encoder" or (i["purpose"] == "images" and not i["detail"].endswith("at most")):
            planned[i["detail"]] = planned.get(i["detail"], 0) + i["nbytes"]
    before, grown = found["before"]["anon"], {}
    for i, part in enumerate(("first", "second"), 1):
        grown[part] = (found[part]["peak"]["anon"] - before) / (sum(planned.values()) + i * found[part]["rows"])
    print(f"\n{name} {format_name}: planned " + ", ".join(f"{detail} {n / MIB:.1f} MiB" for detail, n in planned.items()))
    for part, ratio in grown.items():
        peak, after = ({k: (found[part][when][k] - found["before"][k]) / MIB for k in ("anon", "file")}
                       for when in ("peak", "after"))
        print(f"  {part:7} picture: own memory +{peak['anon']:.1f} MiB at the peak ({ratio - 1:+.2%} of the plan), "
              f"+{after['anon']:.1f} after; pages of files +{peak['file']:.1f} at the peak, +{after['file']:.1f} after")
    return {"name": f"{name} {format_name} planned / resident", "score": summary([1 / v for v in grown.values()]), "plan": plan,
            "found": found, "correct": all(abs(v - 1) <= 0.03 for v in grown.values())}


# ---- turns ----------------------------------------------------------------------------------------------------------------


def turns(name: str, e: Encoder, folder: Path, format_name: str, depth: int, n_threads: int, rounds: int) -> dict[str, Any]:
    """Time to the first token of a question about a new picture / of the next question about it; the encoder is loaded before."""
    with start("whole", e, folder, format_name, n_threads) as process:
        process.call("turn", number=0)
        found = [process.call("turn", number=r + 1) for r in range(rounds)]
    first, second = ([f[part] for f in found] for part in ("first", "second"))
    score = summary([a["seconds"] / b["seconds"] for a, b in zip(first, second)])
    a, b = (float(np.median([f["seconds"] for f in part])) for part in (first, second))
    encode = float(np.median([f["encode_seconds"] for f in first]))
    new = second[0]["n_prompt"] - second[0]["n_cached"]
    print(f"\n{name} {format_name}, {depth} of {e.text['num_hidden_layers']} layers of text: first token after {a:.2f} s (encoder "
          f"{encode:.2f} s, prompt of {first[0]['n_prompt']}), then after {b:.3f} s ({new} new tokens): "
          f"{score['median']:.1f} x +-{score['spread']:.1%}")
    return {"name": f"{name} {format_name} first turn / second turn", "score": score, "text_layers": depth, "turns": found}
