"""A conversation with thinking, tools and formats: what is shown, what is kept, what files of tools and schemas may hold."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings as limits, strategies as st
from test_cli import FakeModel, Pieces, Terminal, type_in

from pyengine.chat.reply.deltas import Delta, ToolCall
from pyengine.cli import answer, paper
from pyengine.cli.talk import chat, completion, saved, toolbox
from pyengine.cli.talk.commands import execute
from pyengine.cli.talk.conversation import Chat
from pyengine.engine.request import Report
from pyengine.errors import RequestError

FUNCTIONS = '''"""Tools of a test."""

from __future__ import annotations

from dataclasses import dataclass
from os.path import join                       # no tool of this file

import numpy


@dataclass
class Place:
    name: str


def warmth(place: Place, day: str = "today") -> dict:
    """Tell how warm it is.

    Args:
        day: which day
    """
    return {"celsius": 17.5, "where": place.name}


def picture() -> numpy.ndarray:
    """Take a picture."""
    return numpy.zeros((4, 6, 3), numpy.uint8)


def endless() -> None:
    """Be interrupted."""
    raise KeyboardInterrupt


def _private(x): ...
'''
LISTED = [{"type": "function", "function": {"name": "look_up", "description": "Look it up.", "parameters": {
    "type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}}}]


def calls(*made: tuple[str, Any]) -> list[Delta]:
    return [d for i, (name, given) in enumerate(made) for d in (Delta("call", name, i), Delta("arguments", json.dumps(given), i))]


class ScriptModel(FakeModel):
    """A model that says one scripted reply after the other: texts, and deltas of thinking and calls."""

    def __init__(self, *replies: list[str | Delta], sees: bool = False):
        super().__init__()
        self.replies, self.asked, self.settings = list(replies), [], []
        self.media = SimpleNamespace() if sees else None

    def chat(self, messages, tools=None, stream=False, max_tokens=512, stop=None, **more):
        self.asked.append([dict(m) for m in messages])
        self.settings.append({"tools": tools, **more})
        report = Report(n_prompt=9)
        pieces = Pieces(self._said(self.replies.pop(0), report))
        pieces.report = report
        return pieces

    def _said(self, reply: list[str | Delta], report: Report):
        for piece in reply:
            if isinstance(piece, Delta) and piece.kind == "thinking":
                report.thinking += piece.text
                report.n_thinking += 1
            elif isinstance(piece, Delta) and piece.kind == "call":
                report.calls.append(ToolCall(f"{piece.index:09}", piece.text, ""))
            elif isinstance(piece, Delta):
                report.calls[piece.index] = ToolCall(f"{piece.index:09}", report.calls[piece.index].name, piece.text)
            self.stats["generated_tokens"] += 1
            report.tokens.append(1)
            yield piece
        report.finish = "tool_calls" if report.calls else "stop"

    def chat_ids(self, messages, tools=None):
        return [0] * (sum(2 + len(answer.written(m).split()) for m in messages) + 5 * len(tools or ()))


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A folder, which is the current one, with files of tools and a schema."""
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    (tmp_path / "list.json").write_text(json.dumps(LISTED))
    (tmp_path / "person.json").write_text('{"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(model: FakeModel, monkeypatch, *lines: str, **settings: Any) -> Chat:
    talk = Chat(model, answer.Settings(), **settings)
    type_in(monkeypatch, "\n".join(lines))
    chat.run(talk)
    return talk


def roles(talk: Chat) -> str:
    return "".join(turn["role"][0] for turn in talk.turns)


# -- thinking -------------------------------------------------------------------------------------------------------------

THOUGHT = [Delta("thinking", "two and"), Delta("thinking", " two"), "It is ", "four."]


def on_paper(monkeypatch, capsys, how: str, *replies: list[str | Delta], terminal: bool = True) -> str:
    monkeypatch.setattr(paper, "can_wrap", lambda: terminal)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    sheet, report = paper.Paper(True, how), Report()
    for piece in [piece for reply in replies for piece in reply]:
        report.n_thinking += isinstance(piece, Delta)
        sheet.take(piece if isinstance(piece, Delta) else Delta("text", piece), report)
    sheet.end()
    assert sheet.text == "".join(piece for reply in replies for piece in reply if isinstance(piece, str))
    return capsys.readouterr().out


def test_thinking_is_dimmed_and_set_apart(monkeypatch, capsys) -> None:
    assert on_paper(monkeypatch, capsys, paper.SHOWN, THOUGHT) == "\x1b[2mtwo and\x1b[22m\x1b[2m two\x1b[22m\n\nIt is four.\n"


def test_thinking_is_folded_to_a_line_that_counts(monkeypatch, capsys) -> None:
    out = on_paper(monkeypatch, capsys, paper.FOLDED, THOUGHT)
    assert "two and" not in out and out.endswith("\r\x1b[K\x1b[2mthought for 2 tokens, 0.0 s\x1b[22m\nIt is four.\n")
    assert "thinking: 1 tokens" in out


@pytest.mark.parametrize("how", [paper.SHOWN, paper.FOLDED])
def test_thinking_without_an_answer_ends_its_line(monkeypatch, capsys, how: str) -> None:
    assert on_paper(monkeypatch, capsys, how, THOUGHT[:2]).endswith("\n")


def test_hidden_thinking_and_a_pipe_get_the_answer_only(monkeypatch, capsys) -> None:
    assert on_paper(monkeypatch, capsys, paper.HIDDEN, THOUGHT) == "It is four.\n"
    assert on_paper(monkeypatch, capsys, paper.SHOWN, THOUGHT, terminal=False) == "It is four.\n"


def test_think_is_asked_for_and_the_thought_is_kept_in_the_turn(monkeypatch, capsys) -> None:
    model = ScriptModel(*[THOUGHT] * 6)
    talk = run(model, monkeypatch, "a", "/think", "b", "/think off", "c", "/set think 200", "d", "/think high", "e", "/set nothink", "/think auto",
               "/set verbose on", "f")
    assert [s.get("think") for s in model.settings] == [None, True, False, 200, "high", None]
    assert talk.turns[1] == {"role": "assistant", "content": "It is four.", "reasoning_content": "two and two"}
    out, err = capsys.readouterr()
    assert out == "It is four.\n" * 6 and "thought for 2 tokens, " in err and "(think off)" in err


@pytest.mark.parametrize("line, part", [("/think deeply", "auto, on, off, low, medium, high"), ("/set think -1", "number of tokens"),
                                        ("/set thinking bright", "shown or folded or hidden")])
def test_what_is_no_thinking(monkeypatch, line: str, part: str) -> None:
    with pytest.raises(RequestError, match=part):
        run(ScriptModel(), monkeypatch, line)


def test_jsonl_tells_thinking_from_the_answer(capsys) -> None:
    answer.print_jsonl(ScriptModel(THOUGHT), answer.Question([{"role": "user", "content": "?"}]), answer.Settings(), False)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[:4] == [{"thinking": "two and"}, {"thinking": " two"}, {"piece": "It is "}, {"piece": "four."}]
    assert lines[4]["thinking"] == "two and two" and lines[4]["text"] == "It is four."


# -- tools ----------------------------------------------------------------------------------------------------------------


def test_functions_of_a_file_are_run(files, monkeypatch, capsys) -> None:
    made = calls(("warmth", {"place": {"name": "Rome"}}), ("warmth", {"place": "Rome"}))
    model = ScriptModel(["I look. ", *made], ["It is ", "17.5."], ["Bye."])
    talk = run(model, monkeypatch, "/tools mine.py", "How warm?", "/undo", "/tools off", "Hello")
    _, err = capsys.readouterr()
    assert '(warmth(place={"name": "Rome"}))' in err and '  = {"celsius": 17.5, "where": "Rome"}' in err and "error: the arguments of warmth are wrong" in err
    assert "(taken back, with its answer: How warm?)" in err
    second = model.asked[1]
    assert [m["role"] for m in second] == ["user", "assistant", "tool", "tool"] and second[1]["content"] == "I look. "
    assert second[1]["tool_calls"][0] == {"id": "000000000", "type": "function", "function": {
        "name": "warmth", "arguments": '{"place": {"name": "Rome"}}'}}
    assert second[2] == {"role": "tool", "tool_call_id": "000000000", "name": "warmth", "content": '{"celsius": 17.5, "where": "Rome"}'}
    assert [t["function"]["name"] for t in model.settings[0]["tools"]] == ["warmth", "picture", "endless"] and model.settings[2]["tools"] is None
    assert roles(talk) == "ua"


def test_results_of_listed_tools_are_typed(files, monkeypatch, capsys) -> None:
    model = ScriptModel(calls(("look_up", {"word": "x"}), ("other", {})), ["Found."])
    talk = run(model, monkeypatch, "/tools list.json", "What is x?", "a letter")
    assert [t["content"] for t in talk.turns if t["role"] == "tool"] == ["a letter", "error: there is no tool other; there are look_up"]
    assert '(look_up(word="x"))' in capsys.readouterr().err


def test_pictures_of_tools_are_shown_to_models_that_see(files, monkeypatch) -> None:
    talk = run(ScriptModel(calls(("picture", {})), ["Black."], sees=True), monkeypatch, "/tools mine.py", "Look!")
    part, = talk.turns[2]["content"]
    assert part["image"].pixels.shape == (4, 6, 3) and [p.name for p in talk.last[1]] == ["picture of picture"]
    with pytest.raises(RequestError, match="picture of picture: a picture without a file"):
        talk.save(files / "x")
    blind = run(ScriptModel(calls(("picture", {})), ["Oh."]), monkeypatch, "/tools mine.py", "Look!")
    assert blind.turns[2]["content"] == "error: the result is a picture, and this model sees none"


def test_ctrl_c_in_a_tool_ends_the_answer(files, monkeypatch, capsys) -> None:
    talk = run(ScriptModel(calls(("endless", {})), ["Never."]), monkeypatch, "/tools mine.py", "Run it")
    assert talk.turns == [] and talk.unanswered == {"role": "user", "content": "Run it"} and "(stopped)" in capsys.readouterr().err
    talk = run(ScriptModel(["Well: ", *calls(("endless", {}))]), monkeypatch, "/tools mine.py", "Run it")
    assert talk.turns[1:] == [{"role": "assistant", "content": "Well: "}]


def test_a_model_that_goes_on_calling_is_stopped(files, monkeypatch, capsys) -> None:
    model = ScriptModel(*[calls(("warmth", {"place": {"name": "x"}}))] * 12)
    talk = run(model, monkeypatch, "/tools mine.py", "Q")
    assert len(model.asked) == 10 and talk.turns == [] and "(stopped: the model goes on calling tools after 10 answers)" in capsys.readouterr().err


def test_what_is_equipped_is_told(files, monkeypatch, capsys) -> None:
    run(ScriptModel(), monkeypatch, "/tools", "/format", "/tools mine.py", "/format person.json", "/tools", "/format", "/show", "/format json", "/show")
    out, err = capsys.readouterr()
    assert "(no tools: " in err and "(answers are free: " in err and "(answers are JSON as person.json says)" in err
    assert "Tell how warm it is." in out and '"required": [' in out
    assert "warmth, picture, endless: mine.py" in out and "JSON as person.json says" in out and "objects of JSON" in out


def test_a_conversation_with_tools_is_saved_and_loaded(files, monkeypatch) -> None:
    talk = run(ScriptModel([Delta("thinking", "hm"), *calls(("warmth", {"place": {"name": "x"}}))], ["Warm."]), monkeypatch, "/tools mine.py", "Q")
    assert roles(talk) == "uata"
    notes = saved.pack(saved.Talk(talk.turns, None, False, "m"))
    assert saved.unpack(files / "x", notes).turns == talk.turns


def main_with_script() -> None:
    """Run the command line with a model of this file."""
    import pyengine
    from pyengine.cli import main

    model = ScriptModel(["I look. ", *calls(("look_up", {"word": "x"}))], [*[Delta("thinking", "hm ")] * 3, "It is a letter."])
    vars(pyengine)["load"] = lambda name, progress=None, **settings: model
    main()


@pytest.mark.skipif(os.name == "nt", reason="pseudo terminals are POSIX")
def test_results_are_typed_and_thinking_is_folded_at_a_terminal(files) -> None:
    program = [sys.executable, "-c", "import sys; sys.path.insert(0, 'tests/cli'); import test_talk_tools; test_talk_tools.main_with_script()"]
    t = Terminal(files / "state", "m", program=program)
    for line, shown in ((f"/tools {files / 'list.json'}", "Look it up."), ("/set thinking folded", "(thinking folded)")):
        t.expect(">>>")
        t.send(line + "\r")
        t.expect(shown)
    t.expect(">>>")
    t.send("What is x?\r")
    t.expect('(look_up(word="x"))')
    t.expect('look_up(word="x") = ')
    t.send("a letter\r")
    t.expect("thought for 3 tokens, ")
    t.expect("It is a letter.")
    t.expect(">>>")
    t.send("/show messages\r")
    t.expect("tool: a letter")
    t.expect(">>>")
    t.send("/bye\r")
    assert t.close() == 0


# -- formats --------------------------------------------------------------------------------------------------------------


def test_formats_are_asked_for(files, monkeypatch) -> None:
    model = ScriptModel(["{}"], ["{}"], ["x"])
    run(model, monkeypatch, "/format person.json", "a", "/format json", "b", "/format off", "c")
    assert [s.get("format") for s in model.settings] == [json.loads((files / "person.json").read_text()), {"type": "object"}, None]


# -- files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, text, part", [
    ("x.json", "[", "no JSON"), ("x.json", "[]", "a list of tools"), ("x.json", "[3]", r"\[0\]: a tool is an object, not a number"),
    ("x.json", '[{"type": "web"}]', r"\[0\].type"), ("x.json", '[{"function": {}}]', r"\[0\].function.name"),
    ("x.json", '{"tools": [{"name": "a"}, {"name": "a"}]}', r"\[1\].function.name: there are two"),
    ("x.json", '[{"name": "a", "parameters": {"properties": {"b": {"type": "int"}}}}]', r"\[0\].parameters: properties.b.type: 'int'"),
    ("x.json", '[{"name": "a", "parameters": 3}]', r"\[0\].parameters: a JSON schema is an object"),
    ("x.py", "def f(:", "line 1: SyntaxError"), ("x.py", "\nimport nowhere_at_all", "line 2: ModuleNotFoundError"), ("x.py", "\n\n1 / 0", "line 3: ZeroDiv"),
    ("x.py", "raise SystemExit(3)", "SystemExit: 3"), ("x.py", "from os.path import join", "no public functions"),
    ("x.py", "def f(a): ...", "f: parameter 'a' has no type hint: .*; a name that begins with _"), ("x.txt", "", "Python file"),
    ("gone.json", None, "No such file"), ("gone.py", None, "No such file")])
