"""Engines side by side on the same files: interleaved repetitions of one prompt and one generation, first tokens, quality.

Each engine keeps its model in a process of its own. In every round each limit and each engine is measured once, in an order that
turns around from round to round, so that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from . import limits
from .engines import LLAMA, OURS, Engine, which, worker
from .quality import N_CTX, compare
from .stats import summary


def random_ids(n: int, n_vocab: int) -> list[int]:
    """The tokens that all engines are given: any will do, as in llama-bench."""
    return np.random.default_rng(0).integers(0, n_vocab, n).tolist()


def speeds(path: Path, names: Sequence[str], n_threads: int, n_prompt: int, n_generate: int, rounds: int,
           folders: Mapping[str, Path] = MappingProxyType({})) -> dict[str, Any]:
    """Tokens/s of each engine and the limits, one sample a round. Models of one file are all loaded before the first round."""
    n_ctx = max(n_prompt, n_generate)
    engines: list[Engine] = []
    try:
        for name in names:
            engines.append(Engine(name, path, n_threads, n_ctx, folders.get(name)))
        ids = random_ids(n_ctx, min(e.n_vocab for e in engines))
        tests = {"pp": ("prompt", ids[:n_prompt]), "tg": ("generate", ids[:n_generate])}
        facts = {e.name: e.call("facts", n_prompt=n_prompt, n_generate=n_generate) for e in engines}
        isa = facts.get(OURS, {}).get("isa")
        for e in engines:                                                      # once without a clock: caches, pages, threads
            for call, tokens in tests.values():
                e.call(call, ids=tokens[:32])
        samples: dict[str, dict[str, list[float]]] = {n: {t: [] for t in tests} for n in names}
        bounds: dict[str, list[float]] = {"read": [], "int8": []}
        for r in range(rounds):
            bounds["read"].append(limits.read_bandwidth(n_threads, repeat=3))
            if isa:
                bounds["int8"].append(limits.peak("int8", isa, n_threads, repeat=3))
            for test, (call, tokens) in tests.items():
                for e in engines[:: 1 if r % 2 == 0 else -1]:
                    samples[e.name][test].append(len(tokens) / e.call(call, ids=tokens))
    finally:
        for e in engines:
            e.__exit__(None, None, None)
    return {"samples": samples, "limits": bounds, "facts": {n: {k: v for k, v in f.items() if k != "eog"} for n, f in facts.items()}}


def _warm(nbytes: int) -> None:
    """Write to so much memory and give it back.

    The next process gets these pages. Where a virtual machine returns free memory to its host, each new page of 2 MiB may otherwise
    take some ms, which would be a measurement of the host.
    """
    from pyengine.native import engine

    np.frombuffer(engine.Buffer(nbytes, True), np.uint8)[::4096] = 1


def first_tokens(path: Path, names: Sequence[str], n_threads: int, rounds: int,
                 folders: Mapping[str, Path] = MappingProxyType({})) -> dict[str, list[dict[str, Any]]]:
    """Load to first token in fresh processes, the file in the page cache, Python's modules compiled as pip does."""
    import compileall

    import pyengine

    for folder in (Path(pyengine.__file__).parent, *folders.values()):
        compileall.compile_dir(folder, quiet=1)
    with open(path, "rb") as f:
        while f.read(1 << 24):
            pass
    out: dict[str, list[dict[str, Any]]] = {n: [] for n in names}
    for r in range(rounds):
        for name in list(out)[:: 1 if r % 2 == 0 else -1]:
            command = worker("worker", *which(name, folders.get(name)), path, "-t", n_threads, "--first-token")
            _warm(2 * path.stat().st_size + (1 << 29))
            done = subprocess.run(**command, stdout=subprocess.PIPE, text=True, check=True)
            out[name].append(json.loads(done.stdout))
    return out


