"""What changed between the saved run and the run that resumes it: the changed keys, and what each change means."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path

from vlm.checks.fields import format_value
from vlm.config.recorded import current_key
from vlm.config.schema import RunConfig
from vlm.train.resume.key_classes import KeyClass, class_of
from vlm.train.resume.record import RunRecord


class Missing(Enum):
    """The value of a key that one of two runs does not have; it is the same object on every rank."""

    MISSING = "(none)"


MISSING = Missing.MISSING

MAX_LISTED = 20
"""Maximum number of changes that a message lists."""

MAX_VALUE_LENGTH = 120
"""Maximum number of characters of a value in a message."""


@dataclass(frozen=True)
class Change:
    """A key with its values before and now; `MISSING` if there was or is none."""

    key: str
    before: object
    now: object
    kind: KeyClass

    def values(self) -> list[object]:
        """Return both values for JSON: null if there is none."""
        return [None if value is MISSING else value for value in (self.before, self.now)]

    def __str__(self) -> str:
        return f"{self.key}: {_format(self.before)} -> {_format(self.now)}"


def compare_settings(before: RunRecord, now: RunRecord, config: RunConfig) -> list[Change]:
    """Return the changed keys of the configuration, code, versions and number of ranks.

    Keys that the earlier record does not have are ignored.
    """
    found = []
    was, is_now = ({current_key(key): value for key, value in _flatten(record.config)} for record in (before, now))
    defaults = dict(_flatten(asdict(RunConfig())))
    for key in dict.fromkeys([*was, *is_now]):
        old, new = was.get(key, MISSING), is_now.get(key, MISSING)
        if old is MISSING and (not was or new == defaults.get(key, MISSING)):
            continue  # a key that is newer than the record
        kind = class_of(key, config)
        if kind is not KeyClass.START and _differ(old, new):
            found.append(Change(key, old, new, kind))
    for name in ("code", "versions"):
        found += _compare_facts(name, getattr(before, name), getattr(now, name), KeyClass.SAFE)
    if before.world_size != now.world_size:
        found.append(Change("world_size", before.world_size, now.world_size, KeyClass.CHANGES_RUN))
    return found


WORLD_KEYS = (
    "world_size",
    "trainer.per_device_train_batch_size",
    "trainer.gradient_accumulation_steps",
    "trainer.sharding",
    "trainer.deepspeed",
)
"""Keys whose change is safe if the steps of another world have the same samples."""


def take_another_world(changes: Sequence[Change]) -> list[Change]:
    """Mark changes of ranks and sharding as safe, since the steps have the same samples in the same order."""
    return [replace(change, kind=KeyClass.SAFE) if change.key.startswith(WORLD_KEYS) else change for change in changes]


def compare_data(before: RunRecord, now: RunRecord, *, streams: bool = False) -> list[Change]:
    """Return the differences of the data; if the data of either run are not known, nothing is compared.

    If the training records are a stream, its positions refer to the earlier files.
    """
    changes = _compare_facts("data", before.data, now.data, KeyClass.CHANGES_RUN) if before.data else []
    return [
        replace(change, kind=KeyClass.IMPOSSIBLE) if streams and change.key.startswith("data.train.") else change
        for change in changes
    ]


def _differ(old: object, new: object) -> bool:
    """Return whether two values of a key differ; a missing value counts as null."""
    return (None if old is MISSING else old) != (None if new is MISSING else new)


def _compare_facts(
    section: str, before: Mapping[str, object], now: Mapping[str, object], kind: KeyClass
) -> list[Change]:
    was, is_now = dict(_flatten(before)), dict(_flatten(now))
    keys = [key for key in dict.fromkeys([*was, *is_now]) if section == "data" or (key in was and key in is_now)]
    values = [(key, was.get(key, MISSING), is_now.get(key, MISSING)) for key in keys]
    return [Change(f"{section}.{key}", old, new, kind) for key, old, new in values if old != new]


def _flatten(node: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the dotted keys of nested mappings with their values; an empty mapping has none."""
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _format(value: object) -> str:
    if value is MISSING:
        return MISSING.value
    text = format_value(value)
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[:MAX_VALUE_LENGTH]}…"


def list_changes(changes: Sequence[Change]) -> str:
    """Return changes as lines of a message."""
    lines = [f"  {change}" for change in changes[:MAX_LISTED]]
    return "\n".join([*lines, *([f"  … and {len(changes) - MAX_LISTED} more"] if len(changes) > MAX_LISTED else [])])


ANEW = (
    "choose another trainer.output_dir, or start over in this one with trainer.resume_from_checkpoint=never, which "
    "sets the earlier run aside"
)
"""What to do if a run cannot be resumed."""


def refuse_changes(changes: Sequence[Change], checkpoint: Path, *, accepts: bool) -> None:
    """Refuse changes with which a run cannot be resumed, or that were not accepted.

    Args:
        changes: the changes.
        checkpoint: the checkpoint to resume from.
        accepts: whether changes that affect training are accepted.

    Raises:
        ValueError: with the changed keys and what to do.
    """
    if impossible := [change for change in changes if change.kind is KeyClass.IMPOSSIBLE]:
        raise ValueError(
            f"{checkpoint} cannot be resumed with other values of these keys:\n{list_changes(impossible)}\n"
            f"Restore their earlier values, {ANEW}; to begin a new stage, set trainer.from_pretrained=…/final"
        )
    changing = [change for change in changes if change.kind is KeyClass.CHANGES_RUN]
    if changing and not accepts:
        raise ValueError(
            f"{checkpoint} belongs to a run with other settings:\n{list_changes(changing)}\n"
            f"Restore their earlier values, or accept the new ones from here on with trainer.resume_changes=accept, or "
            f"{ANEW}"
        )


def refuse_changes_of_done(changes: Sequence[Change], final: Path) -> None:
    """Refuse changes of a finished run that would have an effect.

    Raises:
        ValueError: with the changed keys and what to do.
    """
    if changing := [change for change in changes if change.kind is not KeyClass.SAFE]:
        raise ValueError(
            f"{final} belongs to a run that is done and had other settings:\n{list_changes(changing)}\n"
            f"Nothing is left to train with the new ones: {ANEW}"
        )
