"""Conversations in which the model's calls are run: it is asked, its calls are answered, and it is asked again."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple, TYPE_CHECKING

from pyengine.arguments import whole
from pyengine.chat.functions import Function
from pyengine.engine.answer import Answer
from pyengine.errors import nearest, RequestError, shown

if TYPE_CHECKING:
    from pyengine.chat.reply.deltas import Delta, ToolCall

ROUNDS = 10                          # answers to one question: a model that goes on calling is stopped
CUT = ("length", "cancelled")        # how answers end whose calls are not run: the last one may be cut off

Messages = list[dict[str, Any]]
Chat = Callable[[Messages, list[dict[str, Any]]], Any]       # messages and schemas of tools to an Answer, or to a Stream


class Ran(NamedTuple):
    """The last answer, and the messages that were added to the conversation: answers, that one too, and results of calls.

    Where the last answer has calls, they were not run: the limit was reached, or the answer was cut off.
    """

    answer: Answer
    messages: Messages


class Toolbox:
    """Functions that a model may call, by their names. Raises: RequestError for what cannot be told to a model."""

    def __init__(self, tools: Sequence[Callable[..., Any]] | None):
        self.functions: dict[str, Function] = {}
        if not isinstance(tools, (list, tuple)) or not tools:
            raise RequestError(f"tools: a list of functions is needed, to run them, not {shown(tools)}")
        for i, tool in enumerate(tools):
            if not callable(tool):
                raise RequestError(f"tools[{i}]: only functions can be run, and this is a {type(tool).__name__}; without run_tools its calls are given back")
            function = Function(tool)
            if function.name in self.functions:
                raise RequestError(f"tools[{i}]: there are two functions of the name {function.name}")
            self.functions[function.name] = function

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """All of them in OpenAI's form."""
        return [function.schema for function in self.functions.values()]

    def content(self, call: ToolCall) -> Any:
        """Run a call; returns the content of its tool message. What goes wrong is a text that begins with "error: "."""
        function = self.functions.get(call.name)
        if function is None:
            return f"error: there is no tool {call.name}{nearest(call.name, self.functions) or '; there are ' + ', '.join(self.functions)}"
        try:
            return function.call(call.arguments)
        except RequestError as error:
            return f"error: {error}"
        except (Exception, SystemExit) as error:             # whatever the function raises: the model may do better
            return f"error: {type(error).__name__}: {_said(error)}"

    def results(self, calls: Sequence[ToolCall]) -> Messages:
        """Run the calls of an answer in their order; returns their tool messages."""
        return [result_of(call, self.content(call)) for call in calls]


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:                                        # its own text fails
        return "without a text"


def result_of(call: ToolCall, content: Any) -> dict[str, Any]:
    """Return the message that gives a call's result to the model."""
    return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": content}


def run_tools(chat: Chat, messages: Sequence[dict[str, Any]], tools: Sequence[Callable[..., Any]], limit: int = ROUNDS) -> Ran:
    """Ask, run the calls of the answer, and ask again with their results, until an answer has no calls, or `limit` answers are there.

    chat(messages, schemas) gives an Answer. Raises: RequestError for tools that are no functions; what `chat` raises.
    """
    toolbox, added = Toolbox(tools), Messages()
    most = whole("limit", limit, 1)
    for n in range(1, most + 1):
        answer = chat([*messages, *added], toolbox.schemas)
        added.append(answer.message)
        if not answer.tool_calls or answer.finish in CUT or n == most:
            break
        added += toolbox.results(answer.tool_calls)
    answer.report.earlier = added[:-1]
    return Ran(answer, added)


class ToolStream(Iterator[str]):
    """Pieces of the text of all answers of `run_tools`, as they come.

    chat(messages, schemas) gives a Stream; later(messages, schemas), if it is given, those after the first. `messages` grows as answers
    and results are added. `deltas()` gives thinking and calls too, instead of the pieces.
    """

    def __init__(self, chat: Chat, messages: Sequence[dict[str, Any]], tools: Sequence[Callable[..., Any]] | None, limit: int = ROUNDS,
                 later: Chat | None = None):
        self._chat, self._later = chat, later or chat
        self._asked, self._toolbox, self._limit = list(messages), Toolbox(tools), whole("limit", limit, 1)
        self.messages: Messages = []
        self._stream: Any = None
        self._answer: Answer | None = None
        self._deltas = self._run()

    def _run(self) -> Generator[Delta, None, None]:
        for n in range(1, self._limit + 1):
            ask, self._answer = self._chat if n == 1 else self._later, None
            self._stream = ask([*self._asked, *self.messages], self._toolbox.schemas)
            texts = []
            for delta in self._stream.deltas():
                if delta.kind == "text":
                    texts.append(delta.text)
                yield delta
            self._answer = Answer("".join(texts), self._stream.report)
            self._answer.report.earlier = list(self.messages)
            self.messages.append(self._answer.message)
            if not self._answer.tool_calls or self._answer.finish in CUT or n == self._limit:
                return
            self.messages += self._toolbox.results(self._answer.tool_calls)

    def deltas(self) -> Iterator[Delta]:
        """Give what is left: texts, thinking and calls of all answers."""
        return self._deltas

    def __next__(self) -> str:
        return next(delta.text for delta in self._deltas if delta.kind == "text")

    def ran(self) -> Ran:
        """Take all that is left; returns the last answer and the messages that were added."""
        for _ in self._deltas:
            pass
        if self._answer is None:
            raise RequestError("the stream was closed before an answer was whole")
        return Ran(self._answer, self.messages)

    def answer(self) -> Answer:
        """Take all that is left; returns the last answer."""
        return self.ran().answer

    def close(self) -> None:
        """Stop working on it; functions that have begun are waited for."""
        self._deltas.close()
        if self._stream is not None:
            self._stream.close()

    def __enter__(self) -> ToolStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

