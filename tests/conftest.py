"""Shared fixtures: tiny converted checkpoints, full-size models without data, and the real models that `make weights` fetches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Each process of tests has one processor (`pytest -n`): threads that PyTorch and BLAS would start wait for each other in loops.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

# The default tests try the same examples on every machine and day, so that a failure is of the change at hand; `make test-all` tries new ones.
# How long an example takes, or making one, is the machine's matter: no test fails by that.
TIMELESS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("same", derandomize=True, **TIMELESS)
settings.register_profile("new", derandomize=False, **TIMELESS)
settings.load_profile(os.environ.get("PYENGINE_TEST_EXAMPLES", "same"))

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = Path(os.environ.get("PYENGINE_TEST_WEIGHTS", ROOT / "models"))
REAL = {"gemma": "gemma3-270m-q4_k_m.gguf", "smollm2": "smollm2-135m-q4_1.gguf", "qwen": "qwen2.5-coder-0.5b-q4_k_m.gguf"}
ENCODERS = {"minilm": "all-minilm-l6-v2.zip"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", default=None, help="run the contract suites on this device only: cuda, cuda-emulated, cuda:1 ..")


def pytest_configure(config: pytest.Config) -> None:
    """Models of the suites go to that device too, where a test does not name one."""
    if config.getoption("--backend"):
        os.environ["PYENGINE_DEVICE"] = config.getoption("--backend")


def real_path(name: str) -> Path:
    """Path of a real model, or skip."""
    path = WEIGHTS / {**REAL, **ENCODERS}[name]
    if not path.exists():
        pytest.skip(f"{path.name} is not in {WEIGHTS}: `make weights` fetches it")
    return path


@pytest.fixture(scope="session")
def real_model():
    """real_model("smollm2", n_ctx=..) -> loaded model; each combination is loaded once."""
    import pyengine as pe

    loaded: dict[Any, Any] = {}

    def get(name: str, **settings: Any):
        key = (name, tuple(sorted(settings.items())))
        if key not in loaded:
            loaded[key] = pe.load(real_path(name), **{"n_ctx": 1024, **settings})
        return loaded[key]

    return get


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory):
    """tiny_gguf("llama", outtype="f32", **config) -> (GGUF path, checkpoint folder) of a case's seeded random model."""
    pytest.importorskip("transformers", reason="needs transformers and torch: pip install -r requirements/test.txt")
    import tiny
    from converters import convert

    made: dict[Any, Any] = {}

    def get(kind: str, outtype: str = "f32", **config: Any) -> tuple[Path, Path]:
        key = (kind, repr(sorted(config.items())))
        folder = tmp_path_factory.mktemp(kind) if key not in made else made[key]
        if key not in made:
            tiny.make_checkpoint(kind, folder / "hf", seed=1, **config)
            made[key] = folder
        out = folder / f"{outtype}.gguf"
        if not out.exists():
            convert(folder / "hf", out, outtype)
        return out, folder / "hf"

    return get


@pytest.fixture(scope="session")
def full_size(tmp_path_factory):
    """full_size("gemma-12b") -> files of headers and holes of a published model: (decoder, encoder or None)."""
    pytest.importorskip("gguf")
    import cases

    models = {name: full for case in cases.every().values() for name, full in case.full.items()}
    folder = tmp_path_factory.mktemp("full")
    made: dict[str, tuple[Path, Path | None]] = {}

    def get(name: str) -> tuple[Path, Path | None]:
        if name not in made:
            made[name] = models[name].write(folder, name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def cuda_device(request: pytest.FixtureRequest) -> str:
    """The device to test: "cuda" where there is a card and its library, else "cuda-emulated", or what `--backend` names."""
    import devices

    return devices.device(request, "cuda")


@pytest.fixture(scope="session")
def metal_device(request: pytest.FixtureRequest) -> str:
    """The same for Metal: "metal" on a Mac, else "metal-emulated"."""
    import devices

    return devices.device(request, "metal")


@pytest.fixture
def client(served):
    """A client of the server with the one model that a file's fixture `served` loads."""
    pytest.importorskip("httpx")
    from starlette.testclient import TestClient

    from pyengine.server.app import application

    return TestClient(application([served]), base_url="http://localhost:8080")


@pytest.fixture
def model(served):
    """The model of `served`, for what the library says."""
    return served.model


@pytest.fixture
def machine(monkeypatch):
    """machine(bytes, gpu bytes...): what every plan takes for the memory of this machine from now on, beside other models of this process."""
    from pyengine import hardware
    from pyengine.hardware.facts import Device
    from pyengine.memory import held

    def set_to(free: int, *gpus: int) -> None:
        found = hardware.detect()
        devices = [found.devices[0]._replace(total=free, free=free)]
        devices += [Device("cuda", "test GPU", i, n, n) for i, n in enumerate(gpus)]
        monkeypatch.setattr(hardware, "detect", lambda system=None: found._replace(devices=tuple(devices)))
        monkeypatch.setattr(held, "held", lambda without=(): [])

    return set_to


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A server that is Hugging Face's hub and Ollama's registry, for a user whose home is empty; attempts follow each other at once."""
    from servers import Server

    from pyengine.pull import download

    for name in ("PYENGINE_MODELS", "OLLAMA_MODELS", "HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.0)
    with Server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("OLLAMA_REGISTRY", server.url)
        yield server
