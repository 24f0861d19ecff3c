"""Vectors of sentences, beside transformers and llama.cpp: sentences of 3 to 60 words in one list, in turns, from texts to vectors.

The encoder is a folder of sentence-transformers, such as all-MiniLM-L6-v2 (`make weights` has it). Each engine is a process of its own; in every round
each embeds all sentences once, in an order that turns around from round to round. Time on the cores is told too: on a machine that others use it says
more, with one thread most, as engines whose threads wait by spinning lose with several.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from .engines import LLAMA, OURS, Process
from .stats import summary

FORMATS = ("F32", "F16", "Q8_0")
LEAST, MOST = 3, 60                                          # words of a sentence
# the smallest cosine with transformers' vectors in float32: roundings add up over layers, and anything that is wrong gives far less
NEAR = {"F32": 0.99999, "F16": 0.9999, "Q8_0": 0.99}


def sentences(file: Path, n: int, seed: int = 0) -> list[str]:
    """Draw sentences of whole words of a file's vocabulary, of which one in five is two words joined, with signs between some."""
    import pyengine as pe

    tokenizer = pe.load_tokenizer(file)
    words = [t[1:] for t in map(lambda raw: raw.decode("utf-8", "replace"), tokenizer.vocabulary.tokens) if t[1:].isascii() and t[1:].isalpha()
             and t[0] == "\u2581" and len(t) > 2]
    draw, out = random.Random(seed), []
    for _ in range(n):
        chosen = [draw.choice(words) + (draw.choice(words) if draw.random() < 0.2 else "") for _ in range(draw.randint(LEAST, MOST))]
        out.append(" ".join(word + ("," if draw.random() < 0.1 else "") for word in chosen) + ".")
    return out


def run(folder: Path, n_threads: int, n: int, rounds: int, peers: Sequence[str], formats: Sequence[str], rows: int) -> dict[str, Any]:
    """Measure sentences a second of each engine. rows: of a run, of a batch of llama.cpp."""
    from converters import convert

    with TemporaryDirectory(prefix="pyengine-vectors-") as made, ExitStack() as stack:
        base = Path(made)
        (base / "hf").symlink_to(folder.resolve())
        for f in formats:
            convert(folder, base / f"{f}.gguf", f.lower())
        (base / "sentences.json").write_text(json.dumps(sentences(base / f"{formats[0]}.gguf", n)))
        jobs = [(OURS, f) for f in formats] + [(LLAMA, f) for f in formats if LLAMA in peers] + [("torch", "F32")]
        running = {job: stack.enter_context(Process(job[0], "vectors_worker", job[0], base, job[1], "-t", n_threads, "--rows", rows)) for job in jobs}
        vectors = {}
        for job, process in running.items():                                   # not timed: caches, pages, threads
            process.call("embed", n=min(n, 64), file=str(base / "v.npy"))
            vectors[job] = np.load(base / "v.npy")
        if "torch" not in peers:
            running.pop(("torch", "F32")).__exit__(None, None, None)
        samples: dict[tuple[str, str], dict[str, list[float]]] = {job: {"seconds": [], "cpu": []} for job in running}
        for r in range(rounds):
            for job in list(running)[:: 1 if r % 2 == 0 else -1]:
                for kind, value in running[job].call("embed", n=n).items():
                    samples[job][kind].append(n / value)
        tokens = running[OURS, formats[0]].ready["tokens"]
    return {"suite": "embed", "sentences": n, "tokens": tokens, "results": _results(samples, vectors, n_threads, tokens / n)}


def _results(samples: Mapping[tuple[str, str], Mapping[str, list[float]]], vectors: Mapping[tuple[str, str], np.ndarray], n_threads: int, length: float) -> list[dict[str, Any]]:
    """Judge and print what was measured. length: tokens of a sentence, on average."""
    want, results = vectors["torch", "F32"], []
    for (engine, f), kinds in samples.items():
        cosine = float((vectors[engine, f] * want).sum(1).min())
        found = {"name": f"embed {engine} {f}", "unit": "sentences/s", "n_threads": n_threads, **summary(kinds["seconds"]), "cosine": cosine,
                 "per cpu second": summary(kinds["cpu"]), "correct": engine != OURS or cosine >= NEAR[f]}
        for peer, other in (("torch", "F32"), (LLAMA, f)):                     # of the same round
            if engine == OURS and (peer, other) in samples:
                for kind, words in (("seconds", ""), ("cpu", " by time on the cores")):
                    found[f"over {peer}{words}"] = float(np.median(np.array(kinds[kind]) / np.array(samples[peer, other][kind])))
        results.append(found)
        ratios = "".join(f"  {found[key]:.2f} x {key[5:]}" for key in found if key.startswith("over "))
        print(f"{engine:9} {f:5} {found['median']:8.1f} sentences/s  {found['median'] * length:9.0f} tokens/s  +-{100 * found['spread']:.0f}%"
              f"  smallest cosine {cosine:.5f}{ratios}")
    return results
