"""The keys of a run as dotted names, found by walking the schema. Imports its siblings only."""

from collections.abc import Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from typing import TYPE_CHECKING

from vlm.config.schema import RunConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def dotted_keys() -> list[str]:
    """Return every key of a run that takes a value, with its section: `trainer.max_steps`."""
    return [*_find_keys(RunConfig, "")]


def find_field(key: str) -> Field[object] | None:
    """Return the field of a dotted key (`trainer.max_steps`), or None if there is no such key."""
    *steps, name = key.split(".")
    section = _find_section(steps)
    return None if section is None else next((field for field in fields(section) if field.name == name), None)


def _find_keys(section: "type[DataclassInstance]", prefix: str) -> Iterator[str]:
    for found in fields(section):
        if isinstance(found.default_factory, type) and is_dataclass(found.default_factory):
            yield from _find_keys(found.default_factory, f"{prefix}{found.name}.")
        else:
            yield f"{prefix}{found.name}"


def _find_section(steps: Sequence[str]) -> "type[DataclassInstance] | None":
    """Return the dataclass at a path into the schema."""
    node: type[DataclassInstance] = RunConfig
    for name in steps:
        found = next((field.default_factory for field in fields(node) if field.name == name), None)
        if not (isinstance(found, type) and is_dataclass(found)):
            return None
        node = found
    return node
