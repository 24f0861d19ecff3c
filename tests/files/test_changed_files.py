"""Files that are cut, written over or replaced while they are open: what was copied stays, what is read says so, no process ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from pyengine.errors import InvalidModelError
from pyengine.files import mapped
from pyengine.files.gguf import GGUFFile

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows does not let mapped files be cut")

VALUES = np.arange(1 << 18, dtype=np.float32)                # 1 MiB
# What uses a model after its file has changed; each says what became of it.
USES = """
import json, os, shutil, sys, pyengine as pe
path, what = sys.argv[1:]
m = pe.load(path, n_ctx=128, n_threads=2, mmap=what == "cut mapped")
before = pe.load_tokenizer(path).tokenize("The quick brown fox")
if what.startswith("cut"): os.truncate(path, 4096)
elif what == "written":
    size = os.path.getsize(path)
    with open(path, "r+b") as f: f.write(b"\\xff" * size)
else:
    shutil.copy(path, path + ".new"); os.replace(path + ".new", path)
def encode():
    from PIL import Image
    return m.encode_image(Image.new("RGB", (64, 64), "red")) is not None
uses = {"tokenize": lambda: m.tokenize("The quick brown fox") == before, "step": lambda: m.logits([1, 2, 3]) is not None,
        "encode": encode, "answer": lambda: m.generate("The", max_tokens=2) is not None,
        "save": lambda: bool(m.feed([1, 2]) is not None and m.save(path + ".session"))}
said = {}
for name, use in uses.items():
    try: said[name] = use()
    except (pe.errors.InvalidModelError, pe.errors.UnsupportedModelError) as error: said[name] = str(error)
print(json.dumps(said))
"""


def written(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("t.texts", [f"text {i}" for i in range(50_000)])
    writer.add_array("t.numbers", list(range(1000)))
    writer.add_tensor("t.weight", VALUES)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path / "m.gguf")


def check_metadata(file: GGUFFile) -> None:
    assert file.metadata["t.texts"] == [f"text {i}" for i in range(50_000)]
    assert file.metadata["t.numbers"].tolist() == list(range(1000)) and file.metadata.encoded("t.numbers")[:4] == struct.pack("<I", 9)


@pytest.mark.parametrize("to", [0, 100, 4096, 700_000])
def test_a_file_that_is_cut_reads_as_zeros_and_says_so(path: Path, to: int) -> None:
    file = GGUFFile(path)
    view = file.array("t.weight")
    file.check()
    os.truncate(path, to)
    end = (-(-to // 4096) * 4096 - file.tensors["t.weight"].offset) // 4
    assert (view[max(0, end):] == 0).all() and (view[:max(0, end) // 2] == VALUES[:max(0, end) // 2]).all()
    check_metadata(file)
    for _ in range(2):
        with pytest.raises(InvalidModelError, match=f"{path}: was cut"):
            file.check()
    with open(path, "ab") as again:                          # what came back is not known to be the same
        again.truncate(1 << 21)
    with pytest.raises(InvalidModelError, match="was cut"):
        file.check()


def test_a_cut_is_found_before_anything_is_read(path: Path) -> None:
    file, size = GGUFFile(path), path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(InvalidModelError, match=f"has {size - 1} bytes instead of {size} since it was opened"):
        file.check()


def test_a_file_that_is_written_over(path: Path) -> None:
    file, size = GGUFFile(path), path.stat().st_size
    with open(path, "r+b") as other:
        other.write(b"\xff" * size)
    check_metadata(file)
    with pytest.raises(InvalidModelError, match="was written to since it was opened"):
        file.check()


def test_a_file_that_is_replaced_stays_for_who_has_it_open(path: Path) -> None:
    file = GGUFFile(path)
    (path.parent / "other").write_bytes(b"something else")
    os.replace(path.parent / "other", path)
    file.check()
    check_metadata(file)
    assert (file.array("t.weight") == VALUES).all()
    os.unlink(path)
    file.check()


def test_arrays_outlive_their_file(path: Path) -> None:
    with GGUFFile(path) as file:
        view = file.array("t.weight")
    os.truncate(path, 4096)
    assert (view[4096:] == 0).all()                          # still watched
    file.check()                                             # a closed file has nothing to say


def test_any_number_of_files_one_after_the_other(path: Path) -> None:
    for _ in range(3000):                                    # more than are watched at once
        GGUFFile(path).close()
    file = GGUFFile(path)
    view = file.view("t.weight")
    os.truncate(path, 4096)
    assert not view[8192:].any()


def test_a_start_beyond_the_limit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "MOST_START", 1 << 19)
    with pytest.raises(InvalidModelError, match="keys and list of tensors take more than"):
        GGUFFile(path)


@pytest.mark.parametrize("handler", ["", "import faulthandler; faulthandler.enable()",
                                     "import signal; signal.signal(signal.SIGBUS, signal.SIG_IGN)"])
@pytest.mark.parametrize("after", [False, True])
def test_faults_elsewhere_end_the_process_as_ever(path: Path, handler: str, after: bool) -> None:
    """A mapping that is not ours, with and without another handler, which may come before ours or after."""
    other = path.parent / "other"
    other.write_bytes(bytes(1 << 16))
    lines = [handler, f"from pyengine.files.gguf import GGUFFile; f = GGUFFile({str(path)!r})"]
    code = "\n".join([*(reversed(lines) if after else lines), f"g = GGUFFile({str(path)!r})", "import mmap, os",
                      f"m = mmap.mmap(os.open({str(other)!r}, os.O_RDONLY), 1 << 16, access=mmap.ACCESS_READ)",
                      f"os.truncate({str(other)!r}, 0)", "m[9000]", "print('lives')"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGBUS and "lives" not in done.stdout
    assert ("Bus error" in done.stderr) == ("faulthandler" in handler)


@pytest.mark.parametrize("what", ["cut", "cut mapped", "written", "replaced"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_model_whose_file_changes(tiny_gguf, tmp_path: Path, kind: str, what: str) -> None:
    path = shutil.copy(tiny_gguf(kind)[0], tmp_path / "m.gguf")
    done = subprocess.run([sys.executable, "-c", USES, path, what], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr)
    said = json.loads(done.stdout)
    assert said["tokenize"] is True
    for name in ("step", "answer", "save"):
        wrong = what != "replaced" and (name == "save" or what == "cut mapped" or kind == "llama")          # llama's embedding is mapped
        assert (said[name] is not True) == wrong, (name, said)
    if kind == "gemma3":
        assert (said["encode"] is True) == (what == "replaced"), said
