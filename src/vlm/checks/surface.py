"""What a configuration may do depends on where it comes from: only the command line may run code.

Everything else that accepts keys from people, such as the page, calls `check_surface` before it uses a configuration.
The composed values are checked, however the overrides were spelled. Fields say in their metadata what their values can
reach (`vlm.config.rules.Reach`). Imports neither torch nor a model.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vlm.checks.fields import ConfigError, format_value
from vlm.config.named import is_custom_name
from vlm.config.rules import Reach, get_reach
from vlm.config.secrets import MASK, is_secret_key, mask


@dataclass(frozen=True)
class Reaching:
    """A key of a configuration whose value reaches beyond the run."""

    key: str
    value: object
    reach: Reach

    def __str__(self) -> str:
        """Return the error message."""
        value = MASK if is_secret_key(self.key) else mask(format_value(self.value))
        return f"{self.key}={value}: it {self.reach.effect}, so it can be set on the command line only"


def find_reaching(config: object) -> Iterator[Reaching]:
    """Yield the keys of a configuration, a dataclass of the schema, whose values reach beyond the run."""
    for key, value, reach in iter_reach(config, ""):
        items = value if isinstance(value, list) else [value]
        if any(item is not None and not reach.is_harmless(item) for item in items):
            yield Reaching(key, value, reach)


def check_surface(config: object, *, allowed: Collection[str] = ()) -> None:
    """Refuse a configuration that does not come from the command line but has values that only it may set.

    Args:
        config: the composed configuration, as a dataclass of the schema.
        allowed: keys that the caller restricts itself.

    Raises:
        ConfigError: with the key, its value and what it would do.
    """
    for found in find_reaching(config):
        if found.key not in allowed:
            raise ConfigError(str(found))


def check_plain_values(composed: DictConfig) -> None:
    """Refuse a composed configuration with an interpolation, which could read the environment or a file.

    The packaged YAML files have none. Overrides can spell one in many ways, so the composed values are checked.

    Raises:
        ConfigError: with its key; its value is not resolved.
    """
    for key in _find_interpolations(OmegaConf.to_container(composed, resolve=False)):
        raise ConfigError(f"{key}: ${{…}} is not filled in here; write the value itself")


def named_by_user(config: object) -> frozenset[str]:
    """Return the names `package.module:attribute` in the fields that accept them; see `permit_names`."""
    names: set[str] = set()
    for _, value, reach in iter_reach(config, ""):
        if reach.runs_code:
            items = value if isinstance(value, list) else [value]
            names |= {item for item in items if isinstance(item, str) and is_custom_name(item)}
    return frozenset(names)


def iter_reach(node: Any, prefix: str) -> Iterator[tuple[str, Any, Reach]]:
    """Yield key, value and reach of each field with a reach, in a dataclass and all nested ones."""
    for field in fields(node):
        key, value, reach = f"{prefix}{field.name}", getattr(node, field.name), get_reach(field)
        if reach is not None:
            yield key, value, reach
        if is_dataclass(value):
            yield from iter_reach(value, f"{key}.")
        elif isinstance(value, list | dict):
            for name, child in value.items() if isinstance(value, dict) else enumerate(value):
                if is_dataclass(child):
                    yield from iter_reach(child, f"{key}.{name}.")


def _find_interpolations(node: object, path: str = "") -> Iterator[str]:
    """Yield the keys of a composed configuration whose values are interpolations, also among the keys of mappings."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, child in items:
        key = f"{path}.{name}" if path else str(name)
        if "${" in str(name) or (isinstance(child, str) and "${" in child):
            yield key
        else:
            yield from _find_interpolations(child, key)
