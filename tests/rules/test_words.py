"""What comments, docstrings and pages say: paths and modules exist, functions are told in the imperative and classes by nouns."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from sources import functions, package, read, ROOT, Source

from pyengine.compiler import codegen

# -- paths ----------------------------------------------------------------------------------------------------------------

TOPS = ("pyengine", "csrc", "tests", "docs", "converters", "bench", "requirements")
_PATH = re.compile(rf"(?<![\w./~-])(?:{'|'.join(TOPS)})/[\w*<>{{}},./-]*[\w*>}}/]")
_MODULE = re.compile(r"(?<![\w./-])(?:pyengine|converters|bench)(?:\.[a-z_]\w*)+(?![\w/])")
_FILE = re.compile(r"(?<![\w./*<>-])(?:gen/(?:\w+/)?)?[a-z_]\w*\.(?:py|c|h|cpp)(?![\w/])")
MADE = ("csrc/gen", "pyengine/_abi", "pyengine/_engine")           # by the build, so they are in no checkout
# Bare names of other projects' files; with a folder before them they are none of ours anyway.
FOREIGN = re.compile(r"(modeling|modular|config|configuration|processing|preprocessing|image|vision|image_processing|video_processing|convert|run|feature_extraction)_\w+\.py"
                     r"|tokenization(_\w+)?\.py|(ggml|(ik_)?llama|clip|mtmd|sgemm|siglip)\w*\.(c|h|cpp)"
                     r"|(quants|tensor_mapping|vocab|gguf_reader|gguf_writer|constants|generation|model|functional)\.py")


def exists(path: str, root: Path) -> bool:
    """Say whether a file, folder or pattern of files is there; <name> and {a,b} stand for any name, and an ending may be left out."""
    pattern = re.sub(r"<[^>]*>|\{[^}]*\}|\*+", "*", path.rstrip("/."))
    return pattern.startswith(MADE) or any(True for end in ("", ".*") for _ in root.glob(pattern + end))


def module_exists(name: str, root: Path) -> bool:
    """Say whether a dotted name is a module, or a word that stands in one."""
    parts = re.sub(r"^pyengine\.(?=(converters|bench)\b)", "", name).split(".")          # installed inside of the library
    if "/".join(parts).startswith(MADE):
        return True
    for n in range(len(parts), 0, -1):
        base = root.joinpath(*parts[:n])
        file = base.with_suffix(".py") if base.with_suffix(".py").exists() else base / "__init__.py" if (base / "__init__.py").exists() else None
        if n == len(parts) and (file or base.is_dir()):
            return True
        if file:                                             # the rest are names in it, not a module that is not there
            return all(re.search(rf"\b{re.escape(p)}\b", file.read_text()) for p in parts[n : n + 1])
    return False


def missing_paths(files: Sequence[Source], generated: Iterable[str], root: Path = ROOT) -> list[str]:
    """Paths, modules and names of files in prose that are not there."""
    bare = {p.name for top in TOPS for p in (root / top).rglob("*.*")} | {p.name for p in root.glob("*.*")} | {Path(g).name for g in generated}
    known, found = {*generated, *(f"gen/{g}" for g in generated)}, []
    for f in files:
        for line, text in f.prose():
            text = re.sub(r"https?://\S+", "", text)
            wrong = [p for p in _PATH.findall(text) if not exists(p, root)]
            wrong += [m for m in _MODULE.findall(text) if not module_exists(m, root)]
            for name in () if f.path.endswith(".md") else _FILE.findall(text):           # pages show code, where x.c is no file
                there = name in known if name.startswith("gen/") else name in bare or FOREIGN.fullmatch(name)
                wrong += [] if there else [name]
            found += [f"{f.path}:{line}: {w}" for w in wrong]
    return found


def written_by_codegen(folder: Path) -> list[str]:
    """Names of the files that codegen writes, below csrc/gen."""
    (folder / "cpu").mkdir()
    (folder / "cpu" / "cpu.h").write_text("")
    codegen.generate(folder)
    return sorted(p.relative_to(folder / "gen").as_posix() for p in (folder / "gen").rglob("*") if p.is_file())


def test_what_comments_name_is_there(tmp_path) -> None:
    files = read("pyengine/**/*.py", "csrc/**/*.[ch]", "csrc/**/*.cpp", "csrc/**/*.py", "converters/**/*.py", "bench/*.py", "setup.py")
    assert missing_paths(files, written_by_codegen(tmp_path)) == []


def test_what_pages_name_is_there(tmp_path) -> None:
    assert missing_paths(read("*.md", "docs/*.md"), written_by_codegen(tmp_path)) == []


@pytest.mark.parametrize("path, text", [
    ("pyengine/x.py", "# see pyengine/planning.py"), ("pyengine/x.py", '"""`pyengine.planner` reads it."""'),
    ("csrc/cpu/x.c", "/* as in gen/params.h */"), ("csrc/cpu/x.c", "// declared in nowhere.h, not in pool.h"),
    ("docs/x.md", "The files of `csrc/vulkan/` are"), ("docs/x.md", "`pyengine.ops.conv3d`"),
    ("pyengine/x.py", "# gen/table.c is not gen/cpu/table.c"),
])
def test_a_path_to_nowhere_is_found(path: str, text: str, tmp_path) -> None:
    assert len(missing_paths([Source(path, text)], written_by_codegen(tmp_path))) == 1
    good = ("/* csrc/cpu/pool.c, gen/cpu/table.c, formats.h, pyengine.ops.linear, docs/adding-an-*.md, tests/models/test_<arch>.py, csrc/gen, "
            "modeling_llama.py, pyengine._engine, pyengine.converters.quantize */")
    assert missing_paths([Source("csrc/x.c", good)], ["formats.h", "cpu/table.c"]) == []


# -- imports --------------------------------------------------------------------------------------------------------------


def relative_imports(files: Sequence[Source]) -> list[str]:
    """Imports that name their module relatively. Only `converters` and `bench` do: they are installed under another name."""
    return [f"{f.path}:{n.lineno}" for f in files for n in ast.walk(f.tree) if isinstance(n, ast.ImportFrom) and n.level]


def test_imports_are_absolute() -> None:
    assert relative_imports(package()) == []


def test_a_relative_import_is_found() -> None:
    assert relative_imports([Source("pyengine/x.py", "import os\nfrom . import y\n\ndef f():\n    from ..nn import z\n")]) == [
        "pyengine/x.py:2", "pyengine/x.py:5"]


# -- docstrings -----------------------------------------------------------------------------------------------------------

# The verbs with which docstrings of functions begin; a new one is added here.
VERBS = frozenset("""
    accept add adjust align allocate allow answer append apply ask assert assign attend
    begin bind bring broadcast build calculate call cast centre check
    choose clean clear close collect combine compare compile compute connect continue convert copy count create cut decide declare decode
    dequantize derive describe detect detokenize determine discard divide do download draw drop dump encode end ensure estimate evaluate
    execute expand explain extend extract fetch fill filter find finish fit fold forget format fuse gather generate give go group guess hand
    handle hash hide hold identify ignore import insert install join keep lay leave let limit list load locate look lower
    make map mark match
    measure merge mix move multiply name normalize note offer open order pack pad parse pass pause pay permute pick place plan play point
    predict prepare preserve print process produce project prune put quantize quote raise read rebuild receive record reduce refuse register
    release reload remember remove render repeat replace replay report represent reserve reset resize resolve restore resume return reuse
    rewrite rotate round run sample save say scale scan scatter search see select send separate set settle share shift show skip sort split
    spread start state stop store stream strip sum swap switch take tell test tokenize trace train transform translate treat trim try turn
    unpack update use validate wait walk wrap write yield
    halve launch
    queue warn
