"""Drafts: the same greedy answers with and without them, in turns, by kind of work; by a draft model too; beside llama.cpp's with its own lookup.

Kinds are what drafts are good for, and what they are not: a function is edited, a text is asked about, a text is written freely.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .engines import Process
from .stats import summary

CODE = ('''def read_table(path, delimiter=",", skip=0):
    """Read a table of numbers and names from a text file."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number < skip or not line.strip():
                continue
            cells = []
            for cell in line.rstrip("\\n").split(delimiter):
                try:
                    cells.append(float(cell))
                except ValueError:
                    cells.append(cell.strip())
            rows.append(cells)
    return rows
''', '''class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance
        self.history = []

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount
        self.history.append(("deposit", amount))

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("not enough money")
        self.balance -= amount
        self.history.append(("withdraw", amount))
''', '''def shortest_path(graph, start, goal):
    distances = {start: 0}
    previous = {}
    queue = [(0, start)]
    while queue:
        distance, node = heapq.heappop(queue)
        if node == goal:
            break
        if distance > distances.get(node, float("inf")):
            continue
        for neighbour, weight in graph[node].items():
            other = distance + weight
            if other < distances.get(neighbour, float("inf")):
                distances[neighbour] = other
                previous[neighbour] = node
                heapq.heappush(queue, (other, neighbour))
    path = [goal]
    while path[-1] != start:
        path.append(previous[path[-1]])
    return path[::-1]
''')
EDITS = ("Write this function again with type hints.", "Write this class again with a method `transfer(self, other, amount)` at its end.",
         "Write this function again, and call it `route`.")
TEXTS = ('''The harbour office opens at seven in the morning and closes at five in the afternoon, except on Sundays, when it is closed. Boats that
arrive later tie up at the guest pier and report the next morning. A place costs twelve euros a night for boats of up to eight metres and twenty
euros for longer ones; water is included, electricity costs three euros a day. Showers need a coin, which the office sells. Dogs are welcome on
the piers but must be kept on a leash. Fires are not allowed anywhere in the harbour.''',
'''Glass is made of sand, soda and lime. Sand alone melts at about 1,700 degrees; soda lowers that to about 1,000, and lime keeps the glass from
dissolving in water. The molten glass is poured onto a bath of liquid tin, on which it spreads and becomes perfectly flat. It then cools slowly in a
long oven, so that no tension stays in it. Coloured glass has traces of metals: iron makes it green, cobalt blue, and gold a deep red.''',
'''Minutes of the meeting of 4 March. Present: Anna Berg, Tom Weiss, Li Chen. Anna reported that the new warehouse in Graz will be ready in June, two
weeks later than planned, because the doors were delivered late. Tom asked for a second forklift; the board agreed, up to 18,000 euros. Li presented the
figures of February: 412 orders, 9 returns, and 31,400 euros of sales. The next meeting is on 1 April at ten o'clock in room 204.''')
QUESTIONS = ("List every price and rule that the text names, with the words of the text.",
             "Which sentences of the text explain how glass becomes flat and coloured? Quote them.",
             "Who reported what? Repeat the facts of the text as a list.")
FREE = ("Write a short story about a lighthouse keeper.", "Explain why the sky is blue.", "Give advice to somebody who runs a first marathon.")


def work() -> dict[str, list[str]]:
    """Return what is asked, by kind."""
    return {"edit": [f"{ask}\n\n```python\n{code}```" for ask, code in zip(EDITS, CODE)],
            "question": [f"{text}\n\n{ask}" for ask, text in zip(QUESTIONS, TEXTS)], "free": list(FREE)}


def _ours(model: Any, ids: Sequence[int], n: int, speculate: bool) -> tuple[float, list[int], tuple[int, int]]:
    """Return the seconds of a token from the first one on, the tokens, and how many were drafted and accepted."""
    model.reset()
    answer = model.generate(list(ids), max_tokens=n, temperature=0, repeat_penalty=1, speculate=speculate)
    return answer.seconds / max(1, len(answer.tokens) - 1), answer.tokens, (answer.n_drafted, answer.n_accepted)


