"""An agent at a screen that writes down what is done to it, with answers that are given: what is done, refused, told and recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from PIL import Image
from replies import calls_of

import pyengine as pe
from pyengine.agents.agent import Agent, OLD, Step
from pyengine.chat.reply.style import find
from pyengine.chat.reply.tools import read_tools
from pyengine.engine.answer import Answer
from pyengine.engine.request import Report
from pyengine.errors import RequestError

HERMES = """{{ tools }}<tool_call>\\n{"name": "{{ call.name }}", "arguments": {{ call.arguments }}}\\n</tool_call>"""
FILE = ROOT / "converters/demo/weights/demo-q8_0.gguf"
END = '{"name": "computer_use", "arguments": {"action": "terminate", "status": "success"}}'


class Desk:
    """A white screen that remembers what is done to it."""

    def __init__(self, size: tuple[int, int] = (200, 150)):
        self.log: list[tuple[Any, ...]] = []
        self._size, self.n_seen = size, 0

    def size(self) -> tuple[int, int]:
        return self._size

    def screenshot(self) -> Image.Image:
        self.n_seen += 1
        return Image.new("RGB", self._size, (255, 255, 255 - self.n_seen % 200))

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name not in ("move", "click", "drag", "type", "key", "scroll"):
            raise AttributeError(name)
        return lambda *args: self.log.append((name, *args))


class Parrot:
    """A model's eyes, and answers that are given."""

    def __init__(self, model: pe.Model, *answers: str):
        self.media, self._answers, self.heard = model.media, list(answers), []

    def chat(self, messages: list[dict[str, Any]], tools: Any = None, **options: Any) -> Answer:
        self.heard.append((messages, tools, options))
        reader = find(HERMES, lambda text: False).reader(read_tools(tools), False)
        deltas = [*reader.push(self._answers.pop(0)), *reader.flush()]
        said = "".join(d.text for d in deltas if d.kind == "text")
        return Answer(said, Report(media=[], finish="stop", calls=calls_of(deltas)))


@pytest.fixture(scope="module")
def model() -> pe.Model:
    return pe.load(FILE, n_ctx=1024)


