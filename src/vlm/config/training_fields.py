"""Reads the fields of `transformers.TrainingArguments` from its source, because importing it takes seconds.

Imports nothing of `vlm`.
"""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@cache
def read_training_argument_fields() -> dict[str, tuple[object, object]]:
    """Return name -> (type, default) of every field of the installed `TrainingArguments`, without importing it.

    Types that OmegaConf does not support (unions of several types, enums) become `Any`. A default that is not a literal
    becomes `None`, which leaves the default to `TrainingArguments`.
    """
    simple = {"str": str, "int": int, "float": float, "bool": bool}
    arguments: dict[str, tuple[object, object]] = {}
    for name, options, value in _read_annotations():
        concrete = [simple.get(option) for option in options if option != "None"]
        kind: Any = concrete[0] if len(concrete) == 1 and concrete[0] else Any
        default = _literal_default(value)
        arguments[name] = (kind if default is not None or kind is Any else kind | None, default)
    return arguments


@cache
def read_training_argument_choices() -> dict[str, list[str]]:
    """Return name -> allowed values of each field of `TrainingArguments` that holds one of an enumeration's strings."""
    choices = {}
    for name, (option, *others), _ in _read_annotations():
        if others == ["str"] and option in _read_classes():
            lines = (line.value for line in _read_classes()[option] if isinstance(line, ast.Assign))
            choices[name] = [line.value for line in lines if isinstance(line, ast.Constant)]
    return choices


@cache
def _read_classes() -> dict[str, list[ast.stmt]]:
    """Return class -> the statements of its body, from the installed transformers' source files about training."""
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.submodule_search_locations
    files = [Path(spec.submodule_search_locations[0], name) for name in ("training_args.py", "trainer_utils.py")]
    nodes = [node for file in files for node in ast.parse(file.read_text(encoding="utf-8")).body]
    return {node.name: node.body for node in nodes if isinstance(node, ast.ClassDef)}


def _read_annotations() -> Iterator[tuple[str, list[str], ast.expr | None]]:
    """Yield the name of each field of `TrainingArguments`, the types of its union, and what it is assigned."""
    for node in _read_classes()["TrainingArguments"]:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, ast.unparse(node.annotation).split(" | "), node.value


def _literal_default(value: ast.expr | None) -> object:
    """Return the default in `name: type = field(default=…)` or `= …` if it is a literal, else None."""
    if isinstance(value, ast.Call):
        value = next((keyword.value for keyword in value.keywords if keyword.arg == "default"), None)
    try:
        return None if value is None else ast.literal_eval(value)
    except ValueError:
        return None
