"""What adding costs: an architecture its module, converter and tests; an op its declaration and its kernel; a backend its folder.

Nothing lists them. Examples are those of the pages in docs/ where a page has one, so pages stay right.
"""

from __future__ import annotations

import ast
import filecmp
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

import cases
from pyengine.compiler import codegen
from pyengine.models import architectures, tower_models

TESTS = ROOT / "tests"


def run(script: str, *arguments: object, root: Path = ROOT, **env: str) -> str:
    """Run a script in a process of its own over a tree; returns what it printed, once it has succeeded."""
    paths = (root, root / "tests" / "support", os.environ.get("PYTHONPATH", "") if root is ROOT else "")
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], cwd=root, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), **env})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def block(page: str, language: str, n: int = 0) -> str:
    """The n-th piece of code of a language on a page of docs/."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.M | re.S)[n]


# -- an architecture ------------------------------------------------------------------------------------------------------

HELIUM = {
    "models/helium.py": '''"""Helium: llama's layout."""

from pyengine.models.llama import Model  # noqa: F401
''',
    "converters/helium.py": '''"""Helium: pairs of elements are rotated, as in the file, so no rows change places."""

from converters.contract import converts
from converters.decoder import Decoder


@converts("HeliumForCausalLM")
class Helium(Decoder):
    arch, rope_base = "helium", 1e5
    defaults = {"rms_norm_eps": 1e-8, "tie_word_embeddings": False}

    def layer(self, i, b, m):
        yield self.norm(f"{b}.attn_norm", f"{m}.input_layernorm", self.d_model)
        yield self.norm(f"{b}.ffn_norm", f"{m}.post_attention_layernorm", self.d_model)
        yield from self.attention(b, f"{m}.self_attn")
        yield from self.gated(b, f"{m}.mlp", self.d_ff)
''',
    "tests/models/test_helium.py": '''"""Helium."""

import numpy as np

from cases import Case, Converted
from tiny import COMMON

CASES = (Case(
    "helium", "helium", "HeliumConfig", "HeliumForCausalLM", "llama-bpe", {**COMMON, "head_dim": 16},
    converted=Converted({
        "block_count": 3, "context_length": 256, "embedding_length": 96, "feed_forward_length": 160, "vocab_size": 512,
        "attention.head_count": 6, "attention.head_count_kv": 2, "attention.key_length": 16, "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": np.float32(1e-8), "rope.freq_base": 1e5}, names="LLAMA")),)
