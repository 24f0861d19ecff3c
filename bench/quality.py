"""Whether two engines say the same: perplexity of both, divergence of their next-token distributions, greedy texts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .engines import Engine

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


def compare(ours: Engine, theirs: Engine, n_chunks: int = N_CHUNKS) -> dict[str, Any]:
    """Run both engines, with contexts of N_CTX, on the same tokens (theirs) and say how far apart they are.

    Perplexity is llama-perplexity's: chunks of 512 tokens from an empty cache, the first of each replaced by BOS where the model
    wants one, tokens of the second half are scored.
    """
    if ours.n_vocab != theirs.n_vocab:
        raise RuntimeError(f"{ours.n_vocab} logits from {ours.name}, {theirs.n_vocab} from {theirs.name}")
    facts = theirs.call("facts", n_prompt=0, n_generate=0)
    text = plain_text()[: n_chunks * N_CTX * 12]
    ids = theirs.call("tokenize", text=text)
    if len(ids) < n_chunks * N_CTX:
        raise RuntimeError(f"the text has {len(ids)} tokens, {n_chunks} chunks need {n_chunks * N_CTX}")
    same_ids = ids == ours.call("tokenize", text=text)
    chunks = [ids[c * N_CTX : (c + 1) * N_CTX] for c in range(n_chunks)]
    for chunk in chunks if facts["add_bos"] else ():
        chunk[0] = facts["bos"]
    perplexity, kl = _distributions(ours, theirs, chunks)
    greedy = [_greedy(theirs, ours, prompt, set(facts["eog"])) for prompt in PROMPTS]
    equal = sum(g["parted_at"] is None for g in greedy)
    gaps = [g["gap"] for g in greedy if g["parted_at"] is not None]
    difference = perplexity[ours.name] / perplexity[theirs.name] - 1
    print(f"  perplexity {perplexity[ours.name]:.4f}, {theirs.name} {perplexity[theirs.name]:.4f} ({difference:+.3%}); "
          f"mean KL {kl.mean():.2e}; same token ids: {same_ids}")
    parted = f"; where they part, {theirs.name}'s top two are within {max(gaps):.3f} nats" if gaps else ""
    print(f"  greedy: {equal} of {len(greedy)} equal{parted}", flush=True)
    return {"perplexity": perplexity, "mean_kl": float(kl.mean()), "max_kl": float(kl.max()), "scored_tokens": len(kl),
            "same_token_ids": same_ids, "greedy_equal": equal, "greedy": greedy}


def _distributions(ours: Engine, theirs: Engine, chunks: list[list[int]]) -> tuple[dict[str, float], np.ndarray]:
    """Perplexity of the second half of the chunks by engine, and the divergence of ours from theirs at each of its tokens."""
    half, nats, kl = N_CTX // 2, {ours.name: 0.0, theirs.name: 0.0}, []
    with tempfile.TemporaryDirectory() as tmp:
        for chunk in chunks:
            rows = {}
            for e in (ours, theirs):
                file = str(Path(tmp, f"{e.name}.npy"))
                e.call("log_probabilities", ids=chunk, wanted=half, file=file)
                rows[e.name] = np.load(file, mmap_mode="r")[:-1]               # what follows the last token is not known
                nats[e.name] -= float(rows[e.name][np.arange(half - 1), chunk[half + 1 :]].sum(dtype=np.float64))
            kl.append(divergence(rows[theirs.name], rows[ours.name]))
    found = np.concatenate(kl)
    return {name: float(np.exp(total / len(found))) for name, total in nats.items()}, found


def _greedy(theirs: Engine, ours: Engine, prompt: str, eog: set[int]) -> dict[str, Any]:
    """Continue one prompt by both; where they part, the gap (nats) between llama.cpp's two likeliest tokens."""
    ids = theirs.call("tokenize", text=prompt)
    a, b = (e.call("greedy", ids=ids, n=N_GREEDY) for e in (theirs, ours))
    ends = next((i + 1 for i, t in enumerate(a["tokens"]) if t in eog), N_GREEDY)
    parted = next((i for i in range(ends) if a["tokens"][i] != b["tokens"][i]), None)
    return {"prompt": prompt, "parted_at": parted, "gap": None if parted is None else a["gaps"][parted]}