def test_files_that_are_no_tools(tmp_path, name: str, text: str | None, part: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(RequestError, match=f"/tools .*{name}: .*{part}"):
        toolbox.read_tools(tmp_path / name)
    assert toolbox.MODULE not in sys.modules or Path(sys.modules[toolbox.MODULE].__file__).name != "gone.py"


@pytest.mark.parametrize("text, part", [
    ('{"type": "object", "properties": {"age": {"type": "int"}}}', "properties.age.type: 'int' is not valid"), ("[]", "not a list"), ("{", "no JSON"),
    ('{"anyOf": [{}, {"minLength": -1}]}', r"anyOf\[1\].minLength: -1"), ("\ufeff", "no JSON"), ('{"required": "name"}', "required: 'name'")])
def test_schemas_are_refused_with_the_path_of_the_fault(tmp_path, text: str, part: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(RequestError, match=f"/format .*s.json: .*{part}"):
        toolbox.read_format(tmp_path / "s.json")


def test_a_file_of_functions_may_import_what_lies_beside_it(tmp_path) -> None:
    (tmp_path / "beside_it_9.py").write_text("N = 3")
    (tmp_path / "t.py").write_text("import beside_it_9\ndef f() -> int:\n  return beside_it_9.N\n")
    before = list(sys.path)
    tools = toolbox.read_tools(tmp_path / "t.py")
    assert tools.content(ToolCall("", "f", ""), input) == "3" and sys.path == before


JSON = st.recursive(st.none() | st.booleans() | st.integers(-3, 3) | st.text("abc", max_size=3),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
                        ["type", "function", "name", "parameters", "properties", "tools", "description", "enum"]), inner, max_size=4))


@limits(max_examples=200, deadline=None)
@given(value=JSON)
def test_any_json_is_tools_or_refused_in_words(value: Any, tmp_path_factory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(value))
    try:
        for schema in toolbox.read_tools(path).schemas:
            jsonschema.Draft202012Validator.check_schema(schema["function"]["parameters"])
    except RequestError as error:
        assert str(path) in str(error)


def test_tab_completes_files_of_tools_and_formats(files) -> None:
    assert [o.text for o in completion.offers("/tools ")] == ["off", "list.json", "mine.py", "person.json"]
    assert [o.text for o in completion.offers("/format ")] == ["json", "off", "list.json", "person.json"]
    assert [o.text for o in completion.offers("/set think lo")] == ["low"] and [o.text for o in completion.offers("/think o")] == ["on", "off"]
    assert [o.text for o in completion.offers("/set thinking f")] == ["folded"]


def test_tools_need_a_template(files) -> None:
    talk = Chat(ScriptModel(), answer.Settings(), raw=True)
    with pytest.raises(RequestError, match="/tools needs the chat template"):
        execute(talk, "/tools mine.py")
    assert talk.tools is None