def run(path: Path, n_threads: int, n_generate: int, rounds: int, peer: Path | None, draft: Path | None = None) -> dict[str, Any]:
    """Measure each kind; answers must be the same with and without. peer: the folder of llama-cpp-python, to be measured in the same rounds; draft: a
    draft model, whose prompts are read within the measured time."""
    import pyengine as pe

    model = pe.load(path, n_ctx=1024, n_threads=n_threads)
    turns = [("plain", model, False), ("lookup", model, True)]
    if draft is not None:
        turns.append(("draft", pe.load(path, n_ctx=1024, n_threads=n_threads, draft=draft), True))
    asked = {kind: [model.chat_ids([{"role": "user", "content": text}]) for text in texts] for kind, texts in work().items()}
    others = Process("llama.cpp", "lookup_worker", path, "-t", n_threads, "--folder", peer) if peer else None
    seconds: dict[str, dict[str, list[float]]] = {kind: {} for kind in asked}
    drafts = {kind: {name: [0, 0] for name, *_ in turns} for kind in asked}
    equal = True
    try:
        for r in range(rounds + 1):                          # the first one warms up
            for kind, prompts in asked.items():
                order = turns[:: 1 if r % 2 == 0 else -1]
                got: dict[str, float] = {}
                texts: dict[str, list[list[int]]] = {}
                for name, one, on in order:
                    each = [_ours(one, ids, n_generate, on) for ids in prompts]
                    got[name], texts[name] = sum(s for s, _, _ in each), [t for _, t, _ in each]
                    drafts[kind][name] = [sum(d[i] for *_, d in each) for i in range(2)]
                    if others and name != "draft":
                        got[f"llama.cpp {name}"] = sum(others.call("generate", ids=ids, n=n_generate, lookup=on) for ids in prompts)
                equal &= all(found == texts["plain"] for found in texts.values())
                for name, value in got.items() if r else ():
                    seconds[kind].setdefault(name, []).append(value / len(prompts))
    finally:
        if others:
            others.__exit__(None, None, None)
    results = [_result(path.stem, kind, found, drafts[kind], equal) for kind, found in seconds.items()]
    return {"suite": "lookup", "generate": n_generate, "results": results}


def _result(model: str, kind: str, seconds: dict[str, list[float]], drafts: dict[str, list[int]], equal: bool) -> dict[str, Any]:
    """Return and print what one kind of work gave: tokens a second, and ratios within rounds."""
    rates = {name: summary([1 / s for s in found]) for name, found in seconds.items()}
    ratio = summary([a / b for a, b in zip(seconds["plain"], seconds["lookup"])])
    line = f"{model} {kind}: {rates['plain']['median']:.1f} tokens/s, with lookup {rates['lookup']['median']:.1f}: {ratio['median']:.2f} x"
    theirs = beside = None
    if "draft" in seconds:
        beside, (n, came) = summary([a / b for a, b in zip(seconds["plain"], seconds["draft"])]), drafts["draft"]
        line += f"; with the draft model {rates['draft']['median']:.1f}: {beside['median']:.2f} x, {came} of {n} drafted tokens accepted"
    if "llama.cpp plain" in seconds:
        theirs = summary([a / b for a, b in zip(seconds["llama.cpp plain"], seconds["llama.cpp lookup"])])
        line += f"; llama.cpp {rates['llama.cpp plain']['median']:.1f}, with its lookup {rates['llama.cpp lookup']['median']:.1f}: {theirs['median']:.2f} x"
    n, came = drafts["lookup"]
    print(f"{line}; {came} of {n} drafted tokens accepted; answers {'equal' if equal else 'DIFFER'}", flush=True)
    return {"name": f"{model} {kind}", "kind": kind, "rates": rates, "score": ratio, "llama_cpp_ratio": theirs, "draft_ratio": beside, "drafted": n, "accepted": came,
            "correct": equal}
