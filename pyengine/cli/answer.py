"""One answer: the prompt in the model's form, its text as it comes, Ctrl-C, and how long it took."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from pyengine.cli.screen import note, show, size
from pyengine.errors import RequestError

MAX_TOKENS = 512                     # of an answer, as in Model.generate; a small model may else repeat itself for ever

# Names that makers give to models that were trained to answer; files without a chat template are told apart by them.
_TUNED = re.compile(r"(?:^|[^a-z])(?:it|instruct(?:ed|ion)?|chat|assistant|sft|dpo|rlhf)(?:$|[^a-z])", re.IGNORECASE)

Messages = list[dict[str, Any]]


@dataclass
class Settings:
    """What a user may set about an answer. `sampling`: the fields of SamplingParams that do not have their defaults."""

    sampling: dict[str, Any] = field(default_factory=dict)
    max_tokens: int | None = MAX_TOKENS
    stop: tuple[str, ...] = ()

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of Model.chat and Model.stream."""
        return {"max_tokens": self.max_tokens, "stop": list(self.stop), **self.sampling}


@dataclass(frozen=True)
class Report:
    """How one answer came about. Seconds count from the question, to the first text and to the end."""

    text: str
    stopped: bool                    # by Ctrl-C
    n_prompt: int
    n_cached: int                    # tokens of the prompt that an earlier turn had left in the cache
    n_generated: int
    prompt_per_second: float         # tokens that were not in the cache
    generated_per_second: float      # after the first text
    first_seconds: float
    seconds: float

    def line(self) -> str:
        """The numbers for --verbose."""
        return (f"prompt {self.n_prompt} tokens ({self.n_cached} cached), {self.prompt_per_second:.1f} tokens/s; "
                f"answer {self.n_generated} tokens, {self.generated_per_second:.1f} tokens/s; "
                f"first text after {self.first_seconds:.3f} s, all after {self.seconds:.3f} s")


class Interrupt:
    """Make Ctrl-C end an answer and not the program, while entered.

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
    """Whether a model only continues text: there is no chat template, and no name of one that was trained to answer."""
    if "tokenizer.chat_template" in metadata:
        return False
    names = (metadata.get(f"general.{key}", "") for key in ("name", "finetune", "basename"))
    return not any(isinstance(name, str) and _TUNED.search(name) for name in (*names, Path(path).stem))


def open_image(path: str) -> Any:
    """Read a picture whole. Raises: RequestError for a path that is none, or a file that Pillow cannot read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except FileNotFoundError:
        raise RequestError(f"--image {path}: no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:      # what Pillow's formats raise
        raise RequestError(f"--image {path}: cannot be read as a picture: {error}") from None


def user_message(text: str, images: list[Any]) -> dict[str, Any]:
    """Return a user's turn: the text alone, or parts with the pictures first."""
    if not images:
        return {"role": "user", "content": text}
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


@dataclass(frozen=True)
class Question:
    """A conversation that waits for an answer. Raw, the model goes on with the messages' text, one a paragraph."""

    messages: Messages
    raw: bool = False
    images: tuple[Any, ...] = ()     # of a raw prompt; else they stand in the messages

    def text(self) -> str:
        """The prompt of a raw question."""
        return "\n".join(message["content"] for message in self.messages)

    def stream(self, model: Any, settings: Settings) -> Iterator[str]:
        """The answer's pieces."""
        if self.raw:
            return model.stream(self.text(), images=self.images, **settings.arguments())
        return model.chat(self.messages, stream=True, **settings.arguments())

    def generate(self, model: Any, settings: Settings) -> Any:
        """The whole answer, a pyengine.Answer."""
        if self.raw:
            return model.generate(self.text(), images=self.images, **settings.arguments())
        return model.chat(self.messages, **settings.arguments())


def stream(model: Any, question: Question, settings: Settings, write: Callable[[str], None]) -> Report:
    """Write the pieces of an answer as they come, until its end or Ctrl-C. Raises what generation raises."""
    before, text, stopped = dict(model.stats), [], False
    asked = started = time.perf_counter()
    first, n_first = None, 0
    try:
        with Interrupt() as interrupt:
            pieces = question.stream(model, settings)     # tokenizes; the prompt is processed at the first next()
            started = time.perf_counter()
            for piece in pieces:
                if first is None:
                    first, n_first = time.perf_counter(), model.stats["generated_tokens"]
                    interrupt.flowing = True
                text.append(piece)
                write(piece)
                if interrupt.pressed:
                    stopped = True
                    break
    except KeyboardInterrupt:                             # raised within a step: what the cache holds is not certain
        model.reset()
        stopped = True
    ended = time.perf_counter()
    first = ended if first is None else first
    n_prompt, n_cached, n_generated = (model.stats[name] - before[name]
                                       for name in ("prompt_tokens", "cached_tokens", "generated_tokens"))
    n_later = model.stats["generated_tokens"] - n_first if text else 0
    return Report("".join(text), stopped, n_prompt, n_cached, n_generated, rate(n_prompt - n_cached, first - started),
                  rate(n_later, ended - first), first - asked, ended - asked)


def print_answer(model: Any, question: Question, settings: Settings, verbose: bool) -> Report:
    """Write an answer to standard output as it comes, ended by a newline. Raises what generation raises."""
    last = ""

    def write(piece: str) -> None:
        nonlocal last
        last = piece
        show(piece, end="")

    try:
        report = stream(model, question, settings, write)
    finally:
        show(end="" if last.endswith("\n") else "\n")
    if verbose:
        note(report.line())
    return report


def answer_json(model: Any, question: Question, settings: Settings) -> dict[str, Any]:
    """Return an answer with its tokens and how fast it came, as plain data. Raises what generation raises."""
    found = question.generate(model, settings)
    n_later = max(0, len(found.tokens) - 1)               # the first token comes from the prompt's last step
    return {
        "model": model.plan.model, "text": str(found), "tokens": found.tokens, "finish": found.finish,
        "chat_template": not question.raw, "n_prompt": found.n_prompt, "n_cached": found.n_cached,
        "prompt_seconds": found.prompt_seconds, "generation_seconds": found.seconds,
        "prompt_tokens_per_second": rate(found.n_prompt - found.n_cached, found.prompt_seconds),
        "generation_tokens_per_second": rate(n_later, found.seconds), "memory": memory(model),
    }


def check_sampling(sampling: dict[str, Any]) -> None:
    """Check sampling parameters before a model is loaded. Raises: RequestError."""
    from pyengine.sampling import SamplingParams

    SamplingParams(**sampling)


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
    note(f"memory: planned {size(m['planned_bytes'])} and {size(m['mapped_bytes'])} mapped, "
         f"resident {size(m['resident_bytes'])}")
