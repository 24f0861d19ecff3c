"""What is installed: one top-level package, with the benchmarks and the converters inside of it, run by their names there; and what
the packages hold that it is installed from."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from conftest import ROOT

import pyengine

pytest.importorskip("setuptools", reason="needs setuptools: pip install -r requirements/build.txt")
pytest.importorskip("pybind11", reason="needs pybind11: pip install -r requirements/build.txt")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the Python files that a wheel has, and the extension that is built here."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for path in [*(ROOT / "pyengine").glob("_engine*"), ROOT / "pyengine" / "_abi.py"]:
        target = folder / "pyengine" / path.name
        if not target.exists():
            target.symlink_to(path)
    return folder


def run(installed: Path, *arguments: str) -> str:
    """Standard output of Python that finds that folder before the checkout, in a working folder that is neither."""
    work = installed / "work"
    work.mkdir(exist_ok=True)
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, *arguments], cwd=work, env=env, capture_output=True, text=True, check=True)
    return done.stdout


def test_one_name_is_installed(installed: Path) -> None:
    assert {p.name for p in installed.iterdir()} - {"work"} == {"pyengine"}
    for name in ("bench", "converters"):
        files = {p.relative_to(ROOT / name) for p in (ROOT / name).rglob("*.py")}
        assert {p.relative_to(installed / "pyengine" / name) for p in (installed / "pyengine" / name).rglob("*.py")} == files
    page = Path("pyengine", "server", "page_files")
    assert {p.name for p in (installed / page).iterdir()} == {p.name for p in (ROOT / page).iterdir()} >= {"index.html", "app.js"}


@pytest.mark.parametrize("module", ["converters", "converters.quantize", "converters.weights",
                                    "bench", "bench.worker", "bench.encoder_worker"])
def test_commands_have_the_name_that_they_are_run_by(installed: Path, module: str) -> None:
    assert run(installed, "-m", f"pyengine.{module}", "--help").startswith(f"usage: python -m pyengine.{module} ")


def test_converters_are_found_inside_of_pyengine(installed: Path) -> None:
    from converters import supported

    code = ("from pyengine import converters; from pyengine.bench import beside; assert beside.converters() is converters; "
            "print(converters.__file__, *converters.supported())")
    file, *found = run(installed, "-c", code).split()
    assert Path(file).is_relative_to(installed) and set(found) == set(supported())


def test_workers_run_from_any_folder_under_either_name(installed: Path) -> None:
    model = ROOT / "converters/demo/weights/demo-q8_0.gguf"
    code = ("import os, sys, {package}.engines as e; os.chdir('/')\n"
            "with e.Engine(e.OURS, sys.argv[1], 1) as engine: print(engine.n_vocab, engine.process.args[2])")
    inside = run(installed, "-c", code.format(package="pyengine.bench"), str(model)).split()
    command = [sys.executable, "-c", code.format(package="bench"), str(model)]
    beside = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert inside[0] == beside[0] and int(inside[0]) > 100
    assert (inside[1], beside[1]) == ("pyengine.bench.worker", "bench.worker")


# ---- packages ------------------------------------------------------------------------------------------------------------

STEM = f"{pyengine.DISTRIBUTION.replace('-', '_')}-{pyengine.__version__}"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source package, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(folder / f"{STEM}.tar.gz") as packed:
        packed.extractall(folder, filter="data")
    return folder / STEM


def test_the_source_package_holds_what_a_build_reads(sdist: Path) -> None:
    files = {p.relative_to(sdist).as_posix() for p in sdist.rglob("*") if p.is_file()}
    tracked = subprocess.run(["git", "ls-files", "csrc", "pyengine", "bench", "converters"], cwd=ROOT, check=True, capture_output=True, text=True)
    code = {name for name in tracked.stdout.split() if name.endswith((".py", ".c", ".h", ".cpp", ".html", ".css", ".js", ".svg"))}
    code = {name for name in code if (ROOT / name).exists()}
    assert code <= files, sorted(code - files)
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py", "MANIFEST.in"} <= files
    assert not {name for name in files if name.startswith(("csrc/gen/", "tests/", "build/", "models/")) or name.endswith((".so", ".gguf", "_abi.py"))}


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel that is built from the source package, with the portable kernels alone: they compile in a third of the time."""
    pytest.importorskip("pip", reason="needs pip")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", str(sdist.parent), str(sdist)]
    done = subprocess.run(command, env={**os.environ, "PYENGINE_ARCH": "generic"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = sdist.parent.glob("*.whl")
    return made


@pytest.mark.slow
def test_the_wheel_holds_one_package_and_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        about = message_from_bytes(packed.read(f"{STEM}.dist-info/METADATA"))
        commands = packed.read(f"{STEM}.dist-info/entry_points.txt").decode()
        assert packed.read(f"{STEM}.dist-info/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert {name.split("/")[0] for name in names} == {"pyengine", f"{STEM}.dist-info"}
    kinds = {Path(name).suffix for name in names if name.startswith("pyengine/")}
    assert kinds == {".py", ".so", ".html", ".css", ".js", ".svg"} and "pyengine/_abi.py" in names and len([n for n in names if n.endswith(".so")]) == 1
    assert {"pyengine/bench/__main__.py", "pyengine/converters/quantize/__main__.py"} <= set(names)
    assert about["Name"] == pyengine.DISTRIBUTION and about["License-Expression"] == "MIT" and about["Author"] == "the pyengine authors"
    assert "pyengine-run = pyengine.cli:main" in commands


@pytest.mark.slow
def test_the_wheel_answers_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(tmp_path), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    demo = ROOT / "converters" / "demo"
    answer = run(tmp_path, "-m", "pyengine", str(demo / "weights/demo-q8_0.gguf"), "What does it say?", "--image", str(demo / "samples/word.png"),
                 "--temperature", "0")
    where = run(tmp_path, "-c", "import pyengine._engine as e; print(e.__file__, *e.isas())").split()
    assert answer.strip() == "SPEAKING" and Path(where[0]).is_relative_to(tmp_path) and where[1:] == ["generic"]
