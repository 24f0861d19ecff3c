"""An agent: a model that sees a screen in screenshots and acts on it, one checked action at a time.

Screenshot in, calls of the computer's tool out: each is checked (`tool.read_action`), mapped to the screen's own pixels, confirmed
where the caller wants that, done and written down. What is refused is told to the model as the tool's result and not done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TYPE_CHECKING

from pyengine.agents.screen import Screen
from pyengine.agents.tool import Action, ActionError, ALLOWED, check_allowed, computer_tool, KEYS, NAME, on_screen, read_action
from pyengine.arguments import whole
from pyengine.chat.reply.deltas import ToolCall
from pyengine.errors import RequestError, shown

if TYPE_CHECKING:
    from PIL.Image import Image

    from pyengine.engine.model import Model

Messages = list[dict[str, Any]]
_BUTTONS = {"left_click": ("left", 1), "right_click": ("right", 1), "middle_click": ("middle", 1), "double_click": ("left", 2)}
OLD = "(an older screenshot)"
LEFT_OUT = "not done, because an earlier action of this answer was not done"


@dataclass(frozen=True)
class Step:
    """One call of a model.

    said        what the model wrote beside its calls
    call        as the model wrote it
    action      as it was read; None: it could not be
    at          the pixel of the screen that it points at
    screenshot  what the model saw: of the screen's size; `processed` is the size that the encoder made of it
    done        whether it was done; if not, `result` is what the model was told
    """

    number: int
    said: str
    call: ToolCall
    screenshot: Image
    processed: tuple[int, int]
    action: Action | None = None
    at: tuple[int, int] | None = None
    done: bool = False
    result: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it, without the screenshot."""
        return {"number": self.number, "said": self.said, "name": self.call.name, "arguments": self.call.arguments, "at": self.at,
                "screen": self.screenshot.size, "processed": self.processed, "done": self.done, "result": self.result,
                "seconds": round(self.seconds, 3)}


