"""Names of models resolve in stores that other programs keep; made up here, file by file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pyengine.errors import ModelNotFoundError
from pyengine.files.stores import find_model, list_models, MAX_MANIFEST_BYTES

MODEL, PROJECTOR = "application/vnd.ollama.image.model", "application/vnd.ollama.image.projector"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty home folder, and working folder, with none of the variables set that name a store elsewhere."""
    for name in ("PYENGINE_MODELS", "OLLAMA_MODELS", "HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    return tmp_path


def put(path: Path, n_bytes: int = 5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"G" * n_bytes)
    return path


def manifest(home: Path, name: str, layers: object, host: str = "registry.ollama.ai/library",
             tag: str = "latest") -> Path:
    path = put(home / ".ollama/models/manifests" / host / name / tag)
    path.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return path


def blob(home: Path, digit: str, n_bytes: int = 7) -> tuple[Path, str]:
    """Return the path of a new blob and the digest by which a manifest names it."""
    return put(home / ".ollama/models/blobs" / f"sha256-{digit * 64}", n_bytes), f"sha256:{digit * 64}"


def hub(home: Path, repo: str, file: str, revision: str = "aaaa", n_bytes: int = 5) -> Path:
    """Return a file in the Hugging Face cache: a link from the snapshot to a blob, as huggingface_hub lays it out."""
    root = home / ".cache/huggingface/hub" / ("models--" + repo.replace("/", "--"))
    target = put(root / "blobs" / f"{revision}-{file.replace('/', '_')}", n_bytes)
    link = root / "snapshots" / revision / file
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)
    return link


def test_a_path_is_itself_whatever_the_file_is_called(home):
    path = put(home / "model.bin")
    assert find_model(str(path)) == path
    assert find_model(path) == path


def test_pyengine_models_takes_several_folders_and_looks_below_them(home, monkeypatch):
    one, two = put(home / "one/tiny.gguf"), put(home / "two/sub/Big-Q8_0.gguf")
    put(home / "two/.hidden/secret.gguf")
    put(home / "two/readme.md")
    monkeypatch.setenv("PYENGINE_MODELS", os.pathsep.join((str(home / "one"), str(home / "absent"), str(home / "two"))))
    assert [(m.name, m.path, m.source) for m in list_models()] == [
        ("tiny", one, "PYENGINE_MODELS"), ("sub/Big-Q8_0", two, "PYENGINE_MODELS")]
    for name in ("sub/big-q8_0", "Big-Q8_0", "Big-Q8_0.gguf", "sub/Big-Q8_0.gguf"):
        assert find_model(name) == two


def test_a_folder_pairs_a_projector_with_its_own_model_only(home, monkeypatch):
    vision = put(home / "m/gemma-3-4b-it-Q4_K_M.gguf")
    projector = put(home / "m/mmproj-gemma-3-4b-it-F16.gguf")
    text = put(home / "m/smollm2-Q4_1.gguf")
    monkeypatch.setenv("PYENGINE_MODELS", str(home / "m"))
    assert find_model("gemma-3-4b-it-Q4_K_M") == [vision, projector]
    assert find_model("smollm2-Q4_1") == text


def test_split_files_are_one_model(home, monkeypatch):
    parts = [put(home / f"m/big-Q4_0-0000{i}-of-00002.gguf", 10 * i) for i in (1, 2)]
    put(home / "m/cut-00002-of-00002.gguf")                       # its first part is missing: not a model
    monkeypatch.setenv("PYENGINE_MODELS", str(home / "m"))
    assert [(m.name, m.path, m.nbytes) for m in list_models()] == [("big-Q4_0", parts[0], 30)]
    assert find_model("big-Q4_0") == parts[0]


