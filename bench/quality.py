"""Whether two engines say the same: perplexity of both, divergence of their next-token distributions, greedy texts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers import LLAMA, OURS, Engine

N_CTX = 512
N_CHUNKS = 16
N_GREEDY = 64
PROMPTS = (
    "The capital of France is", "Once upon a time, in a small village by the sea,", "def fibonacci(n):\n",
    "Water boils at", "The three primary colours are", "Dear Sir or Madam,\n\nI am writing to",
    "SELECT name FROM users WHERE", "In 1969, two people",
    "Photosynthesis is the process by which", "To make a good omelette, first",
    "The difference between a list and a tuple in Python is", "Le petit chat est", "import numpy as np\n\ndef softmax(x):\n", "My favourite book is", "The quick brown fox",
    "A prime number is a number that", "Q: What is the largest planet?\nA:", "<html>\n<head>\n", "Die Hauptstadt von Deutschland ist",
    "The moon orbits the Earth because",
)


def plain_text() -> str:
    """English text that every Python brings: the topics of its help system."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) of each row, from log-probabilities [n, vocab]; float64 [n]."""
    return np.array([np.sum(np.exp(a.astype(np.float64)) * (a.astype(np.float64) - b)) for a, b in zip(p, q)])


def compare(path: Path, n_threads: int, n_chunks: int = N_CHUNKS) -> dict[str, Any]:
    """Run both engines on the same tokens (llama.cpp's) and say how far apart they are.

    Perplexity is llama-perplexity's: chunks of 512 tokens from an empty cache, the first of each replaced by BOS where the model
    wants one, tokens of the second half are scored.
    """
    with (Engine(LLAMA, path, n_threads, N_CTX) as theirs, Engine(OURS, path, n_threads, N_CTX) as ours,
          tempfile.TemporaryDirectory() as tmp):
        if ours.n_vocab != theirs.n_vocab:
            raise RuntimeError(f"{path.name}: {ours.n_vocab} logits here, {theirs.n_vocab} in llama.cpp")
        facts = theirs.call("facts", n_prompt=0, n_generate=0)
        text = plain_text()[: n_chunks * N_CTX * 12]
        ids = theirs.call("tokenize", text=text)
        if len(ids) < n_chunks * N_CTX:
            raise RuntimeError(f"the text has {len(ids)} tokens, {n_chunks} chunks need {n_chunks * N_CTX}")
        same_ids = ids == ours.call("tokenize", text=text)
        half, nats, kl = N_CTX // 2, {OURS: 0.0, LLAMA: 0.0}, []
        for c in range(n_chunks):
            chunk = ids[c * N_CTX : (c + 1) * N_CTX]
            if facts["add_bos"]:
                chunk[0] = facts["bos"]
            rows = {}
            for e in (ours, theirs):
                file = str(Path(tmp, f"{e.name}.npy"))
                e.call("log_probabilities", ids=chunk, wanted=half, file=file)
                rows[e.name] = np.load(file, mmap_mode="r")[:-1]               # what follows the last token is not known
                nats[e.name] -= float(rows[e.name][np.arange(half - 1), chunk[half + 1 :]].sum(dtype=np.float64))
            kl.append(divergence(rows[LLAMA], rows[OURS]))
        n = n_chunks * (half - 1)
        perplexity = {name: float(np.exp(total / n)) for name, total in nats.items()}
        greedy = [_greedy(theirs, ours, prompt, set(facts["eog"])) for prompt in PROMPTS]
    equal = sum(g["parted_at"] is None for g in greedy)
    gaps = [g["gap"] for g in greedy if g["parted_at"] is not None]
    difference = perplexity[OURS] / perplexity[LLAMA] - 1
    print(f"  perplexity {perplexity[OURS]:.4f}, llama.cpp {perplexity[LLAMA]:.4f} ({difference:+.3%}); "
          f"mean KL {np.concatenate(kl).mean():.2e}; same token ids: {same_ids}")
    parted = f"; where they part, llama.cpp's top two are within {max(gaps):.3f} nats" if gaps else ""
    print(f"  greedy: {equal} of {len(greedy)} equal{parted}", flush=True)
    return {"perplexity": perplexity, "mean_kl": float(np.concatenate(kl).mean()), "max_kl": float(np.concatenate(kl).max()),
            "scored_tokens": n, "same_token_ids": same_ids, "greedy_equal": equal, "greedy": greedy}


def _greedy(theirs: Engine, ours: Engine, prompt: str, eog: set[int]) -> dict[str, Any]:
    """Continue one prompt by both; where they part, the gap (nats) between llama.cpp's two likeliest tokens."""
    ids = theirs.call("tokenize", text=prompt)
    a, b = (e.call("greedy", ids=ids, n=N_GREEDY) for e in (theirs, ours))
    ends = next((i + 1 for i, t in enumerate(a["tokens"]) if t in eog), N_GREEDY)
    parted = next((i for i in range(ends) if a["tokens"][i] != b["tokens"][i]), None)
    return {"prompt": prompt, "parted_at": parted, "gap": None if parted is None else a["gaps"][parted]}
