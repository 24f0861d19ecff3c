"""The server under load: streams of mixed length, clients that leave and that read slowly, every answer compared with the one given alone.

A second measure asks 16 streams of this server and of llama.cpp's `llama-server`, in turns, for the same prompts.
"""

from __future__ import annotations

import asyncio
import base64
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import psutil

from .stats import summary
from .streams import ask, Client, Reply

LEAVES, SLOW = 0.10, 0.05            # shares of clients
PAUSE = 0.2                          # seconds before each read of a slow one
START_SECONDS = 120.0
SEQ, CTX = 16, 1024                  # conversations at once, and positions of each


class Server:
    """A server in a process of its own, ended with the block."""

    def __init__(self, command: Sequence[str], port: int):
        self.port = port
        self.process = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        self.facts = psutil.Process(self.process.pid)
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and self.process.poll() is None:
            try:
                if b"ok" in urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read():
                    return
            except OSError:
                time.sleep(0.2)
        self.process.kill()
        raise SystemExit(f"bench: {' '.join(command)} does not serve")

    @classmethod
    def ours(cls, models: Sequence[Path], n_threads: int) -> Server:
        """Start this package's."""
        return cls([sys.executable, "-m", "pyengine", "serve", *map(str, models), "--ctx", str(CTX), "--seq", str(SEQ), "--threads", str(n_threads)], 8980)

    @classmethod
    def theirs(cls, command: Path, model: Path, n_threads: int) -> Server:
        """Start llama.cpp's, with as many places of the same size."""
        return cls([str(command), "-m", str(model), "-c", str(CTX * SEQ), "-np", str(SEQ), "-t", str(n_threads)], 8981)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.terminate()
        self.process.wait(60)

    def metric(self, name: str) -> float:
        """Return a number of /metrics, summed over models."""
        text = urlopen(f"http://127.0.0.1:{self.port}/metrics").read().decode()
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(rf"{name}(\{{|\s)", line))

    def loop_seconds(self) -> float:
        """Return the processor's seconds of the thread that speaks HTTP: the process's first one."""
        return next(t.user_time + t.system_time for t in self.facts.threads() if t.id == self.process.pid)


def texts(number: int, rng: random.Random) -> list[dict[str, Any]]:
    """Make requests of mixed length about the words of a page of ours."""
    words = re.findall(r"[A-Za-z]+", (Path(__file__).parents[1] / "README.md").read_text())
    made = []
    for i in range(number):
        n, start = rng.choice((12, 40, 120, 300)), rng.randrange(len(words) - 400)
        sampling = {"temperature": 0} if i % 2 else {"temperature": 0.8, "seed": i}
        made.append({"messages": [{"role": "user", "content": "Go on: " + " ".join(words[start : start + n])}],
                     "max_tokens": rng.choice((8, 24, 64, 128)), **sampling})
    return made


def pictures(number: int, rng: random.Random) -> list[dict[str, Any]]:
    """Make questions about the demo model's pictures."""
    folder, made = Path(__file__).parents[1] / "converters" / "demo" / "samples", []
    asked = {"word.png": ("What does it say?", "What colour is the text?"), "shapes.png": ("Where is the purple star?", "How many shapes are there?"),
             "form.png": ("What is the TOTAL?",)}
    for _ in range(number):
        name = rng.choice(sorted(asked))
        url = "data:image/png;base64," + base64.b64encode((folder / name).read_bytes()).decode()
        made.append({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": rng.choice(asked[name])}]}],
                     "max_tokens": 40, "temperature": 0})
    return made


async def _alone(port: int, requests: Sequence[dict[str, Any]]) -> list[Reply]:
    client = Client(port)
    replies = [await ask(client, r) for r in requests]
    client.close()
    return replies


async def _together(port: int, requests: Sequence[dict[str, Any]]) -> list[Reply]:
    clients = [Client(port) for _ in requests]
    replies = list(await asyncio.gather(*(ask(c, r) for c, r in zip(clients, requests))))
    for client in clients:
        client.close()
    return replies


async def _stream(port: int, known: Sequence[tuple[dict[str, Any], Reply]], until: float, rng: random.Random, found: dict[str, Any]) -> None:
    """Ask one thing after the other until a time comes."""
    client = Client(port)
    while time.monotonic() < until:
        body, want = rng.choice(known)
        leaves, slow = rng.random() < LEAVES, rng.random() < SLOW
        try:
            got = await ask(client, body, rng.randrange(1, 6) if leaves else None, PAUSE if slow else 0.0)
        except OSError as error:
            found["wrong"].append(f"connection: {error}")
            continue
        if got.error:
            found["wrong"].append(got.error[:300])
            continue
        found["tokens"] += got.tokens
        if got.finish:                                       # it has ended, also where the client would have left later
            found["finished"] += 1
            if got.first:
                found["first"].append(got.first)
            if got.text != want.text:
                found["different"].append([want.text, got.text])
        else:
            found["left"] += 1
    client.close()


async def _watch(server: Server, until: float, seen: list[tuple[float, int, int]]) -> None:
    began = time.monotonic()
    while time.monotonic() < until:
        seen.append((time.monotonic() - began, server.facts.memory_info().rss, server.facts.num_fds()))
        await asyncio.sleep(1)


