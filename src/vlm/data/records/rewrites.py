"""Records of other tools, rewritten as chat messages, which `conversations.read_messages` reads.

Imports siblings and the standard library only. Keys that are not rewritten stay. Each function raises `BadSample` for a
record of another form.
"""

import re
from collections.abc import Sequence

from vlm.data.records.extracted_frames import group_frames
from vlm.data.records.marks import find_marks
from vlm.data.records.text import text_from_value
from vlm.data.sample import PLACEHOLDER, VIDEO_PLACEHOLDER, BadSample, Record

MINICPM_MARK = re.compile(r"<image_\d+>")
"""A name of one of several images in MiniCPM-V's texts."""


def rewrite_alpaca(record: Record, sample_id: str) -> Record:
    """Rewrite `{"instruction", "input", "output", "history": [[question, answer], …]}`; images come first.

    `input` follows the instruction on a line of its own; `input` and `history` may be absent or empty.
    """
    question = "\n".join(filter(None, (_text(record, "instruction", sample_id), _optional(record, "input", sample_id))))
    turns = [(question, _text(record, "output", sample_id))]
    history = record.get("history") or []
    if not isinstance(history, list) or not all(_is_pair(pair) for pair in history):
        raise BadSample(sample_id, "`history` must be a list of pairs of a question and an answer")
    return with_media_first(record, _messages([*history, *turns]), ("instruction", "input", "output", "history"))


def rewrite_cauldron(record: Record, sample_id: str) -> Record:
    """Rewrite `{"images": […], "texts": [{"user", "assistant"}, …]}`; all images come first."""
    texts = record.get("texts")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, dict) for text in texts):
        raise BadSample(sample_id, "`texts` must be a list of at least one mapping with `user` and `assistant`")
    pairs = [(_text(text, "user", sample_id), _text(text, "assistant", sample_id)) for text in texts]
    return with_media_first(record, _messages(pairs), ("texts",))


def rewrite_minicpm(record: Record, sample_id: str) -> Record:
    """Rewrite `{"image": path or {"<image_00>": path, …}, "conversations": [{"role", "content"}, …]}`.

    `<image_00>` in a text stands for the image of that name, `<image>` for a single one; without either, images come
    first.
    """
    conversation, image = record.get("conversations"), record.get("image")
    turns = [turn for turn in conversation if isinstance(turn, dict)] if isinstance(conversation, list) else []
    messages = [{**turn, "content": text_from_value(turn.get("content"))} for turn in turns]
    if (
        not isinstance(conversation, list)
        or len(turns) < len(conversation)
        or not all(isinstance(message["content"], str) for message in messages)
    ):
        raise BadSample(sample_id, "`conversations` must be a list of mappings with `role` and `content`")
    if not isinstance(image, dict) or {"bytes", "path"} & image.keys():
        return with_media_first(record, messages, ("conversations",))
    image = {name: value for name, value in image.items() if value is not None}  # rows of a table name all images
    names = [name for message in messages for name in MINICPM_MARK.findall(message["content"])]
    if unknown := [name for name in names if name not in image]:
        raise BadSample(
            sample_id, f"{unknown[0]} in its text is not one of its images, which are {', '.join(image):.80}"
        )
    for message in messages:
        message["content"] = MINICPM_MARK.sub(PLACEHOLDER, message["content"])
    images = [image[name] for name in names] or list(image.values())
    if unused := [name for name in image if names and name not in names]:
        raise BadSample(sample_id, f"{unused[0]} of its images does not occur in its text")
    record = {**record, "image": None, "images": images}
    return with_media_first(record, messages, ("conversations",), every_mark=bool(names))


def _text(record: Record, key: str, sample_id: str) -> str:
    if (text := text_from_value(record.get(key))) is None:
        raise BadSample(sample_id, f"`{key}` must be a string, got {record.get(key)!r:.60}; it has {', '.join(record)}")
    return text


def _optional(record: Record, key: str, sample_id: str) -> str:
    return "" if record.get(key) is None else _text(record, key, sample_id)


def _is_pair(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _messages(pairs: Sequence[Sequence[str]]) -> list[Record]:
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def with_media_first(
    record: Record, messages: list[Record], rewritten: Sequence[str], *, every_mark: bool = False
) -> Record:
    """Return the record with messages, in which images and videos that no text has a place for come first.

    The mark of a single image or video is a word where it is within a sentence, see `marks`; with `every_mark` it
    stands for the image or video there too.
    """
    numbers = {}
    for mark, names in ((VIDEO_PLACEHOLDER, ("video", "videos")), (PLACEHOLDER, ("image", "images"))):
        media = next((record[name] for name in names if record.get(name) is not None), [])
        if mark == VIDEO_PLACEHOLDER:
            media = group_frames(record, media, "?")
        numbers[mark] = len(media) if isinstance(media, list) else 1
    may_be_words = sum(numbers.values()) == 1 and not every_mark
    written = find_marks([message["content"] for message in messages if message.get("role") == "user"])
    placed = {mark.spelling for mark in written if mark.alone or not may_be_words}
    marks = [mark for mark, number in numbers.items() for _ in range(number) if mark not in placed]
    first = next((message for message in messages if message.get("role") == "user"), None)
    if marks and first is not None:
        first["content"] = "".join(marks) + f"\n{first['content']}"
    return {**{key: value for key, value in record.items() if key not in rewritten}, "messages": messages}