def test_ollama_names(home):
    path, digest = blob(home, "a", 11)
    other, other_digest = blob(home, "b")
    mm, mm_digest = blob(home, "c", 4)
    manifest(home, "gemma3", [{"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:" + "f" * 64},
                              {"mediaType": MODEL, "digest": digest, "size": 11}])
    manifest(home, "gemma3", [{"mediaType": MODEL, "digest": other_digest},
                              {"mediaType": PROJECTOR, "digest": mm_digest}], tag="4b")
    manifest(home, "repo-GGUF", [{"mediaType": MODEL, "digest": other_digest}], host="hf.co/org", tag="Q8_0")
    assert find_model("gemma3") == find_model("gemma3:latest") == path
    assert find_model("registry.ollama.ai/library/gemma3") == path
    assert find_model("gemma3:4b") == [other, mm]
    assert find_model("hf.co/org/repo-gguf:q8_0") == other
    assert [(m.name, m.nbytes) for m in list_models()] == [
        ("gemma3:4b", 11), ("gemma3:latest", 11), ("hf.co/org/repo-GGUF:Q8_0", 7)]


def test_ollama_store_elsewhere(home, monkeypatch):
    path, digest = blob(home, "a")
    manifest(home, "x", [{"mediaType": MODEL, "digest": digest}])
    (home / ".ollama/models").rename(home / "store")
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "store"))
    assert find_model("x") == home / "store/blobs" / path.name


@pytest.mark.parametrize("layers, says", [
    ([{"mediaType": MODEL, "digest": "sha256:" + "../" * 21 + "a"}], "digest"),
    ([{"mediaType": MODEL, "digest": "../../../../etc/passwd"}], "digest"),
    ([{"mediaType": MODEL, "digest": "sha256:" + "a" * 64 + "/../x"}], "digest"),
    ([{"mediaType": MODEL, "digest": "sha256:" + "a" * 64 + "\n"}], "digest"),
    ([{"mediaType": MODEL, "digest": 7}], "digest"),
    ([{"mediaType": MODEL, "digest": "sha256:" + "9" * 64}], "is missing"),
    ([{"mediaType": [MODEL]}, None, 5, "x"], "no layer"),
    ({"a": 1}, "no layer"),
    (None, "no layer"),
])
def test_hostile_ollama_layers_are_refused_and_the_rest_is_found(home, layers, says):
    path, digest = blob(home, "a")
    manifest(home, "good", [{"mediaType": MODEL, "digest": digest}])
    bad = manifest(home, "bad", layers)
    assert [m.name for m in list_models()] == ["good:latest"]
    assert find_model("good") == path
    with pytest.raises(ModelNotFoundError) as error:
        find_model("bad")
    assert str(bad) in str(error.value) and says in str(error.value)


@pytest.mark.parametrize("content, says", [
    (b"\x80\xff not json", "not JSON"),
    (b"[" * 100_000, "not JSON"),                                    # nested deeper than the parser's stack
    (b'{"layers": ' + b"1" * 10_000 + b"}", "not JSON"),            # longer than an int may be
    (b"", "not JSON"),
    (b"[]", "no layer"),
    (b" " * (MAX_MANIFEST_BYTES + 1), "larger than"),
])
def test_hostile_ollama_manifests_are_refused(home, content, says):
    path = manifest(home, "bad", [])
    path.write_bytes(content)
    assert list_models() == []
    with pytest.raises(ModelNotFoundError, match=says):
        find_model("bad")


def test_an_ollama_manifest_that_is_a_pipe_does_not_hang(home):
    path = manifest(home, "bad", [])
    path.unlink()
    os.mkfifo(path)
    assert list_models() == []


def test_hub_names(home):
    small = hub(home, "org/repo-GGUF", "repo-Q4_K_M.gguf")
    large = hub(home, "org/repo-GGUF", "repo-Q8_0.gguf")
    for name in ("org/repo-GGUF:Q8_0", "ORG/repo-gguf:q8_0", "org/repo-GGUF/repo-Q8_0.gguf", "repo-Q8_0.gguf",
                 "repo-Q8_0"):
        assert find_model(name) == large
    assert find_model("org/repo-GGUF") == small                      # Q4_K_M is what people mean
    assert [m.name for m in list_models()] == ["org/repo-GGUF:Q4_K_M", "org/repo-GGUF:Q8_0"]


