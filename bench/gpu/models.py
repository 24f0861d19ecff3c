"""Whole models on a card: logits beside the CPU backend's, and how fast a model of 8 billion random weights reads and writes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyengine import hardware
from pyengine.backends import backend
from pyengine.cache.cells import Conversation
from pyengine.engine.runner import Runner
from pyengine.files.model_files import open_files
from pyengine.media.image import open_image
from pyengine.media.views import Limits
from pyengine.memory.layout import ModelLayout
from pyengine.memory.settings import Settings
from pyengine.programs import encoder
from pyengine.programs.bound import bind
from pyengine.programs.rows import token_rows
from pyengine.programs.step import Step, Work

from . import synthetic
from ..machine import ROOT
from ..stats import summary

# Largest difference of logits from the CPU's, as a share of their range: the order of sums differs, and of BF16 rows are two bf16 numbers each.
LIMITS = {"F32": 1e-5, "BF16": 1e-3}
# Where rows are rounded to 8 bits before a product with blocks, the last bit of a sum decides here and there what they are rounded to, and
# two runs soon differ by as much as rounding costs. So what is held to the CPU's is that cost: the error beside float32 weights.
COST = 1.25


class Model:
    """A model's step on a device, with conversations of token ids."""

    def __init__(self, path: Path, device: str, n_ctx: int, n_batch: int, kv: str = "f16", n_head: int = 1, n_seq: int = 4):
        layout = ModelLayout(bind(open_files(path)), Settings(n_ctx, n_batch, kv, n_seq=n_seq), hardware.detect())
        step = Step(layout.bound.model, layout.sizes.with_(n_head=n_head))
        self.program: Any = backend(device).prepare(step.declare()).load()
        self.runner = Runner(step, self.program)

    def work(self, s: Conversation, ids: Sequence[int], wanted: int = 1) -> Work:
        """Return work that continues a conversation and wants the logits of its last rows."""
        rows, n = token_rows(list(ids), len(s), self.runner.axes), len(ids)
        return Work(s, rows, 0, n, np.arange(n - wanted, n, dtype=np.int32))

    def logits(self, parts: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the logits after every token of a new conversation that is run part by part."""
        s = self.runner.cells.new()
        out = [self.runner.run([self.work(s, ids, len(ids))]).whole().copy() for ids in parts]
        self.runner.cells.drop(s)
        return np.concatenate(out)


def cut(ids: Sequence[int], *sizes: int) -> list[Sequence[int]]:
    """Cut a sequence into parts of these sizes, the last of them again and again."""
    out, at = [], 0
    while at < len(ids):
        n = sizes[min(len(out), len(sizes) - 1)]
        out.append(ids[at : at + n])
        at += n
    return out


def agree(name: str, device: str, folder: Path, kv: str = "f16", n: int = 100) -> dict[str, Any]:
    """Compare a small model with the CPU backend: a prompt, then tokens one by one. Cuts of a prompt must give the same bits."""
    small, stem, batch = synthetic.SMALL[name], name.replace(" ", "-"), 64
    path, exact = (synthetic.write(folder / f"{stem}{end}.gguf", small, exact=bool(end)) for end in ("", "-exact"))
    ids = np.random.default_rng(1).integers(0, small.vocab_size, n).tolist()
    parts = [*cut(ids[: n - 8], batch), *cut(ids[n - 8 :], 1)]
    true, want = (Model(p, "cpu", 256, batch, kv, batch).logits(parts).astype(np.float64) for p in (exact, path))
    ours = Model(path, device, 256, batch, kv, batch)
    got = ours.logits(parts)
    again = ours.logits([*cut(ids[: n - 8], 24), *cut(ids[n - 8 :], 1)])
    span = float(want.max() - want.min())
    errors = [float(np.sqrt(np.mean(np.square(a - true)))) / span for a in (got, want)]
    return {"name": f"{name}, cache {kv}", "difference": float(np.abs(got - want).max()) / span, "limit": LIMITS.get(small.formats),
            "error": errors[0], "error_of_cpu": errors[1], "same_when_cut": bool((got == again).all()), "finite": bool(np.isfinite(got).all()),
            "fallbacks": ours.program.prepared.fallbacks}


def _embedding(path: Path, device: str, picture: Path) -> np.ndarray:
    """Run a model's encoder on a picture."""
    image = bind(open_files(path)).image
    if image is None:
        raise RuntimeError(f"{path.name} has no encoder")
    limits = Limits(1024, image.most_rows(1024))
    view = image.process(open_image(picture), limits).views[0]
    return encoder.run(backend(device).prepare(encoder.declare(image, limits.rows)).load(), view)


def seen(kind: str, device: str) -> dict[str, Any]:
    """Compare the demo model's encoder with the CPU's, on a picture: with weights in f16, or rounded to bytes."""
    picture = ROOT / "converters" / "demo" / "samples" / "shapes.png"
    paths = {k: ROOT / "converters" / "demo" / "weights" / f"demo-{k}.gguf" for k in ("f16", "q8_0")}
    true, want, got = (_embedding(paths[k], d, picture).astype(np.float64) for k, d in (("f16", "cpu"), (kind, "cpu"), (kind, device)))
    span = float(np.ptp(want))
    errors = [float(np.sqrt(np.mean(np.square(a - true)))) / span for a in (got, want)]
    return {"name": f"demo encoder {kind}", "difference": float(np.abs(got - want).max()) / span, "limit": LIMITS["BF16"] if kind == "f16" else None,
            "error": errors[0], "error_of_cpu": errors[1], "same_when_cut": True, "finite": bool(np.isfinite(got).all()), "fallbacks": {}}


def right(record: dict[str, Any]) -> bool:
    """Say whether a comparison went well."""
    near = record["difference"] <= record["limit"] if record["limit"] else record["error"] <= COST * record["error_of_cpu"]
    return near and record["same_when_cut"] and record["finite"] and not record["fallbacks"]


def _generate(model: Model, s: Conversation, n: int) -> list[float]:
    """Generate n tokens, each the most likely one, and return the seconds of each step."""
    token, seconds = 1, []
    for _ in range(n):
        start = time.perf_counter()
        token = int(model.runner.run([model.work(s, [token])]).whole()[0].argmax())
        seconds.append(time.perf_counter() - start)
    return seconds


def _read(model: Model, s: Conversation, ids: Sequence[int], batch: int) -> float:
    """Read a prompt in batches and return the seconds."""
    start = time.perf_counter()
    for part in cut(ids, batch):
        model.runner.run([model.work(s, part)])
    return time.perf_counter() - start


def _steps(model: Model, s: Conversation, n: int) -> dict[str, float]:
    """Profile n generated tokens: seconds of a token by op."""
    model.program.profile(True)
    _generate(model, s, n)
    spent: dict[str, float] = {}
    for node, seconds in model.program.seconds():
        spent[node.op.name] = spent.get(node.op.name, 0.0) + seconds / n
    model.program.profile(False)
    return spent


def speeds(path: Path, device: str, prompt: int = 512, generate: int = 128, depth: int = 32768, kv: str = "f16") -> dict[str, Any]:
    """Time a model: a prompt, tokens after it, several conversations at once, and tokens at the end of a long context."""
    start = time.perf_counter()
    model = Model(path, device, depth + generate, prompt, kv, n_seq=1)
    loaded = time.perf_counter() - start
    ids = np.random.default_rng(2).integers(0, 1000, depth).tolist()
    reads = []
    for _ in range(4):                                       # the first two are not replayed yet
        s = model.runner.cells.new()
        reads.append(_read(model, s, ids[:prompt], prompt))
        model.runner.cells.drop(s)
    s = model.runner.cells.new()
    _read(model, s, ids[:prompt], prompt)
    tokens = _generate(model, s, generate)[3:]
    spent = _steps(model, s, 8)
    model.runner.cells.drop(s)
    s = model.runner.cells.new()
    long = _read(model, s, ids[: depth - 64], prompt)
    deep = _generate(model, s, 32)[3:]
    median = summary(tokens)["median"]
    return {"file_bytes": path.stat().st_size, "load_seconds": loaded, "prompt": {"tokens": prompt, "per_second": prompt / min(reads[2:])},
            "generation": {"after": prompt, "per_second": 1 / median, "seconds": summary(tokens)},
            "steps_seconds": spent, "between_steps": 1 - sum(spent.values()) / median,
            "long": {"tokens": depth, "prompt_per_second": (depth - 64) / long, "per_second": 1 / summary(deep)["median"]}}
