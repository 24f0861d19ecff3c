"""The CPU backend: lays a graph out, loads its weights in the form that kernels want, and replays it by one call into C."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

from pyengine import hardware
from pyengine.backends import base
from pyengine.backends.cpu.prepared import Prepared
from pyengine.compiler.arena import Turns
from pyengine.compiler.codegen import outdated
from pyengine.errors import GraphError, PyEngineError
from pyengine.native import engine


def isa() -> str:
    """Return the instruction set in use: the best of this machine, or the one named by $PYENGINE_ISA."""
    available = engine.isas()
    wanted = os.environ.get("PYENGINE_ISA")
    if wanted and wanted not in available:
        raise GraphError(f"PYENGINE_ISA={wanted}: this machine and build have {', '.join(available)}")
    return wanted or available[0]


@lru_cache(maxsize=4)
def kernels_of(name: str) -> frozenset[str]:
    """Return the ops that this build computes with an instruction set. Raises: PyEngineError for one older than the declarations."""
    if others := outdated(getattr(engine, "declarations", {})):
        raise PyEngineError(f"pyengine's compiled part was built for other declarations than those that are here ({', '.join(others)}); "
                            "build it again: `pip install .`, in a checkout `python setup.py build_ext --inplace`")
    return frozenset(engine.kernels(name))


class Backend(base.Backend):
    """See the module's docstring. in_place: weights are read where their files are mapped, nothing is packed when it is loaded."""

    name: ClassVar[str] = "cpu"

    def __init__(self, n_threads: int | None = None, in_place: bool = False):
        self.n_threads, self.in_place = n_threads or hardware.default_threads(), in_place
        self.isa = isa()
        self.kernels = kernels_of(self.isa)

    def prepare(self, declared: base.Declared, turns: Turns | None = None, passes: Sequence[str] | None = None) -> Any:
        """Fuse, lay out and count without loading."""
        return Prepared(declared, turns, passes, self.kernels, self.isa, self.n_threads, self.in_place)
