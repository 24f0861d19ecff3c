"""llama.cpp with llama-cpp-python's prompt lookup in a process of its own: `python -m bench.lookup_worker MODEL -t N --folder DIR`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from .worker import own_stdout, serve


class Worker:
    """A model twice, over the same mapped weights: alone, and with drafts of 10 tokens behind matches of 2 (the package's defaults)."""

    def __init__(self, path: str, n_threads: int):
        from llama_cpp import Llama
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        own = {"n_ctx": 1024, "n_threads": n_threads, "n_threads_batch": n_threads, "verbose": False}
        self.models = {on: Llama(path, draft_model=LlamaPromptLookupDecoding() if on else None, **own) for on in (False, True)}

    def ready(self) -> dict[str, Any]:
        return {}

    def generate(self, ids: Sequence[int], n: int, lookup: bool) -> float:
        """Return the seconds of a greedy token, from the first one on."""
        model, made, began = self.models[lookup], 0, 0.0
        for token in model.generate(list(ids), temp=0.0, repeat_penalty=1.0, reset=True):
            if not made:
                began = time.perf_counter()
            made += 1
            if made == n or token == model.token_eos():
                break
        return (time.perf_counter() - began) / max(1, made - 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.lookup_worker", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("-t", "--threads", type=int, required=True)
    parser.add_argument("--folder", help="holds the package; default: the installed one")
    args = parser.parse_args()
    if args.folder:
        sys.path.insert(0, args.folder)
    answers = own_stdout()
    serve(Worker(args.model, args.threads), answers)


if __name__ == "__main__":
    main()
