"""Records for embeddings: a query, what it should find, and what it should not find, as turns of one sample.

Imports `sample`, its siblings and the standard library only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import groupby
from pathlib import Path

from vlm.data.records.fields import first_present, is_empty
from vlm.data.records.media import MediaPlacer
from vlm.data.records.text import text_from_value
from vlm.data.sample import BadSample, ContentPart, ImageRef, Record, Sample, ToolCallTurn, ToolResultTurn, Turn

INSTRUCTION_KEYS = ("instruction", "prompt", "system")
"""Keys of a member that hold its own system turn."""
MEMBER_KEYS = ("text", "image", "images", "video", "videos", "messages", *INSTRUCTION_KEYS)
"""Keys of a member."""
QUERY_KEYS = ("query", "anchor")
POSITIVE_KEYS = ("positive", "pos", "response")
NEGATIVE_KEYS = ("negatives", "negative", "neg", "rejected_response")
MMEB_KEYS = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
"""Keys of VLM2Vec's records (MMEB)."""
SWIFT_KEYS = ("messages", "positive_messages", "negative_messages", "positive_images", "negative_images")
"""Keys of ms-swift's records."""
PAIR_KEYS = (
    *QUERY_KEYS,
    *POSITIVE_KEYS,
    *NEGATIVE_KEYS,
    *(f"negative_{number}" for number in range(1, 33)),
    *MMEB_KEYS,
    *SWIFT_KEYS,
)
"""Keys of records that the format `pair` reads."""
OWN_KEYS = ("image", "images", "video", "videos", "system", "system_prompt")
"""Keys of other forms, which are in members here; of ms-swift's records, `images` are the query's."""
MMEB_MARK = "<|image_1|>"

ReadChat = Callable[[Record, Path], Sample]
"""Reads a record of chat messages."""


@dataclass(frozen=True)
class MemberTurn(Turn):
    """A turn of one of the members of a record.

    Attributes:
        member: 0 for the query, 1 for the positive, from 2 on for negatives.
    """

    member: int = 0


def split_members(sample: Sample) -> list[Sample]:
    """Return the query, the positive and the negatives of a record, each as a sample that waits for a reply.

    In a record without members, such as an image with its caption, the query is what is before the last reply, and
    that reply is the positive.

    Raises:
        BadSample: it is such a record, but has no reply, or nothing before its reply.
    """
    if any(isinstance(turn, MemberTurn) for turn in sample.turns):
        numbered = [(turn.member if isinstance(turn, MemberTurn) else 0, turn) for turn in sample.turns]
        groups = groupby(numbered, key=lambda pair: pair[0])
        return [replace(sample, turns=tuple(turn for _, turn in group), label=None) for _, group in groups]
    *before, last = sample.turns
    if last.role != "assistant" or last.is_blank or not any(turn.role == "user" for turn in before):
        raise BadSample(
            sample.id,
            "it has no query and positive: a record of the format pair needs both, and a record of another "
            "format needs a reply behind its question or image",
        )
    return [replace(sample, turns=turns, label=None) for turns in (tuple(before), (Turn("user", last.content),))]


def choose_member(sample: Sample, *, is_query: bool) -> Sample:
    """Return the query of a record, or its positive; a record that is one of them, without a reply, is returned whole.

    Raises:
        BadSample: see `split_members`.
    """
    is_pair = any(isinstance(turn, MemberTurn) for turn in sample.turns)
    if not is_pair and sample.turns[-1].role != "assistant":
        return sample
    return split_members(sample)[0 if is_query else 1]


def member_key(member: Sample) -> int:
    """Return a number that is equal for members of equal content, whatever their system turns, from 0 to 2^62.

    Images are compared by the names of their files, or by their bytes where the record holds them.
    """
    digest = blake2b(digest_size=8)
    for turn in (turn for turn in member.turns if turn.role != "system"):
        digest.update(f"\0{turn.role}".encode())
        for part in turn.content:
            if isinstance(part, ImageRef) and part.content is not None:
                digest.update(b"\1" + part.content)
            else:
                digest.update((f"\2{part}" if isinstance(part, str) else f"\3{part!s}").encode("utf-8", "replace"))
    return int.from_bytes(digest.digest()) >> 2


def read_members(record: Record, folder: Path, sample_id: str, read_chat: ReadChat) -> tuple[Turn, ...]:
    """Return the turns of a record of one of these forms, see `formats.read_pair`.

    Raises:
        BadSample: the record has another form, or an image cannot be used.
    """
    for key in OWN_KEYS:
        if not is_empty(record.get(key)) and not (key == "images" and "positive_messages" in record):
            member = "as `instruction` of that member" if key.startswith("system") else "within that member"
            raise BadSample(
                sample_id, f"`{key}` is next to query and positive but belongs to neither; write it {member}"
            )
    if "qry" in record or "qry_image_path" in record:
        values = _mmeb_values(record)
    elif "positive_messages" in record:
        values = _swift_values(record, sample_id)
    else:
        values = [
            (name, first_present(record, *keys)) for name, keys in (("query", QUERY_KEYS), ("positive", POSITIVE_KEYS))
        ]
        values += [("negative", value) for value in _negatives(record)]
    turns: list[Turn] = []
    for number, (name, value) in enumerate(values):
        for turn in _read_member(value, folder, sample_id, name, read_chat):
            if isinstance(turn, ToolCallTurn | ToolResultTurn):
                raise BadSample(sample_id, f"`{name}`: calls of tools are not compared; write them as text")
            turns.append(MemberTurn(turn.role, turn.content, turn.supervised, turn.weight, turn.thinking, number))
    if 1 not in {turn.member for turn in turns if isinstance(turn, MemberTurn)}:
        raise BadSample(sample_id, "it has no positive, which its query should match")
    return tuple(turns)


