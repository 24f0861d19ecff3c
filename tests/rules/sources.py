"""What rules read: files of this repository as text and syntax trees, or planted ones that break a rule on purpose."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ("pyengine/_abi.py", "csrc/gen/")                # by the build; what writes them is held to the rules


@dataclass(frozen=True)
class Source:
    """A file: its path from the repository's root, with slashes, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree of a Python file."""
        return ast.parse(self.text, self.path)

    @cached_property
    def documented(self) -> set[int]:
        """Ids of the constants that are docstrings."""
        found = set()
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node) is not None:
                found.add(id(node.body[0].value))
        return found

    def strings(self) -> Iterator[tuple[int, str]]:
        """Line and value of each string constant, pieces of f-strings too, docstrings not."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in self.documented:
                yield node.lineno, node.value

    def prose(self) -> Iterator[tuple[int, str]]:
        """Line and text of comments and docstrings; all lines of a page."""
        if self.path.endswith(".py"):
            for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
                if token.type == tokenize.COMMENT:
                    yield token.start[0], token.string
            for node in ast.walk(self.tree):
                if isinstance(node, ast.Constant) and id(node) in self.documented:
                    yield from enumerate(node.value.split("\n"), node.lineno)
        elif self.path.endswith((".c", ".h", ".cpp")):
            for m in re.finditer(r"/\*.*?\*/|//[^\n]*", self.text, re.S):
                yield from enumerate(m.group().split("\n"), self.text.count("\n", 0, m.start()) + 1)
        else:
            yield from enumerate(self.text.split("\n"), 1)


def read(*patterns: str, root: Path = ROOT) -> list[Source]:
    """The files that match patterns such as "pyengine/**/*.py", without generated ones."""
    paths = sorted({p for pattern in patterns for p in root.glob(pattern) if p.is_file()})
    found = [(p.relative_to(root).as_posix(), p) for p in paths]
    return [Source(name, p.read_text()) for name, p in found if not name.startswith(GENERATED)]


def package() -> list[Source]:
    """All Python files of the library."""
    return read("pyengine/**/*.py")


def within(files: Sequence[Source], *folders: str) -> list[Source]:
    """Those whose path begins with one of these."""
    return [f for f in files if f.path.startswith(folders)]


def without(files: Sequence[Source], *folders: str) -> list[Source]:
    """The others."""
    return [f for f in files if not f.path.startswith(folders)]


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, ast.ClassDef | None]]:
    """Each function with its dotted name and the class that it is a method of."""
    def walk(node: ast.AST, prefix: str, owner: ast.ClassDef | None) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, ast.ClassDef | None]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield prefix + child.name, child, owner
                yield from walk(child, f"{prefix}{child.name}.", None)
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, f"{prefix}{child.name}.", child)
            else:
                yield from walk(child, prefix, owner)

    yield from walk(tree, "", None)
