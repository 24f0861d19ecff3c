"""Who knows what: a policy's kind in its own module, a state's memory in backends, and a suite over every backend and architecture."""

from __future__ import annotations

import ast
from collections.abc import Sequence

import pytest
from sources import package, ROOT, Source, within, without

from pyengine import backends, models
from pyengine.cache import policy

POLICY = "pyengine/cache/policy.py"
KINDS = {name for name, kind in vars(policy).items() if isinstance(kind, type) and issubclass(kind, policy.Policy)}


def kinds_asked(files: Sequence[Source]) -> list[str]:
    """Where it is asked of what kind a policy is: isinstance, issubclass, `type(..) is`, a pattern of `match`, or its name."""
    found = []

    def names(node: ast.AST) -> set[str]:
        return {n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(node) if isinstance(n, (ast.Name, ast.Attribute))} & KINDS

    for f in without(files, POLICY):
        for node in ast.walk(f.tree):
            asked: set[str] = set()
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass"):
                asked = names(node.args[1])
            elif isinstance(node, ast.MatchClass):
                asked = names(node.cls)
            elif isinstance(node, ast.Compare) and "type" in {n.id for n in ast.walk(node.left) if isinstance(n, ast.Name)}:
                asked = set().union(*map(names, node.comparators))
            found += [f"{f.path}:{node.lineno}: {name}" for name in sorted(asked)]
    return found


def test_a_policys_kind_is_its_own_business() -> None:
    assert KINDS == {"Policy", "Full", "Compressed", "Grouped", "Recent", "Pinned", "Sliding", "Chunked", "Cross", "Recurrent"}
    assert kinds_asked(package()) == []


@pytest.mark.parametrize("text", ["isinstance(p, Full)", "isinstance(p, (int, policy.Sliding))", "match p:\n  case Chunked(size): pass",
                                  "type(p) is Cross", "x = [q for q in a if type(q) in (Full, list)]"])
def test_a_kind_that_is_asked_for_is_found(text: str) -> None:
    assert len(kinds_asked([Source("pyengine/cache/cells.py", text), Source(POLICY, text)])) == 1
    assert kinds_asked([Source("pyengine/models/x.py", "p = [Full(), Sliding(3)]; isinstance(x, int); type(x) is dict")]) == []


def states_indexed(files: Sequence[Source]) -> list[str]:
    """Where the memory of a state is reached without the verbs of `State`: indexed, or asked for its bytes."""
    found = []
    for f in without(files, "pyengine/backends/", "pyengine/models/", "pyengine/ops/"):
        for node in ast.walk(f.tree):
            what = node.value if isinstance(node, ast.Subscript) else None
            if isinstance(what, ast.Subscript):                                  # program.states["k"][..], layer.states[0][..]
                hit = isinstance(what.value, ast.Attribute) and what.value.attr == "states"
            elif isinstance(what, ast.Attribute):                                # state.memory[..]
                hit = what.attr in ("memory", "state_memory")
            elif isinstance(what, ast.Call):                                     # program.state("k")[..]
                hit = isinstance(what.func, ast.Attribute) and what.func.attr == "state"
            else:
                hit = isinstance(node, ast.Attribute) and node.attr == "state_memory"
            if hit:
                found.append(f"{f.path}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_only_backends_reach_into_states() -> None:
    assert states_indexed(package()) == []


@pytest.mark.parametrize("text", ["program.states['k'][:, cells] = 0", "layer.states[0][1]", "x = state.memory[:, 1:]", "program.state(name)[0]"])
def test_an_indexed_state_is_found(text: str) -> None:
    assert len(states_indexed([Source("pyengine/cache/store.py", text), Source("pyengine/backends/host.py", text)])) == 1
    assert states_indexed([Source("pyengine/cache/store.py", "program.states[name].gather(cells)[0]; tables[0][1]")]) == []


def unheld(files: Sequence[Source]) -> list[str]:
    """What of the two contracts no suite is run over: a module that is not found by its name, or has not the class it must have."""
    found = []
    for folder, there, kind in (("pyengine/backends/", set(backends.names()), "Backend"),
                                ("pyengine/models/", set(models.architectures()), "Model")):
        for f in within(files, folder):
            name = f.path.removeprefix(folder).removesuffix(".py").removesuffix("/__init__")
            has = any(isinstance(n, (ast.ClassDef, ast.Assign, ast.ImportFrom)) and kind in defined(n) for n in f.tree.body)
            own = "/" not in name and f.path not in ("pyengine/backends/base.py",)
            if own and has and name not in there and name != "__init__":
                found.append(f"{f.path}: has {kind}, but is not found by its name")
            if own and name in there and not has:
                found.append(f"{f.path}: has no {kind}")
    return found


def defined(node: ast.stmt) -> set[str]:
    """Names that a statement of a module gives."""
    if isinstance(node, ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.ImportFrom):
        return {a.asname or a.name for a in node.names}
    return {t.id for t in node.targets if isinstance(t, ast.Name)} if isinstance(node, ast.Assign) else set()


def test_every_backend_and_architecture_is_found() -> None:
    ours = [f for f in package() if f.path != "pyengine/backends/graph.py" and not f.path.startswith("pyengine/backends/chain")]
    assert unheld(ours) == []


def test_one_that_is_not_found_is_found_here() -> None:
    planted = [Source("pyengine/backends/tpu.py", "class Backend: pass"), Source("pyengine/models/llama.py", "class Llama: pass")]
    assert unheld(planted) == ["pyengine/backends/tpu.py: has Backend, but is not found by its name", "pyengine/models/llama.py: has no Model"]


def test_the_suites_run_over_all_that_there_are() -> None:
    """No list of kinds: parameters come from what is found."""
    for name, found in (("test_backends.py", "params=names()"), ("test_architectures.py", "architectures()")):
        assert found in (ROOT / "tests" / "contract" / name).read_text(), name
