"""Which values a field of the schema may have: `field(default=…, metadata=at_least(1))`, `metadata=choices("a", "b")`.

`vlm.checks.fields` checks every field by its rule, and the configuration reference lists the rules. A field may also be
null if its type includes `None`; the rule of a list applies to its elements. A field whose values can run code, or
reach files and addresses other than the run's own, also has a `Reach`: `metadata=at_least(1) | runs_code(…)`.
`vlm.checks.surface` accepts such values only from the command line and the user's own YAML. Imports its sibling `named`
only.
"""

from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass
from math import inf
from typing import Any, get_args

from vlm.config.named import is_custom_name

MAX_LISTED_VALUES = 16
"""The maximum number of values that a message lists; docs/configuration.md lists all."""

Metadata = dict[str, "Choices | Bounds | Reach"]


@dataclass(frozen=True)
class Choices:
    """A fixed list of names, and the form of a name for the user's own code (`package.module:Class`), if allowed."""

    names: tuple[str, ...]
    custom: str | None = None

    def allows(self, value: object) -> bool:
        """Return whether a value that is not null is allowed."""
        return value in self.names or (self.custom is not None and isinstance(value, str) and is_custom_name(value))

    def message(self, nullable: bool) -> str:
        """Return what is allowed, in words."""
        names = self.names if len(self.names) <= MAX_LISTED_VALUES else [*self.names[:MAX_LISTED_VALUES], "…"]
        listing = ", ".join([*(["null"] if nullable else []), *names])
        return f"allowed are {listing}" + (f", or {self.custom} for your own" if self.custom else "")


@dataclass(frozen=True)
class Bounds:
    """A range of numbers, with its description in words. An open end is not part of the range."""

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


@dataclass(frozen=True)
class Reach:
    """What values of a field do beyond the run itself; null is always harmless.

    Attributes:
        effect: what a value does, in words that follow `it`: `runs code from a repository`.
        is_harmless: returns whether a value (for lists: each element) does not have this effect.
        runs_code: whether the effect is that code runs; otherwise it reads or writes elsewhere.
    """

    effect: str
    is_harmless: Callable[[object], bool]
    runs_code: bool


def choices(names: Iterable[str], custom: str | None = None) -> Metadata:
    """Return the metadata of a field with one of these names; with `custom`, other names run code. See `Choices`."""
    rule = Choices(tuple(names), custom)
    return {"rule": rule} if custom is None else {"rule": rule} | imports_unless(rule.names.__contains__)


def runs_code(effect: str, is_harmless: Callable[[object], bool]) -> Metadata:
    """Return the metadata of a field whose values run code, except harmless ones; see `Reach`."""
    return {"reach": Reach(effect, is_harmless, runs_code=True)}


def reads_outside(effect: str, is_harmless: Callable[[object], bool]) -> Metadata:
    """Return the metadata of a field whose values read or write elsewhere, except harmless ones; see `Reach`."""
    return {"reach": Reach(effect, is_harmless, runs_code=False)}


def imports_unless(is_harmless: Callable[[object], bool]) -> Metadata:
    """Return the metadata of a field that accepts `package.module:attribute` in addition to harmless values."""
    return runs_code("imports a module, which runs code", is_harmless)


def is_plain_name(value: object) -> bool:
    """Return whether a value is a name of a table, and can name no module, file or address."""
    return isinstance(value, str) and value.replace("_", "").replace("-", "").isalnum()


def is_false(value: object) -> bool:
    """Return whether a value is `false`."""
    return value is False


def is_file_or_hub_name(value: object) -> bool:
    """Return whether a value is a path of this machine, or a data set on the Hub (`hf://…`)."""
    if not isinstance(value, str):
        return False
    path = value.removeprefix("hf://")
    return ":" not in path.partition("/")[0] and "://" not in path and "::" not in path


def never(value: object) -> bool:
    """Return False: no value of the field is harmless except null."""
    return False


FOLDER = reads_outside("writes to any folder", never)
"""The metadata of each folder that a run writes into."""


def at_least(lower: int, text: str | None = None) -> Metadata:
    """Return the metadata of a field that takes a number of at least `lower`."""
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
    """Return the rule of a field's values, or None if only its type is checked."""
    return field.metadata.get("rule")


def get_reach(field: Field[object]) -> Reach | None:
    """Return what values of a field do beyond the run itself, or None if they do nothing."""
    return field.metadata.get("reach")


def is_nullable(field: Field[object]) -> bool:
    """Return whether the type of a field includes `None`."""
    return type(None) in get_args(field.type)
