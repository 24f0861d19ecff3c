"""`classify`, `index` and `search`: what they print, what is encoded anew, what goes on after an interruption, and what is refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_towers
from PIL import Image

import pyengine as pe
from converters.writer import convert
from pyengine.cli.command import execute, INTERRUPTED, USAGE_ERROR
from pyengine.errors import RequestError

pytest.importorskip("usearch")
from pyengine.search import fingerprint, PictureIndex                                      # noqa: E402


@pytest.fixture(scope="module")
def clip(tmp_path_factory: Any) -> Path:
    made = tmp_path_factory.mktemp("clip")
    return convert(tiny_towers.save_clip(made / "m", "gelu", tiny_towers.CLIP_NEW), made / "clip.gguf", "f32")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: Any) -> Path:
    import transformers

    made = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, image_size=32, patch_size=8,
                                    id2label={0: "cat", 1: "dog", 2: "sofa"})
    folder = tiny_towers.make("ViTForImageClassification", config, made / "m")
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 32}))
    return convert(folder, made / "vit.gguf", "f32")


@pytest.fixture()
def photos(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.setenv("PYENGINE_INDEX", str(tmp_path / "index"))
    folder = tmp_path / "photos"
    (folder / "deeper" / ".hidden").mkdir(parents=True)
    for i, picture in enumerate(tiny_towers.pictures()):
        picture.save(folder / ("deeper" if i % 2 else ".") / f"p{i}.png")
    (folder / "deeper" / ".hidden" / "no.png").write_bytes((folder / "p0.png").read_bytes())
    (folder / "notes.txt").write_text("no picture")
    return folder


def said(capsys: Any, *arguments: object) -> Any:
    """Run the command with --json; return what it prints."""
    assert execute([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_words_of_a_model_that_reads(clip: Path, vit: Path, tmp_path: Path, tiny_gguf: Any, capsys: Any) -> None:
    """What the commands for decoders say to it, what `classify` says to a decoder, and its graphs."""
    writer, picture = str(tiny_gguf("llama")[0]), tmp_path / "p.png"
    tiny_towers.pictures()[0].save(picture)
    for arguments, words in ((["bench", str(clip)], "writes no text"), (["perplexity", str(vit), "-f", __file__], "writes no text"),
                             (["attention", str(clip), "--image", str(picture)], "writes no text"),
                             (["classify", writer, "a", "--image", str(picture)], "writes text and has no classes")):
        assert execute(arguments) == USAGE_ERROR
        error = capsys.readouterr().err
        assert words in error and "--ctx" not in error and error.count("\n") == 1
    for file, inputs in ((clip, ("ids", "patches")), (vit, ("patches",))):
        for more in ([], ["--no-passes"]):
            assert execute(["graph", str(file), *more]) == 0
            parts = capsys.readouterr().out.split("\n\n")
            assert len(parts) == len(inputs) and all(name in part and "attention" in part for name, part in zip(inputs, parts))
        assert execute(["graph", str(file), "--dot"]) == 0
        assert capsys.readouterr().out.count("digraph") == len(inputs)


@pytest.mark.parametrize("n, can", [(1, ["texts ranked by a query"]), (3, ["classes"])])
def test_show_says_what_scores_are_of(n: int, can: list[str], tmp_path: Path, capsys: Any) -> None:
    import transformers

    tiny_towers.save_word_piece(tmp_path)
    config = transformers.BertConfig(vocab_size=160, hidden_size=96, num_hidden_layers=1, num_attention_heads=6, intermediate_size=128,
                                     max_position_embeddings=64, num_labels=n)
    file = convert(tiny_towers.make("BertForSequenceClassification", config, tmp_path), tmp_path / "scores.gguf", "f32")
    assert said(capsys, "show", file)["can"] == can


# -- classify -------------------------------------------------------------------------------------------------------------


def test_labels_of_ones_own(clip: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    more = tmp_path / "labels.txt"
    more.write_text("\ufeffa sofa\n\n  2 foxes \n")
    found = said(capsys, "classify", clip, "a cat", "a dog", "--labels", more, "--image", photos / "p0.png")
    with pe.load(clip) as model:
        want = model.classify(photos / "p0.png", ["a cat", "a dog", "a sofa", "2 foxes"])
    assert found == {"model": "clip.gguf", "activation": "softmax", "pictures": [{"picture": "p0.png", "labels": want}]}
    assert list(found["pictures"][0]["labels"]) == list(want)
    assert execute(["classify", str(clip), "a cat", "a dog", "--image", str(photos / "p0.png"), "--image", str(photos / "p2.png")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("%") == 4 and printed.index("p0.png") < printed.index("p2.png")
    assert len(said(capsys, "classify", clip, "a cat", "a dog", "--top", 1, "--image", photos / "p0.png")["pictures"][0]["labels"]) == 1
    assert said(capsys, "classify", clip, "a cat", "--activation", "sigmoid", "--image", photos / "p0.png")["activation"] == "sigmoid"


def test_bars_at_a_terminal(clip: Path, photos: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert execute(["classify", str(clip), "a cat", "a\x1b[31mdog", "--image", str(photos / "p0.png")]) == 0
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "\u2588" in printed and "\\x1b[31mdog" in printed


def test_classes_of_the_file(vit: Path, photos: Path, capsys: Any) -> None:
    found = said(capsys, "classify", vit, "--image", photos / "p0.png")["pictures"][0]["labels"]
    with pe.load(vit) as model:
        assert found == model.classify(photos / "p0.png")


@pytest.mark.parametrize("arguments, words", [
    (["a cat"], "--image FILE is missing"), (["a cat", "a cat", "--image", "p0.png"], "given twice"), (["--image", "p0.png"], "no classes of its own"),
    (["a", "--image", "p9.png"], "p9.png"), (["a", "--activation", "relu", "--image", "p0.png"], "softmax, sigmoid or none"),
    (["--labels", "none.txt", "--image", "p0.png"], "none.txt")])
def test_what_cannot_be_classed_is_said(clip: Path, photos: Path, capsys: Any, monkeypatch: Any, arguments: list[str], words: str) -> None:
    monkeypatch.chdir(photos)
    assert execute(["classify", str(clip), *arguments]) == USAGE_ERROR
    assert words in capsys.readouterr().err


# -- index and search -----------------------------------------------------------------------------------------------------


def test_pictures_are_found_by_texts_and_by_pictures(clip: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    done = said(capsys, "index", photos, "--model", clip)
    assert done["pictures"] == 4 and {**done["folders"][0], "folder": ""} == {"folder": "", "new": 4, "changed": 0, "removed": 0, "unchanged": 0, "faulty": []}
    found = said(capsys, "search", "the", "lazy", "dog", "-n", 3)
    with pe.load(clip) as model:
        text, paths = model.embed("the lazy dog"), sorted(photos.rglob("p*.png"))
        cosines = {str(p): float(model.embed(pe.open_image(p)) @ text) for p in paths}
    assert [f["path"] for f in found["found"]] == sorted(cosines, key=lambda p: -cosines[p])[:3] and found["query"] == "the lazy dog"
    assert all(f["score"] == pytest.approx(cosines[f["path"]], abs=1e-5) for f in found["found"])
    like = said(capsys, "search", "--image", photos / "p2.png")["found"]
    assert like[0]["path"] == str(photos / "p2.png") and like[0]["score"] == pytest.approx(1, abs=1e-5) and len(like) == 4
    assert execute(["search", "a <b>dog</b>", "--html", str(tmp_path / "found.html")]) == 0
    page = (tmp_path / "found.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4 and "a &lt;b&gt;dog" in page and "http" not in page and "<script" not in page


def test_only_what_is_new_is_encoded(clip: Path, photos: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def embed(path: Path) -> np.ndarray:
        seen.append(path.name)
        return np.asarray(pe.open_image(path).pixels[:2, :3].reshape(-1)[:8], np.float32)

    def bring() -> tuple[int, ...]:
        seen.clear()
        with PictureIndex(tmp_path / "i") as index:
            index.use("m", "mark", 8)
            done = index.update(photos, embed)
            assert len(index) == len(index.nearest(np.ones(8), 100))
            return done.new, done.changed, done.removed, done.unchanged, len(done.faulty)

    assert bring() == (4, 0, 0, 0, 0) and len(seen) == 4
    assert bring() == (0, 0, 0, 4, 0) and seen == []
    os.utime(photos / "p0.png", (1, 1))                                                    # another time, the same bytes
    assert bring() == (0, 0, 0, 4, 0) and seen == []
    (photos / "copy.png").write_bytes((photos / "p0.png").read_bytes())
    (photos / "p2.png").rename(photos / "moved.png")
    assert bring() == (2, 0, 1, 3, 0) and seen == ["moved.png"]                            # a copy has its vector already
    Image.new("RGB", (9, 9), (200, 10, 10)).save(photos / "p0.png")
    (photos / "broken.jpg").write_bytes(b"no picture")
    assert bring() == (0, 1, 0, 4, 1) and seen == ["broken.jpg", "p0.png"]
    assert bring() == (0, 0, 0, 5, 1) and seen == []                                       # what is broken is not read again until it changes
    Image.new("RGB", (9, 9)).save(photos / "broken.jpg")
    assert bring() == (0, 1, 0, 5, 0)


def test_an_interrupted_update_goes_on(photos: Path, tmp_path: Path) -> None:
    calls = []

    def embed(path: Path) -> np.ndarray:
        calls.append(path.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return np.eye(8, dtype=np.float32)[len(calls)]

    for _ in range(2):
        with PictureIndex(tmp_path / "i") as index:
            index.use("m", "mark", 8)
            if len(calls) < 3:
                with pytest.raises(KeyboardInterrupt):
                    index.update(photos, embed)
                assert len(index) == 2
            else:
                assert index.update(photos, embed)[:4] == (2, 0, 0, 2)
    assert len(calls) == 5


def test_vectors_and_catalogue_agree_after_a_crash(photos: Path, tmp_path: Path) -> None:
    place = tmp_path / "i"
    with PictureIndex(place) as index:
        index.use("m", "mark", 8)
        index.update(photos, lambda path: np.eye(8, dtype=np.float32)[int(path.stem[1:])])
        index._vectors.remove(int(index._vectors.keys[0]))                                 # as if it had not been written
        index._vectors.add(99, np.ones(8, np.float32))                                     # as if the catalogue had not been
        index._vectors.save(str(place / "vectors.usearch"))
    with PictureIndex(place) as index:
        index.use("m", "mark", 8)
        assert len(index.nearest(np.ones(8), 9)) == 3
        assert index.update(photos, lambda path: np.eye(8, dtype=np.float32)[int(path.stem[1:])])[:4] == (0, 1, 0, 3)
        assert len(index.nearest(np.ones(8), 9)) == 4


def test_an_index_belongs_to_one_model_and_one_process(clip: Path, vit: Path, photos: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    assert execute(["search", "a dog"]) == USAGE_ERROR and "no index is here" in capsys.readouterr().err
    assert execute(["index", str(photos)]) == USAGE_ERROR and "give --model" in capsys.readouterr().err
    said(capsys, "index", photos, "--model", clip)
    said(capsys, "index", photos)                                                          # its own model
    for command in (["index", str(photos)], ["search", "--image", str(photos / "p0.png")]):
        assert execute([*command, "--model", str(vit)]) == USAGE_ERROR
        assert "was made with" in (told := capsys.readouterr().err) and "clip.gguf" in told and "vit.gguf" in told
    with PictureIndex(tmp_path / "index"):
        assert execute(["index", str(photos)]) == USAGE_ERROR and "another process" in capsys.readouterr().err
        assert execute(["search", "a", "dog"]) == 0                                        # reading goes on meanwhile
    demo = "converters/demo/weights/demo-q8_0.gguf"
    assert execute(["index", str(photos), "--model", demo, "--index", str(tmp_path / "other")]) == USAGE_ERROR
    assert "needs a model of vectors" in capsys.readouterr().err
    assert execute(["search"]) == USAGE_ERROR and execute(["search", "a", "--image", "b.png"]) == USAGE_ERROR
    monkeypatch.setattr("pyengine.search.PictureIndex.update", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert execute(["index", str(photos)]) == INTERRUPTED


def test_pictures_alone_are_found_by_pictures(vit: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    place = ("--index", tmp_path / "vit")
    said(capsys, "index", photos, "--model", vit, *place)
    assert said(capsys, "search", "--image", photos / "p0.png", *place)["found"][0]["path"] == str(photos / "p0.png")
    assert execute(["search", "a", "dog", *map(str, place)]) == USAGE_ERROR and "reads pictures only" in capsys.readouterr().err


def test_damaged_files_are_said(photos: Path, tmp_path: Path) -> None:
    place = tmp_path / "i"
    with PictureIndex(place) as index:
        index.use("m", "mark", 8)
        index.update(photos, lambda path: np.ones(8, np.float32))
    (place / "vectors.usearch").write_bytes(b"\xff" * 100)
    with PictureIndex(place) as index, pytest.raises(RequestError, match="remove the folder and index again"):
        index.use("m", "mark", 8)
    (place / "files.sqlite").write_bytes(b"x" * 5000)
    with pytest.raises(RequestError, match="remove the folder and index again"):
        PictureIndex(place)
    with pytest.raises(RequestError, match="not a folder"), PictureIndex(tmp_path / "j") as index:
        index.use("m", "mark", 8)
        index.update(tmp_path / "none", lambda path: np.ones(8, np.float32))


def test_a_models_file_is_told_from_others(tmp_path: Path) -> None:
    one, other = tmp_path / "a", tmp_path / "b"
    one.write_bytes(bytes(range(256)) * 999)
    other.write_bytes(bytes(range(256)) * 998 + bytes(256))
    assert fingerprint(one) == fingerprint(one) != fingerprint(other)
    (tmp_path / "c").write_bytes(b"")
    assert len(fingerprint(tmp_path / "c")) == 64
