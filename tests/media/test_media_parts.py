"""Pictures and videos in requests: every form that people write is seen or refused in words, with the path of the field."""

from __future__ import annotations

import base64
import io
import resource
import struct
import sys
import zlib
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyengine as pe
from pyengine.engine.prompts import media_of, Prompts
from pyengine.errors import ImageError, PyEngineError, RequestError
from pyengine.media.messages import as_list, split
from pyengine.media.policy import MediaPolicy
from pyengine.media.sources import is_base64

PIXELS = np.random.default_rng(5).integers(0, 256, (32, 40, 3), dtype=np.uint8)


def saved(kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(PIXELS).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


CONTENT = saved()
ENCODED = base64.b64encode(CONTENT).decode()
URL = "data:image/png;base64," + ENCODED


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "red.png").write_bytes(CONTENT)
    return tmp_path / "red.png"


def user(*parts: Any, **keys: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts), **keys}]


def seen(messages: Any, policy: MediaPolicy = MediaPolicy()) -> list[Any]:
    """The media of messages, opened."""
    return [media_of(m.source, m.kind, policy, m.url, m.options) for m in split(messages)[1]]


def forms(path: Path) -> dict[str, Any]:
    """One picture, as a part of a content, in every form."""
    return {
        "OpenAI": {"type": "image_url", "image_url": {"url": URL, "detail": "high"}},
        "OpenAI, short": {"type": "image_url", "image_url": URL},
        "OpenAI, responses": {"type": "input_image", "image_url": URL, "detail": "auto", "file_id": None},
        "Anthropic": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ENCODED}, "cache_control": {"type": "ephemeral"}},
        "Anthropic, URL": {"type": "image", "source": {"type": "url", "url": URL}},
        "MCP": {"type": "image", "data": ENCODED, "mimeType": "image/png"},
        "Hugging Face, base64": {"type": "image", "base64": ENCODED},
        "Hugging Face, URL": {"type": "image", "url": URL},
        "Hugging Face, path": {"type": "image", "path": str(path)},
        "mlx-vlm": {"type": "image", "image": str(path)},
        "Qwen, URL": {"type": "image", "image": URL},
        "base64 in an address's place": {"type": "image_url", "image_url": {"url": ENCODED}},
        "base64 in lines": {"type": "image", "image": "\n".join(ENCODED[i:i + 76] for i in range(0, len(ENCODED), 76)) + "\n"},
        "base64 without padding": {"type": "image", "image": ENCODED.rstrip("=")},
        "Pillow": PIL.Image.fromarray(PIXELS), "NumPy": PIXELS, "bytes": CONTENT, "bytearray": bytearray(CONTENT),
        "memoryview": memoryview(CONTENT), "Path": path, "Image": pe.open_image(PIXELS),
        "a part with Pillow": {"type": "image", "image": PIL.Image.fromarray(PIXELS), "name": "red", "path": str(path)},
        "a part with a Path as address": {"type": "image_url", "image_url": path},
        "None beside": {"type": "image", "image": PIXELS, "text": None, "video": None},
    }


NAMES = list(forms(Path("x")))


@pytest.mark.parametrize("name", NAMES)
def test_every_form_is_seen(name: str, path: Path) -> None:
    shown, media = split(user({"type": "text", "text": "what"}, forms(path)[name]))
    assert shown == [{"role": "user", "content": [{"type": "text", "text": "what"}, {"type": "image"}]}]
    assert media[0].field.startswith("messages[0].content[1]")
    np.testing.assert_array_equal(seen(user(forms(path)[name]))[0].pixels, PIXELS)


