"""One answer: the prompt in the model's form, its text as it comes, Ctrl-C, and how long it took."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path
from types import FrameType
from typing import Any, TYPE_CHECKING

from pyengine.cli.paper import Paper, thought
from pyengine.cli.pictures import boxes_json, media_json, Picture, places, report_line, warn_of_loss
from pyengine.cli.screen import busy, note, show_json, size
from pyengine.errors import ModelNotFoundError, ModelWarning, shown
from pyengine.records import dataclass

if TYPE_CHECKING:
    from pyengine.chat.reply.deltas import Delta

MAX_TOKENS = -1                      # of an answer: until the model ends it, or the context is full
RATED = 16                           # tokens from which on a number of tokens per second says something
READING_AFTER_SECONDS = 0.5

# Names that makers give to models that were trained to answer; files without a chat template are told apart by them.
_TUNED = re.compile(r"(?:^|[^a-z])(?:it|instruct(?:ed|ion)?|chat|assistant|sft|dpo|rlhf)(?:$|[^a-z])", re.IGNORECASE)

Messages = list[dict[str, Any]]


@dataclass
class Settings:
    """What a user has set about an answer; the rest is as the model's files recommend.

    sampling   fields of SamplingParams
    think      True, False, a budget in tokens, or "low", "medium", "high"; None: as the model does by itself
    format     the JSON schema of answers
    tools      schemas of the tools that may be called
    compress   how the conversation's cells are compressed: a policy's text, "off": not at all; None: as the model was loaded
    """

    sampling: dict[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    think: bool | int | str | None = None
    compress: str | None = None
    format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of Model.chat and Model.stream; those that nobody has set are left out."""
        return {"max_tokens": self.max_tokens, **({"stop": list(self.stop)} if self.stop else {}),
                **({} if self.format is None else {"format": self.format}), **({} if self.compress is None else {"compress": self.compress}),
                **self.sampling}

    def wishes(self) -> dict[str, Any]:
        """Return those that Model.chat alone takes."""
        return {**({} if self.think is None else {"think": self.think}), **({"tools": self.tools} if self.tools else {})}


@dataclass(frozen=True)
class Shown:
    """How one answer came about. Seconds count from the question, to the first text and to the end."""

    answer: Any                      # a pyengine.Answer, as far as it came
    names: tuple[str, ...]           # of its pictures and videos, in the order of `answer.media`
    stopped: bool                    # by Ctrl-C
    n_prompt: int
    n_cached: int                    # tokens of the prompt that an earlier turn had left in the cache
    n_generated: int
    prompt_per_second: float         # tokens that were not in the cache
    generated_per_second: float      # after the first text
    first_seconds: float
    seconds: float
    thinking_seconds: float = 0.0

    def lines(self) -> list[str]:
        """Format the numbers for --verbose, first those of each picture."""
        lines = [report_line(name, info) for name, info in zip(self.names, self.answer.report.media)]
        if self.answer.thinking:
            lines.append(thought(self.answer.report.n_thinking, self.thinking_seconds))
        lines.append(f"prompt {_tokens(self.n_prompt)} ({self.n_cached} cached)"
                     f"{_rated(self.n_prompt - self.n_cached, self.prompt_per_second)}; "
                     f"answer {_tokens(self.n_generated)}{_rated(self.n_generated, self.generated_per_second)}; "
                     f"first text after {self.first_seconds:.3f} s, all after {self.seconds:.3f} s")
        return lines

    def cut(self, settings: Settings, n_ctx: int | None) -> str:
        """Say why an answer was cut before the model ended it; "" where it was not."""
        n = len(self.answer.tokens) or self.n_generated       # a server gives no tokens
        if self.stopped or self.answer.finish != "length":
            return ""
        if n == settings.max_tokens:
            return f"(cut after {_tokens(n)}; --max-tokens N, or -n N, allows more)"
        if n_ctx is None:
            return f"(cut after {_tokens(n)} by the server)"
        return f"(cut after {_tokens(n)}: the context of {n_ctx:,} tokens is full; --ctx N makes a larger one)"


