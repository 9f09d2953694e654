"""The fields of the installed `transformers.TrainingArguments`, read out of its source: importing it takes seconds.

Imports nothing of `vlm`.
"""

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any


@cache
def read_training_argument_fields() -> dict[str, tuple[object, object]]:
    """Return name -> (type, default) of every field of the installed `TrainingArguments`, without importing it.

    Types that OmegaConf cannot hold (unions of several, enums) become `Any`; a default that is no literal becomes
    `None`, which leaves the field to `TrainingArguments`.
    """
    tree = ast.parse(_transformers_source("training_args.py"))
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments")
    simple = {"str": str, "int": int, "float": float, "bool": bool}
    arguments: dict[str, tuple[object, object]] = {}
    for node in body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        options = [option.strip() for option in ast.unparse(node.annotation).split("|")]
        concrete = [simple.get(option) for option in options if option != "None"]
        kind: Any = concrete[0] if len(concrete) == 1 and concrete[0] else Any
        default = _literal_default(node.value)
        arguments[node.target.id] = (kind if default is not None or kind is Any else kind | None, default)
    return arguments


@cache
def read_training_argument_choices() -> dict[str, list[str]]:
    """Return name -> allowed values of each field of `TrainingArguments` that holds one of an enumeration's strings."""
    trees = [ast.parse(_transformers_source(name)) for name in ("training_args.py", "trainer_utils.py")]
    classes = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
    choices = {}
    for node in classes["TrainingArguments"].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            options = [option.strip() for option in ast.unparse(node.annotation).split("|")]
            if len(options) == 2 and options[1] == "str" and options[0] in classes:
                lines = (line.value for line in classes[options[0]].body if isinstance(line, ast.Assign))
                choices[node.target.id] = [line.value for line in lines if isinstance(line, ast.Constant)]
    return choices


def _transformers_source(name: str) -> str:
    """Return the text of a file of the installed transformers, which is not imported."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], name).read_text(encoding="utf-8")


def _literal_default(value: ast.expr | None) -> object:
    """Return the default in `name: type = field(default=…)` or `= …` where it is a literal, else None."""
    if isinstance(value, ast.Call):
        value = next((keyword.value for keyword in value.keywords if keyword.arg == "default"), None)
    try:
        return None if value is None else ast.literal_eval(value)
    except ValueError:
        return None