'''}
RUN = """
import sys
from pathlib import Path

import cases
import converters
import pyengine.models
import pytest

new = Path(sys.argv[1])
pyengine.models.__path__.append(str(new / "models"))
converters.__path__.append(str(new / "converters"))
cases.FOLDERS.append(new / "tests/models")
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "helium", *sys.argv[2:]]))
"""
# some of the suites that run over all text models, and how many tests of one model
SUITES = {"tests/contract/test_text_models.py": 7 + 2 + 1, "tests/converters/test_converters.py": 2, "tests/cache/test_sessions.py": 1,
          "tests/contract/test_architectures.py": 7}


def test_three_files_are_a_new_architecture(tmp_path: Path) -> None:
    """Helium is added here by its three files, and then suites over models test it."""
    pytest.importorskip("transformers", reason="needs transformers and torch: pip install -r requirements/test.txt")
    for name, text in HELIUM.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    out = run(RUN, tmp_path, *SUITES)
    passed, skipped = (int(n) for n in re.search(r"(\d+) passed(?:, (\d+) skipped)?", out).groups(0))
    assert passed >= sum(SUITES.values()) and skipped <= 1, out                 # without llama.cpp one is skipped


def test_every_architecture_has_its_cases() -> None:
    found = cases.every().values()
    read = {c.arch.replace("-", "_") for c in found} | {c.dialect.ollama_arch for c in found if c.dialect} | {a for c in found for a in c.also}
    read |= {c.arch for c in cases.sources().values()}
    assert set(architectures()) <= read
    assert all((TESTS / "models" / f"test_{c.arch.replace('-', '_')}.py").exists() for c in found)


def test_every_converter_has_its_cases() -> None:
    from converters import supported

    towers = {name for name, made in supported().items() if getattr(made, "arch", "").replace("-", "_") in tower_models()}
    assert set(supported()) - towers <= {name for c in (*cases.every().values(), *cases.sources().values()) for name in (c.model_class, *c.also)}
    tests = "".join(path.read_text() for path in (TESTS / "towers").glob("test_*.py"))
    assert [name for name in tower_models() if not re.search(name.replace("_", "[-_ ]?"), tests, re.IGNORECASE)] == []


def test_nothing_lists_models() -> None:
    """Two as examples are no list."""
    kinds = set(cases.every())
    for path in [p for p in TESTS.rglob("*.py") if p.parent.name != "models"]:
        for node in ast.walk(ast.parse(path.read_text())):
            elements = node.elts if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else node.keys if isinstance(node, ast.Dict) else ()
            named = {e.value for e in elements if isinstance(e, ast.Constant)} & kinds
            assert len(named) < 3, f"{path.relative_to(ROOT)}:{node.lineno} lists {sorted(named)}"


# -- an op ----------------------------------------------------------------------------------------------------------------

USE_OP = """
import numpy as np
import pyengine as pe
from pyengine import ops
from pyengine.backends import backend
from pyengine.backends.cpu import isa

g, rng = pe.Graph(), np.random.default_rng(0)
x = g.input("x", (pe.Dim("m", 64), 37))
y = ops.dynamic_tanh(ops.scale(x, factor=2.0), *(rng.standard_normal(37).astype(np.float32) for _ in "wb"), alpha=0.5)
given = rng.standard_normal((64, 37)).astype(np.float32)
got = g.compile(y, strict=True).run(x=given)
want = backend("reference").compile([y], single=True).run(x=given)
assert np.abs(got - want).max() < 1e-6
print(isa(), pe.__file__)
"""


def with_an_op(root: Path) -> Path:
    """A copy of what is built, with the op of docs/adding-an-op.md added as the page says."""
    for name in ("pyengine", "csrc", "converters", "bench"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_abi.py", "gen", "results", "*.gguf"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, root / name)
    norm, names = root / "pyengine/ops/norm.py", root / "pyengine/ops/__init__.py"
    norm.write_text(norm.read_text() + "\n\n" + block("adding-an-op.md", "python"))
    names.write_text(names.read_text().replace("from pyengine.ops.norm import ", "from pyengine.ops.norm import dynamic_tanh, "))
    (root / "csrc/cpu/dynamic_tanh.c").write_text(block("adding-an-op.md", "c"))
    return root


def changed(a: Path, b: Path, *tops: str) -> Iterator[str]:
    """Files of b that a has not, or that differ, and those that b lacks; what a build makes is left out."""
    def files(root: Path) -> set[str]:
        found = {p.relative_to(root).as_posix() for top in tops for p in (root / top).rglob("*") if p.is_file()}
        return {f for f in found if "/gen/" not in f and "__pycache__" not in f and Path(f).suffix in (".py", ".c", ".h", ".cpp")
                and not f.endswith("_abi.py")}

    return (f for f in sorted(files(a) | files(b))
            if not (a / f).exists() or not (b / f).exists() or not filecmp.cmp(a / f, b / f, shallow=False))


def test_a_kernel_is_registered_by_the_line_that_defines_it(tmp_path: Path) -> None:
    root = with_an_op(tmp_path)
    assert list(changed(ROOT, root, "pyengine", "csrc")) == ["csrc/cpu/dynamic_tanh.c", "pyengine/ops/__init__.py", "pyengine/ops/norm.py"]
    run("from pathlib import Path; from pyengine.compiler import codegen; codegen.generate(Path('csrc'))", root=root)
    table, header = ((root / "csrc/gen" / name).read_text() for name in ("cpu/table.c", "kernels.h"))
    assert '{"dynamic_tanh", call_dynamic_tanh, 0}' in table and "{ float alpha; } pe_dynamic_tanh_params" in header
    assert list(changed(ROOT, root, "pyengine", "csrc")) == ["csrc/cpu/dynamic_tanh.c", "pyengine/ops/__init__.py", "pyengine/ops/norm.py"]
    with pytest.raises(ValueError, match="'dynamic_tanh', which is not declared"):
        codegen.kernels_of("cpu", [root / "csrc/cpu/dynamic_tanh.c"])


@pytest.mark.slow
def test_a_declaration_and_a_kernel_are_a_new_op(tmp_path: Path) -> None:
    """The whole library is built with it, for the generic instruction set, and the op runs on the CPU without falling back."""
    if not shutil.which("cc") and not shutil.which("gcc"):
        pytest.skip("needs a C compiler: install gcc or clang")
    root = with_an_op(tmp_path)
    run("import sys; sys.argv = ['setup.py', 'build_ext', '--inplace', '-q']; exec(open('setup.py').read(), {'__file__': 'setup.py', "
        "'__name__': '__main__'})", root=root, PYENGINE_ARCH="generic")
    assert run(USE_OP, root=root).split() == ["generic", str(root / "pyengine/__init__.py")]


# -- a backend ------------------------------------------------------------------------------------------------------------

EXAMPLE = {
    "example/__init__.py": '''"""An example of a device with memory of its own: states never leave it but through their verbs."""

