"""What is installed: one top-level package, with the benchmarks and the converters inside of it, run by their names there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

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
