"""A name stands where what it names is decided: ops in declarations, a step's inputs in the step, tensors and keys in models and dialects,
numbers of formats in one table."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence

import pytest
from sources import package, read, Source, within, without

from pyengine import dtype
from pyengine.graph.op import REGISTRY
from pyengine.models import architectures
from pyengine.ops import linear

STEP = "pyengine/programs/step.py"

# -- backends name no op --------------------------------------------------------------------------------------------------


def ops_named(files: Sequence[Source], ops: Iterable[str]) -> list[str]:
    """Ops that backends name: as texts, as attributes of `ops`, or imported."""
    known, found = set(ops), []
    for f in within(files, "pyengine/backends/"):
        found += [f"{f.path}:{line}: {text!r}" for line, text in f.strings() if text in known]
        for node in ast.walk(f.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ops" and node.attr in known:
                found.append(f"{f.path}:{node.lineno}: ops.{node.attr}")
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyengine.ops"):
                found += [f"{f.path}:{node.lineno}: {a.name} of {node.module}" for a in node.names if a.name in known]
    return found


def test_backends_name_no_op() -> None:
    assert len(REGISTRY) > 20 and "linear" in REGISTRY and linear.name == "linear"
    assert ops_named(package(), REGISTRY) == []


@pytest.mark.parametrize("text", ['PRODUCTS = {"linear"}', "from pyengine import ops\nf = ops.linear", "from pyengine.ops.matmul import linear"])
def test_an_op_named_by_a_backend_is_found(text: str) -> None:
    planted = [Source("pyengine/backends/cpu/x.py", text), Source("pyengine/compiler/x.py", text)]
    assert len(found := ops_named(planted, REGISTRY)) == 1 and "backends/cpu/x.py" in found[0] and "linear" in found[0]


# -- a step's inputs ------------------------------------------------------------------------------------------------------

DECLARES = {"input", "table", "state", "_put"}               # what takes a name of an input, table or cache in the step's file
TOWERS = "pyengine/programs/towers.py", "pyengine/nn/texts.py"
ORDINARY = {"table", "seq", "lo", "hi", "cells"}             # words of policies (`InputSpec`), arguments of ops, kinds of leaves


def names_of_step(step: Source) -> set[str]:
    """Names, and the constant parts of made-up names, that the step's file gives to inputs, tables and caches."""
    found = set()
    for node in ast.walk(step.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in DECLARES and node.args:
            found |= {c.value for c in ast.walk(node.args[0]) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found.add(node.value.value)                      # HEAD
        if isinstance(node, ast.FunctionDef) and node.name == "_states":
            found |= {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
    return found - ORDINARY - {"."}


def inputs_named(files: Sequence[Source]) -> list[str]:
    """Names of a step's inputs and caches outside its file. Encoders declare inputs of their own, in models; towers in their program's file."""
    step = next(f for f in files if f.path == STEP)
    names, found = names_of_step(step), []
    for f in without(files, STEP, *TOWERS, "pyengine/models/"):
        keys = {id(k) for d in ast.walk(f.tree) if isinstance(d, ast.Dict) for k in d.keys}          # of results as JSON, of messages
        for node in ast.walk(f.tree):
            if isinstance(node, ast.Constant) and node.value in names and id(node) not in f.documented | keys:
                found.append(f"{f.path}:{node.lineno}: {node.value!r}")
    return found


def test_a_steps_inputs_are_named_in_one_file() -> None:
    names = names_of_step(next(f for f in package() if f.path == STEP))
    assert {"ids", "positions", "media", "wanted", "head", "across.rows", "_wanted", ".table", "blk.", ".k", ".v"} <= names
    assert inputs_named(package()) == []


@pytest.mark.parametrize("text", ['program.inputs["ids"][:n] = ids', 'def f(name): return name == "head"', 'x = f"{name}.table"'])
def test_an_input_named_elsewhere_is_found(text: str) -> None:
    planted = [*within(package(), STEP), Source("pyengine/engine/x.py", text), Source("pyengine/models/x.py", text)]
    assert len(found := inputs_named(planted)) == 1 and found[0].startswith("pyengine/engine/x.py:1")


# -- architectures, tensors, keys -----------------------------------------------------------------------------------------

AT_HOME = ("pyengine/models/", "pyengine/nn/", "pyengine/files/dialects.py", "pyengine/text/", "pyengine/chat/defaults.py")
TENSOR = (r".*_exps\.?|.*_shexp\.?|patches|patch_embd.*|token_embd|output_norm|attn_\w+|ffn_\w+|rope_(freqs|factors_\w+)"
          r"|v\.|mm\.?|v\.(blk|patch)\..*")
KEY = r"clip|clip\..*"


def architecture_names(kinds: Iterable[str]) -> str:
    """A pattern of texts that begin with an architecture's name, or that of its family without digits behind, if that is more than a letter.
    Names of three letters are those of no word that goes on ("opt" of "option")."""
    families = {family for k in kinds if len(family := k.rstrip("0123456789")) > 1}
    return "|".join(re.escape(k) + ("(?![a-z]).*" if len(k) < 4 else ".*") for k in sorted({*kinds, *families, "clip", "siglip", "pixtral"}))


def model_names(files: Sequence[Source], kinds: Iterable[str]) -> list[str]:
    """Names of architectures, tensors and keys of encoders outside their homes: texts without blanks that are such a name."""
    pattern = re.compile(f"({architecture_names(kinds)}|{TENSOR}|{KEY})")
    return [f"{f.path}:{line}: {text!r}" for f in without(files, *AT_HOME) for line, text in f.strings()
            if re.fullmatch(r"[\w.*]+", text) and pattern.fullmatch(text)]


def test_architectures_tensors_and_keys_are_named_at_home() -> None:
    assert model_names(package(), architectures()) == []


@pytest.mark.parametrize("text", ["gemma3", "qwen2.5", "llama", "ffn_gate_exps", "_exps.", "patches", "clip",
                                  "clip.vision.image_size", "pixtral", "attn_q", "mm"])
def test_a_name_far_from_home_is_found(text: str) -> None:
    planted = [Source(f"pyengine/{where}.py", f"x = name.startswith({text!r})") for where in ("memory/x", "models/x", "files/dialects")]
    found = model_names(planted, "llama gemma3 qwen2 qwen2vl".split())
    assert found == [f"pyengine/memory/x.py:1: {text!r}"]
    assert model_names([Source("pyengine/cli/x.py", "a = 'llama models'; b = 'patch_size'; c = 'a picture in patches'; d = 'option'")], ["llama", "opt"]) == []


# -- formats --------------------------------------------------------------------------------------------------------------

_BRACKET = re.compile(r"[({]([^(){}]*)[)}]")


def format_facts(files: Sequence[Source]) -> list[str]:
    """Numbers of a format beside its name: its id, or two of id, elements and bytes of a block."""
    found = []
    for f in without(files, "pyengine/dtype.py"):
        code = re.sub(r"/\*.*?\*/|//[^\n]*", lambda m: "\n" * m.group().count("\n"), f.text, flags=re.S)
        for m in _BRACKET.finditer(code):
            words = re.findall(r"\w+", m.group(1))
            for i, word in enumerate(words):
                d = _FORMATS.get(word.strip("_").upper().removeprefix("PE_"))
                numbers = [int(w) for w in words[i + 1 : i + 5] if w.isdigit()]
                if d is not None and len(set(numbers) & {d.id, d.block, d.nbytes}) >= 2:
                    found.append(f"{f.path}:{code.count(chr(10), 0, m.start()) + 1}: {m.group()[:60]}")
        for m in re.finditer(r"\b(?:PE_)?([A-Z]+\d\w*)\s*=\s*(\d+)\b", code):
            d = _FORMATS.get(m.group(1))
            if d is not None and int(m.group(2)) in (d.id, d.nbytes):
                found.append(f"{f.path}:{code.count(chr(10), 0, m.start()) + 1}: {m.group()}")
    return found


_FORMATS = {t.name.upper(): t for t in dtype.DTYPES if t.block > 1}


def test_numbers_of_formats_are_in_one_table() -> None:
    assert len(_FORMATS) > 15
    assert format_facts([*package(), *read("csrc/**/*.[ch]", "csrc/**/*.cpp", "converters/**/*.py", "bench/*.py")]) == []


@pytest.mark.parametrize("path, text", [
    ("csrc/cpu/x.c", "static const int t[][2] = {\n  {PE_Q4_0, 32, 18}};"), ("csrc/x.h", "enum { PE_Q6_K = 14 };"),
    ("csrc/cpu/x.h", "#define FORMATS(X) X(Q8_0, 8, 32, 34)"), ("pyengine/x.py", "T = [('Q4_K', 256, 144)]")])
def test_numbers_of_formats_elsewhere_are_found(path: str, text: str) -> None:
    assert len(found := format_facts([Source(path, text)])) == 1 and found[0].startswith(path)
    assert format_facts([Source("csrc/x.c", "/* Q4_0: (Q4_0, 32, 18) */ ENCODER(Q4_0, 32, q4_0) int x = (PE_BLOCK_Q4_0, 3);")]) == []

# -- test files ---------------------------------------------------------------------------------------------------------------


def twice(paths: Iterable[str]) -> list[str]:
    """Names that several test files have: pytest imports them by their names alone, and cannot collect them together."""
    names = [path.rpartition("/")[2] for path in paths]
    return sorted({name for name in names if names.count(name) > 1})


def test_no_two_test_files_have_one_name() -> None:
    assert twice(f.path for f in read("tests/*/test_*.py")) == []


def test_a_name_of_two_test_files_is_found() -> None:
    assert twice(["tests/a/test_x.py", "tests/b/test_x.py", "tests/b/test_xy.py"]) == ["test_x.py"]