def load(model: Path, seeing: Path | None, streams: int, seeing_streams: int, minutes: float, n_threads: int) -> dict[str, Any]:
    """Keep a server busy, and say what became of every answer, of memory, of files, and what HTTP costs."""
    rng = random.Random(0)
    models = [model, *([seeing] if seeing else [])]
    found: dict[str, Any] = {"finished": 0, "left": 0, "tokens": 0, "first": [], "wrong": [], "different": []}
    with Server.ours(models, n_threads) as server:
        asked = [{**r, "model": model.stem} for r in texts(48, rng)]
        shown = [{**r, "model": seeing.stem} for r in pictures(16, rng)] if seeing else []
        known = list(zip(asked, asyncio.run(_alone(server.port, asked))))
        seen_alone = list(zip(shown, asyncio.run(_alone(server.port, shown))))
        if bad := [reply.error for _, reply in (*known, *seen_alone) if reply.error]:
            raise SystemExit(f"bench: the server refuses what is asked: {bad[0]}")

        async def all_of_them() -> list[tuple[float, int, int]]:
            until, seen = time.monotonic() + 60 * minutes, list[tuple[float, int, int]]()
            await asyncio.gather(_watch(server, until, seen),
                                 *(_stream(server.port, known, until, random.Random(i), found) for i in range(streams)),
                                 *(_stream(server.port, seen_alone, until, random.Random(-1 - i), found) for i in range(seeing_streams if seeing else 0)))
            return seen

        http, began = server.loop_seconds(), time.monotonic()
        seen = asyncio.run(all_of_them())
        seconds, http = time.monotonic() - began, server.loop_seconds() - http
        time.sleep(2)
        idle = {"running": server.metric("pyengine_requests_running"), "waiting": server.metric("pyengine_requests_waiting"),
                "files": server.facts.num_fds(), "files_before": seen[0][2]}
    settled = [rss for at, rss, _ in seen if at > min(60, seconds / 3)]
    made, ended = found["tokens"], found["finished"] + found["left"]
    return {"streams": streams, "with_pictures": seeing_streams if seeing else 0, "minutes": seconds / 60, "finished": found["finished"], "left": found["left"],
            "wrong": found["wrong"][:10], "n_wrong": len(found["wrong"]), "different": found["different"][:5], "n_different": len(found["different"]),
            "tokens_per_second": made / seconds, "first_p50": float(np.percentile(found["first"], 50)), "first_p95": float(np.percentile(found["first"], 95)),
            "http_ms_per_token": 1e3 * http / max(1, made),
            "http_ms_per_answer": 1e3 * http / max(1, ended), "tokens_per_answer": made / max(1, ended),
            "resident_mb": [settled[0] / 1e6, min(settled) / 1e6, max(settled) / 1e6, settled[-1] / 1e6],
            "idle": idle, "correct": not found["wrong"] and not found["different"] and not idle["running"] and not idle["waiting"]}


def beside(model: Path, command: Path, streams: int, rounds: int, n_threads: int) -> dict[str, Any]:
    """Measure tokens/s and times to first tokens of both servers at so many streams, in turns, and whether answers are those given alone."""
    samples: dict[str, dict[str, list[float]]] = {}
    with Server.ours([model], n_threads) as ours, Server.theirs(command, model, n_threads) as theirs:
        servers = {"pyengine": ours, "llama.cpp": theirs}
        for r in range(rounds + 1):                          # the first one warms up; each asks what was not asked before
            asked = [{**q, "model": model.stem} for q in texts(streams, random.Random(r))]
            last = {}
            for name in list(servers)[:: 1 if r % 2 == 0 else -1]:
                began = time.perf_counter()
                got = last[name] = asyncio.run(_together(servers[name].port, asked))
                seconds = time.perf_counter() - began
                if r:
                    into = samples.setdefault(name, {"tokens_per_second": [], "first_p95": []})
                    into["tokens_per_second"].append(sum(g.tokens for g in got) / seconds)
                    into["first_p95"].append(float(np.percentile([g.first for g in got if g.first], 95)))
        same = {name: sum(g.text == a.text for g, a in zip(last[name], asyncio.run(_alone(s.port, asked)))) for name, s in servers.items()}
    result = {name: {**{k: summary(v) for k, v in found.items()}, "same_as_alone": f"{same[name]} of {streams}"} for name, found in samples.items()}
    ratio = result["pyengine"]["tokens_per_second"]["median"] / result["llama.cpp"]["tokens_per_second"]["median"]
    return {"streams": streams, **result, "ratio": ratio, "correct": same["pyengine"] == streams}


def run(model: Path, seeing: Path | None, numbers: tuple[int, int], minutes: float, command: Path | None, rounds: int, n_threads: int) -> dict[str, Any]:
    """Run the load, for some minutes, and the comparison, where llama-server is given; 0 minutes or no command leave one out."""
    results = []
    if minutes:
        results.append({"test": "load", **(found := load(model, seeing, *numbers, minutes, n_threads))})
        print(f"load: {found['finished']} answers, {found['left']} left, {found['n_wrong']} errors, {found['n_different']} differ; "
              f"{found['tokens_per_second']:.0f} tokens/s, first token p50 {found['first_p50']:.2f} s, p95 {found['first_p95']:.2f} s; "
              f"HTTP {found['http_ms_per_token']:.3f} ms a token, {found['http_ms_per_answer']:.2f} an answer of {found['tokens_per_answer']:.1f} tokens; "
              f"resident {' '.join(f'{m:.0f}' for m in found['resident_mb'])} MB; idle {found['idle']}")
    if command:
        results.append({"test": "beside", **(found := beside(model, command, 16, rounds, n_threads))})
        for name in ("pyengine", "llama.cpp"):
            f = found[name]
            print(f"{name}: {f['tokens_per_second']['median']:.0f} tokens/s at 16 streams, first token p95 {f['first_p95']['median']:.2f} s, as alone: {f['same_as_alone']}")
        print(f"ratio {found['ratio']:.2f}")
    return {"suite": "serving", "model": model.name, "results": results}
