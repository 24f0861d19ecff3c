"""Conversations of mixed length side by side, beside one after the other: tokens a second, and whether each answer is its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .stats import summary


def run(paths: Sequence[Path], n_threads: int, numbers: Sequence[int], n_prompt: int, n_generate: int, rounds: int) -> dict[str, Any]:
    """Generate with 1 conversation and with each of `numbers`, in turns; prompts of n_prompt / 4 to n_prompt random ids."""
    import pyengine as pe

    results = []
    for path in paths:
        most = max(numbers)
        model = pe.load(path, n_ctx=n_prompt + n_generate, n_seq=most, n_threads=n_threads)
        rng = np.random.default_rng(0)
        prompts = [rng.integers(0, model.n_vocab, n).tolist() for n in np.linspace(n_prompt // 4, n_prompt, most).astype(int)]
        go_on = {"max_tokens": n_generate, "temperature": 0, "speculate": False, "logit_bias": tuple((i, -1e9) for i in model.tokenizer.eog_ids)}
        rates: dict[int, list[float]] = {n: [] for n in (1, *numbers)}
        own: list[Any] = []
        equal = True
        for _ in range(rounds + 1):                                            # the first one warms up
            for n in rates:
                model.reset()
                started = time.perf_counter()
                if n == 1:
                    answers = [model.generate(p, **go_on) for p in (prompts if not own else prompts[:2])]
                    own = own or [a.tokens for a in answers]
                else:
                    answers = model.generate_many(prompts[:n], **go_on)
                    equal &= [a.tokens for a in answers] == own[:n]
                rates[n].append(sum(len(a.tokens) for a in answers) / (time.perf_counter() - started))
        for n in numbers:
            ratio = [b / a for a, b in zip(rates[1][1:], rates[n][1:])]
            results.append({"name": f"{path.stem} {n} conversations", "conversations": n, "tokens_per_second": summary(rates[n][1:]),
                            "alone": summary(rates[1][1:]), "score": summary(ratio), "correct": equal})
            print(f"{path.stem}: {n} conversations {np.median(rates[n][1:]):.1f} tokens/s, one {np.median(rates[1][1:]):.1f}: "
                  f"{np.median(ratio):.2f} x; answers {'equal' if equal else 'DIFFER'}")
    return {"suite": "together", "prompt": n_prompt, "generate": n_generate, "results": results}
