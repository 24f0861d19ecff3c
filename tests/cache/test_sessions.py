"""Conversations in files: exact when they come back, refused when anything about them is wrong."""

from __future__ import annotations

import os
import struct
import threading
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cases
import pyengine as pe
from pyengine.cache import sessions
from pyengine.errors import ContextOverflowError, PlanError, PyEngineError, RequestError, SessionError

IDS = np.random.default_rng(5).integers(0, 300, 200).tolist()
SETTINGS: dict[str, Any] = {"n_ctx": 256, "n_batch": 32, "n_seq": 2}
NOTES = b"\x00what was said"
KINDS = cases.kinds(own_cache=True)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (50, 70, 3), dtype=np.uint8))


def prompt(kind: str, *tail: int) -> list[Any]:
    seen = [picture(1), 8, picture(2)] if cases.find(kind).sees else []
    return [*IDS[:90], *seen, *IDS[90:100], *tail]


def ask(model: pe.Model, parts: list[Any], n: int = 8) -> Any:
    never = tuple((i, -1e9) for i in model.tokenizer.eog_ids)
    return model.generate(parts, max_tokens=n, temperature=0.7, seed=1, logit_bias=never)


@pytest.mark.parametrize(("kind", "kv_dtype"), [*((k, "f16") for k in KINDS), ("llama", "bf16"), ("gemma3", "f32"), ("gemma3", "q8_0"),
                                                ("gemma3_text", "q8_0/f16"), ("gemma3_text", "q4_0")])
def test_what_comes_back_is_what_was_saved(tiny_gguf, tmp_path, kind: str, kv_dtype: str) -> None:
    path = tiny_gguf(kind)[0]
    model = pe.load(path, kv_dtype=kv_dtype, **SETTINGS)
    first = ask(model, prompt(kind))
    nbytes = model.save(tmp_path / "a", first)
    assert nbytes == (tmp_path / "a").stat().st_size and os.listdir(tmp_path) == ["a"]
    longer = [*prompt(kind), *first.tokens, 3, 4, 5]
    on = ask(model, longer)
    for settings in ({}, {"n_ctx": 300, "n_batch": 7, "n_seq": 1}):              # another size of everything
        other = pe.load(path, **{**SETTINGS, **settings}, kv_dtype=kv_dtype)
        ask(other, IDS[100:150])
        n = other.restore(tmp_path / "a")
        assert n == on.n_cached == first.n_prompt + 7
        again = ask(other, longer)
        assert again.n_cached == n and again.tokens == on.tokens
        assert [x.logprob for x in again.sampled] == [x.logprob for x in on.sampled]
        other.reset()
        other.restore(tmp_path / "a")
        assert len(other._runner.cells.conversations[0].media) == (2 if cases.find(kind).sees else 0)
        other.save(tmp_path / "b")
        assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_a_window_is_all_that_sliding_layers_save(tiny_gguf, tmp_path) -> None:
    """7 layers, of which 6 slide by a window of 6: 5 tokens are seen later."""
    model = pe.load(tiny_gguf("gemma3_text")[0], **SETTINGS)
    nbytes = [model.save(tmp_path / "a", ask(model, IDS[:n], 1)) for n in (50, 51)]
    cell = 2 * 2 * 32 * 2                                    # keys and values of 2 heads of 32 in F16
    assert nbytes[1] - nbytes[0] == 8 + cell                 # a key and a cell of the one layer that sees everything
    head = sessions.HEADER.size + 50 * 8
    assert nbytes[0] == head + (50 + 6 * 5) * cell + (3 + 2 * 7) * sessions.SUM


def test_which_conversation(tiny_gguf, tmp_path) -> None:
    model = pe.load(tiny_gguf("llama")[0], **SETTINGS)
    with pytest.raises(RequestError, match="not in the caches"):
        model.save(tmp_path / "a")
    a, b = ask(model, IDS[:40]), ask(model, IDS[50:80])
    model.save(tmp_path / "last")
    model.save(tmp_path / "a", a)
    stream = model.stream([*IDS[50:80], *b.tokens, 7], max_tokens=5)
    next(stream)
    model.save(tmp_path / "running", stream)
    with pytest.raises(RequestError, match="not in the caches"):
        model.save(tmp_path / "b", b)                        # has gone on in the stream
    stream.close()
    model.reset()
    assert [model.restore(tmp_path / n) for n in ("last", "a")] == [37, 47]
    assert model.restore(tmp_path / "running") > 38
    assert model.generate(IDS[:40], max_tokens=1).n_cached == 39               # the oldest one went, not this
    with pytest.raises(RequestError):
        model.save(tmp_path / "a", a)