@pytest.mark.parametrize("wrap", [list, tuple, lambda x: x[0]])
@pytest.mark.parametrize("name", ["path", "Path", "base64", "URL", "bytes", "Pillow", "part"])
def test_ollamas_images(name: str, wrap: Any, path: Path) -> None:
    value = {"path": str(path), "Path": path, "base64": ENCODED, "URL": URL, "bytes": CONTENT, "Pillow": PIL.Image.fromarray(PIXELS),
             "part": {"type": "image_url", "image_url": {"url": URL}}}[name]
    images = wrap([value])
    if isinstance(images, dict):
        with pytest.raises(RequestError, match=r"messages\[0\].images: a list of pictures, not dict"):
            split([{"role": "user", "content": "colour?", "images": images}])
        return
    messages = [{"role": "user", "content": "colour?", "images": images}]
    shown, media = split(messages)
    assert shown == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "colour?"}]}]
    np.testing.assert_array_equal(seen(messages)[0].pixels, PIXELS)
    shown, _ = split([{"role": "user", "content": [{"type": "text", "text": "a"}], "images": [value, value]}])
    assert [p["type"] for p in shown[0]["content"]] == ["image", "image", "text"]
    assert split([{"role": "user", "images": [value]}])[0][0]["content"] == [{"type": "image"}]


def test_no_images_leave_a_message_as_it_is() -> None:
    for images in ([], (), None):
        assert split([{"role": "user", "content": "a", "images": images}]) == ([{"role": "user", "content": "a"}], [])


def test_options_of_the_processor() -> None:
    picture, = seen(user({"type": "image", "image": PIXELS, "max_pixels": 900, "pan_and_scan": True}))
    assert picture.options == {"max_pixels": 900, "pan_and_scan": True}
    video, = seen(user({"type": "video", "video": [PIXELS, PIXELS], "fps": 2, "sample_fps": 1}))
    assert video.fps == 2 and video.options == {"sample_fps": 1} and len(video) == 2
    with pytest.raises(ImageError, match="sample_fps"):
        seen(user({"type": "video", "video": "film.mp4", "fps": 2}))
    assert len(seen(user([PIXELS, CONTENT, URL]))[0]) == 3


class Role(str, Enum):
    USER = "user"


def test_texts() -> None:
    parts = ["a", {"type": "text", "text": "b"}, {"type": "input_text", "text": "c", "cache_control": None}, {"type": "output_text", "text": "d", "annotations": []}]
    assert split(user(*parts))[0][0]["content"] == [{"type": "text", "text": t} for t in "abcd"]
    markup = type("Markup", (str,), {"__add__": lambda self, other: 1 / 0, "__str__": lambda self: "no"})("<b>")
    shown, _ = split([{"role": Role.USER, "content": markup}, {"role": "user", "content": [markup]}])
    assert type(shown[0]["content"]) is str and shown[0]["content"] == "<b>" and type(shown[1]["content"][0]["text"]) is str


def test_other_keys_of_a_message_are_the_templates() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [], "name": "x", "reasoning_content": "y", "images": [], "audio": None, "files": []}
    shown, media = split([message])
    assert shown == [{k: v for k, v in message.items() if k != "images"}] and not media


# ------------------------------------------------------------------------------------- what is refused

UNSEEN = [
    {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, {"type": "audio", "audio": "a.wav"}, {"type": "audio_url", "audio_url": {"url": "x"}},
    {"type": "input_file", "file_data": URL}, {"type": "file", "file": {"file_data": URL}}, {"type": "document", "source": {"type": "text", "data": "x"}},
    {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "image", "source": {"type": "base64", "data": ENCODED}}]},
    {"type": "tool_use", "id": "1", "name": "f", "input": {}}, {"type": "thinking", "thinking": "x"}, {"type": "refusal", "refusal": "no"},
    {"type": "image_file", "image_file": {"file_id": "1"}}, {"type": "media_url"}, {"type": "x" * 9999}, {"type": ""},
]


@pytest.mark.parametrize("part", UNSEEN, ids=lambda p: p["type"][:20])
@pytest.mark.parametrize("role", ["user", "tool", "assistant"])
def test_what_would_not_be_seen_is_refused(part: dict[str, Any], role: str) -> None:
    with pytest.raises(RequestError, match=r"^messages\[1\].content\[1\].type: a part of type .* is not taken") as e:
        split([{"role": "user", "content": "a"}, {"role": role, "content": ["x", part]}])
    assert len(str(e.value)) < 300


