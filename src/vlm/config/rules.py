"""Which values a field of the schema may have: `field(default=…, metadata=at_least(1))`, `metadata=choices("a", "b")`.

`vlm.checks.fields` checks every field by its rule, and the configuration reference lists it. A field whose type has
`None` may be null besides; the rule of a list is that of its elements. Imports its sibling `named` only.
"""

from collections.abc import Iterable
from dataclasses import Field, dataclass
from math import inf
from typing import Any, get_args

from vlm.config.named import is_custom_name

Metadata = dict[str, "Choices | Bounds"]


@dataclass(frozen=True)
class Choices:
    """A closed list of names, and the form (`package.module:Class`) of a name for something of the user's own."""

    names: tuple[str, ...]
    custom: str | None = None

    def allows(self, value: object) -> bool:
        """Return whether a value that is not null is allowed."""
        return value in self.names or (self.custom is not None and isinstance(value, str) and is_custom_name(value))

    def message(self, nullable: bool) -> str:
        """Return what is allowed, in words."""
        listing = ", ".join([*(["null"] if nullable else []), *self.names])
        return f"allowed are {listing}" + (f", or {self.custom} for your own" if self.custom else "")


@dataclass(frozen=True)
class Bounds:
    """A range of numbers, with its description in words. An end that is open does not belong to the range."""

    text: str
    lower: float
    upper: float = inf
    is_open_below: bool = False
    is_open_above: bool = False

    def allows(self, value: Any) -> bool:
        """Return whether a number is in the range."""
        above = value > self.lower if self.is_open_below else value >= self.lower
        return above and (value < self.upper if self.is_open_above else value <= self.upper)

    def message(self, nullable: bool) -> str:
        """Return what is needed, in words."""
        return f"{self.text}{', or null,' if nullable else ''} is needed"


def choices(names: Iterable[str], custom: str | None = None) -> Metadata:
    """Return the metadata of a field that takes one of these names; see `Choices`."""
    return {"rule": Choices(tuple(names), custom)}


def at_least(lower: int, text: str | None = None) -> Metadata:
    """Return the metadata of a field that takes a number from `lower` on."""
    return {"rule": Bounds(text or (f"at least {lower}" if lower else "0 or more"), lower)}


def above(lower: int) -> Metadata:
    """Return the metadata of a field that takes a number above `lower`."""
    return {"rule": Bounds(f"a number above {lower}", lower, is_open_below=True)}


def share(*, is_open_below: bool = False, is_open_above: bool = False) -> Metadata:
    """Return the metadata of a field that takes a number from 0 to 1."""
    text = "a share from 0 to below 1" if is_open_above else "a share from 0 to 1"
    if is_open_below:
        text = "a share above 0, at most 1"
    return {"rule": Bounds(text, 0, 1, is_open_below, is_open_above)}


def get_rule(field: Field[object]) -> Choices | Bounds | None:
    """Return the rule of a field's values; None: its type is all that there is to check."""
    return field.metadata.get("rule")


def is_nullable(field: Field[object]) -> bool:
    """Return whether the type of a field has `None`."""
    return type(None) in get_args(field.type)