class Span:
    """How long something goes on, from the first time that it is so to the first time that it is not."""

    def __init__(self) -> None:
        self._started: float | None = None
        self._ended: float | None = None

    def take(self, so: bool) -> None:
        """Take whether it is so now."""
        if so and self._started is None:
            self._started = time.perf_counter()
        elif not so and self._started is not None and self._ended is None:
            self._ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Its length so far."""
        if self._started is None:
            return 0.0
        return (time.perf_counter() if self._ended is None else self._ended) - self._started


def _tokens(n: int) -> str:
    return f"{n} token{'s' * (n != 1)}"


def _rated(n: int, per_second: float) -> str:
    """Format a speed, where there are enough tokens to speak of one."""
    return f", {per_second:.1f} tokens/s" if n >= RATED else ""


class Reading:
    """A line on standard error, where that is a terminal, while a prompt takes long to be read: "reading prompt 3,072/7,478".

    An instance is `progress` of a Stream. The line goes when it is left.
    """

    def __init__(self) -> None:
        self._lock, self._line, self._shown, self._on = threading.Lock(), "", 0, sys.stderr.isatty()
        self._timer = threading.Timer(READING_AFTER_SECONDS, self._show)
        self._timer.daemon = True

    def __call__(self, done: int, total: int) -> None:
        """Take the tokens that are read, of how many."""
        first, self._line = not self._line, f"reading prompt {done:,}/{total:,}"
        if self._on and first:
            self._timer.start()
        elif self._shown:
            self._show()

    def _show(self) -> None:
        with self._lock:
            if self._on:
                sys.stderr.write(f"\r{self._line}")
                sys.stderr.flush()
                self._shown = len(self._line)

    def leave(self) -> None:
        """Take the line away."""
        self._timer.cancel()
        with self._lock:
            self._on = False
            if self._shown:
                sys.stderr.write(f"\r{' ' * self._shown}\r")
                sys.stderr.flush()
            self._shown = 0


class Interrupt:
    """A context in which Ctrl-C ends an answer and not the program.

    Once text flows, the answer ends at the next piece and `pressed` is set. Before, and at a second press,
    KeyboardInterrupt is raised wherever the program stands.
    """

    def __init__(self) -> None:
        self.flowing = self.pressed = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.pressed or not self.flowing:
            raise KeyboardInterrupt
        self.pressed = True

    def __enter__(self) -> Interrupt:
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGINT, self._previous)


def is_base(metadata: Any, path: str | Path) -> bool:
    """Say whether a model only continues text: there is no chat template, and no name of one that was trained to answer."""
    if "tokenizer.chat_template" in metadata:
        return False
    names = (metadata.get(f"general.{key}", "") for key in ("name", "finetune", "basename"))
    return not any(isinstance(name, str) and _TUNED.search(name) for name in (*names, Path(path).stem))


def user_message(parts: Sequence[str | Picture]) -> dict[str, Any]:
    """Return a user's turn: a text alone as it is, else parts in their order."""
    if all(isinstance(part, str) for part in parts):
        return {"role": "user", "content": "".join(map(str, parts))}
    content = [{"type": "text", "text": part} if isinstance(part, str) else part.part() for part in parts]
    return {"role": "user", "content": content}


def text_of(message: dict[str, Any]) -> str:
    """Return the text of a turn, without its pictures."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def written(message: dict[str, Any]) -> str:
    """Format a turn as it can be shown: "[cat.png]" stands for a picture."""
    content = message["content"]
    text = content if isinstance(content, str) else "".join(
        part["text"] if part["type"] == "text" else f"[{part['name']}]" for part in content)
    calls = [f"[{call_text(call['function']['name'], call['function']['arguments'])}]" for call in message.get("tool_calls", ())]
    return " ".join(filter(None, (text, *calls)))


def call_text(name: str, arguments: str) -> str:
    """Format a call of a tool as Python writes it: warmth(city="Rome")."""
    try:
        values = json.loads(arguments or "{}")
        return f"{name}({', '.join(f'{key}={json.dumps(value, ensure_ascii=False)}' for key, value in values.items())})"
    except (ValueError, AttributeError, RecursionError):     # what a model wrote is no object
        return f"{name}({arguments})"


def media_of(messages: Messages) -> list[dict[str, Any]]:
    """Return the parts that are pictures and videos, in their order."""
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return [part for content in contents for part in content if part["type"] != "text"]


@dataclass(frozen=True)
class Question:
    """A conversation that waits for an answer. Raw, the model goes on with the messages' text, one a paragraph.

    Pictures of a raw question come before all text.
    """

    messages: Messages
    raw: bool = False

    def names(self) -> tuple[str, ...]:
        """Return the names of the pictures and videos, in the order in which an answer reports on them."""
        return tuple(part["name"] for part in media_of(self.messages))

    def _raw(self) -> dict[str, Any]:
        return {"prompt": "\n".join(map(text_of, self.messages)),
                "images": [part[part["type"]] for part in media_of(self.messages)]}

    def stream(self, model: Any, settings: Settings) -> Any:
        """Return the answer's pieces, a pyengine.engine.answer.Stream; pictures are encoded when this returns."""
        if self.raw:
            return model.stream(**self._raw(), **settings.arguments())
        return model.chat(self.messages, stream=True, **settings.arguments(), **settings.wishes())


