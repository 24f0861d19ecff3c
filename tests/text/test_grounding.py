"""Boxes and points in models' answers: what is read, where it lands in the original picture, and that no text does harm."""

from __future__ import annotations

import json
import time

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine.errors import RequestError
from pyengine.chat.boxes import Box, draw, find_boxes, Point
from pyengine.media.image import Image

SIZE, PROCESSED = (1120, 560), (560, 280)


def read(text: str, **how: float) -> list[Box | Point]:
    return find_boxes(text, SIZE, PROCESSED, **how)


ANSWER = '''```json
[
\t{"bbox_2d": [100, 50, 400, 200], "label": "cat"},
\t{"point_2d": [280, 14], "label": "ear"}
]
```'''
WHOLE = [Box("cat", 200, 100, 800, 400), Point("ear", 560, 28)]


@pytest.mark.parametrize("text", [
    ANSWER,
    ANSWER.replace("```json\n", "").replace("```", ""),
    "Here are they: " + ANSWER + "\nIs there more?",
    'A 12" pipe, and: {"label": "cat", "bbox_2d": [100,50,400,200]} and {"point_2d": ["280", "14"], "label": "ear"}',
    '{"objects": [{"bbox_2d": [100.0, 50, 400, 200.0], "label": "cat"}, {"label": "ear", "point_2d": [280, 14]}]}',
    '{"bbox_2d": [400, 200, 100, 50], "n": {"x": [1, 2]}, "label": "cat"}{"point_2d":[280,14],"text_content":"ear"}',
    ANSWER[:ANSWER.rindex('"')],                                         # cut off before the last label's end
], ids=["fenced", "bare", "in prose", "one by one", "nested list", "nested object", "cut"])
def test_ways_to_write_the_same(text: str) -> None:
    assert read(text) == WHOLE


def test_every_cut_gives_the_boxes_that_are_whole() -> None:
    for n in range(len(ANSWER)):
        found = read(ANSWER[:n])
        assert len(found) == (n > ANSWER.index("]")) + (n > ANSWER.index("14]") + 2)
        for box, whole in zip(found, WHOLE):
            assert whole.label.startswith(box.label)
            assert type(box) is type(whole) and vars(box) | {"label": 0} == vars(whole) | {"label": 0}


POINTS = [Point("cats", 112, 112), Point("cats", 1069.6, 22.4)]


@pytest.mark.parametrize("text", [
    '<points x1="10.0" y1="20" x2="95.5" y2="4.0" alt="two cats">cats</points>', "Here: <points x1='10' y1='20' x2='95.5' y2='4' alt=''>cats</points>.",
    '<point x="10" y="20" alt="cat">cats</point> and <point x="95.5" y="4" alt="cat">cats</point>',
    '<points x1="10" y1="20" x2="95.5" y2="4" x3="50" y3="101" x4="3" alt="not within, and half">cats',
    '<points x1="10" y1="20" x2="95.5" y2="4" alt="cats">'])
def test_points_in_percent(text: str) -> None:
    assert read(text) == POINTS


def test_a_cut_tag_gives_the_points_that_are_whole() -> None:
    text = '<points x1="10" y1="20" x2="95.5" y2="4" alt="cats">cats</points>'
    for n in range(len(text)):
        found = [(p.x, p.y) for p in read(text[:n])]
        assert found == [(112, 112), (1069.6, 22.4)][: len(found)] and len(found) >= (n > text.index(" x2")) + (n > text.index(" alt"))
    for text in ("<point>", '<pointed x="1" y="2">', '<point y="2">', '<point x="1" y="nan">', "<point x1=5 y2=6>", "<" * 1000):
        assert read(text) == []


def test_what_is_no_box() -> None:
    for text in ("", "no boxes", '{"bbox_2d": [1, 2, 3]}', '{"point_2d": [1, 2, 3, 4]}', '{"bbox_2d": [NaN, 1, 2, 3]}',
                 '{"bbox_2d": [1e999, 1, 2, 3]}', '{"bbox_2d": [1, 2, 3, 99999999999999999999]}', '"bbox_2d": [1, 2, 3, 4]',
                 '{"box": [1, 2, 3, 4]}', '{"bbox_2d": "[1, 2, 3, 4]"}', "(1,2)", "f(1,2), g(3,4)", "(1,2),(3,2025)"):
        assert read(text) == [], text


