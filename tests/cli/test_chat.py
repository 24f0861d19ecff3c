"""A conversation: what its commands do, how its text is laid out, what a full context does, what its user sees at a terminal."""

from __future__ import annotations

import os
import re
import struct
import sys
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings as limits, strategies as st
from test_cli import FAKE, FakeModel, Terminal, type_in

import cases
import pyengine
from pyengine.cli import answer, command, screen
from pyengine.cli.command import execute
from pyengine.cli.talk import chat, commands as chat_commands, completion, editor, settings
from pyengine.cli.talk.conversation import Chat
from pyengine.cli.paper import Words
from pyengine.cli.talk.terminal import quiet
from pyengine.errors import ContextOverflowError, ModelWarning, RequestError

posix = pytest.mark.skipif(os.name == "nt", reason="pseudo terminals are POSIX")


class SmallModel(FakeModel):
    """A model whose context is as full as its messages have words, and two for each; it refuses more than 64."""

    def chat(self, messages, **arguments):
        if len(self.chat_ids(messages)) > 64:
            raise ContextOverflowError("the prompt has too many tokens")
        pieces = super().chat(messages, **arguments)
        pieces.report.finish = "stop"
        return pieces


def talk_with(model=None, **settings) -> Chat:
    return Chat(model or SmallModel(), answer.Settings(**settings))


def roles(talk: Chat) -> str:
    return "".join(turn["role"][0] for turn in talk.turns)


def run(talk: Chat, monkeypatch, *lines: str) -> None:
    type_in(monkeypatch, "\n".join(lines))
    chat.run(talk)


# --- words at the edge ------------------------------------------------------------------------------------------------


def on_screen(output: str, columns: int) -> list[str]:
    """Lines of a terminal after text, newlines, and what takes a word back."""
    lines, at = [""], 0
    for part in re.findall(r"\x1b\[\d+D|\x1b\[K|\n|[^\x1b\n]", output):
        if part == "\n":
            lines.append("")
            at = 0
        elif part.endswith("D"):
            at -= int(part[2:-1])
            assert at >= 0
        elif part.endswith("K"):
            lines[-1] = lines[-1][:at]
        else:
            assert at == len(lines[-1]) < columns
            lines[-1] += part
            at += 1
    return lines


def wrapped(text: str, columns: int, cuts: list[int] = []) -> list[str]:
    words, ends = Words(lambda: columns), sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    return on_screen("".join(words.push(text[a:b]) for a, b in zip(ends, ends[1:])), columns)


@pytest.mark.parametrize(
    "text, lines",
    [
        ("one two three", ["one two", "three"]),
        ("one twelve", ["one", "twelve"]),
        ("one two  three", ["one two", "three"]),
        ("123456789 1", ["123456789", "1"]),
        ("12345678901234 x", ["123456789", "01234 x"]),
        ("ab 12345678901234", ["ab", "123456789", "01234"]),
        ("a\n\n  b c d e f", ["a", "", "  b c d e", "f"]),
        ("a b\n```\nlong line of code that stays\n```\nlong line that goes", None),
    ],
)
def test_words_are_not_cut(text, lines) -> None:
    found = [line.rstrip() for line in wrapped(text, 10 if lines else 40)]
    assert found == (lines or text.split("\n"))


@limits(max_examples=200, deadline=None)
@given(st.text("ab \n", max_size=120), st.integers(3, 30), st.lists(st.integers(0, 200), max_size=6))
def test_wrapped_text_is_the_text(text, columns, cuts) -> None:
    """Pieces are cut anywhere: the lines are the same, fit, and lose nothing but spaces where they break."""
    lines = wrapped(text, columns, cuts)
    assert lines == wrapped(text, columns) and max(map(len, lines)) < columns
    assert "".join(lines).replace(" ", "") == re.sub(r"\s", "", text)
    long = [word for word in text.split() if len(word) >= columns]
    assert long or " ".join(lines).split() == text.split()


def test_wide_letters_break_anywhere_and_marks_take_no_column() -> None:
    assert Words(lambda: 8).push("ab \u6f22\u5b57\u6f22\u5b57\u6f22\u5b57") == "ab \u6f22\u5b57\n\u6f22\u5b57\u6f22\n\u5b57"
    assert Words(lambda: 8).push("e\u0301" * 8) == "e\u0301" * 7 + "\ne\u0301"


