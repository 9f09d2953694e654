"""Writes docs/configuration.md from the schema: `make docs`. Imports no torch."""

import ast
import inspect
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from vlm.checks.surface import iter_reach
from vlm.config import dataset_schema, distillation_schema, model_schema, preference_schema, schema, serving_schema
from vlm.config.rules import Choices, get_rule

CLASSES = {
    module.__name__: {
        node.name: node.body for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ClassDef)
    }
    for module in (schema, model_schema, dataset_schema, distillation_schema, preference_schema, serving_schema)
}
"""Module -> class -> the statements of its body."""
PAGE = Path(__file__).parent / "configuration.md"
HEAD = """# Configuration

This page lists every key of a run. `make docs` generates it from
[src/vlm/config/schema.py](../src/vlm/config/schema.py). Set a key on the command line
(`vlm -cn pretrain-smol trainer.max_steps=100`) or in a YAML file of your own. Choose a packaged group with a slash
(`model/connector=mlp`, `trainer/deepspeed=zero2`). `vlm -cn RUN --cfg job` shows what a run sets.

"""
PASSED_ON = """## trainer, passed on to transformers

These keys are passed to `transformers.TrainingArguments` unchanged; its
[documentation](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments) explains
them. The list is read from the installed version. An empty default is that of transformers.

"""
COMMAND_LINE_ONLY = """
## On the command line only

Some values of these keys run code, or affect more than the run that sets them. Only the command line and your own YAML
files can set them; [the page](web.md), for example, cannot.

"""
ROW = "| {} | {} | {} | {} | {} |\n"
PASSED_ROW = "| {} | {} | {} | {} |\n"


def write() -> str:
    """Return the page."""
    passed = [field for field in fields(schema.TrainerConfig) if field.name in schema.TRAINING_ARGUMENT_FIELDS]
    rows = (
        PASSED_ROW.format(f"`{field.name}`", type_name(field.type), default_text(field), allowed_text(field))
        for field in passed
    )
    header = PASSED_ROW.format("key", "type", "default", "allowed") + PASSED_ROW.format(*["---"] * 4)
    own = [*sections(schema.RunConfig, ""), *sections(serving_schema.ServingConfig, "serving")]
    page = HEAD + "".join(own) + PASSED_ON + header + "".join(rows)
    return page + COMMAND_LINE_ONLY + "".join(f"- `{key}`: {effect}\n" for key, effect in reaching_keys())


def reaching_keys() -> Iterator[tuple[str, str]]:
    """Yield the keys of which some values are taken on the command line only, with what these do."""
    config = schema.RunConfig()
    inner = {
        "dataset.sources.NAME": dataset_schema.MixtureSourceConfig(),
        "model.head.extra_heads.NAME": model_schema.HeadConfig(),
        "model.visual_encoder.extra_encoders.N": model_schema.EncoderConfig(),
    }
    for path, node in {"": config, **inner}.items():
        for key, _, reach in iter_reach(node, f"{path}." if path else ""):
            yield key, reach.effect


def sections(kind: type[Any], path: str) -> Iterator[str]:
    """Yield the section of a dataclass, then those of the dataclasses in its fields."""
    docs = field_docs(kind)
    own = [field for field in fields(kind) if field.name in docs or field.name not in schema.TRAINING_ARGUMENT_FIELDS]
    plain = [field for field in own if section_class(field) is None]
    if path:
        yield f"## {path}\n\n{' '.join((kind.__doc__ or '').split())}\n\n"
    if plain:
        yield ROW.format("key", "type", "default", "allowed", "meaning") + ROW.format(*["---"] * 5)
        for field in plain:
            meaning = " ".join(docs.get(field.name, "").split()).replace("|", "\\|")
            yield ROW.format(
                f"`{field.name}`", type_name(field.type), default_text(field), allowed_text(field), meaning
            )
        yield "\n"
    for field in own:
        if (nested := section_class(field)) is not None:
            yield from sections(nested, f"{path}.{field.name}" if path else field.name)
        elif (element := element_class(field)) is not None and not issubclass(kind, element):
            yield from sections(element, f"{path}.{field.name}.NAME")


def section_class(field: Field[Any]) -> type[Any] | None:
    """Return the dataclass that a field holds, or None."""
    factory = field.default_factory
    return factory if isinstance(factory, type) and is_dataclass(factory) else None


def element_class(field: Field[Any]) -> type[Any] | None:
    """Return the dataclass that the lists or mappings of a field hold, or None."""
    return next((kind for kind in get_args(field.type) if isinstance(kind, type) and is_dataclass(kind)), None)


def field_docs(kind: type[Any]) -> dict[str, str]:
    """Return field -> its docstring, those of the bases included."""
    docs = {}
    for base in reversed([base for base in kind.__mro__ if base.__module__ in CLASSES]):
        body = CLASSES[base.__module__].get(base.__name__, [])
        for line, after in pairwise(body):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                value = after.value if isinstance(after, ast.Expr) else None
                docs[line.target.id] = value.value if isinstance(value, ast.Constant) else ""
        if body and isinstance(body[-1], ast.AnnAssign) and isinstance(body[-1].target, ast.Name):
            docs[body[-1].target.id] = ""
    return docs


def type_name(kind: Any) -> str:
    """Return the name of a type in YAML."""
    if isinstance(kind, UnionType):
        return " or ".join("null" if option is NoneType else type_name(option) for option in get_args(kind))
    if get_origin(kind) is list:
        return "list of " + type_name(get_args(kind)[0])
    if get_origin(kind) is dict or is_dataclass(kind):
        return "mapping"
    return {str: "string", int: "integer", float: "number", bool: "boolean", Any: "any"}[kind]


def default_text(field: Field[Any]) -> str:
    """Return the default of a field as it is written in YAML."""
    if field.default == model_schema.MISSING:
        return "required"
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value is None:
        return "" if field.name in schema.TRAINING_ARGUMENT_FIELDS else "null"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def allowed_text(field: Field[Any]) -> str:
    """Return the values that a field allows besides null."""
    rule = get_rule(field)
    if rule is None:
        return ""
    if isinstance(rule, Choices):
        return ", ".join(f"`{name}`" for name in (*rule.names, *([rule.custom] if rule.custom else [])))
    return rule.text


if __name__ == "__main__":
    PAGE.write_text(write(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