WRONG: list[tuple[Any, str]] = [
    (user({"text": "no type"}), "content[0].type"), (user({"type": None}), "content[0].type"), (user({"type": ["image"]}), "content[0].type"),
    (user({}), "content[0].type"), (user({"inline_data": {"data": ENCODED}}), "content[0].type"), (user(None), "content[0]"), (user(True), "content[0]"),
    (user(3.5), "content[0]"), (user({1}), "content[0]"), (user({"type": "text"}), "content[0].text"), (user({"type": "text", "text": 7}), "content[0].text"),
    (user({"type": "text", "text": None}), "content[0].text"), (user({"type": "text", "text": ["a"]}), "content[0].text"),
    (user({"type": "text", "text": "a", "image": URL}), "content[0].image"), (user({"type": "text", "text": "a", "images": [URL]}), "content[0].images"),
    (user({"type": "image"}), "content[0]"), (user({"type": "image", "image": None}), "content[0]"), (user({"type": "image", "image": 7}), "content[0].image"),
    (user({"type": "image", "image": True}), "content[0].image"), (user({"type": "image", "image": {"a": 1}}), "content[0].image.a"),
    (user({"type": "image", "image": {}}), "content[0].image.url"), (user({"type": "image", "image": {"url": {"url": URL}}}), "content[0].image.url"),
    (user({"type": "image_url", "image_url": {"url": None}}), "content[0].image_url.url"), (user({"type": "image_url", "image_url": {"url": [URL]}}), "image_url.url"),
    (user({"type": "image_url", "image_url": {"url": URL, "headers": {}}}), "image_url.headers"), (user({"type": "image_url", "image_url": [URL]}), "content[0].image_url"),
    (user({"type": "image_url", "image_url": {"url": URL, "detail": "huge"}}), "image_url.detail"), (user({"type": "image_url", "image_url": {"url": URL, "detail": 1}}), "image_url.detail"),
    (user({"type": "image_url", "video_url": URL}), "content[0].video_url"), (user({"type": "video", "image": URL}), "content[0].image"),
    (user({"type": "image", "image": URL, "url": URL}), "content[0]"), (user({"type": "image", "image": "a.png", "path": "b.png"}), "content[0]"),
    (user({"type": "input_image", "file_id": "file-1"}), "content[0]"), (user({"type": "input_image", "image_url": URL, "file_id": "file-1"}), "content[0].file_id"),
    (user({"type": "image", "image": URL, "mask": [1]}), "content[0].mask"), (user({"type": "image", "image": URL, 3: 4}), "content[0].3"),
    (user({"type": "image", "source": {"type": "file", "file_id": "1"}}), "source.type"), (user({"type": "image", "source": {}}), "source.type"),
    (user({"type": "image", "source": {"type": "base64"}}), "source.data"), (user({"type": "image", "source": {"type": "base64", "data": b"x"}}), "source.data"),
    (user({"type": "image", "source": {"type": "base64", "data": ENCODED, "url": "x"}}), "source.url"), (user({"type": "image", "source": {"type": "url"}}), "source.url"),
    (user({"type": "image", "base64": 5}), "content[0].base64"), (user({"type": "image", "data": {"a": 1}}), "content[0].data"),
    ([{"role": "user", "content": {"type": "text", "text": "x"}}], "messages[0].content"), ([{"role": "user", "content": 5}], "messages[0].content"),
    ([{"role": "user", "content": PIXELS}], "messages[0].content"), ([{"role": "user", "content": b"x"}], "messages[0].content"), ([{"role": "user", "content": True}], "messages[0].content"),
    ([{"content": "x"}], "messages[0].role"), ([{"role": 5, "content": "x"}], "messages[0].role"), ([{"role": None}], "messages[0].role"), ([5], "messages[0]"), ([None], "messages[0]"),
    (["hi"], "messages[0]"), ([["role", "user"]], "messages[0]"), (None, "messages"), ("hi", "messages"), (5, "messages"), ({"role": "user", "content": "x"}, "messages"), (b"x", "messages"),
    ([{"role": "user", "content": "a", "images": object()}], "messages[0].images"), ([{"role": "user", "content": "a", "images": 5}], "messages[0].images"),
    ([{"role": "user", "content": "a", "images": True}], "messages[0].images"), ([{"role": "user", "content": "a", "images": {"url": URL}}], "messages[0].images"),
    ([{"role": "user", "content": "a", "images": [None]}], "messages[0].images[0]"), ([{"role": "user", "content": "a", "images": [URL, 5]}], "messages[0].images[1]"),
    ([{"role": "user", "content": "a", "images": [{"type": "text", "text": "x"}]}], "messages[0].images[0]"), ([{"role": "user", "content": "a", "images": [{"data": ENCODED}]}], "images[0].type"),
    *[([{"role": "user", "content": "a", key: value}], f"messages[0].{key}") for key, value in
      {"image": URL, "image_url": {"url": URL}, "video": "a.mp4", "videos": ["a.mp4"], "audio": {"id": "1"}, "files": ["a"], "attachments": [{}], "image_urls": [URL]}.items()],
]