def test_code_is_left_to_the_terminal() -> None:
    code = "```python\n" + "x = 'a line that is copied as it is'\n" * 2 + "```\n"
    assert Words(lambda: 12).push(code) == code


def test_lines_are_folded_below_their_last_column() -> None:
    table = "  cpu    weights        28.7 MiB  embedding, head and norms"
    assert screen.folded(table, 120) == table
    assert screen.folded("  cpu    weights  embedding, head and norms", 36) == "  cpu    weights  embedding, head\n" + " " * 18 + "and norms"
    path = "/a/very/long/path/that/cannot/be/cut"
    assert screen.folded(f"x: {path} is not there", 20) == f"x:\n  {path}\n  is not there"


def test_warnings_are_notes(monkeypatch, capsys) -> None:
    def load(name, **_):
        warnings.warn("the file says\n  nothing", ModelWarning)
        return FakeModel()

    monkeypatch.setitem(vars(pyengine), "load", load)
    assert execute(["m", "Q"]) == 0
    assert capsys.readouterr().err == "note: the file says nothing\n"


# --- settings ---------------------------------------------------------------------------------------------------------


class Recommending(FakeModel):
    sampling_defaults = {"temperature": 0.6, "top_k": 20}
    stop_defaults = ("<end>", "two\nlines")


def listed(talk: Chat) -> dict[str, tuple[str, str]]:
    return {name: (value, about.partition(":")[0]) for name, value, about in talk.choices.rows(talk.model)}


def test_set_lists_all_values_and_where_they_are_from() -> None:
    talk = talk_with(Recommending(), max_tokens=7)
    found = listed(talk)
    assert set(found) == {*settings.SAMPLING, "max_tokens", "stop", "think", "thinking", "compress", "keep", "wordwrap", "verbose"}
    assert found["temperature"] == ("0.6", "the model's") and found["top_k"] == ("20", "the model's") and found["top_p"][0] == "0.95"
    assert found["stop"] == ('"<end>" "two\\nlines"', "the model's") and found["max_tokens"] == ("7", "set")
    talk.say(["Q"])
    assert talk.model.calls[0][3:] == (None, {})                       # the model's own: nothing is said in their place
    for name, value in (("temperature", "0.1"), ("stop", '"a b" c'), ("keep", "latest"), ("wordwrap", "off"), ("verbose", None)):
        talk.choices.set(name, value)
    found = listed(talk)
    assert found["temperature"] == ("0.1", "set") and found["stop"] == ('"a b" "c"', "set")
    assert [found[name] for name in ("keep", "wordwrap", "verbose")] == [("latest", "set"), ("off", "set"), ("on", "set")]
    assert "temperature 0.1" in talk.choices.changed(talk.model) and "top_k" not in talk.choices.changed(talk.model)
    for name in ("temperature", "stop", "keep", "wordwrap"):
        talk.choices.set(name)
    assert (talk.choices.keep, talk.choices.wordwrap, listed(talk)["temperature"][0]) == ("all", True, "0.6")


def test_sequence_breakers_are_typed_as_texts() -> None:
    talk = talk_with()
    for typed, want in ((r'"\n" "a b" c', ("\n", "a b", "c")), ("none", ()), ("END", ("END",))):
        talk.choices.set("dry_sequence_breakers", typed)
        assert talk.choices.answer.sampling == {"dry_sequence_breakers": want}
    assert listed(talk)["dry_sequence_breakers"] == ('"END"', "set")


def test_settings_have_the_words_of_the_options() -> None:
    import typing

    hints, names = typing.get_type_hints(command.run, include_extras=True), {"typical_p": "typical"}
    for name in (*settings.SAMPLING, "max_tokens", "stop"):
        said = hints[names.get(name, name)].__metadata__[0].help
        meaning = settings.MEANINGS[name].partition(": END")[0]
        assert said.startswith(meaning[0].upper() + meaning[1:]), name


