"""Record what transformers answers with the demo model.

`python tests/support/record_demo.py CHECKPOINT` writes tests/data/demo.{json,npz}.

The pictures are of the test split and drawn from a seed that no other thing uses. Answers are greedy, in float32, from the
checkpoint that the files in converters/demo/weights were converted from.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SEED, N = 77, 6                          # conversations of each kind


def main(checkpoint: Path) -> None:
    import torch
    import transformers

    from bench.sight import draw, hold, theirs

    examples = draw(N, SEED)
    answers = hold(theirs(checkpoint), examples)
    pictures: list[np.ndarray] = []
    conversations = []
    for example, said in zip(examples, answers):
        shown = range(len(pictures), len(pictures) + len(example.pictures))
        pictures += [p.pixels for p in example.pictures]
        turns = [{"task": t.task, "question": t.question, "role": t.role, "shown": n, "true": t.answer, "transformers": a}
                 for t, n, a in zip(example.turns, example.shown(), said)]
        conversations.append({"tools": example.functions(), "pictures": list(shown), "turns": turns})
    made = {"made_by": "tests/support/record_demo.py", "seed": SEED, "transformers": transformers.__version__, "torch": torch.__version__}
    (ROOT / "tests/data/demo.json").write_text(json.dumps({**made, "conversations": conversations}, indent=1) + "\n")
    np.savez_compressed(ROOT / "tests/data/demo.npz", *pictures)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(Path(sys.argv[1]))