def test_labels() -> None:
    for label in ('say "hi"', "猫", "a\tb", "\\", "{[]}", "", "😀", "\ud800"):
        for ascii_only in (True, False):
            written = json.dumps({"bbox_2d": [0, 0, 1, 1], "label": label}, ensure_ascii=ascii_only)
            assert read(written)[0].label == label
    assert read('{"bbox_2d": [0, 0, 1, 1], "label": "\\q"}')[0].label == "\\q"
    assert read('{"bbox_2d": [0, 0, 1, 1], "label": 3}')[0].label == ""
    assert [b.label for b in read('{"bbox_2d": [[0, 0, 1, 1], [2, 2, 3, 3]], "label": "two"}')] == ["two", "two"]


FAULTY = {
    "a line break": '[{"bbox_2d": [100, 50, 400, 200], "label": "one\ntwo"}, {"point_2d": [280, 14], "label": "ear"}]',
    "a carriage return": '[{"bbox_2d": [100, 50, 400, 200], "label": "one\r\ntwo"}, {"point_2d": [280, 14], "label": "ear"}]',
    "a quote": '[{"bbox_2d": [100, 50, 400, 200], "label": "19" screen"}, {"point_2d": [280, 14], "label": "ear"}]',
    "quotes": '[{"bbox_2d": [100, 50, 400, 200], "label": "a "fine", old cat"}, {"point_2d": [280, 14], "label": "ear"}]',
    "a quote, the label first": '[{"label": "19" screen", "bbox_2d": [100, 50, 400, 200]}, {"label": "ear", "point_2d": [280, 14]}]',
    "no closing quote": '[{"bbox_2d": [100, 50, 400, 200], "label": "cat}, {"point_2d": [280, 14], "label": "ear"}]',
    "no closing quote, the label first": '[{"label": "cat, "bbox_2d": [100, 50, 400, 200]}, {"label": "ear", "point_2d": [280, 14]}]',
    "no closing quote before a line's end": '[{"bbox_2d": [100, 50, 400, 200], "label": "cat\n}, {"point_2d": [280, 14], "label": "ear"}]',
    "no brace": '[{"bbox_2d": [100, 50, 400, 200], "label": "cat"\n{"point_2d": [280, 14], "label": "ear"}]',
    "trailing commas": '[{"bbox_2d": [100, 50, 400, 200,], "label": "cat",}, {"point_2d": [280, 14,], "label": "ear",},]',
    "as Python prints it": "[{'bbox_2d': [100, 50, 400, 200], 'label': 'cat'}, {'point_2d': (280, 14), 'label': 'ear'}]",
    "an apostrophe": "[{'bbox_2d': [100, 50, 400, 200], 'label': 'the cat's tail'}, {'point_2d': [280, 14], 'label': 'ear'}]",
    "tuples": "[{'bbox_2d': (100, 50, 400, 200), 'label': \"cat's\"}, {'point_2d': (280, 14), 'label': 'ear'}]",
    "bare keys": '[{bbox_2d: [100, 50, 400, 200], label: "cat"}, {point_2d: [280, 14], label: "ear"}]',
    "numbers as texts": """[{"bbox_2d": ["100", "50", '400', "200"], "label": "cat"}, {"point_2d": ["280", "14"], "label": "ear"}]""",
    "numbers as floats": '[{"bbox_2d": [1e2, 50., 4.0E+2, +200], "label": "cat"}, {"point_2d": [2.8e2, 14.000000000000000000000], "label": "ear"}]',
    "corners": '[{"bbox_2d": [[100, 50], [400, 200]], "label": "cat"}, {"point_2d": [[280, 14]], "label": "ear"}]',
    "a box without numbers before": '[{"bbox_2d": [NaN, 50, 400, 200], "label": "gone"}, {"bbox_2d": [100, 50, 400, 200], "label": "cat"}, '
                                    '{"point_2d": [280, 14], "label": "ear"}]',
    "other keys": '[{"bbox_2d": [100, 50, 400, 200], "sub": {"label": "x"}, "label": "cat", "score": 0.9, "ok": true, "no": null}, '
                  '{"point_2d": [280, 14], "label": "ear"}]',
    "two blocks": '```json\n[{"bbox_2d": [100, 50, 400, 200], "label": "cat"}]\n```\nAnd it\'s 12" wide:\n```json\n[{"point_2d": [280, 14], "label": "ear"}]\n```',
    "no fence's end": '```json\n[{"bbox_2d": [100, 50, 400, 200], "label": "cat"}, {"point_2d": [280, 14], "label": "ear"}]',
}


