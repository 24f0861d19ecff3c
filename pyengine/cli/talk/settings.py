"""What a user may set in a conversation, by `/set`, and what holds where nothing is set."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, fields
from typing import Any

from pyengine.cli import answer
from pyengine.cli.paper import FOLDED, HIDDEN, SHOWN
from pyengine.errors import RequestError

SAMPLING: dict[str, type] = {"temperature": float, "top_k": int, "top_p": float, "min_p": float, "typical_p": float,
                             "repeat_penalty": float, "repeat_last_n": int, "presence_penalty": float,
                             "frequency_penalty": float, "seed": int, "top_n_sigma": float, "xtc_probability": float, "xtc_threshold": float,
                             "dynatemp_range": float, "dynatemp_exponent": float, "mirostat": int, "mirostat_tau": float,
                             "mirostat_eta": float, "dry_multiplier": float, "dry_base": float, "dry_allowed_length": int,
                             "dry_penalty_last_n": int, "dry_sequence_breakers": tuple}
KEEP = ("all", "latest")
SWITCHES = ("on", "off")
THINK = ("auto", "on", "off", "low", "medium", "high")          # or a number of tokens
WORDS = {"keep": KEEP, "thinking": (SHOWN, FOLDED, HIDDEN), "wordwrap": SWITCHES, "verbose": SWITCHES}
MEANINGS = {
    "temperature": "sampling temperature; 0 always takes the most likely token",
    "top_k": "keep the K most likely tokens; 0: all",
    "top_p": "nucleus sampling: keep the most likely tokens up to total probability P; 1: off",
    "min_p": "drop tokens less likely than P times the most likely one; 0: off",
    "typical_p": "locally typical sampling up to total probability P; 1: off",
    "repeat_penalty": "divide logits of recent tokens by X; 1: off",
    "repeat_last_n": "how many tokens count as recent for the penalties; -1: all",
    "presence_penalty": "subtract X from logits of recent tokens; 0: off",
    "frequency_penalty": "subtract X from logits of recent tokens, once for each use; 0: off",
    "seed": "random seed; the same seed gives the same answer",
    "top_n_sigma": "keep logits within X standard deviations of the largest; 0: off",
    "xtc_probability": "how often the top choices are left out, down to the last one that is likely; 0: off",
    "xtc_threshold": "the probability of a top choice",
    "dynatemp_range": "the temperature goes X below and above by how sure the model is; 0: off",
    "dynatemp_exponent": "the power of the entropy in that",
    "mirostat": "1 or 2: hold the surprise at mirostat_tau, without top_k, top_p and the others; 0: off",
    "mirostat_tau": "the surprise of a token that mirostat aims at, in bits",
    "mirostat_eta": "how fast mirostat follows",
    "dry_multiplier": "DRY: how much is subtracted from what would prolong a repetition; 0: off",
    "dry_base": "how much more that is for each token that is repeated",
    "dry_allowed_length": "repetitions that are longer lose more than the multiplier",
    "dry_penalty_last_n": "how many tokens are searched for repetitions; -1: all",
    "dry_sequence_breakers": 'texts that no repetition reaches over: END, or several: "\\n" ":"; none: there are none',
    "max_tokens": "at most N tokens in an answer; -1: until the model ends it or the context is full",
    "stop": 'a text that ends the answer and is not part of it: END, or several: "one" "two"',
    "think": "whether the model thinks before it answers: auto (as it does by itself), on, off, low, medium, high, or at most N tokens",
    "compress": "how much of what was read is kept: a policy such as look-m:ratio=0.2, or off; as the model was loaded",
    "thinking": "how that is shown: dimmed as it comes, folded to one line that counts it, or hidden",
    "keep": "when the context is full: all is kept and you are told, or only the latest turns",
    "wordwrap": "no word is cut at the terminal's edge",
    "verbose": "after each answer, what was seen and how fast",
}
# Names that Ollama gives to switches, and what they are here.
_OTHER_WORDS = {"nowordwrap": ("wordwrap", "off"), "quiet": ("verbose", "off"), "nothink": ("think", "off")}


@dataclass
class Choices:
    """What is set: about answers, and about the conversation. `keep`: one of KEEP; `thinking`: how it is shown."""

    answer: answer.Settings = field(default_factory=answer.Settings)
    keep: str = "all"
    thinking: str = SHOWN
    wordwrap: bool = True
    verbose: bool = False

    def set(self, name: str, value: str | None = None) -> str:
        """Set one setting; without a value, go back to the default, and a switch goes on. Returns what was done. Raises: RequestError."""
        if value is None and name in _OTHER_WORDS:
            name, value = _OTHER_WORDS[name]
        if name in SAMPLING:
            sampling = {k: v for k, v in self.answer.sampling.items() if k != name}
            if value is not None:
                sampling[name] = answer.breakers(_texts(value)) if SAMPLING[name] is tuple else _number(name, value, SAMPLING[name])
            answer.check_sampling(sampling)
            self.answer.sampling = sampling
        elif name == "max_tokens":
            n = answer.Settings().max_tokens if value is None else _number(name, value, int)
            self.answer.max_tokens = None if n is None or n < 0 else n
        elif name == "stop":
            self.answer.stop = _texts(value or "")
        elif name == "think":
            value = value or "on"
            self.answer.think = _think(value)
        elif name == "compress":
            self.answer.compress = None if value is None else _policy(value)
        elif name in WORDS:
            word = WORDS[name][0] if value is None else _word(name, value)
            setattr(self, name, word == "on" if WORDS[name] == SWITCHES else word)
            value = word
        else:
            from pyengine.errors import nearest

            raise RequestError(f"/set {name}: there is no such setting{nearest(name, MEANINGS)}; /set alone lists all")
        return f"{name} {value}" if value is not None else f"{name} as by default"

    def rows(self, model: Any) -> list[tuple[str, str, str]]:
        """List all settings: name, value, and whether it is set here or recommended by the model, with what it means."""
        from pyengine.text.sampling import SamplingParams

        usual: dict[str, Any] = {f.name: f.default for f in fields(SamplingParams)}
        found = []
        for name in SAMPLING:
            source = "set" if name in self.answer.sampling else "the model's" if name in model.sampling_defaults else ""
            value = {**usual, **model.sampling_defaults, **self.answer.sampling}[name]
            text = " ".join(map(_quoted, value)) if isinstance(value, (tuple, list)) else str(value)
            found.append((name, "random" if value is None else text, source))
        limit, stop, plain = self.answer.max_tokens, self.answer.stop or model.stop_defaults, Choices()
        found.append(("max_tokens", "-1" if limit is None else str(limit), "set" if limit != plain.answer.max_tokens else ""))
        found.append(("stop", " ".join(map(_quoted, stop)) or "none", "set" if self.answer.stop else "the model's" if stop else ""))
        think = self.answer.think
        word = "auto" if think is None else SWITCHES[not think] if isinstance(think, bool) else str(think)
        found.append(("think", word, "" if think is None else "set"))
        compress = self.answer.compress
        found.append(("compress", str(getattr(getattr(model, "compression", None), "text", "off") if compress is None else compress), "" if compress is None else "set"))
        for name in WORDS:
            value = getattr(self, name)
            word = value if isinstance(value, str) else SWITCHES[not value]
            found.append((name, word, "set" if value != getattr(plain, name) else ""))
        return [(name, value, f"{source}: {MEANINGS[name]}" if source else MEANINGS[name]) for name, value, source in found]

    def changed(self, model: Any) -> str:
        """Name what is set here, in one line."""
        return ", ".join(f"{name} {value}" for name, value, about in self.rows(model) if about.startswith("set: "))


def _number(name: str, value: str, kind: type) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise RequestError(f"/set {name} {value}: must be {'a whole number' if kind is int else 'a number'}") from None


def _word(name: str, value: str) -> str:
    if value not in WORDS[name]:
        raise RequestError(f"/set {name} {value}: must be {' or '.join(WORDS[name])}")
    return value


def _think(value: str) -> bool | int | str | None:
    """Read what is asked of thinking, as Model.chat takes it. Raises: RequestError."""
    if value in THINK:
        return {"auto": None, "on": True, "off": False}.get(value, value)
    if not value.isdecimal():
        raise RequestError(f"/set think {value}: must be one of {', '.join(THINK)}, or a number of tokens")
    return int(value)


def _texts(value: str) -> tuple[str, ...]:
    """Read one text as it is, or several in quotes."""
    if value[:1] not in ("'", '"'):
        return (value,) if value else ()
    try:
        return tuple(text for text in shlex.split(value) if text)
    except ValueError as error:
        raise RequestError(f"/set stop {value}: {error}") from None


def _quoted(text: str) -> str:
    return '"' + text.replace("\n", "\\n").replace('"', '\\"') + '"'


def _policy(value: str) -> str:
    """Return a policy's text as it is written in full. Raises: RequestError."""
    from pyengine.cache.compression.written import compression_of              # a conversation begins sooner

    policy = compression_of(value)
    return policy.text if policy is not None else "off"
