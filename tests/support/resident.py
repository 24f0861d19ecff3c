"""A process of its own that loads a model, uses it step by step, and says what was planned and what is resident.

    python tests/support/resident.py MODEL N_CTX N_SEQ [pictures]      one JSON line a phase: name, resident, tokens in each conversation
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def resident() -> dict[str, int]:
    """Bytes of this process in memory: all, and those of no file."""
    found = dict.fromkeys(("Rss", "Anonymous"), 0)
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in found:
            found[name] = int(value.split()[0]) * 1024
    return {"resident": found["Rss"], "anonymous": found["Anonymous"]}


def main(path: str, n_ctx: int, n_seq: int, pictures: bool) -> None:
    """Print the phases."""
    import pyengine as pe

    model = pe.load(path, n_ctx=n_ctx, n_seq=n_seq)
    used: list[int] = []

    def say(phase: str) -> None:
        encoded = bool(model.media and model.media.loaded)
        print(json.dumps({"phase": phase, "used": used, "encoded": encoded, **resident()}), flush=True)

    def prompt(first: int, n: int) -> list[int]:
        used.append(n)
        return [first, *[5 + i % 90 for i in range(n - 1)]]

    print(json.dumps(model.plan.to_json()), flush=True)
    p = model.program
    print(json.dumps({"weights": p.weights.nbytes, "arena": p.arena.nbytes, "state": p.state_memory.nbytes}), flush=True)
    model.tokenizer  # noqa: B018 -- built when it is first asked for
    say("loaded")
    first = prompt(100, min(4096, n_ctx - 8))
    for _ in model.logit_blocks(first, first=max(0, len(first) - 100)):            # as many logits at once as there ever are
        pass
    model.generate(first, max_tokens=2, temperature=0.7, seed=1)
    say("after a prompt")
    if pictures:
        import numpy as np

        for seed in range(3):
            rng = np.random.default_rng(seed)
            model.encode_image(rng.integers(0, 256, (300 + 20 * seed, 400, 3), dtype=np.uint8))
        say("after three pictures")
    if n_seq > 1:
        model.generate_many([prompt(100 + i, min(512, n_ctx - 8)) for i in range(1, n_seq)], max_tokens=2, temperature=0.7, seed=1)
        say(f"after {n_seq} conversations")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "pictures" in sys.argv[4:])