def test_forms_of_ollama_are_read(monkeypatch) -> None:
    talk = talk_with()
    run(talk, monkeypatch, "/set parameter top_k 3", "/set nowordwrap", "/set verbose", "/set quiet", "/set system Be brief.")
    assert talk.choices.answer.sampling == {"top_k": 3} and talk.system == "Be brief."
    assert (talk.choices.wordwrap, talk.choices.verbose) == (False, False)


@pytest.mark.parametrize("name, value, message", [("keep", "some", "all or latest"), ("temprature", "3", "near: temperature"), ("stop", '"a', "quot"),
                                                  ("wordwrap", "yes", "on or off"), ("seed", "x", "whole number")])
def test_what_cannot_be_set_is_said(name, value, message) -> None:
    with pytest.raises(RequestError, match=message):
        talk_with().choices.set(name, value)


# --- commands ---------------------------------------------------------------------------------------------------------


def test_every_command_is_listed_and_its_other_names_work(monkeypatch, capsys) -> None:
    for last in ("/bye", "/exit", "/quit"):
        talk = talk_with()
        run(talk, monkeypatch, "/?", last, "never")
        assert talk.model.calls == []
        out = capsys.readouterr().out
        assert all(name in out for name in chat_commands.COMMANDS) and '"""' in out
    with pytest.raises(RequestError, match="no command /retyr; near: /retry"):
        run(talk_with(), monkeypatch, "/retyr")


def test_words_that_end_are_messages_for_a_program_at_the_other_end(monkeypatch) -> None:
    talk = talk_with()
    run(talk, monkeypatch, "exit", "quit")
    assert [call[1][-1]["content"] for call in talk.model.calls] == ["exit", "quit"]


def test_show_is_short_and_shows_more_when_asked(monkeypatch, capsys) -> None:
    talk = talk_with(Recommending())
    talk.model.system_default = "From the file."
    run(talk, monkeypatch, "one", "/show")
    out = capsys.readouterr().out
    assert re.search(r"context +13 of 64 tokens used, 1 question\n", out) and "weights" not in out and "From the file." in out
    run(talk, monkeypatch, "/show memory", "/show system", "/show messages", "/show settings")
    out = capsys.readouterr().out
    assert "weights" in out and "(the model's own)\nFrom the file." in out and "user: one\nassistant: <user:one>\n" in out and "top_k" in out
    with pytest.raises(RequestError, match="there are memory, template"):
        run(talk, monkeypatch, "/show all")


def test_retry_takes_the_place_of_the_answer(monkeypatch, capsys) -> None:
    talk = talk_with()
    with pytest.raises(RequestError, match="no question yet"):
        run(talk, monkeypatch, "/retry")
    run(talk, monkeypatch, "one", "two", "/retry")
    assert [call[1] for call in talk.model.calls][1] == [call[1] for call in talk.model.calls][2] and roles(talk) == "uaua"
    before = list(talk.turns)
    monkeypatch.setattr(talk.model, "_pieces", lambda said, asked: iter(()))
    run(talk, monkeypatch, "/retry")
    assert talk.turns == before and "ended without a text" in capsys.readouterr().err


def test_a_question_without_an_answer_can_be_asked_again(monkeypatch) -> None:
    talk = talk_with()
    talk.say(["silent"])
    assert talk.turns == [] and talk.unanswered == {"role": "user", "content": "silent"}
    run(talk, monkeypatch, "/retry")
    assert [call[1] for call in talk.model.calls] == [[{"role": "user", "content": "silent"}]] * 2
    run(talk, monkeypatch, "/clear")
    assert talk.unanswered is None


def test_undo_takes_back_a_question_and_its_answer(monkeypatch, capsys) -> None:
    talk = talk_with()
    run(talk, monkeypatch, "one", "two", "/undo", "three")
    assert [turn["content"] for turn in talk.turns if turn["role"] == "user"] == ["one", "three"]
    assert "(taken back, with its answer: two)" in capsys.readouterr().err
    run(talk, monkeypatch, "/undo", "/undo")
    assert talk.turns == [] and talk.used() == 0
    with pytest.raises(RequestError, match="no question yet"):
        talk.undo()