def stream(model: Any, question: Question, settings: Settings, write: Callable[[Delta, Any], None]) -> Shown:
    """Give the pieces of an answer as they come, each with the report so far, until its end or Ctrl-C. Raises what generation raises."""
    from pyengine.engine.request import Report

    before, text, origin, stopped, pieces = dict(model.stats), [], Report(), False, None
    names, new = question.names(), Question(question.messages[-1:]).names()
    meanwhile, reading = busy(f"looking at {', '.join(new)}" if new else ""), Reading()
    asked = started = time.perf_counter()
    first, n_first, thinks = None, 0, Span()
    try:
        with Interrupt() as interrupt:
            with meanwhile:
                pieces = question.stream(model, settings)     # tokenizes; the prompt is processed at the first next()
            origin, pieces.progress = pieces.report, reading
            started = time.perf_counter()
            for name, info in zip(names, origin.media):
                warn_of_loss(name, info)
            for delta in pieces.deltas():
                if first is None:
                    first, n_first = time.perf_counter(), model.stats["generated_tokens"]
                    interrupt.flowing = True
                    reading.leave()
                thinks.take(delta.kind == "thinking")
                if delta.kind == "text":
                    text.append(delta.text)
                write(delta, origin)
                if interrupt.pressed:
                    stopped = True
                    break
    except KeyboardInterrupt:                             # raised within a step: what the cache holds is not certain
        if pieces is not None:
            pieces.close()
        model.reset()
        stopped = True
    finally:
        reading.leave()
        if pieces is not None:
            pieces.close()
    ended = time.perf_counter()
    first = ended if first is None else first
    n_prompt, n_cached, n_generated = (model.stats[name] - before[name]
                                       for name in ("prompt_tokens", "cached_tokens", "generated_tokens"))
    n_later = model.stats["generated_tokens"] - n_first if n_first else 0
    return Shown(_whole("".join(text), origin), names, stopped, n_prompt, n_cached, n_generated, rate(n_prompt - n_cached, first - started),
                 rate(n_later, ended - first), first - asked, ended - asked, thinks.seconds)


def _whole(text: str, report: Any) -> Any:
    """Return the answer that pieces were of."""
    from pyengine.engine.answer import Answer
    from pyengine.engine.request import Report

    if type(report) is Report:
        return Answer(text, report)
    from pyengine.cli.talk.remote import RemoteAnswer          # HTTP and TLS take 15 ms to import

    return RemoteAnswer(text, report)


def print_answer(model: Any, question: Question, settings: Settings, verbose: bool) -> tuple[Any, bool]:
    """Write an answer to standard output as it comes, ended by a newline; returns it, and whether Ctrl-C ended it.

    Raises what generation raises.
    """
    paper = Paper(wrap=True)
    try:
        report = stream(model, question, settings, paper.take)
        paper.write("")
    finally:
        paper.end()
    if cut := report.cut(settings, model.n_ctx):
        note(cut)
    for line in places(report.answer, report.names):
        note(line)
    for line in report.lines() if verbose else ():
        note(line)
    return report.answer, report.stopped


def print_json(model: Any, question: Question, settings: Settings, verbose: bool) -> tuple[Any, bool]:
    """Write an answer to standard output as one object of JSON, with its tokens, pictures and boxes, and how fast it came.

    Returns as `print_answer`, and raises what generation raises; `verbose` adds nothing.
    """
    report = stream(model, question, settings, lambda delta, _: None)
    show_json(summary(model, question, report))
    return report.answer, report.stopped


