"""`make gpu-check` as far as it goes without a card: the same script on the emulator, without the packages that a bare machine lacks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.gpu import check, synthetic
from bench.gpu.devices import MULTIPROCESSORS, occupancy
from bench.gpu.ptxas import parsed, plain
from pyengine.dtype import dtype
from pyengine.files.gguf import GGUFFile
from pyengine.native.blocks import dequantize

ROOT = Path(__file__).resolve().parents[2]
# What runs pyengine elsewhere and is not on a machine with NumPy, pybind11, cffi, Pillow and PyTorch only.
ABSENT = ("gguf", "tokenizers", "typer", "rich", "psutil", "starlette", "uvicorn", "llguidance", "jsonschema", "huggingface_hub", "sentencepiece",
          "prompt_toolkit", "pytest", "hypothesis", "transformers", "safetensors", "matplotlib", "prometheus_client", "httpx")


def bare(tmp_path: Path, *args: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    """Run the check where these packages cannot be imported, and return what it wrote."""
    out = tmp_path / "out.json"
    code = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); from bench.gpu.check import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "--device", "cuda-emulated", "--tiny", "--json", str(out), *args], cwd=ROOT, text=True,
                          capture_output=True, timeout=600, check=False)
    return done, json.loads(out.read_text()) if out.exists() else {}


@pytest.mark.slow
def test_everything_is_right_in_the_emulator(tmp_path: Path) -> None:
    done, found = bare(tmp_path, "--only", "speeds,ops,kernels,agree,model")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert found["wrong"] == [] and found["ops"]["checked"] > 60
    assert {r["op"] for r in found["kernels"]} == {"linear", "attention", "rms_norm", "rope_append"}
    assert all(r["correct"] and r["seconds"]["median"] > 0 and r["share"] > 0 for r in found["kernels"])
    assert {r["name"].partition(",")[0] for r in found["agree"]} == {*synthetic.SMALL, "demo encoder f16", "demo encoder q8_0"}
    assert found["model"]["generation"]["per_second"] > 0 and found["model"]["long"]["tokens"] == 96
    assert set(found["speeds"]) == {"copy", "read", "s8", "bf16", "f16", "f32"} and min(found["speeds"].values()) > 0


def test_every_declared_case_is_right_in_the_emulator(tmp_path: Path) -> None:
    done, found = bare(tmp_path, "--only", "ops")
    assert done.returncode == 0 and found["wrong"] == [] and found["ops"]["checked"] > 120, done.stdout[-4000:] + done.stderr[-4000:]


def test_what_is_wrong_is_said_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(job: object, device: str) -> dict:
        raise RuntimeError("a planted fault")

    monkeypatch.setattr(check.jobs, "checked", broken)
    assert check.main(["--device", "cuda-emulated", "--tiny", "--only", "ops", "--json", str(tmp_path / "x.json")]) == 1
    found = json.loads((tmp_path / "x.json").read_text())
    assert len(found["wrong"]) > 60 and all("a planted fault" in w for w in found["wrong"])
    assert "WRONG ops: linear" in capsys.readouterr().out


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--only", "opps"]) == 2
    assert "opps" in capsys.readouterr().out


# ---- its pieces -------------------------------------------------------------------------------------------------------------------


def test_synthetic_files_hold_what_they_say(tmp_path: Path) -> None:
    for name, model in synthetic.SMALL.items():
        file = GGUFFile(synthetic.write(tmp_path / f"{name}.gguf", model))
        tensors = {t.name: t for t in file.tensors} if not isinstance(file.tensors, dict) else file.tensors
        assert {n: (tuple(t.shape), t.dtype.name) for n, t in tensors.items()} == {n: (s, f) for n, s, f in model.tensors()}


def test_eight_billion_weights_are_mixed_as_llama_cpp_mixes_them() -> None:
    formats = {n: f for n, _, f in synthetic.EIGHT.tensors()}
    bigger = [i for i in range(32) if formats[f"blk.{i}.ffn_down.weight"] == "Q6_K"]
    assert bigger == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31] == [i for i in range(32) if formats[f"blk.{i}.attn_v.weight"] == "Q6_K"]
    assert formats["output.weight"] == "Q6_K" and formats["token_embd.weight"] == formats["blk.5.ffn_up.weight"] == "Q4_K"
    total = sum(dtype(f).size(int(np.prod(s))) for _, s, f in synthetic.EIGHT.tensors())
    assert 4.85e9 < total < 4.95e9                           # Llama 3.1 8B Q4_K_M: 4.92 GB


@pytest.mark.parametrize("kind", ("Q4_K", "Q6_K", "Q8_0", "Q5_0"))
def test_random_weights_have_the_spread_of_trained_ones(kind: str) -> None:
    rng = np.random.default_rng(0)
    for rows in (64, 2048):                                  # quantized, and made of random codes
        w = dequantize(synthetic.blocks(dtype(kind), 1024, rows, rng), dtype(kind))
        assert 0.8 < w.std() * 32 < 1.25 and np.isfinite(w).all()


def test_occupancy_is_that_of_the_calculator() -> None:
    assert occupancy("80", 32, 256, 0) == 1.0 and occupancy("80", 33, 256, 0) == 0.75 and occupancy("80", 255, 256, 0) == 0.125
    assert occupancy("86", 40, 256, 0) == 1.0 and occupancy("90a", 64, 128, 100 << 10) == 256 / 2048
    assert occupancy("75", 64, 1024, 0) == 1.0 and occupancy("89", 32, 32, 0) == 24 * 32 / 1536
    assert occupancy("80", 32, 256, 164 << 10) == 0.0        # a block that does not fit
    assert set(MULTIPROCESSORS) == {"75", "80", "86", "89", "90a", "100", "120"}


def test_the_assemblers_words_are_read() -> None:
    text = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3abc9my_kernelILi3EEEvPf' for 'sm_80'
ptxas info    : Function properties for _ZN3abc9my_kernelILi3EEEvPf
    48 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 360 bytes cmem[0]
ptxas info    : Compiling entry function '_Z5otherv' for 'sm_80'
ptxas info    : Function properties for _Z5otherv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, 320 bytes cmem[0]
"""
    assert [tuple(k) for k in parsed(text)] == [("abc::my_kernel<3>", 255, 40, 48), ("other", 8, 0, 0)]
    assert plain("void (anonymous namespace)::norm_kernel<0, (int)4>(pe::Rows, float*)") == "norm_kernel<0, (int)4>"