def test_use_of_the_context_is_known_after_every_command(monkeypatch) -> None:
    talk = talk_with()
    assert talk.used() == 0
    run(talk, monkeypatch, "one", "two")
    assert talk.used() == 13                                           # as the answer reports
    talk.undo()
    assert talk.used() == 13 and len(talk.turns) == 2
    talk.instruct("Be brief.")
    assert talk.used() == 3 + 3 + 4                                    # counted
    monkeypatch.setattr(talk.model, "chat_ids", lambda messages: 1 / 0)
    assert talk.used() == 10                                           # once
    talk.turns = [{"role": "user", "content": [{"type": "image", "name": "cat.png"}]}]
    assert talk.used() is None                                         # a picture is not encoded for that
    talk.clear()
    assert talk.used() == 0


def test_the_line_below_the_prompt_warns_before_the_context_is_full() -> None:
    talk, seen = talk_with(), {}
    talk.turns = [{"role": "user", "content": ""}]
    for used in (13, 48, 58, 64):
        talk._uses[1] = used
        style, text = editor.status(talk)[0]
        seen[text] = style
    assert seen == {"ctx 20 %": "", "ctx 75 %": "class:high", "ctx 91 %": "class:full", "ctx 100 %": "class:full"}
    talk.turns[0]["content"] = [{"type": "image", "name": "cat.png"}]
    talk._uses.clear()
    assert editor.status(talk) == [("", "ctx ? of 64 tokens")]


# --- a full context ---------------------------------------------------------------------------------------------------

WORDS = "word " * 9 + "word"


def test_a_full_conversation_says_what_to_do(monkeypatch, capsys) -> None:
    talk = talk_with()
    talk.model.config.n_ctx_train = 4096
    try:
        with pytest.raises(ContextOverflowError) as error:
            run(talk, monkeypatch, *[WORDS] * 5)
        said = str(error.value)
        assert re.search(r"conversation is full: with this message it takes \d+ tokens, and the context holds 64", said)
        assert all(way in said for way in ("/clear", "/undo", "/set keep latest", "--ctx N at the start, up to 4,096"))
        n = len(talk.turns)
        with pytest.raises(ContextOverflowError, match="conversation is full"):
            talk.say([WORDS])
        assert len(talk.turns) == n                                    # as it was
        with pytest.raises(ContextOverflowError, match="this message alone takes 75 tokens, and the context holds 64: shorten it"):
            talk.say([WORDS * 8])
    finally:
        talk.model.config.n_ctx_train = 64


def test_the_oldest_turns_go_by_choice(monkeypatch, capsys) -> None:
    talk = talk_with()
    with pytest.raises(ContextOverflowError):
        run(talk, monkeypatch, *[WORDS] * 5)
    run(talk, monkeypatch, "/system S", "/set keep latest", "/retry", *(f"{i} {WORDS}" for i in range(9)))
    assert talk.turns[-2]["content"] == f"8 {WORDS}" and talk.turns[0]["role"] == "user"
    assert talk.messages()[0] == {"role": "system", "content": "S"}
    dropped = [int(n) for n in re.findall(r"the oldest (\d+) messages are forgotten", capsys.readouterr().err)]
    assert 1 < len(dropped) and all(n % 2 == 0 for n in dropped)
    with pytest.raises(ContextOverflowError, match="this message alone"):
        talk.say([WORDS * 8])


def test_room_is_made_for_the_answer_and_half_of_the_context_at_once(capsys) -> None:
    talk = talk_with(max_tokens=4)
    talk.choices.keep = "latest"
    talk.turns = [{"role": r, "content": "a b c d"} for _ in range(4) for r in ("user", "assistant")]      # 48 tokens
    talk.say(["a b c d e f g h i j"])                                   # 60: the answer has its 4
    assert len(talk.turns) == 10
    talk.turns = talk.turns[:8]
    talk.choices.answer.max_tokens = None                               # a fourth of the context
    talk.say(["a b c d e f g h i j"])
    assert len(talk.turns) == 4 and "the oldest 6 messages" in capsys.readouterr().err


