"""Drafts: the same greedy answers with and without them, in turns, by kind of work; by a draft model too; beside llama.cpp's with its own lookup.

Kinds are what drafts are good for, and what they are not: a function is edited, as editors ask for it and with the words that models add when nobody
asks them not to; a text is asked about; a text is written freely.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from .serving import Server
from .stats import summary

CTX = 1024                           # positions of a conversation
LOOKUPS = {"plain": "none", "lookup": "ngram-simple"}       # llama.cpp's names; of its ways to look prompts up the fastest by default (`ngram-*`)

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
    edits = list(zip(EDITS, CODE))
    return {"edit": [f"{ask} Answer with the code only.\n\n```python\n{code}```" for ask, code in edits],
            "edit and explain": [f"{ask}\n\n```python\n{code}```" for ask, code in edits],
            "question": [f"{text}\n\n{ask}" for ask, text in zip(QUESTIONS, TEXTS)], "free": list(FREE)}


Answered = tuple[float, list[int], tuple[int, int]]          # seconds of a token from the first one on, the tokens, how many were drafted and accepted


class Ours:
    """A model of this package. Prompts stay in its caches, so they are read once."""

    def __init__(self, model: Any, speculate: bool):
        self.model, self.speculate = model, speculate

    def answer(self, ids: Sequence[int], n: int, place: int) -> Answered:
        answer = self.model.generate(list(ids), max_tokens=n, temperature=0, repeat_penalty=1, speculate=self.speculate)
        return answer.seconds / max(1, len(answer.tokens) - 1), answer.tokens, (answer.n_drafted, answer.n_accepted)

    def end(self) -> None:
        self.model.close()


class Theirs:
    """llama.cpp's server, with a place for each prompt, so that it reads them once too."""

    def __init__(self, command: Path, path: Path, n_threads: int, n_seq: int, kind: str, port: int):
        threads = ["-t", str(n_threads), "-tb", str(n_threads)]
        self.server = Server([str(command), "-m", str(path), "-c", str(CTX * n_seq), "-np", str(n_seq), *threads, "--spec-type", LOOKUPS[kind]], port)

    def answer(self, ids: Sequence[int], n: int, place: int) -> Answered:
        body = {"prompt": list(ids), "n_predict": n, "temperature": 0, "repeat_penalty": 1, "return_tokens": True, "cache_prompt": True, "id_slot": place}
        asked = Request(f"http://127.0.0.1:{self.server.port}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"})
        reply = json.load(urlopen(asked, timeout=600))
        times = reply["timings"]
        return (times["predicted_ms"] / 1000 / max(1, times["predicted_n"] - 1), reply["tokens"],
                (times.get("draft_n", 0), times.get("draft_n_accepted", 0)))

    def end(self) -> None:
        self.server.__exit__()


def run(path: Path, n_threads: int, n_generate: int, rounds: int, seconds: float, llama_server: Path | None, draft: Path | None = None,
        kinds: Sequence[str] = ()) -> dict[str, Any]:
    """Measure each kind, or `kinds`; answers must be the same with and without. No round begins behind this many seconds.

    llama_server: llama.cpp's command, to be measured in the same rounds; draft: a draft model, whose prompts are read within the measured time
    """
    import pyengine as pe

    asked = {kind: texts for kind, texts in work().items() if not kinds or kind in kinds}
    n_seq = sum(map(len, asked.values()))
    settings = {"n_ctx": CTX, "n_threads": n_threads, "n_seq": n_seq}
    model = pe.load(path, **settings)
    engines: dict[str, Ours | Theirs] = {"plain": Ours(model, False), "lookup": Ours(model, True)}
    try:
        if draft is not None:
            engines["draft"] = Ours(pe.load(path, **settings, draft=draft), True)
        for port, kind in enumerate(LOOKUPS if llama_server else (), 8982):
            engines[f"llama.cpp {kind}"] = Theirs(llama_server, path, n_threads, n_seq, kind, port)
        return {"suite": "lookup", "generate": n_generate, "results": _rounds(path.stem, engines, asked, n_generate, rounds, seconds)}
    finally:
        for engine in engines.values():
            engine.end()


def _rounds(model: str, engines: dict[str, Any], asked: dict[str, list[str]], n: int, rounds: int, most: float) -> list[dict[str, Any]]:
    """Measure kind by kind: what is read and warms up first, then rounds whose order is reversed each time."""
    results, place, each = [], 0, most / len(asked)
    for kind, texts in asked.items():
        prompts = [engines["plain"].model.chat_ids([{"role": "user", "content": text}]) for text in texts]
        for engine in engines.values():
            for i, ids in enumerate(prompts):
                engine.answer(ids, 4, place + i)
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        drafts, equal, began = {}, True, time.monotonic()
        for r in range(rounds):
            if r and time.monotonic() - began > each:
                break
            texts_of: dict[str, list[list[int]]] = {}
            for name in list(engines)[:: 1 if r % 2 == 0 else -1]:
                answers = [engines[name].answer(ids, n, place + i) for i, ids in enumerate(prompts)]
                seconds[name].append(sum(s for s, _, _ in answers) / len(answers))
                texts_of[name], drafts[name] = [t for _, t, _ in answers], [sum(d[i] for *_, d in answers) for i in range(2)]
            equal &= all(found == texts_of["plain"] for name, found in texts_of.items() if not name.startswith("llama.cpp"))
        results.append(_result(model, kind, seconds, drafts, equal))
        place += len(prompts)
    return results


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
    if "llama.cpp lookup" in drafts:
        n, came = drafts["llama.cpp lookup"]
        line += f", {came} of {n} accepted"
    n, came = drafts["lookup"]
    print(f"{line}; {came} of {n} drafted tokens accepted; answers {'equal' if equal else 'DIFFER'}", flush=True)
    return {"name": f"{model} {kind}", "kind": kind, "rates": rates, "score": ratio, "llama_cpp_ratio": theirs, "draft_ratio": beside, "drafted": n, "accepted": came,
            "correct": equal}
