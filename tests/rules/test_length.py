"""What can be read at once: files of at most 650 lines, functions of at most 60 lines and 8 parameters."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from sources import functions, package, read, Source

LINES, FUNCTION, PARAMETERS = 650, 60, 8
DOORS = ("pyengine/engine/load.py: load", "pyengine/memory/fit.py: plan", "pyengine/engine/model.py: Model.submit")       # what users call with everything they may ask for


def decorated(node: ast.FunctionDef | ast.AsyncFunctionDef, *names: str) -> bool:
    """Say whether one of these decorators stands above a function: `op`, `app.command`."""
    tops = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return any((t.id if isinstance(t, ast.Name) else t.attr if isinstance(t, ast.Attribute) else "") in names for t in tops)


def too_long(files: Sequence[Source]) -> list[str]:
    """Files and functions beyond these numbers. Forms of the command line are tables of options, and parameters of a declared op are
    those of its kernel: neither has a limit of them."""
    found = []
    for f in files:
        if (n := f.text.count("\n")) > LINES:
            found.append(f"{f.path}: {n} lines")
        for name, node, owner in functions(f.tree) if f.path.endswith(".py") else ():
            where, form = f"{f.path}: {name}", f.path.startswith("pyengine/cli/") and decorated(node, "command", "callback")
            n = node.end_lineno - node.lineno + 1
            if n > FUNCTION and not form:
                found.append(f"{where}: {n} lines")
            a = node.args
            n = len(a.posonlyargs + a.args + a.kwonlyargs) - (owner is not None and not decorated(node, "staticmethod"))
            if n > PARAMETERS and not (form or where in DOORS or decorated(node, "op")):
                found.append(f"{where}: {n} parameters")
    return found


def test_files_and_functions_can_be_read_at_once() -> None:
    assert too_long([*package(), *read("csrc/**/*.[ch]", "csrc/**/*.cpp", "csrc/**/*.cu", "csrc/**/*.m*")]) == []


def test_what_is_too_long_is_found() -> None:
    eight = ", ".join(f"a{i}: int" for i in range(8))
    nine = f"{eight}, *, b: int = 0"
    body = "\n".join(f"    x = {i}" for i in range(60))
    text = f"def f({nine}): pass\ndef g({eight}): pass\nclass A:\n  def h(self, {eight}): pass\n  def k(self, {nine}): pass\ndef m():\n{body}\n"
    assert too_long([Source("pyengine/nn/x.py", text)]) == [
        "pyengine/nn/x.py: f: 9 parameters", "pyengine/nn/x.py: A.k: 9 parameters", "pyengine/nn/x.py: m: 61 lines"]
    assert too_long([Source("pyengine/cli/x.py", f"@app.command()\ndef f({nine}):\n{body}\n")]) == []
    assert too_long([Source("pyengine/ops/x.py", f"@op(inplace='x')\ndef f({nine}): pass")]) == []
    assert too_long([Source("csrc/cpu/x.c", "\n" * 651)]) == ["csrc/cpu/x.c: 651 lines"]
