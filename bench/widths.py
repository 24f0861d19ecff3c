"""16 bits beside 4: what a model's weights in F16 and in 4 bits cost in bytes, in time and in what it says.

A file whose matrices have 4 bits already is its own narrow one; its F16 is the same numbers written wider, so it shows bytes and
time, and what the int8 products of 4-bit weights change. Quality is perplexity (llama-perplexity's) on the help texts of Python,
of a model that sees the share of right answers about fresh pictures (`bench.sight`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .beside import converters
from .quality import plain_text
from .sight import draw, hold, ours, scores
from .stats import summary

N_PROMPT, N_GENERATE, N_CTX, N_CHUNKS = 256, 64, 512, 8
SEED, N_CONVERSATIONS = 20_261_130, 20
HEAD = f"{'model':<26} {'weights':<8} {'file MB':>8} {'plan MB':>8} {'pp256 t/s':>10} {'tg64 t/s':>9}  quality"


def bits(file: Path) -> float:
    """Compute the bits that an element of a file's matrices takes on average."""
    from pyengine.files.gguf import GGUFFile

    with GGUFFile(file) as opened:
        matrices = [t for t in opened.tensors.values() if len(t.shape) > 1]
    return 8 * sum(t.nbytes for t in matrices) / sum(t.n_elements for t in matrices)


def both(file: Path, folder: Path) -> dict[str, Path]:
    """Return a model's file in F16 and in 4 bits, made where it is not that already."""
    quantize = converters("quantize.file").quantize_file
    made = {"F16": folder / f"{file.stem}-f16.gguf"}
    quantize(file, made["F16"], "F16")
    if bits(file) < 7:
        return {**made, "4 bits": file}
    made["4 bits"] = folder / f"{file.stem}-q4_k_m.gguf"
    quantize(made["F16"], made["4 bits"], "Q4_K_M")
    return made


def quality(file: Path, sees: bool, n_threads: int) -> dict[str, float]:
    """Measure what a model says: perplexity, or the share of right answers about pictures (and of overlap of boxes)."""
    import pyengine
    from pyengine.measure.perplexity import perplexity

    if sees:
        examples = draw(N_CONVERSATIONS, SEED)
        return {"right": float(np.mean([p for points in scores(examples, hold(ours(file, "f16", n_threads), examples)).values() for p in points]))}
    with pyengine.load(file, n_ctx=N_CTX, n_threads=n_threads, device="cpu") as model:
        return {"perplexity": perplexity(model, plain_text(), N_CTX, N_CHUNKS).value}


def measured(files: dict[str, Path], n_threads: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Measure bytes and tokens/s of both files, in turns."""
    import pyengine
    from pyengine.measure.speed import measure

    models = {name: pyengine.load(file, n_ctx=N_CTX, n_threads=n_threads, device="cpu") for name, file in files.items()}
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in files}
    for r in range(rounds):
        for name in list(files)[:: 1 if r % 2 == 0 else -1]:
            for result in measure(models[name], N_PROMPT, N_GENERATE, 1):
                samples[name].setdefault(result.test, []).extend(result.samples)
    found = {}
    for name, model in models.items():
        found[name] = {"file_bytes": files[name].stat().st_size, "plan_bytes": model.plan.total,
                       **{test: summary(values) for test, values in samples[name].items()}}
        model.close()
    return found


def run(paths: Sequence[Path], n_threads: int, rounds: int) -> dict[str, Any]:
    """Measure each model in both widths and print a table."""
    from pyengine.files.gguf import GGUFFile

    results = []
    print(HEAD)
    for path in paths:
        with GGUFFile(path) as opened:
            sees = any(name.startswith("v.") for name in opened.tensors)
        with tempfile.TemporaryDirectory() as folder:
            files = both(path, Path(folder))
            for name, found in measured(files, n_threads, rounds).items():
                said = quality(files[name], sees, n_threads)
                results.append({"name": f"{path.stem} {name}", **found, **said})
                shown = f"{said['right']:.1%} right" if sees else f"perplexity {said['perplexity']:.3f}"
                print(f"{path.stem:<26} {name:<8} {found['file_bytes'] / 1e6:8.1f} {found['plan_bytes'] / 1e6:8.1f} "
                      f"{found[f'pp{N_PROMPT}']['median']:10.0f} {found[f'tg{N_GENERATE}']['median']:9.1f}  {shown}", flush=True)
    return {"suite": "widths", "results": results}