def print_jsonl(model: Any, question: Question, settings: Settings, verbose: bool) -> tuple[Any, bool]:
    """Write {"piece": text} to standard output for each piece as it comes, {"thinking": text} for what the model writes for itself, and
    last the object of `print_json`: one a line."""
    def write(delta: Delta, _: Any) -> None:
        if delta.kind in ("text", "thinking"):
            _line({"piece" if delta.kind == "text" else "thinking": delta.text})

    report = stream(model, question, settings, write)
    _line(summary(model, question, report))
    return report.answer, report.stopped


def _line(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


def summary(model: Any, question: Question, report: Shown) -> dict[str, Any]:
    """Return an answer and how it came about as plain data."""
    from pyengine.memory.plan import MemoryPlan

    found = report.answer
    n_later = max(0, len(found.tokens) - 1)               # the first token comes from the prompt's last step
    return {
        "model": model.plan.model, "text": str(found), "tokens": found.tokens,
        "finish": "interrupted" if report.stopped else found.finish,
        "chat_template": not question.raw, "n_prompt": found.n_prompt, "n_cached": found.n_cached,
        "n_drafted": found.n_drafted, "n_accepted": found.n_accepted,
        **({"drafts": {origin: d._asdict() for origin, d in found.report.drafts.items()}} if found.n_drafted else {}),
        "prompt_seconds": found.prompt_seconds, "generation_seconds": found.seconds,
        "prompt_tokens_per_second": rate(found.n_prompt - found.n_cached, found.prompt_seconds),
        "generation_tokens_per_second": rate(n_later, found.seconds),
        **({"thinking": found.thinking} if found.thinking else {}),
        "media": media_json(question.names(), found.report.media), **boxes_json(found),
        **({"memory": memory(model)} if isinstance(model.plan, MemoryPlan) else {}),
    }


def recommended(model: str) -> dict[str, int]:
    """Return the whole numbers that a model's Modelfile in Ollama's store gives, by name: num_ctx, num_predict.

    A name that is only the beginning of the model's is told. What cannot be found is left to `load`. Raises: InvalidModelError.
    """
    from pyengine.files.stores import look_up, read_modelfile

    if os.path.isfile(model):
        return {}
    try:
        found = look_up(model)
    except ModelNotFoundError:
        return {}
    if model.casefold() not in map(str.casefold, (found.name, *found.aliases)):
        note(f"({found.name})")
    numbers: dict[str, int] = {}
    for name, least in (("num_ctx", 1), ("num_predict", -2)):
        value = read_modelfile(found).parameters.get(name)
        if type(value) is int and value >= least:
            numbers[name] = value
        elif value is not None:
            warnings.warn(f"Ollama's parameter {name} is ignored: {shown(value)} is no whole number from {least} on", ModelWarning)
    return numbers


def limit(max_tokens: int | None) -> int | None:
    """Return the most tokens of an answer, None for no limit, from a number that may be below 0."""
    return None if max_tokens is None or max_tokens < 0 else max_tokens


def check_sampling(sampling: dict[str, Any]) -> None:
    """Check sampling parameters before a model is loaded. Raises: RequestError."""
    from pyengine.text.sampling import SamplingParams

    SamplingParams(**sampling)


def breakers(texts: Sequence[str]) -> tuple[str, ...]:
    """Return sequence breakers as they were typed: \\n is the end of a line, and `none` alone says that there are none."""
    return () if tuple(texts) == ("none",) else tuple(text.replace("\\n", "\n") for text in texts)


def rate(count: int, seconds: float) -> float:
    """Return `count` per second; 0 where nothing was counted."""
    return count / max(seconds, 1e-9) if count else 0.0


def memory(model: Any) -> dict[str, int]:
    """Return bytes: what the plan allocates, what it reads from the mapped file, and what the process has resident."""
    import psutil

    return {"planned_bytes": model.plan.total, "mapped_bytes": model.plan.of("mapped"),
            "resident_bytes": psutil.Process().memory_info().rss}


def note_memory(model: Any) -> None:
    """Say on standard error what the model takes."""
    m = memory(model)
    s = model.stats
    read = model.plan.decoding if s.get("image_misses") or s.get("image_hits") else 0
    note(f"memory: planned {size(m['planned_bytes'])} and {size(m['mapped_bytes'])} mapped, resident {size(m['resident_bytes'])}"
         + f" (reading a picture may take up to {size(read)} more for a moment)" * bool(read))
    if s.get("image_misses"):
        note(f"image cache: {s['image_hits']} hits, {s['image_misses']} misses, {size(s['image_cache_bytes'])} kept")
