"""The computer's tool: what models are told, which calls become actions, and where on the screen they point."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, strategies as st

from pyengine.agents.tool import Action, ActionError, ACTIONS, ALLOWED, computer_tool, KEYS, on_screen, read_action
from pyengine.errors import RequestError

SIZE = (140, 112)
PARAMETERS = computer_tool(SIZE)["function"]["parameters"]

GOOD: list[tuple[dict[str, Any], Action]] = [
    ({"action": "left_click", "coordinate": [98, 11]}, Action("left_click", (98.0, 11.0))),
    ({"action": "double_click", "coordinate": [0, 0]}, Action("double_click", (0.0, 0.0))),
    ({"action": "right_click", "coordinate": [139, 111]}, Action("right_click", (139.0, 111.0))),
    ({"action": "middle_click"}, Action("middle_click")),
    ({"action": "mouse_move", "coordinate": [1, 2]}, Action("mouse_move", (1.0, 2.0))),
    ({"action": "left_click_drag", "coordinate": [1, 2]}, Action("left_click_drag", (1.0, 2.0))),
    ({"action": "type", "text": "héllo\n"}, Action("type", text="héllo\n")),
    ({"action": "key", "keys": ["Control", "a"]}, Action("key", keys=("ctrl", "a"))),
    ({"action": "key", "keys": ["Return"]}, Action("key", keys=("enter",))),
    ({"action": "key", "keys": ["ctrl+shift+left"]}, None),
    ({"action": "scroll", "pixels": -50}, Action("scroll", pixels=-50.0)),
    ({"action": "wait", "time": 0.5}, Action("wait", seconds=0.5)),
    ({"action": "terminate", "status": "failure"}, Action("terminate", status="failure")),
]


@pytest.mark.parametrize("arguments, action", GOOD)
def test_calls_become_actions(arguments: dict[str, Any], action: Action | None) -> None:
    jsonschema.validate(arguments, PARAMETERS)
    if action is None:
        with pytest.raises(ActionError, match="not allowed"):
            read_action(json.dumps(arguments), SIZE)
    else:
        assert read_action(json.dumps(arguments), SIZE) == action


@pytest.mark.parametrize("arguments, message", [
    ('{"action": "fly"}', "action: 'fly' is none; actions are key, type"),
    ('{"action": null}', "action"),
    ("[]", "an object with an action"),
    ('{"action": "left_click", "coordinate": [1', "no JSON"),
    ("[" * 100_000, "no JSON"),
    ('{"action": "left_click", "coordinate": [140, 5]}', r"coordinate: \[140, 5\] is outside of the screenshot of 140 x 112 pixels"),
    ('{"action": "left_click", "coordinate": [-1, 5]}', "outside"),
    ('{"action": "left_click", "coordinate": [NaN, 5]}', "outside"),
    ('{"action": "left_click", "coordinate": [1e999, 5]}', "outside"),
    ('{"action": "left_click", "coordinate": [true, 5]}', "two numbers"),
    ('{"action": "left_click", "coordinate": "5, 5"}', "two numbers"),
    ('{"action": "mouse_move"}', "mouse_move needs one"),
    ('{"action": "type"}', "text: a text"),
    ('{"action": "type", "text": "\ue009w"}', r"U\+E009 cannot be typed"),
    ('{"action": "type", "text": "\\u001b"}', r"U\+001B cannot be typed"),
    ('{"action": "type", "text": "\\ud800"}', r"U\+D800 cannot be typed"),
    ('{"action": "key", "keys": ["alt", "tab"]}', r"keys: alt\+tab is not allowed here"),
    ('{"action": "key", "keys": ["ctrl", "w"]}', "not allowed"),
    ('{"action": "key", "keys": ["a", "ctrl", "w"]}', "not allowed"),
    ('{"action": "key", "keys": ["ctrl", "ctrl", "a"]}', "not allowed"),
    ('{"action": "key", "keys": ["meta"]}', "not allowed"),
    ('{"action": "key", "keys": ["f5"]}', "not allowed"),
    ('{"action": "key", "keys": ["entre"]}', "no key; near: enter"),
    ('{"action": "key", "keys": []}', "1 to 4 names"),
    ('{"action": "key", "keys": ["\ue009", "w"]}', "no key"),
    ('{"action": "scroll", "pixels": Infinity}', "pixels: a number"),
    ('{"action": "wait", "time": 3600}', "time: a number from 0 to 60"),
    ('{"action": "terminate", "status": "done"}', "success or failure"),
])
def test_what_is_wrong_is_said(arguments: str, message: str) -> None:
    with pytest.raises(ActionError, match=message):
        read_action(arguments, SIZE)


def test_only_what_is_allowed_is_offered_and_done() -> None:
    allowed = {"left_click", "terminate"}
    parameters = computer_tool(SIZE, allowed)["function"]["parameters"]
    assert parameters["properties"]["action"]["enum"] == ["left_click", "terminate"]
    assert set(parameters["properties"]) == {"action", "coordinate", "status"}
    with pytest.raises(ActionError, match="type is not allowed here; allowed are left_click, terminate"):
        read_action('{"action": "type", "text": "x"}', SIZE, allowed)
    with pytest.raises(RequestError, match="'left_clik' is no action; near: left_click"):
        computer_tool(SIZE, {"left_clik"})
    with pytest.raises(RequestError, match="a set of names"):
        computer_tool(SIZE, "left_click")


def test_keys_beside_those_of_the_window_must_be_asked_for() -> None:
    close = '{"action": "key", "keys": ["ctrl", "w"]}'
    assert read_action(close, SIZE, keys={"ctrl+w"}).keys == read_action(close, SIZE, keys=None).keys == ("ctrl", "w")
    assert not any("meta" in k or "alt" in k or k in {"ctrl+w", "ctrl+t", "ctrl+n", "ctrl+l", "ctrl+tab"} for k in KEYS)
    with pytest.raises(ActionError, match="the key enter is not allowed"):
        read_action('{"action": "type", "text": "a\\n"}', SIZE, keys=())


def test_the_tool_is_a_schema_that_names_size_and_actions() -> None:
    jsonschema.Draft202012Validator.check_schema(PARAMETERS)
    told = computer_tool((1092, 616))["function"]
    assert told["name"] == "computer_use" and "1092 x 616" in told["description"] and all(name in told["description"] for name in ACTIONS)
    for wrong in ({"action": "fly"}, {}, {"action": "left_click", "coordinate": [1]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, PARAMETERS)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text("aé\n\x1b\ue009", max_size=5) | st.just([[]])


@given(st.fixed_dictionaries({"action": st.sampled_from([*ACTIONS, "x"])}, optional={
    "coordinate": plain | st.lists(st.integers(-5, 150), min_size=2, max_size=2), "keys": plain | st.lists(st.sampled_from(["ctrl", "a", "tab", "w"]), max_size=4),
    "text": plain, "pixels": plain, "time": plain, "status": plain | st.sampled_from(["success"])}))
def test_what_comes_through_is_in_range(arguments: dict[str, Any]) -> None:
    try:
        action = read_action(json.dumps(arguments), SIZE, ALLOWED - {"wait"})
    except ActionError as e:
        assert str(e)
        return
    assert action.name in ALLOWED - {"wait"}
    if action.at is not None:
        assert 0 <= action.at[0] < SIZE[0] and 0 <= action.at[1] < SIZE[1]
    assert len(action.keys) < 2 or "+".join(action.keys) in KEYS
    assert all(c.isprintable() or c in "\n\t" or c.isspace() or ord(c) > 127 for c in action.text)


@given(st.binary(max_size=60))
def test_any_text_is_read_or_refused(raw: bytes) -> None:
    try:
        read_action(raw.decode("utf-8", "replace"), SIZE)
    except ActionError as e:
        assert str(e)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(28, 2000), st.integers(28, 2000), st.data())
def test_places_are_mapped_into_the_screen(w: int, h: int, pw: int, ph: int, data: Any) -> None:
    x, y = data.draw(st.integers(0, pw - 1)), data.draw(st.integers(0, ph - 1))
    sx, sy = on_screen((x, y), (pw, ph), (w, h))
    assert 0 <= sx < w and 0 <= sy < h
    assert abs((sx + 0.5) / w - (x + 0.5) / pw) <= 0.5 / w + 1e-9 and abs((sy + 0.5) / h - (y + 0.5) / ph) <= 0.5 / h + 1e-9


def test_a_picture_of_the_screens_size_has_the_screens_places() -> None:
    assert [on_screen((x, y), SIZE, SIZE) for x, y in ((0, 0), (139, 111), (7, 50))] == [(0, 0), (139, 111), (7, 50)]
