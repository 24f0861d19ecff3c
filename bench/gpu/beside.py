"""PyTorch on the shapes of our kernels, in a process of its own: cuBLAS in bf16, scaled_dot_product_attention. Reads jobs, prints seconds.

    python -m bench.gpu.beside < jobs.json        [{"name": ..., "op": "linear", "shapes": {...}}, ...] -> {name: seconds}
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

CACHES = 256 << 20                                           # bytes that no card's caches hold
REPEAT, SECONDS = 7, 5e-3


def product(torch: Any, shapes: dict[str, Any]) -> list[Callable[[], Any]]:
    """Return calls that multiply rows by a matrix in bf16, each by one of its own."""
    (n, k), (m, _) = shapes["w"][0], shapes["x"]
    copies = max(1, min(64, -(-CACHES // (2 * n * k)))) if m < 512 else 1
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    return [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]


def attention(torch: Any, shapes: dict[str, Any]) -> list[Callable[[], Any]]:
    """Return calls of attention in f16: causal where all rows are queries, else of rows that see all keys."""
    (m, h, e), (g, keys, _) = shapes["q"], shapes["k"]
    copies = max(1, min(16, -(-CACHES // (4 * g * keys * e)))) if m == 1 else 1
    q = torch.randn(1, h, m, e, device="cuda", dtype=torch.float16)
    kv = [(torch.randn(1, g, keys, e, device="cuda", dtype=torch.float16), torch.randn(1, g, keys, e, device="cuda", dtype=torch.float16))
          for _ in range(copies)]
    attend = torch.nn.functional.scaled_dot_product_attention
    return [lambda k=k, v=v: attend(q, k, v, is_causal=m == keys, enable_gqa=True) for k, v in kv]


MAKERS: dict[str, Callable[..., list[Callable[[], Any]]]] = {"linear": product, "attention": attention}


def seconds_of(torch: Any, calls: list[Callable[[], Any]]) -> float:
    """Time calls one after the other, as a graph that is replayed, and return the seconds of one."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay(times: int) -> float:
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    replay(1)
    times = max(1, int(SECONDS / max(replay(1), 1e-6)))
    return statistics.median(replay(times) for _ in range(REPEAT)) / times / len(calls)


def run(jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """Time every job that PyTorch has something for; what fails says why."""
    import torch

    out: dict[str, Any] = {}
    for job in jobs:
        if job["op"] not in MAKERS:
            continue
        try:
            out[job["name"]] = seconds_of(torch, MAKERS[job["op"]](torch, job["shapes"]))
        except RuntimeError as error:                        # no memory, no kernel for this card
            out[job["name"]] = str(error).splitlines()[0]
        torch.cuda.empty_cache()
    return {"version": torch.__version__, "seconds": out}


if __name__ == "__main__":
    print(json.dumps(run(json.load(sys.stdin))))