@pytest.mark.parametrize("raw", [False, True])
def test_a_tiny_model_with_a_full_context(tiny_gguf, monkeypatch, capsys, raw) -> None:
    """The engine's own counts: the error, the note of a cut answer, and a conversation that goes on for ever with its latest turns."""
    model = pyengine.load(tiny_gguf(cases.first(sees=False, ring=False))[0], n_ctx=96)
    talk = Chat(model, answer.Settings({"temperature": 0.0}, 24), raw=raw)
    with pytest.raises(ContextOverflowError, match="the conversation is full: with this message it takes"):
        run(talk, monkeypatch, *["one two three four"] * 30)
    run(talk, monkeypatch, "/set keep latest", "/retry", *["one two three four"] * 6)
    err = capsys.readouterr().err
    assert "messages are forgotten)" in err and talk.turns[-2]["content"] == "one two three four"
    run(talk, monkeypatch, "/set keep all", "/clear", "/set max_tokens -1", "one")
    assert "(cut: the context of 96 tokens is full; /clear" in capsys.readouterr().err or "ended" in err


# --- what Tab offers --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("cat.png", "my cat.PNG", "film.mp4", "notes.txt", ".hidden.png"):
        (tmp_path / name).write_text("")
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "in.jpg").write_text("")
    (tmp_path / "talk").write_bytes(b"s" * 32 + b"pe-cells" + b"more")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def lines_after_tab(line: str) -> list[str]:
    return [line[:len(line) - offer.n] + offer.text for offer in completion.offers(line)]


@pytest.mark.parametrize(
    "line, found",
    [
        ("/sa", ["/save"]),
        ("/ex", ["/exit"]),
        ("/set te", ["/set temperature"]),
        ("/set keep ", ["/set keep all", "/set keep latest"]),
        ("/set wordwrap of", ["/set wordwrap off"]),
        ("/set top_k ", []),
        ("/show m", ["/show memory", "/show messages"]),
        ("/load ", ["/load cats/", "/load talk"]),
        ("/load ./ta", ["/load ./talk"]),
        ("/image c", ["/image cat.png", "/image cats/"]),
        ("/image ", ["/image cat.png", "/image cats/", "/image my\\ cat.PNG"]),
        ("/image 'my", ["/image 'my cat.PNG'"]),
        ("/image my\\ c", ["/image my\\ cat.PNG"]),
        ("/image .h", ["/image .hidden.png"]),
        ("/video ", ["/video cats/", "/video film.mp4"]),
        ("what is in cats/", ["what is in cats/in.jpg"]),
        ("what is in ~/m", ["what is in ~/my\\ cat.PNG"]),
        ("what is ", []),
        ("it's ca", ["it's cat.png", "it's cats/"]),
        ("/nonsense x", []),
        ("/no/such/folder/", []),
    ],
)
def test_tab(folder, line, found) -> None:
    assert lines_after_tab(line) == found


def test_tab_offers_every_command_and_setting(folder) -> None:
    assert lines_after_tab("/") == list(chat_commands.COMMANDS)
    assert lines_after_tab("/set ") == [f"/set {name}" for name in settings.MEANINGS]
    assert lines_after_tab(f"{folder}/cat") == [f"{folder}/cat.png", f"{folder}/cats/"]


# --- at a terminal ----------------------------------------------------------------------------------------------------


