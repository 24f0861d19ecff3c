"""Caches that forget in models of true shape with random weights (time of a token after long prompts), and in text models (perplexity).

Shapes are those of LLaVA 1.5's and Qwen2.5-VL's text models, with fewer layers: the time of a token grows with them and no share changes.
Weights and tokens are random: what is kept does not matter to the time, only how much.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .cache import FULL, policy, Setting
from .gpu.synthetic import Decoder, write
from .quality import plain_text
from .stats import summary

LAYERS, VOCABULARY, GENERATED = 4, 1024, 32
POLICIES = ("h2o", "snapkv", "roco", "streaming-llm")             # of texts alone
DEPTHS = (4096, 8192, 16384, 32768)
# text models of liuhaotian/llava-v1.5-7b and Qwen/Qwen2.5-VL-3B-Instruct
SHAPES = {"llava": Decoder("llama", LAYERS, 4096, 11008, 32, 32, 128, VOCABULARY, "Q8_0"),
          "qwen": Decoder("qwen2", LAYERS, 2048, 11008, 16, 2, 128, VOCABULARY, "Q8_0", biases=True)}


def speeds(names: Sequence[str], n_threads: int, depths: Sequence[int], chosen: Sequence[Setting], kv: str, rounds: int,
           layers: int = LAYERS) -> dict[str, Any]:
    """Measure the time of a token after a prompt of each depth, under each setting, `rounds` answers in turns.

    A model is loaded for each setting, so that the full cache sums no attention; all are there at once. Nothing is drafted: random models
    repeat themselves.
    """
    import pyengine as pe

    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            file = write(Path(folder, f"{name}.gguf"), replace(SHAPES[name], n_layers=layers))
            for depth in depths:
                samples: dict[Setting, dict[str, list[float]]] = {s: {"token": [], "prompt": [], "compression": [], "bytes": []} for s in chosen}
                with ExitStack() as stack:
                    models = {s: stack.enter_context(pe.load(file, n_ctx=depth + (GENERATED + 2) * rounds, kv_dtype=kv, n_threads=n_threads,
                                                             compress=policy(s.policy, ratio=s.ratio), speculate=False)) for s in chosen}
                    prompts = {s: np.random.default_rng(0).integers(0, VOCABULARY, depth).tolist() for s in chosen}
                    for turn in range(rounds):
                        for setting, model in models.items():
                            answer = model.generate(prompts[setting], max_tokens=GENERATED, temperature=0,
                                                    logit_bias=tuple((i, -1e9) for i in model.tokenizer.eog_ids))
                            prompts[setting] += [*answer.tokens, 1]
                            between = np.diff(answer.report.times)             # of which the first one has the compression in it
                            samples[setting]["token"].append(float(np.median(between[1:])))
                            samples[setting]["compression"].append(float(between[0] - np.median(between[1:])))
                            if not turn:
                                samples[setting]["prompt"].append(answer.prompt_seconds)
                                samples[setting]["bytes"].append(model.cells_held().nbytes)
                results += _results(name, depth, samples)
    return {"suite": "cache-speed", "kv": kv, "layers": layers, "results": results}


def _results(name: str, depth: int, samples: dict[Setting, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Make the results of one model and depth: `score` is the full cache's time of a token over the setting's, turn by turn."""
    out, full = [], samples[Setting(FULL)]
    for setting, found in samples.items():
        out.append({"name": f"{name} {depth} {setting.name}", "ratio": setting.ratio, "bytes": float(np.median(found["bytes"])),
                    "token_seconds": summary(found["token"]), "prompt_seconds": summary(found["prompt"]),
                    "compression_seconds": found["compression"],               # after the prompt, then after each turn's
                    "score": summary([a / b for a, b in zip(full["token"], found["token"])]),
                    "prompt_cost": summary([b / a for a, b in zip(full["prompt"], found["prompt"])])})
        r = out[-1]
        print(f"  {r['name']:<42} {1000 * r['token_seconds']['median']:8.2f} ms a token, {r['score']['median']:.2f} x; prompt "
              f"{r['prompt_seconds']['median']:.1f} s, {r['prompt_cost']['median']:.2f} x", flush=True)
    return out


def perplexities(file: Path, n_threads: int, budgets: Sequence[int], policies: Sequence[str], kv: str, n_ctx: int = 2048,
                 chunks: int = 8) -> dict[str, Any]:
    """Measure a text model's perplexity where each head holds a budget of cells at any time, beside the full cache."""
    import pyengine as pe
    from pyengine.measure.perplexity import perplexity

    results, text = [], plain_text()
    for name, budget in [(FULL, n_ctx), *((p, b) for p in policies for b in budgets)]:
        made = policy(name, budget=budget, when="always")
        with pe.load(file, n_ctx=n_ctx, kv_dtype=kv, n_threads=n_threads, compress=made) as model:
            found = perplexity(model, text[: 12 * n_ctx * chunks], n_ctx, chunks)
            nbytes = model.plan.of("kv")
        results.append({"name": f"{file.stem} {name} {budget}", "policy": name, "budget": budget, "perplexity": found.value,
                        "stderr": found.stderr, "bytes": nbytes,
                        "score": {"median": results[0]["perplexity"] / found.value if results else 1.0, "spread": 0.0}})
        print(f"  {results[-1]['name']:<40} {found.value:.3f} +- {found.stderr:.3f}", flush=True)
    return {"suite": "cache-text", "file": file.name, "kv": kv, "n_ctx": n_ctx, "results": results}