def call(**arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': 'computer_use', 'arguments': arguments})}\n</tool_call>"


DONE = call(action="terminate", status="success")


def work(model: pe.Model, *answers: str, desk: Desk | None = None, **settings: Any) -> tuple[Any, Desk, Parrot]:
    """Let an agent work with these answers, and then the end."""
    desk, parrot = desk or Desk(), Parrot(model, *answers, DONE)
    return Agent(parrot, desk, settle=0, **settings).run("Do it."), desk, parrot          # type: ignore[arg-type]


def test_each_action_reaches_the_screen_in_its_own_pixels(model: pe.Model) -> None:
    """The picture of 200 x 150 pixels becomes one of 196 x 140 in the demo's processor: places are of that one."""
    record, desk, parrot = work(
        model, call(action="mouse_move", coordinate=[0, 0]), call(action="left_click_drag", coordinate=[98, 70]),
        call(action="left_click", coordinate=[195, 139]), call(action="double_click"), call(action="right_click", coordinate=[49, 35]),
        call(action="middle_click", coordinate=[49, 35]), call(action="scroll", pixels=-98), call(action="type", text="abc"),
        call(action="key", keys=["Control", "A"]), call(action="wait", time=0))
    assert record.steps[0].processed == (196, 140)
    assert desk.log == [
        ("move", 0, 0), ("drag", 0, 0, 100, 75), ("click", 199, 149, "left", 1), ("click", 199, 149, "left", 2), ("click", 50, 38, "right", 1),
        ("click", 50, 38, "middle", 1), ("scroll", 50, 38, -105), ("type", "abc"), ("key", ("ctrl", "A"))]
    assert (record.ended, record.status, len(record.steps)) == ("terminate", "success", 11) and all(s.done for s in record.steps)
    assert "196 x 140" in parrot.heard[0][1][0]["function"]["description"] and desk.n_seen == 11


@pytest.mark.parametrize("bad, told", [
    (call(action="fly"), "action: 'fly' is none"), (call(action="left_click", coordinate=[196, 0]), "outside of the screenshot of 196 x 140"),
    (call(action="left_click"), "needs one"), (call(action="left_click_drag", coordinate=[1, 1]), "has not been moved"),
    (call(action="key", keys=["alt", "f4"]), "not allowed"),
])
def test_what_cannot_be_done_is_told_to_the_model(model: pe.Model, bad: str, told: str) -> None:
    record, desk, parrot = work(model, bad)
    assert desk.log == [] and not record.steps[0].done and told in record.steps[0].result
    said = parrot.heard[1][0][-1]
    assert said["role"] == "tool" and said["content"][0]["text"].startswith("error: ") and said["content"][1]["type"] == "image"
    assert said["tool_call_id"] == parrot.heard[1][0][-2]["tool_calls"][0]["id"]
    assert record.ended == "terminate"


def test_actions_that_are_not_allowed_are_neither_offered_nor_done(model: pe.Model) -> None:
    record, desk, parrot = work(model, call(action="type", text="x"), allowed={"left_click", "terminate"})
    assert desk.log == [] and "type is not allowed here" in record.steps[0].result
    assert parrot.heard[0][1][0]["function"]["parameters"]["properties"]["action"]["enum"] == ["left_click", "terminate"]


def test_nothing_is_done_that_is_not_confirmed(model: pe.Model) -> None:
    asked: list[Step] = []

    def confirm(step: Step) -> bool:
        asked.append(step)
        return step.action is not None and step.action.name != "type"

    record, desk, _ = work(model, call(action="type", text="x"), call(action="left_click", coordinate=[98, 70]), confirm=confirm)
    assert desk.log == [("click", 100, 75, "left", 1)] and [s.done for s in record.steps] == [False, True, True]
    assert record.steps[0].result == "error: the user does not want this action"
    assert [(s.action.name, s.at) for s in asked if s.action] == [("type", None), ("left_click", (100, 75))]


def test_steps_are_limited(model: pe.Model) -> None:
    desk, parrot = Desk(), Parrot(model, *[call(action="wait", time=0)] * 9)
    record = Agent(parrot, desk, settle=0, limit=4).run("Wait.")              # type: ignore[arg-type]
    assert record.ended == "limit" and len(record.steps) == 4 and len(parrot.heard) == 4
    record, desk, parrot = work(model, "\n".join([call(action="scroll", pixels=1)] * 5), limit=3)
    assert record.ended == "limit" and len(desk.log) == len(record.steps) == 3
    assert Agent(parrot, desk).limit == 30                                    # type: ignore[arg-type]


def test_after_one_that_fails_the_other_calls_of_an_answer_are_not_done(model: pe.Model) -> None:
    answer = "\n".join([call(action="scroll", pixels=1), call(action="fly"), call(action="type", text="x")])
    record, desk, parrot = work(model, answer)
    assert [s[0] for s in desk.log] == ["scroll"] and [s.done for s in record.steps] == [True, False, False, True]
    assert [m["content"] for m in parrot.heard[1][0] if m["role"] == "tool"][0] == "done"


def test_words_end_a_task(model: pe.Model) -> None:
    record, desk, _ = work(model, "I cannot see it.")
    assert (record.ended, record.said, record.steps, desk.log) == ("answer", "I cannot see it.", [], [])


def test_old_screenshots_are_left_out_and_long_ones_made_smaller(model: pe.Model) -> None:
    _, desk, parrot = work(model, *[call(action="wait", time=0)] * 4, keep=2, longest=140)
    contents = [m["content"] for m in parrot.heard[-1][0] if isinstance(m["content"], list)]
    assert [c[0].get("text") for c in contents] == [OLD] * 3 + [None] * 2
    assert contents[-1][0]["image"].size == (140, 105) and parrot.heard[0][0][0]["content"][1] == {"type": "text", "text": "Do it."}


def test_everything_is_written_down(model: pe.Model, tmp_path: Path) -> None:
    seen: list[int] = []
    desk = Desk()
    parrot = Parrot(model, "Now.\n" + call(action="left_click", coordinate=[98, 70]), DONE)
    record = Agent(parrot, desk, settle=0).run("Do it.", watch=lambda step: seen.append(step.number))       # type: ignore[arg-type]
    record.save(tmp_path / "log")
    told = json.loads((tmp_path / "log/transcript.json").read_text())
    assert seen == [1, 2] and (told["task"], told["ended"], told["status"]) == ("Do it.", "terminate", "success")
    assert told["steps"][0] | {"seconds": 0} == {
        "number": 1, "said": "Now.", "name": "computer_use", "arguments": '{"action": "left_click", "coordinate": [98, 70]}', "at": [100, 75],
        "screen": [200, 150], "processed": [196, 140], "done": True, "result": "", "seconds": 0}
    assert Image.open(tmp_path / "log/step-02.png").size == (200, 150)


@pytest.mark.parametrize("settings, message", [
    ({"allowed": {"left_clik"}}, "near: left_click"), ({"limit": 0}, "limit"), ({"keep": 0}, "keep"), ({"longest": -1}, "longest"), ({"confirm": 1}, "confirm")])
def test_settings_are_checked(model: pe.Model, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Agent(model, Desk(), **settings)                                       # type: ignore[arg-type]


def test_an_agent_needs_eyes() -> None:
    class Blind:
        media = None

    with pytest.raises(RequestError, match="takes pictures"):
        Agent(Blind(), Desk())                                                 # type: ignore[arg-type]


def prompts_of(heard: Sequence[Any], model: pe.Model) -> list[list[int]]:
    return [model.chat_ids(messages, tools) for messages, tools, _ in heard]


def test_each_prompt_goes_on_from_the_one_before(model: pe.Model) -> None:
    """So that nothing of it has to be computed again."""
    _, _, parrot = work(model, call(action="left_click", coordinate=[12, 98]), call(action="fly"))
    first, second, third = prompts_of(parrot.heard, model)
    assert second[: len(first)] == first and third[: len(second)] == second
    said = model.tokenize(call(action="left_click", coordinate=[12, 98]), add_special=False)
    assert second[len(first):][: len(said)] == said