@pytest.mark.parametrize("messages, field", WRONG, ids=[f"{i} {f}" for i, (_, f) in enumerate(WRONG)])
def test_wrong_types_are_refused_with_the_path_of_the_field(messages: Any, field: str) -> None:
    with pytest.raises(RequestError) as e:
        split(messages)
    assert field in str(e.value).split(": ")[0]


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from(["image", "text", "image_url", URL, ENCODED, "user"]),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(
                        ["type", "text", "image", "image_url", "url", "source", "data", "content", "role", "images", "video", "detail", "path", "x"]), inner, max_size=5), max_leaves=20)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": JSON}, optional={"images": JSON}), max_size=3) | JSON)
def test_any_json_is_read_or_refused(messages: Any) -> None:
    try:
        seen(messages, MediaPolicy(paths=False))
    except RequestError:
        pass


def test_deep_nesting_is_refused() -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    for messages in (user(deep), [{"role": "user", "content": deep}], user({"type": "image", "image": deep}), user({"type": "video", "video": deep}), deep,
                     [{"role": "user", "content": "a", "images": deep}]):
        with pytest.raises(RequestError):
            seen(messages)
    while isinstance(deep, list):                                         # taken apart by hand: its end would recurse
        deep = deep.pop()


# ------------------------------------------------------------------------------------- files and addresses

def test_addresses_open_no_files(path: Path) -> None:
    gone = path.with_name("gone.png")
    for form in ("{}", "file://{}", "FILE://{}", "file://localhost{}", "file:{}"):
        for part in ({"type": "image_url", "image_url": {"url": "?"}}, {"type": "image_url", "image_url": "?"}, {"type": "image", "url": "?"},
                     {"type": "input_image", "image_url": "?"}, {"type": "video_url", "video_url": {"url": "?"}}, {"type": "image", "source": {"type": "url", "url": "?"}}):
            said = set()
            for file in (path, gone, path.parent, Path("/etc/passwd"), Path("/root/x")):
                written = eval(repr(part).replace("'?'", repr(form.format(file))))
                with pytest.raises(ImageError, match="no file is opened by its address here") as e:
                    seen(user(written))
                said.add(str(e.value).replace(str(file), ""))
            assert len(said) == 1
    for text in ("file://{}", "file:{}"):                                  # an address in a path's place is an address
        with pytest.raises(ImageError, match="by its address"):
            seen(user({"type": "image", "image": text.format(path)}))


def test_a_policy_may_open_addresses(path: Path) -> None:
    spaced = path.with_name("my red.png")
    spaced.write_bytes(CONTENT)
    for url in (str(path), f"file://{path}", f"file://localhost{path}", path.as_uri(), spaced.as_uri()):
        assert seen(user({"type": "image_url", "image_url": {"url": url}}), MediaPolicy(urls=True))[0].size == (40, 32)
    with pytest.raises(ImageError, match="the file is on elsewhere"):
        seen(user({"type": "image_url", "image_url": {"url": f"file://elsewhere{path}"}}), MediaPolicy(urls=True))
    with pytest.raises(ImageError, match="no address of a file"):
        seen(user({"type": "image_url", "image_url": {"url": "file://[x/a.png"}}), MediaPolicy(urls=True))