def start(state: Path, columns: int = 80, **settings) -> Terminal:
    import fcntl
    import termios

    t = Terminal(state, "m", **settings)
    fcntl.ioctl(t.master, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    t.expect(">>>")
    return t


@posix
def test_keys_are_kept_while_it_speaks(tmp_path) -> None:
    t = start(tmp_path, columns=160)
    t.send("count\r")
    t.expect("0 0 0 ")
    t.send("typed ahead")
    time.sleep(0.3)
    t.send("\x03")
    shown = t.expect("(stopped)")
    assert "^C" not in shown and "typed" not in shown and set(shown.split()) == {"0", "(stopped)"}
    t.expect("typed ahead")                                            # now it is the line
    t.send(" and sent\r")
    t.expect("|user:typed ahead and sent>")
    t.expect(">>>")
    t.send("exit\r")
    assert t.close() == 0


@posix
@pytest.mark.parametrize("before", [True, False])
def test_what_is_typed_ahead_of_ctrl_c_is_not_sent(tmp_path, before) -> None:
    t = start(tmp_path, columns=160)
    t.send("count\r")
    t.expect("0 0 0 ")
    for keys in ("one \x1b[Dtwx\x7fo\rthree\r", "\x03") if before else ("\x03one two\rthree\r",):
        t.send(keys)
        time.sleep(0.3 * before)
    t.expect("three")
    time.sleep(0.5)
    t.send(" edited\r")
    t.expect("|user:one two\r\nthree edited>")
    t.expect(">>>")
    t.send("exit\r")
    assert t.close() == 0


QUIET = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from pyengine.cli.talk.terminal import quiet
before = termios.tcgetattr(0)
with quiet():
    termios.tcsetattr(0, termios.TCSANOW, before)                # as a shell does while this is stopped
    os.kill(os.getpid(), signal.SIGCONT)
    flags = termios.tcgetattr(0)[3]
silent = not flags & termios.ECHO and flags & termios.ISIG and flags & termios.NOFLSH
print("kept" if silent and termios.tcgetattr(0) == before else "lost", flush=True)
"""


@posix
def test_the_terminal_is_left_as_it_was_found(tmp_path) -> None:
    t = Terminal(tmp_path, program=[sys.executable, "-c", QUIET])
    t.expect("kept")
    assert t.close() == 0


def test_without_a_terminal_there_is_nothing_to_silence(monkeypatch) -> None:
    for stream in (None, sys.__stdin__):
        monkeypatch.setattr(sys, "stdin", stream)
        with quiet():
            pass


@posix
def test_answers_are_wrapped_unless_that_is_off(tmp_path) -> None:
    t = start(tmp_path, columns=40)
    long = " ".join(f"word{i:02}" for i in range(12))
    t.send(long + "\r")
    t.expect("<user:word00")
    shown = t.expect(">")
    lines = [re.sub(r"\x1b.*", "", line).strip() for line in shown.split("\n")]
    assert all(len(line) < 40 for line in lines) and len(lines) > 2
    t.expect(">>>")
    t.send("/set wordwrap off\r")
    t.expect("(wordwrap off)")
    t.expect(">>>")
    t.send("/clear\r")
    t.expect(">>>")
    t.send(long + "\r")
    t.expect(f"<user:{long}>")                                         # the terminal breaks it, not we
    t.expect(">>>")
    t.send("/quit\r")
    assert t.close() == 0


@posix
def test_what_is_used_of_the_context_stands_below(tmp_path) -> None:
    here = "\x1b[1;1R"                                                  # the cursor's place, which is asked for
    t = start(tmp_path, program=["env", "-u", "PROMPT_TOOLKIT_NO_CPR", *FAKE])
    t.send(here)
    t.expect("ctx 0 %  0 of 64 tokens")
    t.send("hello\r")
    t.expect("<user:hello>")
    t.expect(">>>")
    t.send(here)
    t.expect("ctx 20 %  13 of 64 tokens")
    t.send("/sav\t")                                                   # completed
    t.expect("/save")
    t.send("\r")
    t.expect("/save FILE: the file is missing")
    t.expect(">>>")
    t.send("/help\r")
    shown = t.expect("Alt-Enter")
    assert all(len(line.rstrip()) <= 80 for line in shown.split("\n")[1:])
    t.expect(">>>")
    t.send("/exit\r")
    assert t.close() == 0


@posix
def test_a_message_is_written_in_the_editor(tmp_path, monkeypatch) -> None:
    script = tmp_path / "editor"
    script.write_text(f"#!{sys.executable}\nimport sys\nopen(sys.argv[1], 'a').write(' and\\nmore')\n")
    script.chmod(0o755)
    monkeypatch.setenv("EDITOR", str(script))
    monkeypatch.delenv("VISUAL", raising=False)
    for key in ("\x18\x05", "\x07"):
        t = start(tmp_path)
        t.send(f"first{key}")
        t.expect("more")
        t.send("\r")
        t.expect("<user:first and\r\nmore>")
        t.expect(">>>")
        t.send("quit\r")
        assert t.close() == 0
