"""The table of docs/gpu-kernels.md: of today's kernels, without spills, with requests to memory within their bounds."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from bench.gpu import figures, ptxas
from pyengine.backends.cuda.build import TARGETS

AGAIN = "run `make gpu-figures`"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return json.loads(figures.JSON.read_text(encoding="utf-8"))


def test_the_table_is_of_todays_kernels(found: dict[str, Any]) -> None:
    today = figures.marks()
    changed = sorted(name for name in {*today, *found["sources"]} if today.get(name) != found["sources"].get(name))
    assert not changed, f"docs/gpu-kernels.md is older than {', '.join(changed)}: {AGAIN}"


def test_the_page_says_what_the_json_says(found: dict[str, Any]) -> None:
    assert figures.PAGE.read_text(encoding="utf-8") == figures.page(found), AGAIN
    assert [row["name"] for row in found["shapes"]] == [s.full.name for s in figures.shapes()], AGAIN


def test_no_kernel_spills_and_hot_ones_fit_on_every_target(found: dict[str, Any]) -> None:
    assert tuple(found["targets"]) == TARGETS
    spilled = [(name, t, k) for by in found["registers"].values() for name, of in by.items() for t, k in of.items() if k[1]]
    assert not spilled
    for name in figures.hot(found):
        of = figures.of_kernel(found, name)
        assert set(of) == set(TARGETS), f"{name} was compiled for {', '.join(of)}"
        assert all(0 < registers <= 255 for registers, _, _ in of.values())


def test_products_read_each_weight_once(found: dict[str, Any]) -> None:
    rows = [row for row in found["shapes"] if row["name"].startswith("linear generate")]
    assert len(rows) == 12
    for row in rows:
        over = 32 * row["held_sectors"] / row["held_bytes"]
        assert 0.99 <= over <= 1.07, f"{row['name']}: {over:.3f} x the sectors of its weights"
        passes = [sum(k[what][part] for k in row["kernels"].values() for what in ("shared_loads", "shared_stores")) for part in ("conflicts", "sectors")]
        assert passes[0] <= 0.01 * passes[1], f"{row['name']}: bank conflicts {passes}"


def test_comments_do_not_age_the_table() -> None:
    plain = ptxas.content([ptxas.CUDA / "norm.cu"])
    code = ptxas.content([ptxas.CUDA / "norm.cu"], code_only=True)
    assert plain != code and len(code) == 16
    assert ptxas.CUDA / "strides.h" in ptxas.included(ptxas.CUDA / "norm.cu")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("target", TARGETS)
def test_small_kernels_compile_without_warnings_and_spills(target: str) -> None:
    for file in ("elementwise.cu", "layout.cu", "norm.cu", "rows.cu", "routing.cu", "matmul.cu", "angles.cu", "speed.cu"):
        assert [k.name for k in ptxas.compiled(ptxas.CUDA / file, target) if k.spills] == []
