"""Each reader on damaged inputs, a few seconds each and always the same ones; `make fuzz` goes on for as long as one likes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import fuzzing
import pytest
import targets
from corpus import checkpoint, model_specs

import pyengine as pe
from converters import convert
from pyengine.errors import InvalidModelError
from pyengine.native import engine

SECONDS, RUNS = 7, 1000


@pytest.mark.parametrize("name", targets.TARGETS)
def test_damaged_inputs_are_read_or_refused(name: str, tmp_path: Path) -> None:
    total = fuzzing.fuzz(name, SECONDS, seed=1, runs=RUNS, folder=tmp_path)
    assert not total["found"], "\n\n".join(p.read_text() for p in sorted(tmp_path.rglob("*.txt")))[-6000:]
    assert total["runs"] and (name == "vocabulary" or total["refused"])


class Faulty(targets.Target):
    """Is wrong in every way, by the first letter of the input."""

    name = "faulty"
    seconds = 0.5
    right = False

    @property
    def seeds(self) -> list[bytes]:
        return [b"fine"]

    def spoilt(self, rng: Random, data: bytes) -> bytes:
        return bytes([rng.choice(b"vscm")])

    def run(self, data: bytes) -> None:
        if data == b"v":
            raise ValueError("foreign")
        if data == b"s":
            end = time.process_time() + 0.7
            while time.process_time() < end:
                pass
        if data == b"m":
            bytearray(8 << 30)
        if data == b"c":
            import ctypes

            ctypes.string_at(0)


@pytest.mark.skipif(getattr(engine, "SANITIZED", False), reason="the sanitizers take all addresses, so there is no limit of memory")
def test_what_is_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A foreign exception, a slow input, one that takes memory, and one that ends the process."""
    program = tmp_path / "faulty.py"
    program.write_text("import sys\nsys.path[:0] = sys.argv.pop(1).split(':')\nimport targets, fuzzing, test_fuzz\ntargets.TARGETS['faulty'] = test_fuzz.Faulty\n"
                       "sys.exit(fuzzing.main())\n")
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **more: real(
        [command[0], str(program), ":".join(sys.path), *command[2:]] if command[1] == fuzzing.__file__ else command, **more))
    total = fuzzing.fuzz("faulty", 40, seed=1, runs=10, folder=tmp_path)
    kinds = {place.partition("-")[0] for place in total["found"]}
    assert kinds == {"ValueError", "Slow", "MemoryError", "Died"}, total
    assert total["runs"] == 10
    for place in total["found"]:
        assert (tmp_path / "faulty" / f"{place}.input").read_bytes() in (b"v", b"s", b"m", b"c")


def test_an_input_is_the_same_each_time() -> None:
    target = targets.Gguf()
    again = [target.spoilt(Random("1 2"), target.seeds[0]) for _ in range(2)]
    assert again[0] == again[1] != target.seeds[0]


# ---- what was found -----------------------------------------------------------------------------------------------------------------


def folder_of(path: Path, files: dict[str, Any]) -> Path:
    path.mkdir()
    for name, value in files.items():
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        if name == "safetensors":
            raw, name = len(raw).to_bytes(8, "little") + raw + bytes(40_000), "model.safetensors"
        (path / name).write_bytes(raw)
    return path


DEEP = b"[" * 100_000


@pytest.mark.parametrize(("file", "change"), [
    *((name, DEEP) for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "safetensors", "special_tokens_map.json")),
    ("tokenizer_config.json", {"chat_template": 3}), ("tokenizer_config.json", {"chat_template": ["x"]}), ("tokenizer_config.json", {"chat_template": {"a": 1}}),
    ("tokenizer_config.json", {"chat_template": [{"name": 1, "template": "x"}]}), ("generation_config.json", {"eos_token_id": [1, "x"]}),
    ("generation_config.json", {"eos_token_id": [1, 10**6]}), ("config.json", {"bos_token_id": None, "eos_token_id": ["x"]})])
def test_checkpoints_with_wrong_values(tmp_path: Path, file: str, change: Any) -> None:
    files = checkpoint()
    files[file] = change if isinstance(change, bytes) else {**files[file], **change}
    if change == {"bos_token_id": None, "eos_token_id": ["x"]}:
        del files["generation_config.json"]
    with pytest.raises(InvalidModelError):
        convert(folder_of(tmp_path / "hf", files), tmp_path / "out.gguf")


def test_the_right_inputs_are_right(tmp_path: Path) -> None:
    """Else nothing behind the first check is tried."""
    path = convert(folder_of(tmp_path / "hf", checkpoint()), tmp_path / "out.gguf")
    assert pe.load(path, n_ctx=32, n_threads=1).generate("hello", max_tokens=2, temperature=0).n_prompt
    for i, spec in enumerate(model_specs()):
        model = tmp_path / f"{i}.gguf"
        model.write_bytes(spec.write())
        assert pe.load(model, n_ctx=32, n_threads=1).logits([1, 2, 3]).shape[0] == 3
