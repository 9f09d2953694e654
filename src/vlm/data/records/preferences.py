"""Records of preferences: two replies of which one is chosen, or one reply that is wanted or not.

`docs/preference.md` states the forms. Imports `sample`, its siblings and the standard library only.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from vlm.data.records.fields import first_present, is_empty
from vlm.data.records.rewrites import with_media_first
from vlm.data.records.text import text_from_value
from vlm.data.records.tool_turns import MESSAGE_ROLES
from vlm.data.sample import BadSample, Record, Sample, Turn

PROMPT_KEYS = ("conversations", "messages", "prompt", "question")
"""Keys of what is before both replies: turns of LLaVA's form, chat messages, or one question."""
CHOSEN_KEYS = ("chosen", "completion")
REJECTED_KEYS = ("rejected", "rejected_response", "rejected_messages")
LABEL_KEYS = ("label", "kto_tag")
"""Keys of whether a reply without another one is wanted: of TRL's and ms-swift's records, and LLaMA-Factory's."""
RLHF_KEYS = ("output_1", "output_2", "preference")
"""Keys of LLaVA-RLHF's records: two replies, and the number of the one that is chosen."""
OWN_MEDIA = {"rejected_images": "images", "rejected_videos": "videos", "rejected_objects": "objects"}
"""Keys of what the rejected side has instead of images, videos and objects of the record."""
TURN_LIST_KEYS = ("conversations", "prompt", "chosen", "rejected", "completion", "rejected_messages")
"""Keys that may hold turns, besides `messages`."""
PREFERENCE_KEYS = ("question", "rejected_response", "text", *LABEL_KEYS, *RLHF_KEYS, *OWN_MEDIA)
"""Further keys of records that the format `preference` reads."""

ReadTurns = Callable[[Record, Path], Sample]
"""Reads a record of turns."""


def read_sides(record: Record, folder: Path, sample_id: str, read_chat: ReadTurns, read_llava: ReadTurns) -> Sample:
    """Return the chosen conversation of a record with the rejected one, or one conversation with its label.

    Only replies in which the two differ are trained on; of one conversation, those after the last question.

    Args:
        record: the record.
        folder: what paths are relative to.
        sample_id: its name.
        read_chat: reads a record of chat messages.
        read_llava: reads a record of LLaVA's form.

    Raises:
        BadSample: the record has another form, or an image cannot be used.
    """
    record = _unpack(record, sample_id)
    prompt, is_llava = _read_prompt(record, sample_id)
    chosen = _read_turns(first_present(record, *CHOSEN_KEYS), "chosen", sample_id)
    rejected = _read_turns(first_present(record, *REJECTED_KEYS), "rejected", sample_id)
    if not chosen:
        if not prompt or _role(prompt[-1]) != "assistant":
            raise BadSample(sample_id, f"it has no chosen reply: `chosen` is needed; it has {', '.join(record)}")
        prompt, chosen = prompt[:-1], prompt[-1:]
    label = _read_label(record, sample_id)
    if rejected and label is not None:
        raise BadSample(sample_id, "it has a rejected reply and a label; leave one of them out")
    own = {*PROMPT_KEYS, *CHOSEN_KEYS, *REJECTED_KEYS, *LABEL_KEYS, *RLHF_KEYS, *OWN_MEDIA, "text"}
    base = {"id": sample_id, **{key: value for key, value in record.items() if key not in own}}

    def read(turns: list[Record], base: Record) -> Sample:
        """Return the conversation of one side."""
        turns = turns if _is_whole(turns) else [*prompt, *turns]
        if is_llava:
            return read_llava({**base, "conversations": list(map(_to_llava, turns))}, folder)
        messages = [dict(_to_message(turn)) for turn in turns]
        if all(isinstance(message.get("content"), str) for message in messages if message.get("role") == "user"):
            return read_chat(with_media_first(base, messages, ()), folder)
        return read_chat({**base, "messages": messages}, folder)

    sample = read(chosen, base)
    if not rejected:
        return replace(_learn_from(sample, _first_reply_place(sample)), label=label)
    return pair(sample, read(rejected, _with_own_media(base, record)))


def pair(chosen: Sample, rejected: Sample) -> Sample:
    """Return a conversation with the one that it is preferred to; only replies in which they differ are trained on.

    If only their images differ, the replies after the last question are trained on.

    Raises:
        BadSample: they do not differ, or one of them has no reply of its own.
    """
    texts = [list(map(_without_media, sample.turns)) for sample in (chosen, rejected)]
    common = 0
    while common < min(map(len, texts)) and texts[0][common] == texts[1][common]:
        common += 1
    if texts[0] == texts[1]:
        if chosen.media == rejected.media:
            raise BadSample(chosen.id, "its chosen and its rejected reply are the same")
        common = _first_reply_place(chosen)
    for name, sample in (("chosen", chosen), ("rejected", rejected)):
        if all(turn.role != "assistant" for turn in sample.turns[common:]):
            raise BadSample(chosen.id, f"its {name} side has no reply that the other side lacks")
    sides = [_learn_from(sample, common) for sample in (chosen, rejected)]
    return replace(sides[0], rejected=sides[1])


