"""Who may import whom: read from the source."""

import ast
from pathlib import Path

import pytest

import vlm

SOURCE = Path(vlm.__file__).parent
MAY = {
    "models": {"models"},
    "config.schema": set(),
    "config.check": {"config.schema"},
    "data": {"data", "config.schema"},
    "build": {"models", "config.schema", "data"},
    "inference": {"inference", "models", "data", "config.schema"},
    "train": {"train", "build", "data", "config.schema", "models", "inference.generate", "inference.metrics"},
}
EVERYTHING = ("__init__", "__main__", "cli", "demo", "tiny")
"""The entry points."""


def modules() -> list[tuple[str, Path]]:
    files = sorted(SOURCE.rglob("*.py"))
    return [(".".join(file.relative_to(SOURCE).with_suffix("").parts), file) for file in files]


def imported(file: Path) -> set[str]:
    """The modules of `vlm` that a file imports, `vlm.` taken off."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return {name.removeprefix("vlm.") for name in names if name.split(".")[0] == "vlm"}


def within(name: str, allowed: set[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


@pytest.mark.parametrize(("name", "file"), modules(), ids=[name for name, _ in modules()])
def test_imports_keep_to_the_frame(name: str, file: Path):
    if name in EVERYTHING:
        return
    rule = next((rule for rule in MAY if within(name, {rule})), None)
    assert rule is not None or name == "config.__init__", f"{name} belongs to no room"
    for other in imported(file):
        assert within(other, MAY[rule or "config.schema"]), f"{name} may not import vlm.{other}"


def test_hub_code_imports_its_siblings_in_the_one_form_that_travels():
    for file in (SOURCE / "models").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert node.module is not None, f"{file.name}: write `from .x import Y`"