def test_an_interrupt_when_it_is_saved(tiny_gguf, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is there, and the interrupt is no failure to write it."""
    model = pe.load(tiny_gguf("llama")[0], **SETTINGS)
    ask(model, IDS[:40])

    def replace(a: str, b: str, real=os.replace) -> None:
        real(a, b)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", replace)
        model.save(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"] and model.restore(tmp_path / "a") == 47


def test_into_a_pipe(tiny_gguf, tmp_path) -> None:
    model = pe.load(tiny_gguf("llama")[0], **SETTINGS)
    ask(model, IDS[:40])
    nbytes = model.save(tmp_path / "a")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SessionError, match="No such device"):                   # nobody reads
        model.save(tmp_path / "pipe")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    while reader.is_alive():
        try:
            assert model.save(tmp_path / "pipe") == nbytes
            break
        except SessionError:                                 # the reader is on its way
            pass
    reader.join()
    assert (tmp_path / "pipe").is_fifo() and got == [(tmp_path / "a").read_bytes()]


def test_refused_in_words(tiny_gguf, tmp_path) -> None:
    path = tiny_gguf("llama", head_dim=32)[0]
    model = pe.load(path, **SETTINGS)
    ask(model, IDS[:100])
    model.save(tmp_path / "a")
    for other, error, text in [
        (pe.load(tiny_gguf("qwen2_5_vl")[0], **SETTINGS), SessionError, "another model"),
        (pe.load(tiny_gguf("llama", "f16", head_dim=32)[0], **SETTINGS), SessionError, "another model"),
        (pe.load(path, **SETTINGS, kv_dtype="q8_0"), SessionError, "formats F16/F16, this model's Q8_0/Q8_0"),
        (pe.load(path, n_ctx=64), ContextOverflowError, "has 107 tokens, but the context holds 64"),
    ]:
        with pytest.raises(error, match=text):
            other.restore(tmp_path / "a")
        assert not other._runner.cells.conversations
    lone = pe.load(path, n_ctx=256)
    stream = lone.stream(IDS[:5], max_tokens=9)
    next(stream)
    with pytest.raises(PlanError, match="all 1 conversations are in use"):
        lone.restore(tmp_path / "a")
    stream.close()
    assert lone.restore(tmp_path / "a") == 107
    os.mkfifo(tmp_path / "pipe")
    for name, text in [("none", "No such file"), ("", "directory|regular"), ("pipe", "not a regular file"), ("\0", "cannot be read")]:
        with pytest.raises(SessionError, match=text):
            model.restore(f"{tmp_path}/{name}")
    with pytest.raises(SessionError, match="cannot be written"):
        model.save(tmp_path / "no folder" / "a")


def test_the_same_shape_with_other_weights_is_another_model(tiny_gguf, tmp_path) -> None:
    path = tiny_gguf("llama")[0]
    model = pe.load(path, **SETTINGS)
    ask(model, IDS[:30])
    model.save(tmp_path / "a")
    changed = bytearray(path.read_bytes())
    info = model.file.tensors["blk.1.attn_k.weight"]
    changed[info.offset : info.offset + info.nbytes] = np.random.default_rng(0).normal(size=info.n_elements).astype("<f4").tobytes()
    (tmp_path / "tuned.gguf").write_bytes(changed)
    with pytest.raises(SessionError, match="another model"):
        pe.load(tmp_path / "tuned.gguf", **SETTINGS).restore(tmp_path / "a")


@pytest.fixture(scope="module")
def saved(tiny_gguf, tmp_path_factory) -> tuple[pe.Model, bytes, Path]:
    model = pe.load(tiny_gguf("qwen2_5_vl")[0], **SETTINGS)
    ask(model, prompt("qwen2_5_vl"))
    path = tmp_path_factory.mktemp("session") / "a"
    model.save(path)
    return model, path.read_bytes(), path


def refused(saved: Any, data: bytes, text: str | None = None) -> None:
    """A hostile file is refused in words, and what is cached stays."""
    model, _, path = saved
    held = list(model._runner.cells.conversations)
    path.write_bytes(data)
    with pytest.raises(PyEngineError, match=text):
        model.restore(path)
    assert model._runner.cells.conversations == held


def test_every_cut_is_noticed(saved) -> None:
    data = saved[1]
    for n in [*range(0, 240, 7), len(data) // 2, len(data) - 1]:
        refused(saved, data[:n])
    refused(saved, data + b"x", "it is cut off or damaged")


def test_every_changed_byte_is_noticed(saved) -> None:
    data = saved[1]
    rng = np.random.default_rng(3)
    for at in [*range(0, 200, 3), *rng.integers(200, len(data), 60)]:
        changed = bytearray(data)
        changed[at] ^= 1 << int(rng.integers(8))
        refused(saved, bytes(changed))


def with_header(data: bytes, **fields: int) -> bytes:
    """The file with other numbers in its header, and the right sum over them."""
    names = ("magic", "version", "n", "position", "n_digests", "n_media", "k", "v", "model")
    values = dict(zip(names, sessions.HEADER.unpack(data[32 : 32 + sessions.HEADER.size])))
    header = sessions.HEADER.pack(*{**values, **fields}.values())
    return sha256(header).digest() + header + data[32 + len(header):]


def test_hostile_numbers(saved) -> None:
    data, most = saved[1], (1 << 32) - 1
    refused(saved, with_header(data, version=2), "has version 2, but only 3, 4 and 5 are read")
    for fields in ({"n": most}, {"n": 0}, {"n": 1}, {"n": 256}, {"n_digests": most}, {"n_digests": 50}, {"n_media": most}, {"n_media": 0},
                   {"position": most}, {"k": 99}, {"n": 200, "n_digests": 200, "n_media": 200}):
        refused(saved, with_header(data, **fields))
    start = 32 + sessions.HEADER.size + 32                                     # of the digests
    n, n_digests, n_media = struct.unpack_from("<I4xII", data, 32 + 12)
    at = start + 32 * (n_digests + n_media) + 32                               # of the keys
    for value in (-1 << 31, -1 - n_digests, (1 << 31) - 1, 512 * 1000):
        keys = bytearray(data[at : at + 8 * n])
        struct.pack_into("<i", keys, 0, value)
        refused(saved, data[: at - 32] + sha256(keys).digest() + keys + data[at + len(keys):], "tokens or pictures that are not there")


@pytest.fixture(scope="module")
def noted(saved, tmp_path_factory) -> tuple[pe.Model, bytes, Path]:
    """As `saved`, with notes."""
    path = tmp_path_factory.mktemp("noted") / "a"
    saved[0].restore(saved[2]) if saved[2].read_bytes() == saved[1] else None
    saved[0].save(path, notes=NOTES)
    return saved[0], path.read_bytes(), path


def test_notes_come_back_and_nothing_else_changes(noted, saved, tmp_path) -> None:
    model, data, _ = noted
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "plain").write_bytes(saved[1])
    assert sessions.read_notes(tmp_path / "a") == NOTES and sessions.read_notes(tmp_path / "plain") == b""
    model.reset()
    n = model.restore(tmp_path / "a")
    model.save(tmp_path / "b", notes=NOTES)
    model.save(tmp_path / "c")
    assert (tmp_path / "b").read_bytes() == data and (tmp_path / "c").read_bytes() == saved[1]
    assert n == model.restore(tmp_path / "c")


def test_damaged_notes_are_noticed(noted) -> None:
    data, size, rng = noted[1], sessions.HEADER.size, np.random.default_rng(4)
    for n in (size, 32 + size, 36 + size, 36 + size + 32, 36 + size + 32 + len(NOTES) - 1, len(data) - 1):
        refused(noted, data[:n])
    for at in [*range(32, 32 + size + 4, 5), *range(32 + size, 36 + size + 32 + len(NOTES))]:
        changed = bytearray(data)
        changed[at] ^= 1 << int(rng.integers(8))
        refused(noted, bytes(changed))
    for n in (0, len(NOTES) + 1, len(data), (1 << 32) - 1):
        header = data[32 : 32 + size] + n.to_bytes(4, "little")
        refused(noted, sha256(header).digest() + header + data[36 + size :])
        with pytest.raises(SessionError):
            sessions.read_notes(noted[2])
    refused(noted, with_header(data, version=3))


def test_hostile_encoder_rows(tiny_gguf, tmp_path) -> None:
    """How many rows a picture has that is seen across."""
    model = pe.load(tiny_gguf("mllama")[0], **SETTINGS)
    ask(model, prompt("mllama"))                             # pictures are tokens 90 and 92, of 40 rows each
    model.save(tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    n, n_digests, n_media = struct.unpack_from("<I4xII", data, 32 + 12)
    at = 32 + sessions.HEADER.size + 32 + 32 * (n_digests + n_media) + 32
    keys = np.frombuffer(data[at : at + 8 * n], "<i4").reshape(n, 2)
    assert keys[[90, 91, 92], 1].tolist() == [-40, 0, -40] and keys[[90, 92], 0].max() < 0
    held = (model, data, tmp_path / "a")
    for token, rows, error in ((90, 0, "bytes, but"), (90, -39, "bytes, but"), (91, -40, "not there"), (90, 40, "bytes, but"),
                               (92, -(1 << 31), "encoder rows, but a conversation holds"), (0, 5, "not there")):
        changed = keys.copy()
        changed[token, 1] = rows
        section = changed.tobytes()
        refused(held, data[: at - 32] + sha256(section).digest() + section + data[at + 8 * n :], error)


def test_an_interrupted_save_leaves_the_file_that_was_there(saved, monkeypatch) -> None:
    model, _, path = saved
    path.write_bytes(b"before")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SessionError, match="No space left"):
        model.save(path)
    assert path.read_bytes() == b"before" and os.listdir(path.parent) == [path.name]