""".split())
_THIRD = {f"{v}s" for v in VERBS} | {f"{v}es" for v in VERBS} | {f"{v[:-1]}ies" for v in VERBS if v.endswith("y")}
_NOUNS = {"name", "names", "list", "lists", "map", "maps", "state", "states", "order", "group", "groups", "cut", "cuts", "turn", "turns", "plan",
          "plans", "store", "stores", "record", "point", "points", "place", "places", "sample", "samples", "step", "steps", "scale", "mix",
          "test", "tests", "report", "reports", "stream", "streams", "share", "shares", "result", "switch", "match", "format", "formats",
          "launch", "launches"}


def first_word(text: str) -> str:
    """The first word of a docstring, in small letters; "" where it begins with something else."""
    m = re.match(r"[A-Za-z]+(?=[\s,.;:]|$)", text)
    return m.group().lower() if m else ""


def unheard(files: Sequence[Source]) -> list[str]:
    """Docstrings of functions that begin with no verb, and those of classes that begin with one.

    Properties are told as what they are, by a noun; the docstrings of declared ops are their formulas.
    """
    found = []
    for f in files:
        for name, node, _ in functions(f.tree):
            marks = {n.id if isinstance(n, ast.Name) else n.attr for d in node.decorator_list for n in [d.func if isinstance(d, ast.Call) else d]
                     if isinstance(n, (ast.Name, ast.Attribute))}
            text = ast.get_docstring(node)
            if text and not marks & {"property", "cached_property", "op", "setter"} and first_word(text) not in VERBS:
                found.append(f"{f.path}:{node.lineno}: {name}: {text.splitlines()[0][:60]}")
        for node in ast.walk(f.tree):
            text = ast.get_docstring(node) if isinstance(node, ast.ClassDef) else None
            if text and (word := first_word(text)) in VERBS | _THIRD and word not in _NOUNS and not text.startswith("See "):
                found.append(f"{f.path}:{node.lineno}: {node.name}: {text.splitlines()[0][:60]}")
    return found


def test_functions_are_told_in_the_imperative_and_classes_by_nouns() -> None:
    left = unheard(package())
    by_file = Counter(line.split(":")[0] for line in left)
    assert not left, "\n".join([f"{len(left)} are left", *(f"{n:4} {path}" for path, n in sorted(by_file.items())), *left])


def test_docstrings_of_the_other_form_are_found() -> None:
    text = '''
class A:
    """Keeps what it is given."""
    def f(self):
        """The value of a key."""
    def g(self):
        """Give the value of a key."""
    @property
    def h(self):
        """The value."""
    def k(self):
        """Returns it."""
class B:
    """What is kept; a name."""
class C:
    """Write a file."""
@op(inplace="x")
def scale(x):
    """x * factor."""
'''
    assert [line.split(": ")[1] for line in unheard([Source("pyengine/x.py", text)])] == ["A.f", "A.k", "A", "C"]
