"""Launches of csrc/metal/routing.metal."""

from __future__ import annotations

from pyengine.backends.metal.launch import ceil_div, Launch, launches, NoKernel, Step

MEMORY = 32 << 10                        # bytes of threadgroup memory
MOST_EXPERTS = 4095                      # of whom sort_experts keeps two numbers there


@launches
def top_experts(s: Step) -> list[Launch]:
    """Launch one simdgroup a row. Raises: NoKernel for more experts than a row may have here."""
    scores, (chosen, gates) = s.need("scores"), s.outputs
    rows, n = scores.shape
    if n > MOST_EXPERTS:
        raise NoKernel(f"{s.name}: {n} experts; at most {MOST_EXPERTS} are possible")
    if rows == 0:
        return []
    together = min(4, rows, MEMORY // (4 * n))
    return [Launch("pick_experts", dict(rows=rows, n=n, used=s.params.n_used, scale=s.params.scale),
                   {"scores": scores, "bias": s.one("bias"), "chosen": chosen, "gates": gates}, (ceil_div(rows, together), 1, 1),
                   (32 * together, 1, 1), 4 * n * together, {"SIGMOID": s.params.gate == 1, "NORMED": s.params.normed})]


@launches
def sum_experts(s: Step) -> list[Launch]:
    """Launch one thread an element of the sum."""
    out = s.outputs[0]
    if out.size == 0:
        return []
    threads = min(256, ceil_div(out.shape[1], 32) * 32)
    return [Launch("add_experts", dict(rows=out.shape[0], width=out.shape[1], used=s.params.n_used),
                   {"y": s.need("y"), "gates": s.one("gates"), "residual": s.one("residual"), "out": out},
                   (ceil_div(out.shape[1], threads), out.shape[0], 1), (threads, 1, 1))]
