"""Models are fetched whole and checked, from servers of this file's own that play Hugging Face and Ollama's registry, well or badly."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from filelock import FileLock
from servers import COMMIT, cut, LAYER, Page, Server, sha256, status, trickle

from pyengine.errors import DownloadError, RequestError
from pyengine.files.stores import find_model, list_models, look_up, MAX_MANIFEST_BYTES, read_modelfile
from pyengine.pull import download, find, hub, offer, web
from pyengine.pull.names import HubName, parse, RegistryName

BIG = bytes(range(256)) * 2048                     # 512 KiB
REPO = "org/vlm-GGUF"


@pytest.fixture
def server(remote):
    return remote


def pull(name: str) -> offer.Offer:
    found = find(name)
    offer.fetch(found)
    return found


def hub_blobs(home: Path) -> set[str]:
    return {p.name for p in home.glob(".cache/huggingface/hub/*/blobs/*")}


# -- names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, means", [
    ("hf.co/org/repo", HubName("org/repo")),
    ("https://huggingface.co/org/repo:Q8_0", HubName("org/repo", "Q8_0")),
    ("org/repo", HubName("org/repo")),
    ("org/repo:iq2_xs", HubName("org/repo", "iq2_xs")),
    ("hf.co/org/repo:latest", HubName("org/repo")),
    ("org/repo/sub/a.gguf", HubName("org/repo", "", "sub/a.gguf")),
    ("https://huggingface.co/org/repo/blob/main/a-Q4_0.gguf", HubName("org/repo", "", "a-Q4_0.gguf")),
    ("https://huggingface.co/org/repo/resolve/v1/a.gguf?download=true", HubName("org/repo", "", "a.gguf", "v1")),
    ("gemma3", RegistryName("registry.ollama.ai", "library", "gemma3", "latest")),
    ("gemma3:4b-it-q4_K_M", RegistryName("registry.ollama.ai", "library", "gemma3", "4b-it-q4_K_M")),
    ("library/gemma3", RegistryName("registry.ollama.ai", "library", "gemma3", "latest")),
    ("https://ollama.com/library/gemma3:4b", RegistryName("registry.ollama.ai", "library", "gemma3", "4b")),
    ("ollama.com/user/x", RegistryName("registry.ollama.ai", "user", "x", "latest")),
    ("user/x:8b", RegistryName("registry.ollama.ai", "user", "x", "8b")),
    ("registry.example.org/team/x:1", RegistryName("registry.example.org", "team", "x", "1")),
    ("http://localhost:5000/team/x", RegistryName("localhost:5000", "team", "x", "latest", "http")),
])
def test_names(name, means):
    assert parse(name) == means


@pytest.mark.parametrize("name", ["", "/", "./x", "../x", "a b", "~/x", "models/x.gguf", "x.gguf", "org/..", "hf.co/../..", "hf.co/org/repo:../x",
                                  "hf.co/org/repo/../../x.gguf", "x:..", "ollama.com/library/..:x", "ftp://hf.co/a/b", "file:///etc/passwd",
                                  "hf.co/org", "hf.co/org/repo/readme.md", "a/b/c", "hf.co/org/repo/%2e%2e/x.gguf", "x\ny", "x:y:z", "é/x"])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(RequestError, match="names no model"):
        parse(name)


# -- Hugging Face ---------------------------------------------------------------------------------------------------------


def test_the_usual_quantization_and_its_projector_are_fetched_into_the_cache_of_the_hub_s_client(server, tmp_path):
    server.repository(REPO, {"README.md": b"#", "vlm-Q8_0.gguf": b"8" * 99, "vlm-Q4_K_M.gguf": BIG, "vlm-imatrix.gguf": b"i",
                             "mmproj-BF16.gguf": b"b", "mmproj-F16.gguf": b"f" * 50})
    seen = []
    found = find(f"hf.co/{REPO}")
    offer.fetch(found, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(BIG) + 50, len(BIG) + 50) and seen == sorted(seen)
    assert found.name == f"{REPO}:Q4_K_M" and not found.notes
    model, projector = find_model(found.name)
    assert model.read_bytes() == BIG and projector.read_bytes() == b"f" * 50
    cached = huggingface_hub.try_to_load_from_cache(REPO, "vlm-Q4_K_M.gguf", cache_dir=tmp_path / ".cache/huggingface/hub")
    assert cached == str(model)
    repo, = huggingface_hub.scan_cache_dir(tmp_path / ".cache/huggingface/hub").repos
    assert repo.repo_id == REPO and repo.size_on_disk == len(BIG) + 50
    assert hub_blobs(tmp_path) == {sha256(BIG), sha256(b"f" * 50)}                 # no locks, nothing incomplete
    for name in (REPO, f"hf.co/{REPO}", f"https://huggingface.co/{REPO}", f"{REPO}:q4_k_m", f"hf.co/{REPO}:Q4_K_M"):
        assert find_model(name) == [model, projector]
    server.seen.clear()
    pull(REPO)
    assert not [s for s in server.seen if s.method == "GET" and "resolve" in s.path]       # all of it is there


@pytest.mark.parametrize("there, chosen", [
    (["Q8_0", "Q4_K_S", "Q4_0"], "Q4_K_S"), (["Q8_0", "Q5_K_M", "Q3_K_M"], "Q5_K_M"), (["F16", "Q8_0"], "Q8_0"), (["F16", "Q3_K_S"], "Q3_K_S"),
    (["Q2_K", "IQ1_S", "BF16"], "BF16"), (["UD-Q4_K_XL", "IQ4_XS", "Q6_K"], "UD-Q4_K_XL"), (["IQ4_NL", "Q4_0"], "Q4_0"), (["MXFP4", "BF16"], "MXFP4"),
])
def test_the_nearest_quantization_is_taken_and_said(server, there, chosen):
    server.repository(REPO, {f"m-{tag}.gguf": tag.encode() for tag in there})
    found = find(REPO)
    assert [f.name for f in found.model] == [f"m-{chosen}.gguf"]
    assert "Q4_K_M is not there" in found.notes[0] and all(tag in found.notes[0] for tag in there)


def test_a_quantization_that_is_not_there_is_an_error_that_lists_them(server):
    server.repository(REPO, {"m-Q8_0.gguf": BIG, "m-Q5_K_M.gguf": BIG})
    with pytest.raises(DownloadError, match=r"has no Q4_0 among its models: Q5_K_M \(0.5 MiB\), Q8_0 \(0.5 MiB\)"):
        find(f"{REPO}:Q4_0")
    with pytest.raises(DownloadError, match="has no other.gguf among"):
        find(f"{REPO}/other.gguf")
    assert find(f"{REPO}:q8_0").name == f"{REPO}:Q8_0"


def test_several_models_of_one_quantization_are_chosen_by_their_file(server):
    server.repository(REPO, {"one-Q4_K_M.gguf": b"1", "two-Q4_K_M.gguf": b"2"})
    with pytest.raises(DownloadError, match=f"choose one by its file: {REPO}/one-Q4_K_M.gguf, {REPO}/two-Q4_K_M.gguf"):
        find(REPO)
    found = pull(f"{REPO}/two-Q4_K_M.gguf")
    assert find_model(found.name).read_bytes() == b"2"


def test_a_repository_without_gguf_says_so(server):
    server.repository(REPO, {"model.safetensors": b"x", "mmproj-F16.gguf": b"f"})
    with pytest.raises(DownloadError, match="has no GGUF files"):
        find(REPO)


def test_all_parts_of_a_split_model_are_fetched_from_its_folder_and_the_projector_from_the_top(server):
    parts = {f"Q4_K_M/big-Q4_K_M-0000{i}-of-00003.gguf": b"%d" % i * 1000 for i in (1, 2, 3)}
    server.repository(REPO, {**parts, "Q8_0/big-Q8_0-00001-of-00002.gguf": b"x", "mmproj-F16.gguf": b"f"})
    found = pull(REPO)
    assert [f.name for f in found.model] == list(parts) and not found.notes               # of the other one a part is missing
    first, projector = find_model(found.name)
    assert [first.with_name(Path(p).name).read_bytes() for p in parts] == list(parts.values())
    assert projector.read_bytes() == b"f" and look_up(found.name).nbytes == 3001


def test_an_interrupted_download_goes_on_from_where_it_was(server, tmp_path, monkeypatch):
    server.repository(REPO, {"m-Q4_K_M.gguf": BIG})
    path = f"/{REPO}/resolve/{COMMIT}/m-Q4_K_M.gguf"
    monkeypatch.setattr(download, "RETRIES", 0)
    server.faults[path] = [cut(100_000)]
    with pytest.raises(DownloadError, match="100000 of 524288 bytes are there, and the same command goes on from them"):
        pull(REPO)
    assert list_models() == [] and find(REPO).n_missing == len(BIG) - 100_000
    found = pull(REPO)
    assert [s.headers["Range"] for s in server.asked(path)] == ["bytes=0-524287", "bytes=100000-524287"]
    assert find_model(found.name).read_bytes() == BIG and hub_blobs(tmp_path) == {sha256(BIG)}


def test_a_connection_that_ends_is_made_again(server):
    server.repository(REPO, {"m-Q4_K_M.gguf": BIG})
    path = f"/{REPO}/resolve/{COMMIT}/m-Q4_K_M.gguf"
    server.faults[path] = [cut(1000), status(503), cut(0), status(429), cut(200_000)]
    assert find_model(pull(REPO).name).read_bytes() == BIG
    assert len(server.asked(path)) == 6


def test_a_server_that_brings_nothing_is_given_up(server):
    server.repository(REPO, {"m-Q4_K_M.gguf": BIG})
    path = f"/{REPO}/resolve/{COMMIT}/m-Q4_K_M.gguf"
    server.faults[path] = [cut(10)] * 99
    with pytest.raises(DownloadError, match="ended early; 60 of 524288"):
        pull(REPO)
    assert len(server.asked(path)) == download.RETRIES + 1


def test_long_files_are_asked_for_in_pieces(server, monkeypatch):
    monkeypatch.setattr(download, "RANGE_BYTES", 200_000)
    server.repository(REPO, {"m-Q4_K_M.gguf": BIG})
    assert find_model(pull(REPO).name).read_bytes() == BIG
    assert len(server.asked(f"/{REPO}/resolve/{COMMIT}/m-Q4_K_M.gguf")) == 3


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("there", [b"of another model", BIG[:7], BIG + b"more", BIG[:-1] + b"!"])
def test_what_was_there_of_it_is_not_trusted(server, ranges, there):
    server.repository(REPO, {"m-Q4_K_M.gguf": BIG})
    server.pages[f"/{REPO}/resolve/{COMMIT}/m-Q4_K_M.gguf"].ranges = ranges
    file, = find(REPO).model
    file.path.parent.mkdir(parents=True)
    file.partial.write_bytes(there)
    assert find_model(pull(REPO).name).read_bytes() == BIG


def test_a_wrong_digest_leaves_nothing(server, tmp_path):
    server.repository(REPO, {"m-Q4_K_M.gguf": BIG})
    server.pages[f"/{REPO}/resolve/{COMMIT}/m-Q4_K_M.gguf"].content = b"!" + BIG[1:]
    with pytest.raises(DownloadError, match=f"has the digest sha256:.*, not sha256:{sha256(BIG)}: it is deleted"):
        pull(REPO)
    assert hub_blobs(tmp_path) == set() and list_models() == []


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("content", [BIG[:-1], BIG + b"x"])
def test_another_size_than_announced_is_refused(server, ranges, content):
    server.repository(REPO, {"m-Q4_K_M.gguf": BIG})
    page = server.pages[f"/{REPO}/resolve/{COMMIT}/m-Q4_K_M.gguf"]
    page.content, page.ranges = content, ranges
    with pytest.raises(DownloadError, match=f"has {len(content)} bytes of it, where {len(BIG)} were announced"):
        pull(REPO)
    assert list_models() == []


def test_a_small_file_is_checked_by_git_s_own_digest(server):
    server.repository(REPO, {"m-Q4_K_M.gguf": b"small"})
    listing = json.loads(server.pages[f"/api/models/{REPO}"].content)
    del listing["siblings"][0]["lfs"]
    server.pages[f"/api/models/{REPO}"].content = json.dumps(listing).encode()
    page = server.pages[f"/{REPO}/resolve/{COMMIT}/m-Q4_K_M.gguf"]
    page.head = {**page.head, "ETag": '"' + "0" * 40 + '"'}
    with pytest.raises(DownloadError, match="digest git:"):
        pull(REPO)
    page.head = {**page.head, "ETag": f'"{git_blob(b"small")}"'}
    assert find_model(pull(REPO).name).read_bytes() == b"small"


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def test_a_mirror_that_lists_names_only_is_enough(server):
    server.repository(REPO, {"m-Q8_0.gguf": BIG})
    server.pages[f"/api/models/{REPO}"] = Page(json.dumps({"siblings": [{"rfilename": "m-Q8_0.gguf"}]}).encode())
    assert find_model(pull(REPO).name).read_bytes() == BIG


@pytest.mark.parametrize("name", ["../../x.gguf", "a/../../x.gguf", "/etc/x.gguf", "a//x.gguf", "..\\x.gguf", "C:x.gguf", "a\nb.gguf", "a" * 300 + ".gguf", "\ud800.gguf"])
def test_names_that_lead_elsewhere_are_refused(server, name):
    server.repository(REPO, {name: b"x"})
    with pytest.raises(DownloadError, match="which no folder could hold"):
        find(REPO)


@pytest.mark.parametrize("change", [{"ETag": '"../../../x"'}, {"ETag": '"' + "0" * 64 + '"'}, {"X-Repo-Commit": "../../x"}, {"X-Linked-Size": "7"},
                                    {"X-Linked-Size": "-7"}])
def test_a_hub_that_contradicts_itself_is_refused(server, tmp_path, change):
    server.repository(REPO, {"m-Q8_0.gguf": BIG})
    if "../" in next(iter(change.values())):                 # nothing else is said, so there is nothing to contradict
        server.pages[f"/api/models/{REPO}"] = Page(json.dumps({"siblings": [{"rfilename": "m-Q8_0.gguf"}]}).encode())
    for revision in ("main", COMMIT):
        page = server.pages[f"/{REPO}/resolve/{revision}/m-Q8_0.gguf"]
        page.head = {**page.head, **change}
    with pytest.raises(DownloadError, match="contradicts itself|names no digest"):
        find(REPO)
    assert not (tmp_path / ".cache").exists()


@pytest.mark.parametrize("content", [b"[]", b"not JSON", b"[" * 100_000, b'{"siblings": 7}', b'{"siblings": [], "sha": "../x"}', b'{"siblings": [], "sha": 7}'])
def test_a_listing_that_is_none_is_refused(server, content):
    server.pages[f"/api/models/{REPO}"] = Page(content)
    with pytest.raises(DownloadError, match="no list of its files|which is none|no list"):
        find(REPO)


def test_more_files_than_a_repository_has_are_refused(server, monkeypatch):
    monkeypatch.setattr(hub, "MAX_FILES", 3)
    server.repository(REPO, {f"{i}-Q8_0.gguf": b"%d" % i for i in range(4)})
    with pytest.raises(DownloadError, match="more than 3 GGUF files"):
        find(REPO)


def test_an_endless_listing_is_refused(server, monkeypatch):
    monkeypatch.setattr(hub, "MAX_LISTING_BYTES", 1000)
    server.pages[f"/api/models/{REPO}"] = Page(b" " * 1001)
    with pytest.raises(DownloadError, match="larger than 1000 bytes"):
        find(REPO)


def test_gated_private_and_absent_repositories_say_what_to_do(server, monkeypatch):
    server.repository(REPO, {"m-Q8_0.gguf": BIG})
    for path in list(server.pages):
        if "/resolve/" in path:
            server.pages[path] = Page(status=403, headers={"X-Error-Code": "GatedRepo"})
    with pytest.raises(DownloadError, match=f"is gated: accept its terms at {server.url}/{REPO}, and say who you are: `hf auth login`"):
        find(REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(DownloadError, match="with the account of your token"):
        find(REPO)
    assert {s.headers.get("Authorization") or s.headers.get("authorization") for s in server.seen[-2:]} == {"Bearer hf_secret"}
    with pytest.raises(DownloadError, match="there is no such repository, or it is private and your token does not open it"):
        find("org/absent")
    server.pages["/api/models/org/absent"] = Page(status=401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
    with pytest.raises(DownloadError, match="the token is not valid"):
        find("org/absent")


def test_the_token_goes_to_the_hub_only(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.repository(REPO, {"m-Q8_0.gguf": BIG})
    path = f"/{REPO}/resolve/{COMMIT}/m-Q8_0.gguf"
    with Server() as far:
        far.pages["/bytes"] = Page(BIG)
        old = server.pages[path]
        server.pages[path] = Page(status=302, headers={"Location": f"{far.url}/bytes?signature=1", **old.head, "X-Linked-Etag": old.head["ETag"]})
        assert find_model(pull(REPO).name).read_bytes() == BIG
        assert server.asked(path)[0].headers["Authorization"] == "Bearer hf_secret"
        assert [s.headers.get("Authorization") for s in far.seen] == [None] and far.seen[0].headers["Range"]


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x"])
def test_redirects_that_lead_elsewhere_are_refused(server, to):
    paths = server.model("library/x", {"model": BIG})
    server.pages[paths["model"]] = Page(status=302, headers={"Location": to})
    with pytest.raises(DownloadError, match="which is refused"):
        pull("x")


def test_redirects_in_a_circle_end(server):
    paths = server.model("library/x", {"model": BIG})
    server.pages[paths["model"]] = Page(status=302, headers={"Location": paths["model"]})
    with pytest.raises(DownloadError, match="302"):
        pull("x")


def test_no_room_is_said_before_anything_is_fetched(server, tmp_path, monkeypatch):
    server.repository(REPO, {"m-Q8_0.gguf": BIG})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, offer.SPARE_BYTES + len(BIG) - 1))
    with pytest.raises(DownloadError, match="0.5 MiB are to be fetched, and 64.5 MiB are free in"):
        pull(REPO)
    assert not (tmp_path / ".cache").exists()


def test_two_processes_do_not_fetch_one_file(server):
    server.repository(REPO, {"m-Q8_0.gguf": BIG})
    file, = find(REPO).model
    file.path.parent.mkdir(parents=True)
    with FileLock(str(file.partial) + ".lock"):
        with pytest.raises(DownloadError, match="another process is fetching it"):
            pull(REPO)
    pull(REPO)


def test_a_place_that_cannot_be_written_is_an_error(server, tmp_path, monkeypatch):
    server.model("library/x", {"model": BIG})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "file/models"))
    with pytest.raises(DownloadError, match="file"):
        pull("x")


def test_nobody_there_is_an_error(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OLLAMA_REGISTRY", "http://127.0.0.1:9")
    for name in (REPO, "x"):
        with pytest.raises(DownloadError, match="refused"):
            find(name)


# -- Ollama's registry ----------------------------------------------------------------------------------------------------


def test_a_model_of_ollama_s_is_laid_out_as_ollama_does(server, tmp_path):
    layers = {"model": BIG, "projector": b"p" * 99, "params": b'{"stop": ["x"]}', "system": b"Be kind.", "license": b"MIT"}
    paths = server.model("library/gemma3", layers, "4b")
    found = pull("gemma3:4b")
    assert found.name == "gemma3:4b"
    root = tmp_path / ".ollama/models"
    manifest = (root / "manifests/registry.ollama.ai/library/gemma3/4b").read_bytes()
    assert manifest == server.pages["/v2/library/gemma3/manifests/4b"].content
    assert {p.name for p in (root / "blobs").iterdir()} == {path.rpartition("/")[2].replace(":", "-") for path in paths.values()}
    for name in ("gemma3:4b", "ollama.com/library/gemma3:4b", "https://ollama.com/library/gemma3:4b", "library/gemma3:4b"):
        assert [p.read_bytes() for p in find_model(name)] == [BIG, b"p" * 99], name
    assert read_modelfile(look_up("gemma3:4b")).system == "Be kind."
    assert server.asked("/v2/library/gemma3/manifests/4b")[0].headers["Accept"] == "application/vnd.docker.distribution.manifest.v2+json"


def test_models_of_users_and_of_other_registries(server, monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT")                        # whose host is Hugging Face's, too
    server.model("user/x", {"model": b"1"}, "8b")
    assert pull("user/x:8b").name == "user/x:8b" and find_model("user/x:8b").read_bytes() == b"1"
    server.model("team/x", {"model": b"2"})
    found = pull(f"{server.url}/team/x")
    assert found.name == f"{server.url.removeprefix('http://')}/team/x:latest" and find_model(found.name).read_bytes() == b"2"


def test_a_model_s_blobs_are_resumed_and_its_manifest_comes_last(server, tmp_path, monkeypatch):
    paths = server.model("library/x", {"model": BIG, "license": b"MIT"})
    monkeypatch.setattr(download, "RETRIES", 0)
    server.faults[paths["model"]] = [cut(3000)]
    with pytest.raises(DownloadError, match="x:latest, model: .* 3000 of 524288 bytes are there"):
        pull("x")
    assert list_models() == [] and not (tmp_path / ".ollama/models/manifests").exists()
    pull("x")
    assert server.asked(paths["model"])[-1].headers["Range"] == "bytes=3000-524287" and len(server.asked(paths["license"])) == 1
    assert find_model("x").read_bytes() == BIG


@pytest.mark.parametrize("kind", ["model", "license", "config"])
def test_a_layer_of_another_digest_is_not_kept(server, tmp_path, kind):
    paths = server.model("library/x", {"model": BIG, "license": b"MIT"})
    page = server.pages[paths[kind]]
    page.content = b"!" + page.content[1:]
    with pytest.raises(DownloadError, match=f"x:latest, {kind}: .* it is deleted"):
        pull("x")
    assert paths[kind].rpartition(":")[2] not in " ".join(os.listdir(tmp_path / ".ollama/models/blobs"))
    assert not (tmp_path / ".ollama/models/manifests").exists()


@pytest.mark.parametrize("manifest, says", [
    (b"not JSON", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"{}", "no layer of a model; models that run elsewhere"),
    (b" " * (MAX_MANIFEST_BYTES + 1), "larger than"),
    ([{"mediaType": LAYER + "model", "digest": "sha256:../../x", "size": 1}], "is not sha256"),
    ([{"mediaType": LAYER + "model", "digest": "sha256:" + "a" * 64, "size": 1}, {"mediaType": "x", "digest": "../x", "size": 1}], "is not sha256"),
    ([{"mediaType": LAYER + "model", "digest": "sha256:" + "a" * 64, "size": 1}] * 2, "two layers of a model"),
    ([{"mediaType": LAYER + "model", "digest": "sha256:" + "a" * 64}], "no size of a layer"),
    ([{"mediaType": LAYER + "model", "digest": "sha256:" + "a" * 64, "size": -1}], "no size of a layer"),
    ([{"mediaType": LAYER + "model", "digest": "sha256:" + "a" * 64, "size": 1 << 60}], "which may have"),
    ([{"mediaType": LAYER + "model", "digest": "sha256:" + "a" * 64, "size": 1},
      {"mediaType": LAYER + "license", "digest": "sha256:" + "b" * 64, "size": 1 << 30}], "license, which may have"),
    ([{"mediaType": LAYER + "model", "digest": "sha256:" + "a" * 64, "size": 1},
      *({"mediaType": LAYER + "license", "digest": f"sha256:{i:064}", "size": 1} for i in range(99))], "more than 64"),
])
def test_a_hostile_manifest_is_refused(server, tmp_path, manifest, says):
    content = manifest if isinstance(manifest, bytes) else json.dumps({"layers": manifest}).encode()
    server.pages["/v2/library/x/manifests/latest"] = Page(content)
    with pytest.raises(DownloadError, match=says):
        find("x")
    assert not (tmp_path / ".ollama").exists()


def test_a_manifest_that_is_cut_is_refused(server):
    server.model("library/x", {"model": BIG})
    server.faults["/v2/library/x/manifests/latest"] = [cut(100)]
    with pytest.raises(DownloadError, match="bytes too early"):
        find("x")


def test_what_the_registry_refuses(server, monkeypatch):
    with pytest.raises(DownloadError, match="x:9b: registry.ollama.ai has no such model or tag; https://ollama.com/library/x/tags lists"):
        find("x:9b")
    server.pages["/v2/user/x/manifests/1b"] = Page(status=401)
    with pytest.raises(DownloadError, match="`ollama pull user/x:1b`"):
        find("user/x:1b")
    monkeypatch.setenv("OLLAMA_REGISTRY", "file:///etc")
    with pytest.raises(DownloadError, match="no URL that begins with"):
        find("x:9b")


def test_an_answer_is_bounded_in_time(server, monkeypatch):
    server.pages["/x"] = Page(b"x" * 10)
    monkeypatch.setattr(web, "ANSWER_SECONDS", -1)
    with pytest.raises(DownloadError, match="takes longer"):
        web.read(f"{server.url}/x", {}, 100)


def test_a_trickle_is_no_connection(server, monkeypatch):
    paths = server.model("library/x", {"model": BIG})
    monkeypatch.setattr(download, "STALL_SECONDS", -1)
    monkeypatch.setattr(download, "STALL_BYTES", 1 << 30)
    server.faults[paths["model"]] = [trickle(10, 0.2)] * 99
    with pytest.raises(DownloadError, match="only 10 bytes came in"):
        pull("x")
    assert len(server.asked(paths["model"])) == download.RETRIES + 1


def test_a_host_that_cannot_be_reached_is_named(server, monkeypatch):
    import socket

    known = socket.getaddrinfo

    def unknown(host, *more, **named):
        if host == "127.0.0.1":
            return known(host, *more, **named)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    web._opener.cache_clear()
    try:
        with pytest.raises(web.Broken, match=r"no connection to models\.example \(Name or service not known\)$"):
            web.read("http://models.example/x?key=1", {}, 100)
        server.pages["/moved"] = Page(status=302, headers={"Location": "http://models.example/x"})
        with pytest.raises(web.Broken, match=r"127\.0\.0\.1:\d+/moved: no connection to models\.example "):
            web.read(f"{server.url}/moved", {}, 100)
    finally:
        web._opener.cache_clear()
