"""Every field of a configuration against the rule in its metadata, see `vlm.config.rules`.

Imports `vlm.config.rules` only.
"""

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from vlm.config.rules import get_rule, is_nullable


class ConfigError(ValueError):
    """A configuration that cannot be run: the key, its value, what is allowed."""


class RunFailed(RuntimeError):
    """A run that failed for a reason that its message explains, with what to do."""


def check_fields(node: object, prefix: str = "") -> None:
    """Refuse a dataclass of the schema that has a value which its field does not allow.

    Args:
        node: the dataclass.
        prefix: what stands before the keys where the user wrote them: `inference.`.

    Raises:
        ConfigError: with the key, the value and what is allowed.
    """
    for problem in _field_problems(node, prefix):
        raise ConfigError(problem)


def _field_problems(node: Any, prefix: str) -> Iterator[str]:
    for field in fields(node):
        key, value, rule = f"{prefix}{field.name}", getattr(node, field.name), get_rule(field)
        if is_dataclass(value):
            yield from _field_problems(value, f"{key}.")
        elif isinstance(value, list | dict):
            for name, child in value.items() if isinstance(value, dict) else enumerate(value):
                if is_dataclass(child):
                    yield from _field_problems(child, f"{key}.{name}.")
        if rule is None or (value is None and (is_nullable(field) or field.type is Any)):
            continue
        if isinstance(value, list):
            yield from (f"{key}={item}: {rule.message(nullable=False)}" for item in value if not rule.allows(item))
        elif not rule.allows(value):
            yield f"{key}={format_value(value)}: {rule.message(is_nullable(field))}"


def format_value(value: object) -> str:
    """Return a value as it is written in YAML."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
