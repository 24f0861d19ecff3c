"""One engine with one sentence encoder in a process of its own: `python -m bench.vectors_worker ENGINE FOLDER FORMAT -t N`.

Lines of JSON come in and go out, as with `bench.worker`. FOLDER has the sentences, a folder `hf` of sentence-transformers and files FORMAT.gguf. What
is timed begins with texts and ends with vectors of length 1, so tokenizing is in it. Each engine has its own usual way to put texts together: runs of 512
rows here, batches of 512 tokens in llama.cpp, and for transformers what sentence-transformers does: sorted by length, 32 at a time, padded.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .worker import N_BATCH, own_stdout, serve

AT_ONCE = 32                                                 # sentence-transformers' batch_size


class PyEngine:
    """This project."""

    def __init__(self, folder: Path, format_name: str, n_threads: int, rows: int):
        import pyengine as pe

        self.model = pe.load(folder / f"{format_name}.gguf", n_threads=n_threads, n_batch=rows)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return self.model.embed(list(texts))

    def tokens(self, texts: Sequence[str]) -> int:
        """Count the tokens of texts."""
        return sum(len(self.model.tokenize(text)) for text in texts)


class LlamaCpp:
    """llama.cpp through llama-cpp-python's own `embed`."""

    def __init__(self, folder: Path, format_name: str, n_threads: int, rows: int):
        from llama_cpp import Llama

        self.model = Llama(str(folder / f"{format_name}.gguf"), embedding=True, n_ctx=rows, n_batch=rows, n_ubatch=rows, n_threads=n_threads,
                           n_threads_batch=n_threads, verbose=False)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.array(self.model.embed(list(texts), normalize=True), np.float32)


class Torch:
    """transformers with PyTorch's fused attention, in float32; means of the rows that are no padding."""

    def __init__(self, folder: Path, format_name: str, n_threads: int, rows: int):
        import torch
        import transformers

        torch.set_num_threads(n_threads)
        self.words = transformers.AutoTokenizer.from_pretrained(folder / "hf")
        self.model = transformers.AutoModel.from_pretrained(folder / "hf", attn_implementation="sdpa", dtype=torch.float32).eval()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        out = np.empty((len(texts), self.model.config.hidden_size), np.float32)
        with torch.inference_mode():
            for start in range(0, len(order), AT_ONCE):
                part = order[start : start + AT_ONCE]
                given = self.words([texts[i] for i in part], padding=True, truncation=True, max_length=N_BATCH, return_tensors="pt")
                states, mask = self.model(**given).last_hidden_state, given["attention_mask"][..., None].float()
                pooled = (states * mask).sum(1) / mask.sum(1)
                out[part] = torch.nn.functional.normalize(pooled, dim=1).numpy()
        return out


ENGINES = {"pyengine": PyEngine, "llama.cpp": LlamaCpp, "torch": Torch}


class Worker:
    """The requests."""

    def __init__(self, engine: Any, folder: Path):
        self.engine, self.texts = engine, json.loads((folder / "sentences.json").read_text())

    def ready(self) -> dict[str, Any]:
        return {"tokens": self.engine.tokens(self.texts) if isinstance(self.engine, PyEngine) else 0}

    def embed(self, n: int, file: str | None = None) -> dict[str, float]:
        """Measure the seconds for the first n sentences, and those of all threads on the cores; file: where their vectors are kept."""
        start, cpu = time.perf_counter(), time.process_time()
        vectors = self.engine.embed(self.texts[:n])
        found = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        if file:
            np.save(file, vectors)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.vectors_worker", description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("format")
    parser.add_argument("-t", "--threads", type=int, required=True)
    parser.add_argument("--rows", type=int, default=N_BATCH)
    args = parser.parse_args()
    answers = own_stdout()
    serve(Worker(ENGINES[args.engine](args.folder, args.format, args.threads, args.rows), args.folder), answers)


if __name__ == "__main__":
    main()