def test_the_command_line_refuses_malformed_addresses(path: Path) -> None:
    """There a user names files, so that addresses of files are allowed."""
    from pyengine.cli import pictures

    assert pictures.open_picture(path.as_uri(), {}).path == path
    for text in ("file://[x/a.png", "file://elsewhere/a.png", "see file://[x/a.png, please"):
        parts, remarks = pictures.find_pictures(text, {})
        assert "".join(map(str, parts)) == text and len(remarks) == 1
    with pytest.raises(ImageError, match="no address of a file"):
        pictures.named_pictures("file://[x/a.png", {}, "image")


@pytest.mark.parametrize("source", ["http://127.0.0.1:1/a.png", "HTTPS://example.com/a.png", "ftp://x/a.png", "s3://b/k.png", "gopher://x"])
def test_nothing_is_fetched(source: str) -> None:
    for part in ({"type": "image_url", "image_url": {"url": source}}, {"type": "image", "image": source}, {"type": "video", "video": [source]}):
        for policy in (MediaPolicy(), MediaPolicy(urls=True), MediaPolicy(paths=False), MediaPolicy(folders=("/",))):
            with pytest.raises(ImageError, match="fetches nothing"):
                seen(user(part), policy)


def test_a_servers_policy_takes_what_was_sent_and_no_files(path: Path) -> None:
    strict = MediaPolicy(paths=False)
    for name, part in forms(path).items():
        if "path" in name.lower() or name == "mlx-vlm":
            with pytest.raises(ImageError, match="no file is opened by its path here"):
                seen(user(part), strict)
        else:
            assert seen(user(part), strict)[0].size == (40, 32), name
    with pytest.raises(ImageError, match="no file is opened"):
        seen(user([CONTENT, str(path)]), strict)                          # a frame
    with pytest.raises(ImageError, match="no file is opened"):
        seen([{"role": "user", "content": "a", "images": [str(path)]}], strict)


def test_folders(path: Path, tmp_path: Path) -> None:
    inner = tmp_path / "shown"
    inner.mkdir()
    (inner / "red.png").write_bytes(CONTENT)
    (tmp_path / "shown twice").mkdir()
    (tmp_path / "shown twice" / "red.png").write_bytes(CONTENT)
    (inner / "out.png").symlink_to(path)
    (inner / "in.png").symlink_to(inner / "red.png")
    (tmp_path / "link").symlink_to(inner)
    policy = MediaPolicy(urls=True, folders=[inner])                      # type: ignore[arg-type]
    for good in (inner / "red.png", inner / "in.png", tmp_path / "link" / "red.png", f"{inner}/../shown/red.png"):
        for part in ({"type": "image", "path": str(good)}, {"type": "image_url", "image_url": {"url": f"file://{good}"}}):
            assert seen(user(part), policy)[0].size == (40, 32)
    said = set()
    for bad in (path, tmp_path / "gone.png", inner / "gone.png", inner / "out.png", inner, tmp_path / "shown twice" / "red.png", f"{inner}/../red.png",
                "/dev/zero", "/etc/passwd", "/root/.x", "a\0b", "x" * 999, "/dev/stdin", f"{inner}/red.png/x"):
        with pytest.raises(ImageError, match="in the folders that may be read here there is no such file") as e:
            seen(user({"type": "image", "path": str(bad)}), policy)
        said.add(str(e.value).partition("': ")[2] or str(e.value).partition("...")[2])
    assert len(said) == 1
    assert MediaPolicy(folders=["/"]).admit(str(path), "picture") == path
    assert not MediaPolicy(folders=()).folders
    with pytest.raises(ImageError):
        MediaPolicy(folders=()).admit(str(path), "picture")