def _negatives(record: Record) -> list[object]:
    """Return the negatives of a record: a list, a single one, or those of numbered keys."""
    values = first_present(record, *NEGATIVE_KEYS)
    listed = values if isinstance(values, list) and not _is_conversation(values) else [values]
    numbered = [record.get(f"negative_{number}") for number in range(1, 33)]
    return [value for value in (*listed, *numbered) if not is_empty(value)]


def _mmeb_values(record: Record) -> list[tuple[str, object]]:
    """Return the members of a record of MMEB: texts, and the path of an image, whose mark begins the text."""

    def member(text: object, image: object) -> dict[str, object]:
        """Return a member with this text and image; if it has an image, the text has no mark."""
        unmarked = text.replace(MMEB_MARK, "").strip() if isinstance(text, str) and image else text
        return {"text": unmarked, "image": image or None}

    query = member(record.get("qry"), record.get("qry_image_path"))
    values: list[tuple[str, object]] = [("qry", query)]
    for name, key in (("pos", "pos_text"), ("neg", "neg_text")):
        texts, images = record.get(key), record.get(f"{name}_image_path")
        texts = texts if isinstance(texts, list) else [texts]
        images = images if isinstance(images, list) else [images] * len(texts)
        pairs = zip(texts, images, strict=len(texts) == len(images))
        members = [(key, member(text, image)) for text, image in pairs if not (is_empty(text) and is_empty(image))]
        values += members[:1] if name == "pos" else members
    return values


def _swift_values(record: Record, sample_id: str) -> list[tuple[str, object]]:
    """Return the members of a record of ms-swift: conversations."""
    positives, negatives = record["positive_messages"], record.get("negative_messages") or []
    if not isinstance(positives, list) or len(positives) != 1 or not isinstance(negatives, list):
        raise BadSample(
            sample_id,
            "`positive_messages` must be a list of one conversation, and `negative_messages` a list of "
            "conversations; write a record for each positive",
        )
    query = {"messages": record.get("messages"), "images": record.get("images")}
    media = {"positive_images": positives, "negative_images": negatives}
    members: list[tuple[str, object]] = [("messages", query)]
    for key, conversations in media.items():
        images = record.get(key) or []
        for number, messages in enumerate(conversations):
            own = images[number] if number < len(images) else None
            members.append((key.replace("images", "messages"), {"messages": messages, "images": own}))
    return members


def _is_conversation(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def _read_member(value: object, folder: Path, sample_id: str, name: str, read_chat: ReadChat) -> list[Turn]:
    """Return the turns of one member: a text, a conversation, or a mapping with `MEMBER_KEYS`."""
    if _is_conversation(value):
        value = {"messages": value}
    if (text := text_from_value(value)) is not None:
        value = {"text": text}
    if not isinstance(value, Mapping) or not set(value) & set(MEMBER_KEYS):
        needed = f"a text, messages, or a mapping with {', '.join(MEMBER_KEYS[:3])} … is needed"
        raise BadSample(sample_id, f"`{name}`: {needed}, got {value!r:.60}")
    if unread := [key for key in value if key not in MEMBER_KEYS and not is_empty(value[key])]:
        raise BadSample(sample_id, f"`{name}.{unread[0]}` is not read; allowed are {', '.join(MEMBER_KEYS)}")
    own = {key: item for key, item in value.items() if key not in INSTRUCTION_KEYS}
    system = first_present(dict(value), *INSTRUCTION_KEYS)
    if own.get("messages") is not None:
        turns = list(read_chat(own | {"id": sample_id}, folder).turns)
        if turns[-1].role == "assistant":
            raise BadSample(
                sample_id, f"`{name}`: its messages end with a reply; they must end with a turn of the user"
            )
    else:
        turns = [Turn("user", _read_content(own, folder, sample_id, name))]
    return [Turn("system", (str(system),)), *turns] if not is_empty(system) else turns


def _read_content(value: Record, folder: Path, sample_id: str, name: str) -> tuple[ContentPart, ...]:
    """Return a member's text with its images in their places; without marks they come first."""
    media = MediaPlacer(value, folder, sample_id)
    text = text_from_value(value.get("text"))
    if text is None and not is_empty(value.get("text")):
        raise BadSample(sample_id, f"`{name}.text` must be a string, got {value.get('text')!r:.60}")
    content = media.place_or_prepend(text) if text else media.rest()
    if not content:
        raise BadSample(sample_id, f"`{name}` has neither a text nor an image")
    media.check_all_placed([Turn("user", content)])
    return content