@pytest.mark.parametrize("fault", FAULTY)
def test_a_fault_costs_no_box(fault: str) -> None:
    found = [b for b in read(FAULTY[fault]) if b.label != "gone"]
    assert [type(b) for b in found] == [Box, Point] and found[1] == WHOLE[1]
    assert vars(found[0]) | {"label": ""} == vars(WHOLE[0]) | {"label": ""}


@pytest.mark.parametrize("fault, label", [("a line break", "one\ntwo"), ("a quote", '19" screen'), ("quotes", 'a "fine", old cat'),
                                          ("an apostrophe", "the cat's tail"), ("tuples", "cat's"), ("other keys", "cat"),
                                          ("no closing quote, the label first", "cat"), ("no closing quote before a line's end", "cat")])
def test_labels_survive_faults(fault: str, label: str) -> None:
    assert read(FAULTY[fault])[0].label == label


@pytest.mark.parametrize("label", ['x" y', "one\ntwo", 'a", b', '"', "it's", "\\", "]}", 'a": b', "[1, 2, 3, 4]", '", "'])
@pytest.mark.parametrize("n", [1, 4])
def test_boxes_behind_any_label_are_read(label: str, n: int) -> None:
    text = "[" + ", ".join(f'{{"bbox_2d": [{i}, 2, 3, 4], "label": "{label}"}}' for i in range(n)) + ', {"bbox_2d": [5, 6, 7, 8], "label": "z"}]'
    found = find_boxes(text, (100, 100), (100, 100))
    assert found[-1] == Box("z", 5, 6, 7, 8) and len(found) == n + 1


def test_a_label_between_special_tokens_may_have_lines() -> None:
    text = "<|object_ref_start|>one\ntwo<|object_ref_end|><|box_start|>(0,0),(10,10)<|box_end|>"
    assert read(text)[0].label == "one\ntwo"


def test_coordinates_scale_exactly_and_stay_inside() -> None:
    text = '{"bbox_2d": [-5, 13, 9999, 279], "label": "x"}'
    assert read(text) == [Box("x", 0, 26, 1120, 558)]
    assert find_boxes(text, (333, 777), (644, 308), image=2) == [Box("x", 0, 13 * 777 / 308, 333, 279 * 777 / 308, 2)]
    assert read('{"point_2d": [500, 250]}', scale=1000) == [Point("", 560, 140)]
    for size, processed, scale in (((0, 5), (5, 5), None), ((5, 5), (5, -1), None), ((5, 5), (5, 5), 0.0)):
        with pytest.raises(RequestError, match="above 0"):
            find_boxes(text, size, processed, scale)


def test_boxes_between_special_tokens() -> None:
    start, end = "<|box_start|>", "<|box_end|>"
    text = f"<|object_ref_start|>the two cats<|object_ref_end|>{start}(100,500),(250,1000){end}{start}(0,0), (10,10){end}" \
           f" and <|object_ref_start|>a dog<|object_ref_end|>{start}(500,500){end}"
    cats = [Box("the two cats", 112, 280, 280, 560), Box("the two cats", 0, 0, 11.2, 5.6)]
    assert read(text) == [*cats, Point("a dog", 560, 280)]
    assert read("the two cats(100,500),(250,1000)(0,0), (10,10)") == cats             # as generated text has it
    assert read("Of these:\n- a dog: (0,0),(10,10)\n- a hen: (0,0),(10,10)")[1].label == "a hen"
    assert read('{"bbox_2d": [0, 0, 1, 1]} or (1,2),(3,4)') == [Box("", 0, 0, 2, 2)]   # one notation in one answer


