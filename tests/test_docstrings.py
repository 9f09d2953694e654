"""Everything with a public name says what it is: classes, functions, methods. What is within functions is private."""

import ast
from collections.abc import Iterator
from pathlib import Path

import vlm

SOURCE = Path(vlm.__file__).parent
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def find_undocumented(node: ast.AST, path: str = "") -> Iterator[str]:
    """Yield the public names below a node that have no docstring, each with those that it stands in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            name = f"{path}.{child.name}".lstrip(".")
            if not child.name.startswith("_") and not ast.get_docstring(child):
                yield name
            if isinstance(child, ast.ClassDef):
                yield from find_undocumented(child, name)
        else:
            yield from find_undocumented(child, path)


def test_a_public_name_without_docstring_is_found():
    code = 'class A:\n    """A."""\n    def b(self):\n        if self:\n            def c(): ...\n    def _d(self): ...'
    assert list(find_undocumented(ast.parse(code))) == ["A.b"]


def test_every_public_name_has_a_docstring():
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 100
    missing = {
        f"{file.relative_to(SOURCE)}: {name}"
        for file in files
        for name in find_undocumented(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert not missing