from pyengine.backends import base
from pyengine.backends.example import kernels
from pyengine.backends.example.program import Prepared


class Backend(base.Backend):
    """Few kernels; the rest falls back."""

    name = "example"

    def __init__(self, n_threads=None):
        self.kernels = frozenset(n for n, f in vars(kernels).items() if callable(f))

    def prepare(self, declared, turns=None, passes=None):
        return Prepared(declared, turns, passes, self.kernels)
''',
    "example/kernels.py": '''"""Kernels, by the names of ops."""

import numpy as np


def matmul(x, y):
    return x @ np.swapaxes(y, -1, -2)


def softmax(x, *, scale=1.0):
    e = np.exp(x * np.float32(scale) - (x * np.float32(scale)).max(-1, keepdims=True, initial=-np.inf))
    return e / e.sum(-1, keepdims=True)
''',
    "example/program.py": '''"""Counted as every device counts; states are lists of cells, as memory that NumPy cannot index."""

import numpy as np

from pyengine.backends import base, reference
from pyengine.backends.example import kernels
from pyengine.backends.prepared import Counted


class State(base.State):
    def __init__(self, host):
        self.host, self.shape, self.dtype, self.nbytes = host, host.shape, host.dtype, host.nbytes

    def gather(self, cells):
        n = self.dtype.size(self.shape[-1])
        return np.array([self.host.gather(np.array([c])) for c in cells], np.uint8).reshape(-1, self.shape[0], n).swapaxes(0, 1).copy()

    def scatter(self, cells, data):
        for i, c in enumerate(cells):
            self.host.scatter(np.array([c]), data[:, i : i + 1])

    def copy(self, source, target):
        for a, b in zip(source, target):
            self.host.copy(np.array([a]), np.array([b]))


class Prepared(Counted):
    dtype = np.float32

    def packed_bytes(self, dtype, shape):
        return 0

    def scratch_bytes(self, node, states=None):
        return 64

    def load(self, progress=None):
        program = Program(self)
        program.states = {name: State(s) for name, s in program.states.items()}
        return program


class Program(reference.Program):
    def kernel(self, node):
        return getattr(kernels, node.op.name, node.op.fn)
'''}
RUN_BACKENDS = """
import sys

import pyengine.backends
import pytest

pyengine.backends.__path__.append(sys.argv[1])
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", sys.argv[2], "tests/contract/test_backends.py"]))
"""


def test_a_folder_is_a_new_backend(tmp_path: Path) -> None:
    """The example of docs/adding-a-backend.md, and a device with its own memory, are found by their names and keep the contract."""
    for name, text in {**EXAMPLE, "plain.py": block("adding-a-backend.md", "python")}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    out = run(RUN_BACKENDS, tmp_path, "plain or example")
    passed, skipped = (int(n) for n in re.search(r"(\d+) passed(?:, (\d+) skipped)?", out).groups(0))
    assert passed >= 2 * 25 and skipped == 2 * 4, out        # NumPy has no caches in blocks, nor in BF16
