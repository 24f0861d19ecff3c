"""Names, versions, extras and files that packages are made of agree with each other and with what messages and pages say."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import pyengine
from csrc import build_rules

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOLD = [p for top in ("pyengine", "bench", "converters", "tests", "docs", "release") for end in ("py", "md") for p in (ROOT / top).rglob(f"*.{end}")]
TOLD += [ROOT / "README.md", ROOT / "Makefile"]
_INSTALL = re.compile(r"pip install ((?:-\S+ )*)['\"]?(pyengine[\w-]*|\{DISTRIBUTION\})(?:\[(\w+)\])?")
_EXTRA = re.compile(r"\bpyengine\[[a-z]+\]")


def wrong_names(text: str, extras: set[str]) -> list[str]:
    """Advice to install another project's `pyengine`, with or without "pip install", or an extra that there is not. "do not `pip install pyengine`" is none."""
    return [m[0] for m in _INSTALL.finditer(text) if not text[: m.start()].endswith("do not `")
            and (m[2] not in (pyengine.DISTRIBUTION, "{DISTRIBUTION}") or m[3] and m[3] not in extras)] + _EXTRA.findall(text)


def test_every_message_names_our_distribution() -> None:
    assert PROJECT["project"]["name"] == pyengine.DISTRIBUTION != "pyengine"
    extras = set(PROJECT["project"]["optional-dependencies"])
    assert {str(p.relative_to(ROOT)): w for p in TOLD if p != Path(__file__) and (w := wrong_names(p.read_text(encoding="utf-8"), extras))} == {}


def test_another_name_is_found() -> None:
    assert wrong_names("it needs pyengine[bench]", {"bench"}) and wrong_names("pip install pyengine[bench]", {"bench"})
    assert wrong_names("`pip install 'pyengine-local[fast]'`", {"bench"})
    assert wrong_names("pip install 'pyengine-local[bench]', do not `pip install pyengine`, pip install '{DISTRIBUTION}[bench]'", {"bench"}) == []


def test_the_licence_is_named_and_there() -> None:
    assert PROJECT["project"]["license"] == "MIT" and PROJECT["project"]["license-files"] == ["LICENSE"]
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n\nCopyright (c) 2026 the pyengine authors\n")


@pytest.mark.parametrize("system, machine", [("linux-x86_64", "x86_64"), ("linux-aarch64", "aarch64"), ("macosx-11.0-arm64", "arm64"),
                                             ("win-amd64", "amd64"), ("macosx-10.9-universal2", None)])
def test_the_processor_that_is_built_for(system: str, machine: str | None) -> None:
    assert build_rules.machine_of(system) == machine
    assert machine is None or len(build_rules.isas(machine)) > 1


def test_python_m_pyengine_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "pyengine", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "plan" in done.stdout, done.stderr


def test_what_cibuildwheel_tests_with_is_there() -> None:
    settings = PROJECT["tool"]["cibuildwheel"]
    named = [word for command in settings["test-command"] for word in shlex.split(command) if "/" in word]
    assert len(named) == 3 and all((ROOT / name).is_file() for name in named)
    assert all(any(name.startswith(f"{source}/") for source in settings["test-sources"]) for name in named)


def test_cibuildwheel_reads_its_settings() -> None:
    pytest.importorskip("cibuildwheel", reason="needs cibuildwheel: pip install -r requirements/release.txt")
    for platform, archs in (("linux", "x86_64,aarch64"), ("macos", "arm64,x86_64"), ("windows", "AMD64")):
        done = subprocess.run([sys.executable, "-m", "cibuildwheel", "--platform", platform, "--archs", archs, "--print-build-identifiers",
                               "--allow-empty"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made = done.stdout.split()
        assert all(re.fullmatch(r"cp3\d+-(manylinux|macosx)_\w+", name) for name in made)
        assert bool(made) == (platform != "windows")


def test_the_image_is_built_from_files_that_are_there() -> None:
    """Every copied path exists and passes .dockerignore; bases are pinned; the command runs as a user without rights, models outside."""
    lines = [line.split() for line in (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    copied = {path for word, *paths in lines if word == "COPY" and not paths[0].startswith("--from") for path in paths[:-1]}
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied and all((ROOT / path).exists() and path.split("/")[0] in let_in for path in copied)
    assert {path.split("/")[0] for path in copied} == let_in
    versions = dict(paths[0].split("=") for word, *paths in lines if word == "ARG")
    assert re.fullmatch(r"3\.\d+\.\d+", versions["PYTHON"]) and versions["DEBIAN"]
    assert all("${PYTHON}" in paths[0] for word, *paths in lines if word == "FROM")
    last = [paths for word, *paths in lines[max(i for i, line in enumerate(lines) if line[0] == "FROM"):] if word in ("USER", "VOLUME", "ENTRYPOINT")]
    assert last == [["pyengine"], ["/models"], ['["pyengine-run"]']]


@pytest.mark.skipif(sys.platform != "linux", reason="wheels for Linux are made on Linux")
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_wheel_is_built_for_the_machine_that_is_asked_for(machine: str) -> None:
    values = runpy.run_path(str(ROOT / "release" / "wheel.py"))["environment"](machine)
    assert values["_PYTHON_HOST_PLATFORM"] == f"linux-{machine}" and machine in values["SETUPTOOLS_EXT_SUFFIX"]
    assert all(f"-target {machine}-linux-gnu.2.17" in values[name] for name in ("CC", "CXX", "LDSHARED", "LDCXXSHARED"))
    assert {flag for flags in build_rules.isas(machine).values() for flag in flags if flag.startswith("-march")} <= set(build_rules.ZIG_WORDS)