@dataclass
class Transcript:
    """All that was done for a task.

    ended   "terminate" (the model ended it; `status` is "success" or "failure"), "answer" (it wrote `said` instead of a call),
            "length" (its answer was cut off before a call was whole) or "limit" (as many steps as were allowed)
    """

    task: str
    steps: list[Step] = field(default_factory=list)
    ended: str = ""
    status: str = ""
    said: str = ""

    def save(self, folder: str | Path) -> None:
        """Write transcript.json and each step's screenshot, step-01.png and so on, into a folder, which is made."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for step in self.steps:
            step.screenshot.save(target / f"step-{step.number:02}.png")
        told = {"task": self.task, "ended": self.ended, "status": self.status, "said": self.said, "steps": [s.as_dict() for s in self.steps]}
        (target / "transcript.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass
class Agent:
    """A model at a screen.

    allowed   names of actions (`tool.ACTIONS`) that may be done
    keys      combinations of keys that may be pressed (`tool.KEYS`: none of them leaves the window); None: all
    confirm   asked before every action but "terminate"; what it says no to is not done
    limit     steps of a task
    longest   pixels of the longer side of the pictures that the model gets; None: screenshots as they are
    keep      screenshots that the model still sees; older ones are left out
    settle    seconds between an action and the next screenshot
    options   arguments of `Model.chat`, as max_tokens and temperature; an answer is greedy unless they say otherwise
    """

    model: Model
    screen: Screen
    allowed: Collection[str] = ALLOWED
    keys: Collection[str] | None = KEYS
    confirm: Callable[[Step], bool] | None = None
    limit: int = 30
    longest: int | None = None
    keep: int = 8
    settle: float = 0.3
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_allowed(self.allowed)
        self.limit, self.keep = whole("limit", self.limit, 1), whole("keep", self.keep, 1)
        self.longest = None if self.longest is None else whole("longest", self.longest, 1)
        if self.confirm is not None and not callable(self.confirm):
            raise RequestError(f"confirm: a function of a step, not {shown(self.confirm)}")
        if self.model.media is None:
            raise RequestError("an agent needs a model that takes pictures")
        self._pointer: tuple[int, int] | None = None

    def run(self, task: str, watch: Callable[[Step], None] | None = None) -> Transcript:
        """Run a task until the model ends it, answers in words, or the limit of steps is reached. watch: called with each step.

        Raises: what `Model.chat` and the screen raise.
        """
        record, picture = Transcript(task), self.screen.screenshot()
        messages: Messages = [{"role": "user", "content": [self._shown(picture), {"type": "text", "text": task}]}]
        self._pointer = None
        while not record.ended:
            processed = self._processed(picture)
            answer = self.model.chat(self._kept(messages), tools=[computer_tool(processed, self.allowed)],
                                     **{"temperature": 0, "max_tokens": 512, **self.options})
            said, calls = str(answer).strip(), answer.tool_calls
            if not calls or answer.finish == "length":       # the last call may lack its end
                record.ended, record.said = "length" if answer.finish == "length" else "answer", said
                break
            ids = [c.id for c in calls]
            messages.append({"role": "assistant", "content": said, "tool_calls": [
                {"id": i, "type": "function", "function": {"name": c.name, "arguments": _object(c.arguments)}} for i, c in zip(ids, calls)]})
            results = self._answer_all(record, [Step(0, said, call, picture, processed) for call in calls], watch)
            if not record.ended:
                time.sleep(self.settle)
                picture = self.screen.screenshot()
                messages += _told(ids, results, self._shown(picture))
        return record

    def _answer_all(self, record: Transcript, steps: Sequence[Step], watch: Callable[[Step], None] | None) -> list[Step]:
        """Do an answer's calls in turn; after one that is not done, the others are not done either."""
        out: list[Step] = []
        for step in steps:
            if record.ended:
                break
            step = replace(step, number=len(record.steps) + 1)
            step = replace(step, result=LEFT_OUT) if out and not out[-1].done else self._do(step)
            out.append(step)
            record.steps.append(step)
            if step.done and step.action is not None and step.action.name == "terminate":
                record.ended, record.status = "terminate", step.action.status
            elif len(record.steps) == self.limit:
                record.ended = "limit"
            if watch is not None:
                watch(step)
        return out

    def _do(self, step: Step) -> Step:
        """Read, check, confirm and do one call."""
        began = time.monotonic()
        try:
            if step.call.name != NAME:
                raise ActionError(f"{shown(step.call.name)} is no function here; call {NAME}")
            action = read_action(step.call.arguments, step.processed, self.allowed, self.keys)
            size = self.screen.size()
            step = replace(step, action=action, at=on_screen(action.at, step.processed, size) if action.at else self._rest(action, size))
            if action.name != "terminate" and self.confirm is not None and not self.confirm(step):
                raise ActionError("the user does not want this action")
            self._act(action, step)
        except ActionError as e:
            return replace(step, result=f"error: {e}", seconds=time.monotonic() - began)
        return replace(step, done=True, seconds=time.monotonic() - began)

    def _rest(self, action: Action, size: tuple[int, int]) -> tuple[int, int] | None:
        """Find the place of an action that names none: where the pointer is, of the wheel also the middle of the screen."""
        if action.name == "scroll":
            return self._pointer or (size[0] // 2, size[1] // 2)
        if action.name in _BUTTONS and self._pointer is None:
            raise ActionError(f"coordinate: {action.name} needs one, [x, y], as long as the pointer has not been moved")
        return self._pointer if action.name in _BUTTONS else None

    def _act(self, action: Action, step: Step) -> None:
        if action.name == "left_click_drag" and self._pointer is None:
            raise ActionError("left_click_drag: the pointer has not been moved yet; move it to where the drag begins")
        match action.name, step.at:
            case "mouse_move", (x, y):
                self.screen.move(x, y)
            case "left_click_drag", (x, y):
                self.screen.drag(*self._pointer, x, y)       # type: ignore[misc]
            case "scroll", (x, y):
                self.screen.scroll(x, y, round(action.pixels * self.screen.size()[1] / step.processed[1]))
            case name, (x, y):
                self.screen.click(x, y, *_BUTTONS[name])
            case "key", None:
                self.screen.key(action.keys)
            case "type", None:
                self.screen.type(action.text)
            case "wait", None:
                time.sleep(action.seconds)
        self._pointer = step.at or self._pointer

    def _processed(self, picture: Image) -> tuple[int, int]:
        """Return the size that the model's processor gives a screenshot; its encoding is kept for the answer."""
        from pyengine.media.image import open_image

        return self.model.media.get(open_image(self._scaled(picture)))[1].processed       # type: ignore[union-attr]

    def _shown(self, picture: Image) -> dict[str, Any]:
        return {"type": "image", "image": self._scaled(picture)}

    def _scaled(self, picture: Image) -> Image:
        """Make a screenshot smaller where its longer side is longer than `longest`."""
        if self.longest is None or max(picture.size) <= self.longest:
            return picture
        from PIL.Image import Resampling

        w, h = (max(1, round(n * self.longest / max(picture.size))) for n in picture.size)
        return picture.resize((w, h), Resampling.LANCZOS)

    def _kept(self, messages: Messages) -> Messages:
        """Leave all but the last screenshots out."""
        out, left = [], self.keep
        for message in reversed(messages):
            content = message["content"]
            if isinstance(content, list):
                if left <= 0:
                    content = [{"type": "text", "text": OLD} if part["type"] == "image" else part for part in content]
                left -= 1
            out.append({**message, "content": content})
        return out[::-1]


def _told(ids: Sequence[str], steps: Sequence[Step], picture: dict[str, Any]) -> Messages:
    """Make the tool's results for the model; the last one shows the screen."""
    texts = [step.result or "done" for step in steps]
    contents: list[Any] = [*texts[:-1], [picture] if steps[-1].done else [{"type": "text", "text": texts[-1]}, picture]]
    return [{"role": "tool", "tool_call_id": i, "name": NAME, "content": content} for i, content in zip(ids, contents)]


def _object(arguments: str) -> str:
    """Return arguments as JSON text of an object, also those that are none: templates put them into a call as they are."""
    try:
        return arguments if isinstance(json.loads(arguments), dict) else json.dumps({"written": arguments})
    except (ValueError, RecursionError):
        return json.dumps({"written": arguments})
