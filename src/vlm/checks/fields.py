"""Checks every field of a configuration by the rule in its metadata, see `vlm.config.rules`.

Imports siblings in `vlm.config` only.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any

from vlm.config.rules import Bounds, Choices, get_rule, is_nullable
from vlm.config.shown import shorten
from vlm.config.suggestions import suggest_value


class ConfigError(ValueError):
    """A configuration that cannot be run: the key, its value, and what is allowed; long values are shortened."""

    def __init__(self, message: str):
        super().__init__(shorten(message))


class RunFailed(RuntimeError):
    """A run that failed; the message explains the reason, and what to do."""


def check_fields(node: object, prefix: str = "") -> None:
    """Refuse a dataclass of the schema with a value that its field does not allow.

    Args:
        node: the dataclass.
        prefix: the section of the keys, as the user wrote it: `inference.`.

    Raises:
        ConfigError: with the key, the value and what is allowed.
    """
    for problem in _field_problems(node, prefix):
        raise ConfigError(problem)


def _field_problems(node: Any, prefix: str) -> Iterator[str]:
    for field in fields(node):
        key, value, rule = f"{prefix}{field.name}", getattr(node, field.name), get_rule(field)
        if any(map(UNWRITABLE.search, _texts_of(value))):
            yield f"{key}={value!r}: a text without zero bytes and bytes that are not UTF-8 is needed"
        if is_dataclass(value):
            yield from _field_problems(value, f"{key}.")
        elif isinstance(value, list | dict):
            for name, child in value.items() if isinstance(value, dict) else enumerate(value):
                if is_dataclass(child):
                    yield from _field_problems(child, f"{key}.{name}.")
        if rule is None or (value is None and (is_nullable(field) or field.type is Any)):
            continue
        if isinstance(value, list):
            for item in value:
                if not rule.allows(item):
                    yield f"{key}={item}: {rule.message(nullable=False)}{_suggest(item, rule, key)}"
        elif not rule.allows(value):
            yield f"{key}={format_value(value)}: {rule.message(is_nullable(field))}{_suggest(value, rule, key)}"


def _suggest(value: object, rule: Choices | Bounds, key: str) -> str:
    """Return the nearest allowed value, as the end of a message."""
    suggestion = suggest_value(value, rule.names, key) if isinstance(rule, Choices) else ""
    return f".{suggestion}" if suggestion else ""


UNWRITABLE = re.compile("[\0\ud800-\udfff]")
"""Characters that paths and files must not have: the zero byte, and surrogates from bytes that are not UTF-8."""


def _texts_of(value: object) -> Iterator[str]:
    """Yield a text, or the texts in lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(map(_texts_of, chain(value.keys(), value.values())))
    elif isinstance(value, list):
        yield from chain.from_iterable(map(_texts_of, value))


def format_value(value: object) -> str:
    """Return a value as YAML."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def texts_by_key(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted key and value of each text in a dataclass of the schema."""
    for field in fields(node):
        value, key = getattr(node, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            yield from texts_by_key(value, f"{key}.")
        elif isinstance(value, str):
            yield key, value
