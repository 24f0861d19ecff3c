"""A conversation: its turns, the answers to them, the room that is left in the context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TYPE_CHECKING

from pyengine.cli import answer, asked, pictures
from pyengine.cli.talk import saved as talks, toolbox
from pyengine.cli.paper import Paper
from pyengine.cli.screen import note, size
from pyengine.cli.talk.settings import Choices
from pyengine.errors import ContextOverflowError, PyEngineError, RequestError, SessionError

if TYPE_CHECKING:
    from pyengine.chat.reply.deltas import ToolCall

CALLS_SHOWN = 300                    # characters of a call and of its result, on the screen
ROOM = 4                             # a fourth of the context is room enough for an answer: with less, old turns go where they may


class Chat:
    """One conversation and what its user has set. Raw, the model continues the text of all turns, without template.

    options     settings of the model's processor, for pictures under "image" and for videos under "video"
    waiting     pictures and videos that begin the next message
    unanswered  the last question, if it got no answer: it is not among the turns
    last        how the last answer came about, and the pictures that it was about; None where it is not of this process
    n_asked     questions so far
    tools       what the model may call
    form        the file that the schema of answers is from
    ask         asks whoever sits at the terminal for a line, after a prompt
    stopped     whether Ctrl-C ended the last answer, until the next message is typed
    """

    def __init__(self, model: Any, settings: answer.Settings, system: str | None = None, raw: bool = False,
                 verbose: bool = False, options: Mapping[str, pictures.Options] | None = None):
        self.model, self.raw = model, raw
        self.choices = Choices(settings, verbose=verbose)
        self.turns: answer.Messages = []
        self.system = system
        self.options = options or {"image": {}, "video": {}}
        self.waiting: list[pictures.Picture] = []
        self.unanswered: dict[str, Any] | None = None
        self.last: tuple[answer.Shown, list[pictures.Picture]] | None = None
        self.n_asked, self.stopped = 0, False
        self.tools: toolbox.Tools | None = None
        self.form: Path | None = None
        self.ask: Callable[[str], str] = input
        self._uses = {0: 0}                              # tokens in the context, by the number of turns

    def messages(self) -> answer.Messages:
        """Return the system message, if there is one, and the turns."""
        return self._whole(self.turns)

    def _whole(self, turns: answer.Messages) -> answer.Messages:
        return [{"role": "system", "content": self.system}, *turns] if self.system else list(turns)

    def instruct(self, system: str | None) -> None:
        """Set the system message, or remove it. Raises: RequestError where no template takes one."""
        if self.raw:
            raise RequestError("/system needs the chat template, which is not used here")
        self.system, self._uses = system, {0: 0}

    # -- questions and answers --------------------------------------------------------------------------------------------

    def add(self, found: Sequence[pictures.Picture]) -> None:
        """Let pictures and videos wait for the next message. Raises: RequestError if the model takes none."""
        if found:
            pictures.need_encoder(self.model)
        self.waiting += found
        for picture in found:
            note(f"Added {picture}")

    def read(self, text: str) -> None:
        """Take a message as it was typed: find pictures in it, and answer it; pictures alone wait for a question."""
        parts, wrong = pictures.read_words([text], self.options["image"])
        found = [part for part in parts if not isinstance(part, str)]
        words = any(isinstance(part, str) and part.strip() for part in parts)
        if found and self.model.media is None:
            names, model = ", ".join(picture.name for picture in found), Path(self.model.file.path).name
            note(f"({model} has no image encoder: {names} {'stays text' if words else 'is not added'})")
            parts, found = [text], []
        elif self.model.media is not None:
            for error in wrong:
                note(f"({error}; it stays text)")
        for picture in found:
            note(f"Added {picture}")
        if words:
            self.say([*self.waiting, *asked.arranged(parts)])
        else:
            self.waiting += found

    def say(self, parts: Sequence[str | pictures.Picture]) -> None:
        """Take a turn: show the answer and keep it. Raises what generation raises, and keeps what was shown."""
        self._ask(answer.user_message(parts))

    def _ask(self, question: dict[str, Any]) -> None:
        self.waiting, self.unanswered, self.stopped = [], question, False
        self.n_asked += 1
        self.turns.append(question)
        try:
            report, n = self._answer(), 1
            while (calls := self._calls(report)) and self._run(calls, n):
                report, n = self._answer(), n + 1
        finally:
            said = self._settle(question)
        if said:
            n_ctx, used = self.model.plan.n_ctx, report.n_prompt + report.n_generated
            if report.n_prompt:                          # a server may not say
                self._uses[len(self.turns)] = used if n_ctx is None else min(used, n_ctx)                # the last token needs no cell
            self.last = report, [_picture(part) for part in answer.media_of(self.messages())]
        self._remark(report, said)

    def _answer(self) -> answer.Shown:
        """Show one answer, and keep what was shown among the turns. Raises what generation raises."""
        paper = Paper(self.choices.wordwrap, self.choices.thinking)
        message: dict[str, Any] = {}
        try:
            if self.choices.keep == "latest":
                self._make_room()
            report = answer.stream(self.model, answer.Question(self.messages(), self.raw), self.choices.answer, paper.take)
            if calls := self._calls(report):
                message = {**report.answer.message, "tool_calls": [call.as_dict() for call in calls]}
            elif not report.stopped and not self.raw:
                message = {key: value for key, value in report.answer.message.items() if key != "tool_calls"}
        except ContextOverflowError as error:
            raise error if paper.text else self._full(error) from None
        finally:
            paper.end()
            if paper.text or message.get("tool_calls"):
                self.turns.append(message or {"role": "assistant", "content": paper.text})
        return report

    def _calls(self, report: answer.Shown) -> list[ToolCall]:
        """Return the calls of an answer that are to be run: of one that was cut, the last call may be, too."""
        whole = self.tools is not None and not report.stopped and report.answer.finish not in ("length", "cancelled")
        return report.answer.tool_calls if whole else []

    def _run(self, calls: Sequence[ToolCall], n: int) -> bool:
        """Run the calls of the n-th answer to a question, and add their results to the turns; returns False where no more is asked."""
        from pyengine.engine.tools import result_of, ROUNDS

        assert self.tools is not None
        if n == ROUNDS:
            note(f"(stopped: the model goes on calling tools after {n} answers)")
            return False
        for call in calls:
            text = _short(answer.call_text(call.name, call.arguments))
            note(f"({text})")
            try:
                content = self._seen(call, self.tools.content(call, lambda text=text: self.ask(f"{text} = ")))
            except EOFError:
                content = "error: nobody gave a result"
            except KeyboardInterrupt:
                self.stopped = True
                note("(stopped)")
                return False
            self.turns.append(result_of(call, content))
            if self.tools.functions is not None:
                note(f"  = {_short(answer.written(self.turns[-1]))}")
        return True

    def _seen(self, call: ToolCall, content: Any) -> Any:
        """Return the content of a result with its pictures as those of messages are; without them where the model sees none."""
        from pyengine.media.image import open_image

        if isinstance(content, str):
            return content
        if self.model.media is None:
            return "error: the result is a picture, and this model sees none"
        return [part if part["type"] == "text" else pictures.Picture(f"picture of {call.name}", open_image(part["image"])).part()
                for part in content]

    def _settle(self, question: dict[str, Any]) -> str:
        """Keep the turns from a question on if they end with a text of the model, and drop them otherwise; returns that text."""
        last = self.turns[-1]
        said = str(last["content"]) if last["role"] == "assistant" else ""
        if said:
            self.unanswered = None
            last.pop("tool_calls", None)                  # nobody has run them
        else:
            start = next(i for i, turn in enumerate(self.turns) if turn is question)
            del self.turns[start:]                        # without an answer it would stand before the next one
            if names := answer.Question([question]).names():
                note(f"(no answer: the question is not kept, nor {', '.join(names)}; /retry asks again)")
        return said

    def _remark(self, report: answer.Shown, said: str) -> None:
        """Say what the text alone does not say: where it was cut, where its boxes are, how fast it came."""
        n_ctx, cut = self.model.plan.n_ctx, report.answer.finish == "length"
        self.stopped = self.stopped or report.stopped
        if report.stopped:
            note("(stopped)")
        elif cut and report.n_generated == self.choices.answer.max_tokens:
            note(f"(cut after {report.n_generated} tokens; /set max_tokens N allows more)")
        elif cut and n_ctx is not None and report.n_prompt + report.n_generated >= n_ctx:
            note(f"(cut: the context of {n_ctx:,} tokens is full; {self._ways_out()})")
        elif not said and not self.stopped:
            note("(the model ended without a text)")
        for line in pictures.places(report.answer, report.names, "/draw FILE draws it"):
            note(line)
        for line in report.lines() if self.choices.verbose else ():
            note(line)

    def retry(self) -> None:
        """Ask the last question again: one that got no answer, or else in place of its answer, which stays if there is no other.

        Raises: RequestError if there is none; else as `say`.
        """
        if self.unanswered is not None:
            self._ask(self.unanswered)
            return
        start = self._last_question()
        old, self.turns = self.turns[start:], self.turns[:start]
        try:
            self._ask(old[0])
        finally:
            if self.unanswered is not None:
                self.turns, self.unanswered = [*self.turns, *old], None

    def undo(self) -> None:
        """Take back the last question and its answer. Raises: RequestError if there is none."""
        start = self._last_question()
        text = " ".join(answer.written(self.turns[start]).split())
        del self.turns[start:]
        self.unanswered, self.last = None, None
        note(f"(taken back, with its answer: {text if len(text) <= 60 else text[:60] + ' ...'})")

    def _last_question(self) -> int:
        asked = [i for i, turn in enumerate(self.turns) if turn["role"] == "user"]
        if not asked:
            raise RequestError("there is no question yet")
        return asked[-1]

    def clear(self) -> None:
        """Forget the turns, their pictures and the cache; the system message stays."""
        self.turns, self.waiting, self.unanswered, self.last, self._uses = [], [], None, None, {0: 0}
        self.model.reset()

    def draw(self, path: Path) -> None:
        """Write the picture that the last answer is about with its boxes. Raises: RequestError."""
        if self.last is None or not self.last[1]:
            raise RequestError("/draw FILE: there is no answer about a picture yet")
        report, shown = self.last
        pictures.check_drawing(path, shown, "/draw")
        pictures.draw(report.answer, shown, path, "/draw")

    # -- room in the context ----------------------------------------------------------------------------------------------

    def used(self) -> int | None:
        """Return the tokens that the conversation takes in the context; None where only the next answer will tell."""
        n = len(self.turns)
        if n not in self._uses:
            if answer.media_of(self.turns):              # whose encoding may take long
                return None
            try:
                self._uses[n] = self._count(self.turns)
            except PyEngineError:                        # a template may refuse turns that end with an answer
                return None
        return self._uses[n]

    def _count(self, turns: answer.Messages) -> int:
        """Count the tokens of a prompt of these turns. Raises as `Model.chat_ids`."""
        if self.raw:                                     # of pictures here only the answer's report tells
            return len(self.model.tokenize("\n".join(map(answer.text_of, turns))))
        return len(self.model.chat_ids(self._whole(turns), **({"tools": self.tools.schemas} if self.tools else {})))

    def equip(self, tools: toolbox.Tools | None) -> None:
        """Let the model call tools, or none. Raises: RequestError where no template tells it of them."""
        if self.raw and tools:
            raise RequestError("/tools needs the chat template, which is not used here")
        self.tools, self.choices.answer.tools, self._uses = tools, tools.schemas if tools else [], {0: 0}

    def shape(self, schema: dict[str, Any] | None, path: Path | None) -> None:
        """Let answers be JSON of a schema, or free."""
        self.choices.answer.format, self.form = schema, path

    def _make_room(self) -> None:
        """Forget the oldest turns where an answer has no room: until half of the context is free, so that the next ones need not."""
        n_ctx, limit = self.model.plan.n_ctx, self.choices.answer.max_tokens
        room = n_ctx // ROOM if limit is None else min(limit, n_ctx // ROOM)
        if self._count(self.turns) + room <= n_ctx:
            return
        left = self.turns
        while len(left) > 1 and self._count(left) > n_ctx // 2:
            left = left[next(i for i, turn in enumerate(left) if i and turn["role"] == "user"):]
        if n := len(self.turns) - len(left):
            self.turns, self._uses = left, {0: 0}
            note(f"(the context is full: the oldest {n} messages are forgotten)")

    def _full(self, error: ContextOverflowError) -> ContextOverflowError:
        """Say in words of the conversation that a prompt does not fit, and what to do."""
        n_ctx = self.model.plan.n_ctx
        try:
            n, alone = self._count(self.turns), self._count(self.turns[-1:])
        except PyEngineError:                            # a server counts for itself; a template may refuse a message alone
            return error
        if n <= n_ctx:
            return error
        if alone > n_ctx:
            return ContextOverflowError(f"this message alone takes {alone:,} tokens, and the context holds {n_ctx:,}: shorten it"
                                        + self._larger())
        return ContextOverflowError(f"the conversation is full: with this message it takes {n:,} tokens, and the context holds "
                                    f"{n_ctx:,}; {self._ways_out()}")

    def _ways_out(self) -> str:
        ways = "/clear begins a new one, /undo takes the last question back"
        return ways + (", /set keep latest forgets the oldest turns" if self.choices.keep == "all" else "") + self._larger()

    def _larger(self) -> str:
        most = self.model.config.n_ctx_train
        return f"; --ctx N at the start, up to {most:,}, gives more room" if self.model.plan.n_ctx < most else ""

    # -- conversations in files -------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the conversation and its part of the caches. Raises: RequestError, SessionError."""
        if not self.turns:
            raise RequestError("/save: there is no conversation yet")
        notes = talks.pack(talks.Talk(self.turns, self.system, self.raw, self.model.plan.model))
        nbytes = self.model.save(path, messages=None if self.raw or self.tools else self.messages(), notes=notes)
        note(f"(saved {len(self.turns)} messages: {path}, {size(nbytes)})")

    def load(self, path: Path) -> None:
        """Take up a conversation in place of this one, which stays as it is if that fails. Raises: RequestError, PyEngineError."""
        from pyengine.cache.sessions import read_notes

        talk, here = talks.unpack(path, read_notes(path)), self.model.plan.model
        if talk.raw != self.raw:
            was, now = ("continued as text" if raw else "answered through the template" for raw in (talk.raw, self.raw))
            raise RequestError(f"{path}: its messages were {was}, here they would be {now}: start with{'out' * self.raw} --raw")
        try:
            n = self.model.restore(path)
        except SessionError as error:
            if talk.model in ("", here):
                raise
            raise SessionError(f"{error}; it was saved with {talk.model}, and this is {here}") from None
        self.turns, self.system, self.waiting = talk.turns, talk.system, []
        self.unanswered, self.last, self._uses = None, None, {0: 0, len(self.turns): n}
        note(f"(loaded {len(self.turns)} messages, {n} tokens: {path})")


def _picture(part: dict[str, Any]) -> pictures.Picture:
    """Return a picture by what stands for it in a message."""
    return pictures.Picture(part["name"], part[part["type"]], None if part["path"] is None else Path(part["path"]), part["type"])


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= CALLS_SHOWN else text[:CALLS_SHOWN] + " ..."