HOSTILE = ["{", "[", '"', "\\", '{"bbox_2d":', '{"bbox_2d":[', '{"a":"\\', "(", "(1,2),", "[1,", "[ ", "{}", "9", " ",
           '{"bbox_2d":[1,2,3,4],', "<|box_start|>", "<|object_ref_start|>", '"9', "(1,2),(3,4)", '"x":', '[["', "}"]


@pytest.mark.parametrize("piece", HOSTILE)
@pytest.mark.parametrize("before", ["", '{"bbox_2d":', '{"label": "', '{"bbox_2d": [1, ', '{"bbox_2d": [9'])
def test_long_nonsense_takes_linear_time(piece: str, before: str) -> None:
    start = time.perf_counter()
    for box in read(before + piece * (100_000 // len(piece))):
        assert isinstance(box, (Box, Point))
    assert time.perf_counter() - start < 5                               # 0.05 s here; quadratic time would be minutes


PIECES = st.sampled_from([*HOSTILE, '"label": "', '"point_2d": ', "[1,2]", "[1, 2, 3, 4]", "]", ",", "\n", "NaN", "-1e400",
                          "a", "\\u12"])


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES | st.text(max_size=5), max_size=40).map("".join))
def test_any_text_gives_boxes_inside(text: str) -> None:
    for box in read(text):
        x, y = ([box.x1, box.x2], [box.y1, box.y2]) if isinstance(box, Box) else ([box.x], [box.y])
        assert 0 <= min(x) <= max(x) <= SIZE[0] and 0 <= min(y) <= max(y) <= SIZE[1]
        assert x == sorted(x) and y == sorted(y)


# ------------------------------------------------------------------------------------- drawing

GREY = Image(np.full((200, 300, 3), 128, np.uint8))


def test_lines_are_where_the_box_is() -> None:
    drawn = draw(GREY, [Box("", 50, 60, 250, 160)])
    assert drawn.size == (300, 200) and drawn.mode == "RGB"
    changed = (np.array(drawn) != 128).any(axis=2)
    assert changed[60, 50:251].all() and changed[160, 50:251].all() and changed[60:161, 50].all() and changed[60:161, 250].all()
    changed[60:161, 50:251] = False
    assert not changed.any()
    assert not (np.array(drawn)[70:150, 60:240] != 128).any()            # hollow
    assert (GREY.pixels == 128).all()


def test_labels_have_their_own_colours_and_can_be_read() -> None:
    labels = ["cat", "dog", "cat", "hen", "cow", "owl", "rat", "bee", "elk"]
    boxes = [Box(label, 40, 20 * i + 12, 200, 20 * i + 19) for i, label in enumerate(labels)]
    drawn = np.array(draw(GREY, boxes)).astype(int)
    colours = {label: drawn[20 * i + 19, 200] for i, label in enumerate(labels)}
    assert (drawn[52 + 7, 200] == colours["cat"]).all()
    listed = np.array(list(colours.values()))
    distance = np.abs(listed[:, None] - listed[None]).sum(axis=2) + 999 * np.eye(len(listed))
    assert distance.min() > 60
    tab = np.array(draw(GREY, [Box("WWWW", 20, 50, 280, 150)])).astype(int)[30:48, 24:50]
    luma = tab @ [0.299, 0.587, 0.114]
    assert luma.max() - luma.min() > 100                                 # text against its tab


@pytest.mark.parametrize("box", [
    Box("in the corner", 0, 0, 0, 0), Box("far right", 290, 190, 300, 200), Point("edge", 300, 200), Point("", 0, 0),
    Box("long " * 50, 0, 0, 300, 200), Box("猫\n\0\ud800😀", 10, 10, 20, 20)], ids=range(6))
@pytest.mark.parametrize("size", [(300, 200), (1, 1), (5, 400)])
def test_labels_stay_in_the_picture(box: Box | Point, size: tuple[int, int]) -> None:
    picture = Image(np.full((size[1], size[0], 3), 128, np.uint8))
    drawn = draw(picture, [box])
    assert isinstance(drawn, PIL.Image.Image) and drawn.size == size
    assert (np.array(drawn) != 128).any() or size == (1, 1)
