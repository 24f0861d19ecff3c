"""`make metal-check`, as far as it runs without a Mac: every part on small sizes, what it writes, and what it says of wrong results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.gpu import metal
from bench.gpu.jobs import tiny


def checked(tmp_path: Path, only: str) -> tuple[int, dict]:
    """The exit code and the JSON of a run."""
    path = tmp_path / "metal.json"
    code = metal.main(["--device", "metal-emulated", "--tiny", "--only", only, "--json", str(path)])
    return code, json.loads(path.read_text())


def test_limits_and_kernels(tmp_path: Path, monkeypatch) -> None:
    few = [job for job in tiny() if job.op.name in ("rms_norm", "rope_append")] + list(tiny())[:1]
    monkeypatch.setattr(metal.jobs, "tiny", lambda: few)
    code, found = checked(tmp_path, "speeds,replay,kernels")
    assert code == 0 and found["wrong"] == [] and found["replay"]["works"] and all(found["speeds"].values())
    assert [k["correct"] for k in found["kernels"]] == [True] * 3 and all(k["seconds"]["median"] > 0 and 0 < k["share"] for k in found["kernels"])


def test_a_wrong_result_is_said(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(metal.jobs, "tiny", lambda: [job for job in tiny() if job.op.name == "rms_norm"])
    monkeypatch.setattr(metal.kernels, "tolerance", lambda job: -1.0)
    code, found = checked(tmp_path, "speeds,kernels")
    assert code == 1 and len(found["wrong"]) == 1 and "WRONG kernels: rms_norm" in capsys.readouterr().out


def test_no_such_part(capsys) -> None:
    assert metal.main(["--only", "all"]) == 2 and "no part is named all" in capsys.readouterr().out


@pytest.mark.slow
def test_every_part(tmp_path: Path) -> None:
    code, found = checked(tmp_path, ",".join(p for p in metal.PARTS if p != "tests"))
    assert code == 0 and found["wrong"] == [] and found["ops"]["checked"] > 50 and len(found["agree"]) > 5 and found["model"]["prompt"]["per_second"] > 0