def test_hub_ambiguity_is_an_error_that_lists_the_choices(home):
    hub(home, "org/repo", "a-Q5_0.gguf")
    hub(home, "org/repo", "a-Q8_0.gguf")
    with pytest.raises(ModelNotFoundError, match="org/repo:Q5_0, org/repo:Q8_0"):
        find_model("org/repo")


def test_hub_projector_goes_with_the_repository_and_f16_is_preferred(home):
    model = hub(home, "org/vlm", "vlm-Q4_K_M.gguf")
    hub(home, "org/vlm", "mmproj-BF16.gguf")
    half = hub(home, "org/vlm", "mmproj-F16.gguf")
    assert find_model("org/vlm") == [model, half]
    assert len(list_models()) == 1


def test_hub_prefers_the_revision_of_main_and_passes_broken_links(home):
    for revision in ("aaaa", "bbbb", "cccc"):
        hub(home, "org/repo", "m-Q8_0.gguf", revision)
    root = home / ".cache/huggingface/hub/models--org--repo"
    put(root / "refs/main").write_text("bbbb\n")
    (root / "snapshots/bbbb/gone-Q4_0.gguf").symlink_to(root / "blobs/nothing")
    (root / "snapshots/gone").symlink_to(root / "nowhere")
    assert find_model("org/repo") == root / "snapshots/bbbb/m-Q8_0.gguf"
    assert len(list_models()) == 1


def test_hub_elsewhere(home, monkeypatch):
    hub(home, "org/repo", "m.gguf")
    link = home / "hf/hub/models--org--repo/snapshots/aaaa/m.gguf"
    (home / ".cache/huggingface").rename(home / "hf")
    link.unlink()
    put(link)
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    assert find_model("org/repo") == link
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "hf/hub"))
    assert find_model("org/repo/m") == link


def test_lm_studio_names(home):
    new = put(home / ".lmstudio/models/pub/repo-GGUF/repo-Q4_K_M.gguf")
    old = put(home / ".cache/lm-studio/models/pub/old-GGUF/old-Q6_K.gguf")
    assert find_model("pub/repo-GGUF") == new
    assert find_model("pub/old-GGUF:Q6_K") == old
    assert [m.source for m in list_models()] == ["LM Studio"] * 2


def test_an_earlier_place_wins(home, monkeypatch):
    put(home / ".lmstudio/models/pub/repo/tiny.gguf")
    mine = put(home / "mine/tiny.gguf")
    monkeypatch.setenv("PYENGINE_MODELS", str(home / "mine"))
    assert find_model("tiny") == mine


def test_an_earlier_folder_wins_as_in_path(home, monkeypatch):
    one, two = put(home / "one/tiny.gguf"), put(home / "two/tiny.gguf")
    for folders, first in ((("one", "two"), one), (("two", "one"), two)):
        monkeypatch.setenv("PYENGINE_MODELS", os.pathsep.join(str(home / folder) for folder in folders))
        assert find_model("tiny") == first


def test_a_whole_file_and_a_split_one_of_one_name_are_two_models(home, monkeypatch):
    whole, part = put(home / "m/x.gguf"), put(home / "m/x-00001-of-00001.gguf")
    monkeypatch.setenv("PYENGINE_MODELS", str(home / "m"))
    with pytest.raises(ModelNotFoundError) as error:
        find_model("x")
    assert str(whole) in str(error.value) and str(part) in str(error.value)
    assert find_model("x.gguf") == whole and find_model(part.name) == part


def test_the_working_folder_s_models_and_one_s_own_are_found(home, monkeypatch):
    demo = put(home / "work/models/demo-Q8_0.gguf")
    mine = put(home / ".local/share/pyengine/models/sub/mine.gguf")
    assert [(m.name, m.source) for m in list_models()] == [("demo-Q8_0", "./models"), ("sub/mine", "pyengine")]
    assert find_model("demo-q8_0").resolve() == demo and find_model("mine") == mine
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "data"))
    other = put(home / "data/pyengine/models/other.gguf")
    assert find_model("other") == other and len(list_models()) == 2
    monkeypatch.setenv("PYENGINE_MODELS", str(home / "work/models"))         # the same folder by another name
    assert [(m.name, m.source) for m in list_models()] == [("demo-Q8_0", "PYENGINE_MODELS"), ("other", "pyengine")]