def _ratios(name: str, ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """One result: `score` is ours / theirs round by round."""
    return {"name": name, "ours": summary(ours), "theirs": summary(theirs), "score": summary([a / b for a, b in zip(ours, theirs)])}


def _shares(file: str, n_prompt: int, n_generate: int, found: dict[str, Any]) -> list[dict[str, Any]]:
    """What our speeds are of the limits of the same round."""
    facts, own = found["facts"][OURS], found["samples"][OURS]
    tg = [v * facts["bytes_per_token"] / bound for v, bound in zip(own["tg"], found["limits"]["read"])]
    pp = [v / n_prompt * facts["prompt_operations"] / bound for v, bound in zip(own["pp"], found["limits"]["int8"])]
    return [{"name": f"{file} pp{n_prompt}", "tokens_per_second": summary(own["pp"]), "limit": "int8", "score": summary(pp)},
            {"name": f"{file} tg{n_generate}", "tokens_per_second": summary(own["tg"]), "limit": "read", "score": summary(tg)}]


def models(paths: Sequence[Path], n_threads: int, n_prompt: int, n_generate: int, rounds: int) -> dict[str, Any]:
    """Our speed on each file, and its share of the limits measured in the same rounds."""
    results, files = [], {}
    for path in paths:
        found = files[path.name] = speeds(path, [OURS], n_threads, n_prompt, n_generate, rounds)
        results += _shares(path.name, n_prompt, n_generate, found)
        for r in results[-2:]:
            v = r["tokens_per_second"]
            share = f"{r['score']['median']:6.1%} of {r['limit']}"
            print(f"{r['name']:42} {v['median']:9.1f} tokens/s +-{v['spread']:.1%}  {share}", flush=True)
    return {"suite": "models", "results": results, "files": files}


def peers(paths: Sequence[Path], n_threads: int, n_prompt: int, n_generate: int, rounds: int, quality: bool = False,
          names: Sequence[str] | None = None, folders: Mapping[str, Path] = MappingProxyType({})) -> dict[str, Any]:
    """Ratios of our speed to that of each other engine, on each file; with `quality` also whether they say the same.

    folders: other builds, by the names that results give them: folders with the package llama_cpp or ik_llama_cpp.
    """
    names = [*(names or (OURS, LLAMA)), *folders]
    results: list[dict[str, Any]] = []
    files: dict[str, Any] = {}
    for path in paths:
        found = files[path.name] = speeds(path, names, n_threads, n_prompt, n_generate, rounds, folders)
        found["first_token"] = first_tokens(path, names, n_threads, rounds, folders)
        print(f"{path.name}, {n_threads} threads, read {max(found['limits']['read']) / 1e9:.1f} GB/s")
        for name in names:
            pp, tg = (summary(found["samples"][name][t]) for t in ("pp", "tg"))
            first = [f["seconds"] for f in found["first_token"][name]]
            print(f"  {name:14} pp{n_prompt} {pp['median']:9.1f} +-{pp['spread']:.1%}   "
                  f"tg{n_generate} {tg['median']:8.1f} +-{tg['spread']:.1%}"
                  f"   first token {np.median(first):6.3f} s", flush=True)
        if OURS not in names:
            continue
        found["shares"] = _shares(path.name, n_prompt, n_generate, found)
        own = found["samples"][OURS]
        for name in names:
            if name == OURS:
                continue
            new = [_ratios(f"{path.name} pp{n_prompt} / {name}", own["pp"], found["samples"][name]["pp"]),
                   _ratios(f"{path.name} tg{n_generate} / {name}", own["tg"], found["samples"][name]["tg"])]
            rate = {n: [1 / f["seconds"] for f in found["first_token"][n]] for n in (OURS, name)}
            new.append(_ratios(f"{path.name} first token / {name}", rate[OURS], rate[name]))
            for r in new:
                score = r["score"]
                print(f"  {r['name'].removeprefix(path.name):34} {score['median']:6.2f} x  +-{score['spread']:.1%}", flush=True)
            results += new
        for share in found["shares"]:
            print(f"  {share['name'].removeprefix(path.name):34} {share['score']['median']:6.1%} of {share['limit']}", flush=True)
        if quality:
            with (Engine(LLAMA, path, n_threads, N_CTX) as theirs,
                  Engine(OURS, path, n_threads, N_CTX) as ours):
                found["quality"] = compare(ours, theirs)
    return {"suite": "peers", "results": results, "files": files}