def test_policies_of_other_types() -> None:
    for bad in ({"paths": 1}, {"urls": "yes"}, {"folders": "/tmp"}, {"folders": Path("/tmp")}, {"folders": [5]}):
        with pytest.raises(RequestError):
            MediaPolicy(**bad)                                            # type: ignore[arg-type]


def test_base64_and_paths_are_told_apart(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        text = base64.b64encode(saved(kind)).decode()
        assert is_base64(text) and seen(user({"type": "image", "image": text}))[0].size == (40, 32)
    for text in ("a.png", "cats", "/9j/x.jpg", "iVBORw0K.png", "Qk1x", "", "/", "UklG", "red", "é", "\udfff", "====", "/usr/share/pixmaps"):
        assert not is_base64(text)
    monkeypatch.chdir(path.parent)
    path.rename("cats")
    assert seen([{"role": "user", "content": "a", "images": "cats"}])[0].size == (40, 32)
    with pytest.raises(ImageError, match="neither a data URL, nor base64 of a format that is read here, nor a path"):
        seen([{"role": "user", "content": "a", "images": base64.b64encode(bytes(9999)).decode()}])
    with pytest.raises(ImageError, match="not base64"):
        seen([{"role": "user", "content": "a", "images": ENCODED[:200] + "@" + ENCODED[200:]}])
    with pytest.raises(ImageError, match="not base64"):
        seen(user({"type": "image", "data": str(path)}))                  # never a path
    with pytest.raises(ImageError, match="not an image format"):
        seen(user({"type": "image", "source": {"type": "base64", "data": "AAAA"}}))


def test_one_picture_or_a_list() -> None:
    for one in ("a.png", CONTENT, PIXELS, Path("a.png"), PIL.Image.fromarray(PIXELS), pe.open_image(PIXELS), bytearray(b"x")):
        assert as_list(one, "images") == [one] if not isinstance(one, np.ndarray) else as_list(one, "images")[0] is one
    for many in (["a", "b"], ("a", "b"), iter("ab"), (c for c in "ab")):
        assert as_list(many, "images") == ["a", "b"]
    assert as_list(None, "images") == []
    for bad in (5, True, object(), {"a": 1}, {1}, 1j):
        with pytest.raises(RequestError, match="^images: a list of pictures"):
            as_list(bad, "images")


# ------------------------------------------------------------------------------------- whole models

@pytest.fixture(scope="module")
def qwen(tiny_gguf: Any) -> Any:
    return pe.load(tiny_gguf("qwen2_5_vl")[0], n_ctx=256)


@pytest.fixture(scope="module")
def gemma(tiny_gguf: Any) -> Any:
    return pe.load(tiny_gguf("gemma3")[0], n_ctx=256)


@pytest.fixture(scope="module")
def blind(tiny_gguf: Any) -> Any:
    return pe.load(tiny_gguf("llama")[0], n_ctx=256)


def test_all_forms_make_one_prompt(qwen: Any, gemma: Any, path: Path) -> None:
    for model in (qwen, gemma):
        ids = {tuple(model.chat_ids(user(form, "what"))) for form in forms(path).values()}
        ids |= {tuple(model.chat_ids([{"role": "user", "content": "what", "images": images}])) for images in ([str(path)], ENCODED, [URL], CONTENT)}
        assert len(ids) == 1 and -1 in ids.pop()


def test_the_field_is_named_by_models_too(qwen: Any, gemma: Any, blind: Any) -> None:
    for call, match in [
            (lambda: qwen.chat_ids(user("a", {"type": "image", "image": "gone.png"})), r"messages\[0\].content\[1\].image: .*no such file"),
            (lambda: gemma.chat_ids(user("a", {"type": "image", "image": PIXELS, "zoom": 2})), r"messages\[0\].content\[1\].image: option 'zoom'"),
            (lambda: gemma.chat_ids(user({"type": "video", "video": [PIXELS]})), r"messages\[0\].content\[0\].video: .*not videos"),
            (lambda: qwen.generate("a", images=object()), "images: a list of pictures, not object"),
            (lambda: qwen.generate("a", images=[None]), r"images\[0\]: .*NoneType"), (lambda: qwen.generate("a", images=5), "images: "),
            (lambda: qwen.generate("a", images=["gone.png"]), r"images\[0\]: gone.png: there is no such file"),
            (lambda: qwen.generate("a", images=[True]), r"images\[0\]"), (lambda: qwen.generate("a", images=[[None]]), r"images\[0\]: frame 0"),
            (lambda: qwen.generate(["a", None]), r"prompt\[1\]: a part of a prompt is NoneType"), (lambda: qwen.generate(["a", np.float32(1)]), r"prompt\[1\]"),
            (lambda: qwen.generate(["a", {"type": "image"}]), r"prompt\[1\]"), (lambda: qwen.generate(["a", np.array([[np.nan]])]), r"prompt\[1\]: .*0 to 1"),
            (lambda: qwen.generate(["a", object()]), r"prompt\[1\]: .*not object"), (lambda: qwen.generate(b"abc"), "a prompt is a text or a list of parts, not bytes"),
            (lambda: qwen.generate(None), "not NoneType"), (lambda: qwen.generate({"a": 1}), "not dict"), (lambda: qwen.generate(5), "not int"),
            (lambda: qwen.generate(["a"], images=PIXELS), "images= goes with a text"), (lambda: blind.generate("a", images="x.png"), "takes no pictures"),
            (lambda: blind.chat_ids([{"role": "user", "content": "a", "images": ["x.png"]}]), "takes no pictures"),
            (lambda: blind.chat_ids(user({"type": "input_audio", "input_audio": {}})), r"messages\[0\].content\[0\].type: .*'input_audio' is not taken"),
            (lambda: qwen.chat(user({"type": "image_url", "image_url": {"url": "/etc/passwd"}})), r"messages\[0\].content\[0\].image_url.url: .*by its address")]:
        with pytest.raises(RequestError, match=match):
            call()
    one = qwen.generate("a", images=PIXELS, max_tokens=1, temperature=0)
    assert one.tokens == qwen.generate("a", images=[PIXELS], max_tokens=1, temperature=0).tokens and len(one.media) == 1


def test_a_template_that_leaves_a_picture_out_is_an_error(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyengine.chat.template import ChatTemplate

    source = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    monkeypatch.setattr(qwen._language, "template", ChatTemplate(source))
    assert -1 in qwen.chat_ids(user(PIXELS, "a"))
    with pytest.raises(RequestError, match=r"messages\[1\].content\[0\]: the model's chat template leaves out"):
        qwen.chat_ids([{"role": "user", "content": "a"}, {"role": "assistant", "content": [PIXELS, "b"]}])
    assert -1 in qwen.chat_ids([{"role": "user", "content": "a"}, {"role": "tool", "content": [PIXELS, "b"]}])       # told in a user's turn


def test_a_server_passes_its_own_policy(qwen: Any, path: Path) -> None:
    prompts = qwen._prompts
    strict = Prompts(prompts.name, prompts.n_ids, prompts.language, prompts.media, MediaPolicy(paths=False))
    assert strict.chat(user({"type": "image", "image": URL}), None)[1][0].size == (40, 32)
    with pytest.raises(ImageError, match=r"messages\[0\].images\[0\]: .*no file is opened by its path"):
        strict.chat([{"role": "user", "content": "a", "images": [str(path)]}], None)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are in KiB on Linux")
def test_a_picture_too_large_for_the_model_is_refused_by_its_header(tiny_gguf: Any) -> None:
    small, side = pe.load(tiny_gguf("qwen2_5_vl")[0], n_ctx=8), 9000
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for call in (lambda: small.generate("a", images=[bomb]), lambda: small.chat_ids(user({"type": "image", "image": bomb})),
                 lambda: small.chat_ids(user([bomb] * 16)), lambda: small.encode_image(bomb)):
        with pytest.raises(PyEngineError, match="positions, but the context holds 8"):
            call()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10
