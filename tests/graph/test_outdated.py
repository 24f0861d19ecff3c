"""A compiled part that is older than the declarations of ops is an error that says so, and not a crash."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from pyengine import dtype, ops
from pyengine.backends import cpu
from pyengine.compiler import codegen
from pyengine.errors import PyEngineError
from pyengine.native import engine


@pytest.fixture(autouse=True)
def asked_anew():
    cpu.kernels_of.cache_clear()
    yield
    cpu.kernels_of.cache_clear()


def test_what_is_built_is_what_is_declared() -> None:
    assert codegen.outdated(engine.declarations) == [] and {"linear", "attention", "formats"} <= engine.declarations.keys()
    assert {name for isa in engine.isas() for name in engine.kernels(isa)} <= engine.declarations.keys()


def changes() -> dict[str, Any]:
    """Declarations of one op, each with something that its kernel would read wrongly."""
    op = ops.REGISTRY["attention"]
    params = list(op.params.items())
    enum = next(name for name, p in params if p.kind == "enum")
    turned = op.params[enum]._replace(choices=op.params[enum].choices[::-1])
    return {"fewer parameters": replace(op, params=dict(params[:-1])), "another order": replace(op, params=dict(reversed(params))),
            "other choices": replace(op, params={**op.params, enum: turned}), "fewer arguments": replace(op, args=dict(list(op.args.items())[:-1]))}


@pytest.mark.parametrize("what", changes())
def test_an_op_that_is_declared_otherwise(what: str, monkeypatch) -> None:
    monkeypatch.setitem(ops.REGISTRY, "attention", changes()[what])
    assert codegen.outdated(engine.declarations) == ["attention"]
    with pytest.raises(PyEngineError, match=r"other declarations .*\(attention\); build it again: .*build_ext --inplace"):
        cpu.Backend()


def test_other_formats_and_a_library_that_says_nothing(monkeypatch) -> None:
    with monkeypatch.context() as m:
        m.setattr(dtype, "PACKED_BIT", 512)
        with pytest.raises(PyEngineError, match=r"\(formats\)"):
            cpu.Backend()
    monkeypatch.setattr(cpu, "engine", SimpleNamespace(isas=engine.isas, kernels=engine.kernels))
    with pytest.raises(PyEngineError, match="build it again"):
        cpu.Backend()


def test_ops_that_the_library_does_not_have_are_no_fault(monkeypatch) -> None:
    monkeypatch.setitem(ops.REGISTRY, "of_a_user", replace(ops.REGISTRY["linear"], name="of_a_user"))
    assert codegen.outdated(engine.declarations) == []
    cpu.Backend()
