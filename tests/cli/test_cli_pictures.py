"""Pictures at the command line: options, paths in what is typed, reports, boxes; tiny models, the whole program."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import Terminal, one_line, type_in

import cases
import pyengine
from converters import convert
from pyengine.chat.reply.deltas import Delta
from pyengine.engine.answer import Stream
from pyengine.cli import answer, pictures
from pyengine.cli.command import execute
from pyengine.cli.talk import chat, commands as chat_commands, saved as talks
from pyengine.errors import ImageError, RequestError, SessionError
from pyengine.engine.encoded import MediaInfo

BOX = '```json\n[{"bbox_2d": [14, 28, 56, 56], "label": "cat"}, {"point_2d": [28, 28], "label": "nose"}]\n```'


@pytest.fixture
def cats(tmp_path, monkeypatch):
    """A folder, which is the current one, with pictures: cat.png, "my cat.png", "it's (1).JPG", bad.png, and notes."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    for name in ("cat.png", "my cat.png", "it's (1).JPG"):
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "bad.png").write_text("no picture")
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "plain").write_bytes((tmp_path / "cat.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny(tiny_gguf):
    """tiny["gemma3"]: path of a tiny model."""
    class Paths:
        def __getitem__(self, kind: str) -> str:
            return str(tiny_gguf(kind)[0])

    return Paths()


@pytest.fixture
def says(monkeypatch):
    """says(text): what every answer of the engine is from now on; pictures are encoded as ever."""

    def set_text(text: str) -> None:
        def deltas(stream):
            stream.begin()
            stream.report.tokens.append(7)
            yield Delta("text", text)

        monkeypatch.setattr(Stream, "deltas", deltas)

    return set_text


# --- what is typed ----------------------------------------------------------------------------------------------------


def found(text: str) -> tuple[list[str], list[str]]:
    """The parts of a message, pictures as <name>, and the remarks."""
    parts, remarks = pictures.find_pictures(text, {})
    return [p if isinstance(p, str) else f"<{p.name}>" for p in parts], remarks


@pytest.mark.parametrize(
    "text, parts",
    [
        ("cat.png", ["<cat.png>"]),
        ("{}/cat.png ", ["<cat.png>", " "]),
        ("what is in ./cat.png?", ["what is in ", "<cat.png>", "?"]),
        ("(see cat.png), or [cat.png]", ["(see ", "<cat.png>", "), or [", "<cat.png>", "]"]),
        ("'{}/my cat.png' what?", ["<my cat.png>", " what?"]),
        ('"my cat.png", "cat.png"', ["<my cat.png>", ", ", "<cat.png>"]),
        ("{}/my\\ cat.png what?", ["<my cat.png>", " what?"]),
        ("it's my\\ cat.png isn't it", ["it's ", "<my cat.png>", " isn't it"]),
        (shlex.quote("{}/it's (1).JPG") + " this", ["<it's (1).JPG>", " this"]),
        ("it\\'s\\ \\(1\\).JPG", ["<it's (1).JPG>"]),
        ("file://{}/my%20cat.png and\nfile://localhost{}/cat.png", ["<my cat.png>", " and\n", "<cat.png>"]),
        ("compare cat.png with 'my cat.png' now", ["compare ", "<cat.png>", " with ", "<my cat.png>", " now"]),
        ("look at {}/plain", ["look at ", "<plain>"]),
        ("look at plain and {}/notes.txt", ["look at plain and {}/notes.txt"]),
        ("a /b c/d ~ . / \\ ' \" file:// ''", ["a /b c/d ~ . / \\ ' \" file:// ''"]),
        ("what is a .png, or *.png", ["what is a .png, or *.png"]),
    ],
)
def test_paths_of_pictures_in_a_message(cats, text, parts) -> None:
    got, remarks = found(text.replace("{}", str(cats)))
    assert got == [part.replace("{}", str(cats)) for part in parts]
    assert bool(remarks) == ("*.png" in text)


def test_the_home_folder(cats, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(cats))
    monkeypatch.setenv("USERPROFILE", str(cats))
    assert found("~/cat.png ~/my\\ cat.png")[0] == ["<cat.png>", " ", "<my cat.png>"]


@pytest.mark.parametrize(
    "text, remark",
    [
        ("is none.png there?", "none.png: there is no such file"),
        ("is '/no/my none.JPG' there?", "/no/my none.JPG: there is no such file"),
        ("this bad.png too", "bad.png: not an image format"),
        ("https://example.org/cat.png", "nothing is fetched"),
        ("file://elsewhere/cat.png", "the file is on elsewhere"),
    ],
)
def test_what_looks_like_a_picture_and_is_none_stays_text(cats, text, remark) -> None:
    parts, remarks = found(text)
    assert "".join(parts) == text and len(remarks) == 1 and remark in remarks[0]


def test_long_messages_are_read_in_time(cats) -> None:
    for text in ("it's " * 20_000, "'" * 50_000, "\\ " * 50_000, "(" * 50_000, "a/b " * 10_000, "'a'" * 20_000):
        assert "".join(found(text)[0]) == text


# --- options ----------------------------------------------------------------------------------------------------------


def test_options_of_processors() -> None:
    read = pictures.parse_options(["pan_and_scan=True", "max_pixels=5000", "ratio=1.5", "off=false"], "--image-option")
    assert read == {"pan_and_scan": True, "max_pixels": 5000, "ratio": 1.5, "off": False}
    for wrong in ("max_pixels", "=3", "a b=3", "max_pixels=", "max_pixels=many", "source=3"):
        with pytest.raises(RequestError, match=re.escape(f"--image-option {wrong}")):
            pictures.parse_options([wrong], "--image-option")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--image", "/no/such.png"], "/no/such.png: there is no such file"),
        (["--image", "bad.png"], "bad.png: not an image format"),
        (["--image", "data:image/png;base64,????"], "not base64"),
        (["--video", "notes.txt"], "notes.txt: cannot be decoded as video"),
        (["--image", "cat.png", "--image-option", "zoom"], "it reads name=value"),
        (["--draw", "out.png"], "needs a picture"),
        (["--image", "cat.png", "--draw", "./cat.png"], "is a picture of the question"),
        (["--image", "cat.png", "--draw", "linked.png"], "is a picture of the question"),
        (["--image", "cat.png", "--draw", "out.txt"], "the name ends in .png"),
        (["--image", "cat.png", "--draw", "nowhere/out.png"], "no such folder"),
    ],
)
def test_errors_come_before_the_model_is_loaded(cats, capsys, arguments, message) -> None:
    if "--video" in arguments:
        pytest.importorskip("av")
    os.link("cat.png", "linked.png")
    assert execute(["/no/such/model.gguf", "Q", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in one_line(err) and out == ""


def test_what_a_model_cannot_take_is_one_line(cats, tiny, capsys) -> None:
    for kind, arguments, message in (
        ("llama", ["Q", "--image", "cat.png"], "has no image encoder"),
        ("llama", ["--lines", "--image", "cat.png"], "has no image encoder"),
        ("gemma3", ["Q", "--image", "cat.png", "--image-option", "max_pixels=3"], "processor has pan_and_scan"),
        ("qwen2_5_vl", ["Q", "--image", "cat.png", "--image-option", "max_pixels=-3"], "max_pixels=-3"),
        ("qwen2_5_vl", ["Q", "--image", "cat.png", "--mmproj", "none.gguf"], "none.gguf"),
    ):
        for more in ([], ["--json"]) if "Q" in arguments else ([],):
            assert execute([tiny[kind], *arguments, *more]) == 2
            out, err = capsys.readouterr()
            assert message in one_line(err) and out == ""


# --- one answer -------------------------------------------------------------------------------------------------------


def ask(*arguments: str) -> list[str]:
    return [*arguments, "-n", "4", "--temp", "0", "--ctx", "256"]


def test_json_says_what_became_of_each_picture(cats, tiny, capsys) -> None:
    url = "data:image/png;base64," + base64.b64encode((cats / "cat.png").read_bytes()).decode()
    images = ["--image", "cat.png", "--image", url, "--image-option", "max_pixels=3136"]
    assert execute(ask(tiny["qwen2_5_vl"], "Q", *images, "--json")) == 0
    answered = json.loads(capsys.readouterr().out)
    first, second = answered["media"]
    assert set(first) == {"name", *(f.name for f in fields(MediaInfo))}
    assert (first["name"], first["size"], first["processed"], first["n_tokens"], first["views"], first["grids"]) == (
        "cat.png", [64, 48], [56, 56], 4, 1, [[1, 2, 2]])
    assert second["name"] == "data URL" and second["cached"] and not first["cached"] and first["encode_seconds"] > 0
    assert len(answered["tokens"]) == 4 and answered["n_prompt"] > 8 and answered["boxes"] == []
    assert answered["prompt_seconds"] > 0 and answered["generation_seconds"] > 0


def test_pictures_of_a_raw_prompt_and_of_two_files(cats, tiny, tmp_path, tiny_gguf, capsys) -> None:
    execute(ask(tiny["gemma3"], "Q", "--image", "cat.png", "--json", "--raw"))
    whole = json.loads(capsys.readouterr().out)
    assert whole["n_prompt"] > whole["media"][0]["n_tokens"] == 4 and not whole["chat_template"]
    convert(tiny_gguf("gemma3")[1], tmp_path / "g.gguf", "f32", split_mmproj=True)
    assert execute(["plan", "g.gguf", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert execute(["plan", "g.gguf", "--json", "--mmproj", "mmproj-g.gguf"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert {i["purpose"] for i in both["items"]} - {i["purpose"] for i in alone["items"]} == {"encoder", "images"}
    assert execute(ask("g.gguf", "Q", "--image", "cat.png", "--json", "--raw", "--mmproj", "mmproj-g.gguf")) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == whole["tokens"]


def test_verbose_and_the_warning(cats, tiny, capsys) -> None:
    Image.new("RGB", (300, 200), "red").save("big.png")
    assert execute(ask(tiny["gemma3"], "Q", "--image", "cat.png", "--image", "big.png", "-v")) == 0
    err = capsys.readouterr().err
    assert "\nimage cat.png: 64x48 seen as 56x56, 1 view, 4 tokens, processed in 0." in err and " s, encoded in " in err
    assert "image cache: 0 hits, 2 misses" in err and re.search(r"first text after \d", err)
    warning = "(big.png: the model sees its 300x200 pixels as 56x56"
    assert err.count(warning) == 1 and "(cat.png" not in err
    assert execute(ask(tiny["gemma3"], "Q", "--image", "big.png", "--image", "cat.png")) == 0
    assert capsys.readouterr().err.startswith(warning)


def test_warnings_count_the_area_that_is_seen(capsys) -> None:
    def info(size, processed, views=1, kind="image", cached=False):
        return MediaInfo(kind, size, processed, 4, views, (), cached, 0.0, 0.0, "")

    for warned, given in (
        (False, info((200, 100), (100, 50))),
        (True, info((202, 100), (100, 50))),
        (False, info((202, 100), (100, 50), views=2)),
        (False, info((202, 100), (100, 50), kind="video")),
        (False, info((202, 100), (100, 50), cached=True)),
    ):
        pictures.warn_of_loss("a.png", given)
        assert bool(capsys.readouterr().err) == warned


def test_videos(cats, tiny, capsys) -> None:
    av = pytest.importorskip("av")
    with av.open("film.mp4", "w") as film:
        stream = film.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for i in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 30 * i, np.uint8), format="rgb24")
            film.mux(stream.encode(frame))
        film.mux(stream.encode())
    arguments = ["--video", "film.mp4", "--image", "cat.png", "--json"]
    assert execute(ask(tiny["qwen2_5_vl"], "Q", *arguments, "--video-option", "sample_fps=2")) == 0
    image, video = json.loads(capsys.readouterr().out)["media"]
    assert (image["kind"], video["kind"], video["name"], video["size"]) == ("image", "video", "film.mp4", [64, 64])
    assert video["grids"][0][0] == 2                                  # 4 of 8 frames, two to a time step
    assert execute(ask(tiny["gemma3"], "Q", "--video", "film.mp4")) == 2
    assert "pictures, not videos" in one_line(capsys.readouterr().err)


# --- boxes ------------------------------------------------------------------------------------------------------------


def test_boxes_are_reported_and_drawn_on_the_last_picture(cats, tiny, says, capsys) -> None:
    says(BOX)
    Image.new("RGB", (224, 168), "white").save("white.png")
    question = ask(tiny["qwen2_5_vl"], "Where?", "--image", "cat.png", "--image", "white.png")
    assert execute([*question, "--image-option", "max_pixels=12544", "--draw", "out.png", "--json"]) == 0
    out, err = capsys.readouterr()
    answered = json.loads(out)
    width, height = answered["media"][1]["processed"]
    box, point = answered["boxes"]
    assert (width, height) != (224, 168) and "(2 marks on white.png: out.png)" in err
    x, y = 224 / width, 168 / height
    assert box == {"label": "cat", "image": 1, "x1": 14 * x, "y1": 28 * y, "x2": 56 * x, "y2": 56 * y}
    assert point == {"label": "nose", "image": 1, "x": 28 * x, "y": 28 * y}
    drawn = np.asarray(Image.open("out.png"))
    assert drawn.shape == (168, 224, 3)
    edge = drawn[round(box["y2"]), round((box["x1"] + box["x2"]) / 2)]
    assert edge.min() < 128 and (drawn[round(box["y2"]) + 4:] == 255).all()      # a line where the box ends
    assert execute([*question, "--draw", "out.jpg"]) == 0
    out, err = capsys.readouterr()
    assert out == BOX + "\n" and Image.open("out.jpg").format == "JPEG"
    assert "(in pixels of white.png, 224x168)\n  cat: 14,28 to 56,56\n  nose: 28,28\n(2 marks on white.png: out.jpg)\n" in err
    assert execute(question) == 0 and "(in pixels of white.png, 224x168)\n  cat: " in capsys.readouterr().err


def test_without_boxes_nothing_is_drawn(cats, tiny, says, capsys) -> None:
    says("There is none.")
    assert execute(ask(tiny["qwen2_5_vl"], "Where?", "--image", "cat.png", "--draw", "out.png")) == 1
    out, err = capsys.readouterr()
    assert out == "There is none.\n" and "names no boxes or points: out.png is not written" in err
    assert not (cats / "out.png").exists()


# --- the conversation -------------------------------------------------------------------------------------------------


def test_a_conversation_tells_places_in_the_original_and_draws_them(cats, tiny, says, monkeypatch, capsys) -> None:
    says(BOX)
    Image.new("RGB", (224, 168), "white").save("white.png")
    talk = chat.Chat(pyengine.load(tiny["qwen2_5_vl"], n_ctx=256), answer.Settings(), options={"image": {"max_pixels": 12544}, "video": {}})
    with pytest.raises(RequestError, match="/draw FILE: there is no answer about a picture yet"):
        talk.draw(Path("out.png"))
    type_in(monkeypatch, "cat.png white.png where?\n/draw out.png\n")
    chat.run(talk)
    err = capsys.readouterr().err
    width, height = talk.last[0].answer.media[1].processed
    x, y = 224 / width, 168 / height
    assert "(in pixels of white.png, 224x168; /draw FILE draws it)\n" in err and (width, height) != (224, 168)
    assert f"  cat: {14 * x:.0f},{28 * y:.0f} to {56 * x:.0f},{56 * y:.0f}\n  nose: {28 * x:.0f},{28 * y:.0f}\n" in err
    assert "(2 marks on white.png: out.png)" in err and Image.open("out.png").size == (224, 168)
    for path, message in (("cat.png", "/draw cat.png: this is a picture of the question"), ("a.txt", "/draw a.txt: the name ends in .png"),
                          ("no/a.png", "/draw no/a.png: there is no such folder")):
        with pytest.raises(RequestError, match=message):
            talk.draw(Path(path))
    says("There is none.")
    type_in(monkeypatch, "and now?\n/draw none.png\n")
    chat.run(talk)
    assert "names no boxes or points" in capsys.readouterr().err and not Path("none.png").exists()


def test_a_conversation_with_another_model_names_both(cats, tiny, tiny_gguf, tmp_path, monkeypatch, capsys) -> None:
    os.symlink(tiny["gemma3"], "first.gguf")
    os.symlink(tiny["llama"], "second.gguf")
    os.symlink(tiny["gemma3"], "renamed.gguf")

    def hold(model: str, *lines: str) -> None:
        type_in(monkeypatch, "\n".join(lines))
        chat.run(chat.Chat(pyengine.load(model, n_ctx=128), answer.Settings(max_tokens=3)))

    hold("first.gguf", "hm", "/save talk")
    with pytest.raises(SessionError, match="talk: .*another model.*; it was saved with first.gguf, and this is second.gguf"):
        hold("second.gguf", "/load talk")
    hold("renamed.gguf", "/load talk")
    assert "(loaded 2 messages" in capsys.readouterr().err


def test_a_conversation_keeps_its_pictures(cats, tiny, monkeypatch, capsys) -> None:
    lines = (f"{cats}/cat.png what is it?", "sure?", "/image my cat.png", "and this?", "/show messages", "/clear", "hm?", "")
    type_in(monkeypatch, "\n".join(lines))
    assert execute([tiny["gemma3"], "--lines", "-n", "3", "--temp", "0", "-v"]) == 0
    out, err = capsys.readouterr()
    notes = err.splitlines()
    assert notes.count("Added image cat.png (64x48)") == 1 and notes.count("Added image my cat.png (64x48)") == 1
    turns = [[line.rpartition(", ")[2] == "cached" for line in turn.splitlines() if line.startswith("image ")]
             for turn in err.split("first text after")]
    assert turns[:4] == [[False], [True], [True, True], []]            # equal pixels are encoded once
    assert "user: [cat.png]what is it?" in out and "user: [my cat.png]and this?" in out
    cached = re.findall(r"\((\d+) cached\)", err)
    assert int(cached[1]) > 4 and int(cached[2]) > int(cached[1])


def cached(err: str) -> list[int]:
    """Tokens of each prompt that were in the cache, from --verbose."""
    return [int(n) for n in re.findall(r"\((\d+) cached\)", err)]


@pytest.mark.parametrize("kind", [cases.first(sees=True, mrope=False), cases.first(sees=True, mrope=True), cases.first(sees=False, ring=False)])
def test_a_saved_conversation_goes_on_in_another_process(cats, tiny, monkeypatch, capsys, kind) -> None:
    """The third answer is the same whether the first two were given here or come from a file, and is computed from them."""
    shown = "cat.png " if cases.find(kind).sees else ""
    settings = [tiny[kind], "--lines", "-n", "3", "--temp", "0", "-v"]
    type_in(monkeypatch, f"/system Be brief.\n{shown}what is it?\nsure?\n/save talk one\nand now?\n/show messages\n")
    assert execute(settings) == 0
    out, err = capsys.readouterr()
    assert re.search(r"\(saved 4 messages: talk one, [\d.]+ KiB\)", err)
    type_in(monkeypatch, "something else\n/load talk one\nand now?\n/show messages\n")
    assert execute(settings) == 0
    again, notes = capsys.readouterr()
    n = int(re.search(r"\(loaded 4 messages, (\d+) tokens: talk one\)", notes)[1])
    assert cached(notes)[-1] == cached(err)[-1] == n > 10
    shown_again, shown_here = (text.split("system: Be brief.")[1] for text in (again, out))
    assert shown_again == shown_here and "something else" not in shown_again


def test_what_cannot_be_saved_or_loaded_is_said(cats, tiny, monkeypatch, capsys) -> None:
    def refused(lines: str, message: str, *options: str) -> None:
        type_in(monkeypatch, lines)
        assert execute([tiny["gemma3"], "--lines", "-n", "3", *options]) == 2
        assert message in capsys.readouterr().err

    refused("/save a\n", "there is no conversation yet")
    refused("/save\n", "/save FILE: the file is missing")
    refused("/load none\n", "No such file")
    refused("/load notes.txt\n", "is not a saved conversation")
    url = "data:image/png;base64," + base64.b64encode((cats / "cat.png").read_bytes()).decode()
    refused("what?\n/save a\n", "data URL: a picture without a file of its own", "--image", url)
    assert not (cats / "a").exists()
    type_in(monkeypatch, "cat.png what?\n/save a\n")
    assert execute([tiny["gemma3"], "--lines", "-n", "3"]) == 0
    refused("/load a\n", "they would be continued as text: start without --raw", "--raw")
    type_in(monkeypatch, "hm\n/save raw\n")
    assert execute([tiny["gemma3"], "--lines", "-n", "3", "--raw"]) == 0
    refused("/load raw\n", "here they would be answered through the template: start with --raw")
    pixels = np.zeros((48, 64, 3), np.uint8)
    Image.fromarray(pixels).save(cats / "cat.png")
    refused("/load a\n", f"{cats}/cat.png, which has another content now")
    (cats / "cat.png").unlink()
    refused("/load a\n", f"{cats}/cat.png, which cannot be shown again")
    model = pyengine.load(tiny["gemma3"], n_ctx=128)
    model.generate([1, 2, 3], max_tokens=1)
    model.save("cells")
    refused("/load cells\n", "without its messages")


@pytest.mark.parametrize("change", [
    lambda talk: [], lambda talk: {**talk, "format": "2"}, lambda talk: {**talk, "turns": {"role": "user"}},
    lambda talk: {**talk, "raw": 1},
    lambda talk: {**talk, "system": 7}, lambda talk: {**talk, "turns": [{"role": "system", "content": "x"}]},
    lambda talk: {**talk, "turns": [{"role": "user"}]}, lambda talk: {**talk, "turns": [{"role": "user", "content": 3}]},
    lambda talk: {**talk, "turns": [{"role": "user", "content": [{"type": "code", "text": ""}]}]},
    lambda talk: {**talk, "turns": [{"role": "user", "content": [{"type": "image", "path": 1, "options": {}, "digest": ""}]}]},
    lambda talk: {**talk, "turns": [{"role": "user", "content": [{"type": "image", "path": "a", "options": [1], "digest": ""}]}]},
    lambda talk: {**talk, "turns": [{"role": "user", "content": [
        {"type": "video", "path": "a", "options": {"fps": "x"}, "digest": ""}]}]},
])
def test_messages_of_a_strange_file_are_refused(change) -> None:
    talk = json.loads(talks.pack(talks.Talk([{"role": "user", "content": "hi"}], None, False)))
    assert talks.unpack(Path("f"), json.dumps(talk).encode()).turns == [{"role": "user", "content": "hi"}]
    for notes in (json.dumps(change(talk)).encode(), b"\xff", b"[" * 100_000):
        with pytest.raises(SessionError, match="are not written as"):
            talks.unpack(Path("f"), notes)


def test_pictures_alone_wait_for_a_question(cats, tiny, monkeypatch, capsys) -> None:
    type_in(monkeypatch, "cat.png 'my cat.png' \n/show messages\n\nwhich?\n")
    assert execute([tiny["qwen2_5_vl"], "--lines", "-n", "3", "--image", "it's (1).JPG", "-v"]) == 0
    out, err = capsys.readouterr()
    added = [line for line in err.splitlines() if line.startswith("Added")]
    assert added == [f"Added image {n} (64x48)" for n in ("it's (1).JPG", "cat.png", "my cat.png")]
    assert "for the next message: image it's (1).JPG (64x48), image cat.png (64x48), image my cat.png (64x48)\n" in out
    assert err.count("first text after") == 1 and "image cache: 1 hits, 2 misses" in err


def test_a_model_without_encoder_says_so_and_goes_on(cats, tiny, monkeypatch, capsys) -> None:
    type_in(monkeypatch, "what is in cat.png?\ncat.png\nnone.png\n/show messages\n")
    assert execute([tiny["llama"], "--lines", "-n", "3"]) == 0
    out, err = capsys.readouterr()
    assert "has no image encoder: cat.png stays text)" in err and "has no image encoder: cat.png is not added)" in err
    assert err.count("image encoder") == 2 and "none.png:" not in err
    assert "user: what is in cat.png?\n" in out and "user: none.png\n" in out and "user: cat.png\n" not in out
    type_in(monkeypatch, "/image cat.png\n")
    assert execute([tiny["llama"], "--lines"]) == 2
    assert "has no image encoder" in one_line(capsys.readouterr().err)


def test_commands_and_paths_are_told_apart() -> None:
    for line in ("/clear", "/image a.png", "/", "/nonsense x"):
        assert chat_commands.FORM.match(line)
    for line in ("/home/me/cat.png what?", "/cat.png", "hello /clear", "/a\\ b.png"):
        assert not chat_commands.FORM.match(line)


def test_what_a_command_names(cats) -> None:
    def names(text: str) -> list[str]:
        return [p.name for p in pictures.named_pictures(text, {}, "image")]

    assert names("my cat.png") == ["my cat.png"] and names("'my cat.png' cat.png") == ["my cat.png", "cat.png"]
    assert names("my\\ cat.png") == ["my cat.png"]
    with pytest.raises(ImageError, match="my other cat.png: there is no such file"):
        names("my other cat.png")
    with pytest.raises(RequestError):
        names("'my cat.png")


def test_a_question_that_fails_takes_its_pictures_along(cats, tiny, capsys) -> None:
    import pyengine

    talk = chat.Chat(pyengine.load(tiny["gemma3"], n_ctx=64), answer.Settings(max_tokens=2))
    with pytest.raises(RequestError, match="this model's processor"):
        talk.options = {"image": {"zoom": 3}, "video": {}}
        talk.read("cat.png what?")
    assert talk.turns == [] and talk.waiting == []
    assert "the question is not kept, nor cat.png" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="pseudo terminals are POSIX")
def test_a_picture_dropped_on_a_terminal(cats, tiny) -> None:
    real = [sys.executable, "-c", "from pyengine.cli import main; main()"]
    t = Terminal(cats / "state", tiny["gemma3"], "-n", "3", "-v", "--temp", "0", program=real)
    t.expect(">>>")
    t.send(f"\x1b[200~'{cats}/my cat.png' \x1b[201~what is it?\r")       # as terminals paste: bracketed
    t.expect("Added image my cat.png (64x48)")
    t.expect("encoded in")
    t.expect(">>>")
    t.send("and now?\r")
    t.expect("tokens, cached")
    t.expect(">>>")
    t.send("/image none.png\r")
    t.expect("pyengine-run: none.png: there is no such file")
    t.expect(">>>")
    t.send("\x04")
    t.expect("image cache: 1 hits, 1 misses")
    assert t.close() == 0


# --- show -------------------------------------------------------------------------------------------------------------


def test_show_tells_of_the_encoder(cats, tiny_gguf, tiny, capsys) -> None:
    assert execute(["show", tiny["gemma3"]]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\nimage encoder  gemma3: 3 blocks of width 72, patches of 14, 6\d\d\.\d KiB in f32\.gguf\n", out)
    assert re.search(r"\n  clip\.vision\.attention\.layer_norm_epsilon +1e-05\n", out)
    convert(tiny_gguf("gemma3")[1], cats / "g.gguf", "f32", split_mmproj=True)
    assert execute(["show", "g.gguf"]) == 0
    assert "image encoder" not in capsys.readouterr().out
    assert execute(["show", "g.gguf", "--mmproj", "mmproj-g.gguf"]) == 0
    out = capsys.readouterr().out
    assert "in mmproj-g.gguf\n" in out and "\nMetadata of mmproj-g.gguf\n" in out
    assert execute(["show", "mmproj-g.gguf", "--json"]) == 0
    encoder = json.loads(capsys.readouterr().out)["encoder"]
    assert (encoder["projector_type"], encoder["block_count"], encoder["n_tensors"]) == ("gemma3", 3, 55)