def test_a_projector_at_the_top_of_a_repository_goes_with_its_folders(home):
    model = hub(home, "org/vlm", "Q4_K_M/vlm-Q4_K_M-00001-of-00001.gguf")
    projector = hub(home, "org/vlm", "mmproj-F16.gguf")
    assert find_model("org/vlm") == [model, projector]


def test_of_several_projectors_that_of_the_model_s_own_name_is_taken(home):
    small, large = hub(home, "org/vlm", "small-Q8_0.gguf"), hub(home, "org/vlm", "large-Q8_0.gguf")
    for name in ("small", "large"):
        hub(home, "org/vlm", f"mmproj-{name}-F16.gguf")
    assert find_model("org/vlm/large-Q8_0") == [large, large.with_name("mmproj-large-F16.gguf")]
    assert find_model("org/vlm/small-Q8_0") == [small, small.with_name("mmproj-small-F16.gguf")]


def test_names_with_the_address_that_they_came_from(home):
    _, digest = blob(home, "a")
    manifest(home, "gemma3", [{"mediaType": MODEL, "digest": digest}], tag="4b")
    model = hub(home, "org/repo", "m-Q8_0.gguf")
    for name in ("hf.co/org/repo", "https://huggingface.co/org/repo:Q8_0", "HF.co/org/repo/m-Q8_0.gguf"):
        assert find_model(name) == model
    for name in ("ollama.com/library/gemma3:4b", "https://ollama.com/library/gemma3:4b", "library/gemma3:4b"):
        assert find_model(name).name == digest.replace(":", "-")


def test_not_found_says_where_was_searched_and_what_is_close(home, monkeypatch):
    put(home / "mine/smollm2-135m.gguf")
    monkeypatch.setenv("PYENGINE_MODELS", str(home / "mine"))
    with pytest.raises(ModelNotFoundError) as error:
        find_model("smolm2-135m")
    assert str(home / "mine") in str(error.value) and "near: smollm2-135m" in str(error.value)


def test_the_beginning_of_one_name_is_enough(home, monkeypatch):
    mine = put(home / "mine/smollm2-135m-q4_1.gguf")
    put(home / "mine/gemma3-270m-Q4_K_M.gguf")
    monkeypatch.setenv("PYENGINE_MODELS", str(home / "mine"))
    small, large = hub(home, "org/qwen-GGUF", "qwen-Q4_K_M.gguf"), hub(home, "org/qwen-GGUF", "qwen-Q8_0.gguf")
    assert find_model("smol") == find_model("SMOLLM2") == mine
    assert find_model("org/qw") == find_model("qwe") == small and find_model("org/qwen-GGUF:Q8") == large
    hub(home, "org/smollm2-135m-q4_1", "x-Q8_0.gguf")                # found by the file in the earlier place all the same
    assert find_model("smollm2-135m-q4_1") == mine
    put(home / "mine/smolvlm-Q4_K_M.gguf")
    with pytest.raises(ModelNotFoundError, match="'smol' begins the names of 2 models; choose one of: smollm2-135m-q4_1, smolvlm-Q4_K_M"):
        find_model("smol")
    with pytest.raises(ModelNotFoundError) as error:
        find_model("smolm2-135m-q4_1")
    assert "near: smollm2-135m-q4_1" in str(error.value) and ".gguf" not in str(error.value).split("near")[1]


@pytest.mark.parametrize("name", ["absent.gguf", "a/b/c.gguf", "nul\0byte", "x" * 5000, "", "../../.."])
def test_strange_names_are_not_found(home, name):
    with pytest.raises(ModelNotFoundError):
        find_model(name)
