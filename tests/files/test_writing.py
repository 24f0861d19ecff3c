"""Files that are written whole or not at all, in the place of what was there, and what is no file and must not be replaced."""

from __future__ import annotations

import os
import pty
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pyengine.files import writing
from pyengine.files.writing import target_of, written


def write(path: Path, *parts: bytes, **how: bool) -> None:
    with written(path, **how) as file:
        for part in parts:
            file.write(part)


@pytest.mark.parametrize("lasting", [False, True])
def test_a_new_file_and_one_in_its_place(tmp_path: Path, lasting: bool) -> None:
    path, was = tmp_path / ("n" * 250), os.umask(0o027)
    try:
        write(path, b"one ", b"two", lasting=lasting)
        write(tmp_path / "private", b"x", private=True)
    finally:
        os.umask(was)
    assert path.read_bytes() == b"one two" and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600
    path.chmod(0o604)
    write(path, b"three", private=True)
    assert path.read_bytes() == b"three" and stat.S_IMODE(path.stat().st_mode) == 0o604
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, "private"])


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    """The error has the name that was given, not one of ours."""
    for what in (target_of, lambda path: write(path, b"x")):
        with pytest.raises(FileNotFoundError) as error:
            what(tmp_path / "none" / "a")
        assert error.value.filename == str(tmp_path / "none" / "a")


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_was_there_stays_until_the_new_one_is_whole(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(error):
        with written(path) as file:
            file.write(b"new")
            assert path.read_bytes() == b"old"
            raise error
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_an_interrupt_when_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised as what it is, and the file is there."""
    def replace(a: str, b: str, real=os.replace) -> None:
        real(a, b)
        raise KeyboardInterrupt

    monkeypatch.setattr(writing.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.symlink("folder/real", tmp_path / "middle")
    os.symlink(tmp_path / "middle", tmp_path / "link")
    for text in (b"one", b"two"):                            # where there is nothing yet, and in place of something
        write(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "real").read_bytes() == text
    assert target_of(tmp_path / "link") == (tmp_path / "folder" / "real").resolve() and os.listdir(tmp_path / "folder") == ["real"]
    os.symlink("loop", tmp_path / "loop")
    with pytest.raises(OSError):
        write(tmp_path / "loop", b"x")


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="No such device"):     # nobody reads
        write(pipe, b"x")
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    while not got:
        try:
            write(pipe, b"a" * 200_000, b"b")                # more than a pipe holds
            break
        except OSError:                                      # the reader is on its way
            pass
    reader.join()
    assert got == [b"a" * 200_000 + b"b"] and pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]
    with pytest.raises(OSError, match="pipe or a device"):
        target_of(pipe)


def test_a_device_is_written_into(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    name = os.ttyname(slave)
    os.symlink(name, tmp_path / "link")
    for path in (Path(name), tmp_path / "link"):
        write(path, b"seen")
        assert os.read(master, 100) == b"seen" and stat.S_ISCHR(os.stat(name).st_mode)
    os.close(master)
    os.close(slave)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="Linux")
def test_what_the_process_has_open_is_written_into(tmp_path: Path, name: str) -> None:
    """Standard output that goes into a file: what it said before and says afterwards stays around it."""
    code = f"""import os
from pyengine.files.writing import written
os.write(1, b"before ")
with written({name!r}) as file: file.write(b"middle")
os.lseek(1, 0, os.SEEK_END); os.write(1, b" after")"""
    with open(tmp_path / "out", "wb") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True, timeout=60)
    assert (tmp_path / "out").read_bytes() == b"before middle after"
    done = subprocess.run([sys.executable, "-c", code.replace("os.lseek", "0 and os.lseek")], stdout=subprocess.PIPE, check=True, timeout=60)
    assert done.stdout == b"before middle after"


def test_folders_and_missing_ones_are_refused(tmp_path: Path) -> None:
    for path, error in ((tmp_path, IsADirectoryError), (tmp_path / "none" / "a", FileNotFoundError), ("a\0b", ValueError)):
        with pytest.raises(error):
            write(path, b"x")
    assert os.listdir(tmp_path) == []


def test_an_interrupt_of_a_process_that_writes(tmp_path: Path) -> None:
    code = f"""from pyengine.files.writing import written
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)     # which a shell takes from what runs in its background
with written({str(tmp_path / "a")!r}) as file:
    file.write(b"x"); print("writing", flush=True); time.sleep(60)"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=60)[1] and os.listdir(tmp_path) == []
