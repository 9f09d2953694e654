"""Fields that records of several formats have: their id, turns, system turn, group, and what is learned of a turn.

Imports the standard library and `sample` only.
"""

import math
from collections.abc import Sequence
from typing import Any

from vlm.data.sample import BadSample, Record, Turn

NEUTRAL_TEXTS = ("", "[]", "{}")
SUPERVISION_KEYS = ("weight", "loss", "loss_scale", "train", "training")
"""Keys of a turn that say whether its reply is trained on: of OpenAI's files, ms-swift's and axolotl's."""
SUPERVISION_KEY_SET = frozenset(SUPERVISION_KEYS)
SYSTEM_KEYS = ("system", "system_prompt")


def is_empty(value: object) -> bool:
    """Return whether a value is empty: None, false, a blank text, or a list or mapping of such values."""
    if value is None:  # as nearly always
        return True
    if isinstance(value, dict):
        return all(map(is_empty, value.values()))
    if isinstance(value, list):
        return all(map(is_empty, value))
    return value is False or (isinstance(value, str) and value.strip() in NEUTRAL_TEXTS)


def first_present(record: Record, *keys: str) -> Any:
    """Return the first value of a record's keys that is not None; None if there is none."""
    for key in keys:
        if (value := record.get(key)) is not None:
            return value
    return None


def read_id(record: object, *names: str) -> str:
    """Read the name of a record, which must be a mapping: its `id`, or the value of another key; else `?`."""
    if not isinstance(record, dict):
        raise BadSample("?", f"each record must be a JSON object, got {type(record).__name__}")
    name = first_present(record, "id", "question_id", "image_id", *names)
    return "?" if name is None else str(name)


def label_record(number: int, sample_id: str) -> str:
    """Return how messages name a record of a file: by its number from 0, and by its id if it has one."""
    return f"record {number}" if sample_id in ("", "?") else f"record {number} ({sample_id!r})"


def read_turn_list(record: Record, key: str, sample_id: str, kind: str) -> list[Any]:
    """Return the turns of a record; `kind` is what messages call one of them.

    Raises:
        BadSample: there are none, or the value is not a list.
    """
    if key not in record:
        raise BadSample(sample_id, f"it has no `{key}`; its keys are {', '.join(map(str, record))}")
    turns = record[key]
    if not isinstance(turns, list) or not turns:
        raise BadSample(sample_id, f"`{key}` must be a list of at least one {kind}")
    return turns


def read_supervision(turn: Record, role: str, where: str, sample_id: str) -> tuple[bool, float]:
    """Read whether a turn is trained on, and how much its loss counts: by default it is, and counts 1.

    The value of one of `SUPERVISION_KEYS` is true or false, or a number from 0 on; 0 and false are the same.

    Raises:
        BadSample: a value is neither, the values contradict each other, or a turn that is not a reply is to be trained
            on.
    """
    if SUPERVISION_KEY_SET.isdisjoint(turn):
        return True, 1.0
    given = {key: turn[key] for key in SUPERVISION_KEYS if turn.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, bool | int | float) or not 0 <= value < math.inf:
            allowed = "allowed are true, false, 0, or a weight above 0"
            raise BadSample(sample_id, f"{where}: {key}={value!r:.20}; {allowed}")
        if value and role != "assistant":
            raise BadSample(sample_id, f"{where}: {key}={value!r} of the {role}'s turn; only replies are trained on")
    weights = {float(value) for value in given.values()}
    if len(weights) > 1:
        listing = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise BadSample(sample_id, f"{where}: {listing} contradict each other; leave one of them out")
    weight = next(iter(weights), 1.0)
    return weight > 0, weight or 1.0


def add_system_turn(record: Record, turns: Sequence[Turn], sample_id: str) -> list[Turn]:
    """Return the turns, preceded by the system turn if the record has one as `system` or `system_prompt`.

    Raises:
        BadSample: it is not a text, or there is another system turn.
    """
    value = first_present(record, *SYSTEM_KEYS)
    if isinstance(value, list) and all(isinstance(item, dict) and isinstance(item.get("text"), str) for item in value):
        value = "\n".join(item["text"] for item in value)  # as in Anthropic's messages
    if is_empty(value):
        return list(turns)
    if not isinstance(value, str):
        raise BadSample(sample_id, f"`system` must be a string, got {value!r:.60}")
    first = turns[0] if turns else None
    if first is not None and first.role == "system" and first.content != (value,):
        raise BadSample(sample_id, "it has `system` and a system turn, which differ; leave one of them out")
    return list(turns) if first is not None and first.role == "system" else [Turn("system", (value,)), *turns]


def check_question_first(turns: Sequence[Turn], sample_id: str) -> None:
    """Raise BadSample if a conversation begins with the assistant."""
    first = next((turn for turn in turns if turn.role != "system"), None)
    if first is not None and first.role == "assistant":
        raise BadSample(sample_id, "it begins with the assistant; a question must come before the first reply")


def read_group(record: Record, key: str = "group") -> str | None:
    """Read the group within which a ranking compares a record."""
    return None if record.get(key) is None else str(record[key])