def _without_media(turn: Turn) -> Turn:
    return replace(turn, content=tuple(part for part in turn.content if isinstance(part, str)))


def _first_reply_place(sample: Sample) -> int:
    """Return the place of the first turn after the last question."""
    return max((place for place, turn in enumerate(sample.turns) if turn.role == "user"), default=-1) + 1


def _learn_from(sample: Sample, start: int) -> Sample:
    """Return a sample whose replies before a given place are read but not trained on."""
    turns = (
        replace(turn, supervised=False) if place < start and turn.role == "assistant" else turn
        for place, turn in enumerate(sample.turns)
    )
    return replace(sample, turns=tuple(turns), label=None)


def _unpack(record: Record, sample_id: str) -> Record:
    """Return a record of RLHF-V without its JSON, and one of LLaVA-RLHF with `chosen` and `rejected`."""
    if isinstance(text := record.get("text"), str) and "chosen" not in record and "rejected" not in record:
        try:
            inner = json.loads(text)
        except ValueError:
            inner = None
        if not isinstance(inner, dict) or not {"question", "chosen", "rejected"} <= inner.keys():
            raise BadSample(sample_id, "`text` must be JSON with question, chosen and rejected, as RLHF-V has it")
        return {**{key: value for key, value in record.items() if key != "text"}, **inner}
    if "output_1" not in record:
        return record
    if (number := record.get("preference")) not in (1, 2):
        raise BadSample(
            sample_id, f"preference={number!r:.20}: 1 or 2 is needed, the number of the output that is chosen"
        )
    return (
        {**record, "chosen": record["output_1"], "rejected": record.get("output_2")}
        if number == 1
        else {**record, "chosen": record.get("output_2"), "rejected": record["output_1"]}
    )


def _read_prompt(record: Record, sample_id: str) -> tuple[list[Record], bool]:
    """Return the turns before the replies, and whether they are of LLaVA's form; none where each side has its own."""
    key = next((key for key in PROMPT_KEYS if not is_empty(record.get(key))), None)
    if key is None:
        return [], False
    if (text := text_from_value(record[key])) is not None:
        return [{"role": "user", "content": text}], False
    return _read_turns(record[key], key, sample_id), key == "conversations"


def _read_turns(value: object, name: str, sample_id: str) -> list[Record]:
    """Return turns of a side: of a text, a single turn, or a list of turns; [] if there is none.

    Raises:
        BadSample: it is none of these.
    """
    if value is None or value == []:
        return []
    if (text := text_from_value(value)) is not None:
        return [{"role": "assistant", "content": text}]
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in turns
    ):
        raise BadSample(sample_id, f"`{name}` must be a text or a list of turns, got {value!r:.60}")
    return turns


def _is_whole(turns: Sequence[Record]) -> bool:
    """Return whether a side begins with a question, and so has the whole conversation."""
    return _role(turns[0]) in ("system", "user")


def _role(turn: Record) -> str | None:
    message = _to_message(turn)
    role = message.get("role")
    return MESSAGE_ROLES.get(role) if isinstance(role, str) else None


def _to_message(turn: Record) -> Record:
    """Return a turn of LLaVA's form as a chat message; a message as it is."""
    if "from" not in turn or "role" in turn:
        return turn
    speaker = turn["from"]
    role = {"human": "user", "gpt": "assistant", "llava": "assistant"}.get(str(speaker), speaker)
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": role, "content": turn.get("value"), **rest}


def _to_llava(turn: Record) -> Record:
    """Return a turn as LLaVA's form has it."""
    message = _to_message(turn)
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    return {"from": message.get("role"), "value": message.get("content"), **rest}


def _with_own_media(base: Record, record: Record) -> Record:
    """Return a record's base with what the rejected side has instead of its images, videos and objects."""
    own = {name: record[key] for key, name in OWN_MEDIA.items() if not is_empty(record.get(key))}
    singular = {name.removesuffix("s"): None for name in own if name != "objects"}
    return {**base, **singular, **own}


def _read_label(record: Record, sample_id: str) -> bool | None:
    """Return whether a reply is wanted; None if the record does not say."""
    value = first_present(record, *LABEL_KEYS)
    if value is None or value in (True, False):
        return None if value is None else bool(value)
    raise BadSample(sample_id, f"label={value!r:.40}: true (wanted) or false is needed")
