"""Forms: functions that turn a sample into a record, the inverse of `records.formats`.

To add a form, write a function `(sample, image_folder) -> dict` that raises `BadSample`, and add it to `FORMS` under
the name that its reader has in `formats.FORMATS`.

Imports `sample`, `records.marks` and the standard library only.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

from vlm.data.records.marks import MARK_PATTERN, MarkError, Slot, split_at_marks
from vlm.data.sample import PLACEHOLDER, VIDEO_PLACEHOLDER, BadSample, ImageRef, Record, Sample, Turn, VideoRef

LLAVA_ROLE_NAMES = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}


def to_llava(sample: Sample, image_folder: Path) -> Record:
    """Write a sample as a record of LLaVA's form, which `conversations.read_llava` reads.

    `read_llava` moves the only image of a turn to its start; where no turn is changed by that (see
    `is_image_moved_by_llava`), the sample is read back as it was.

    Raises:
        BadSample: a text has `<image>` or `<video>` as words that LLaVA's form takes for marks; an image has no file.
    """
    media = _media_values(sample, image_folder)
    media_or_only = {key: names[0] if len(names) == 1 else names for key, names in media.items()}
    turns = [
        {"from": LLAVA_ROLE_NAMES[turn.role], "value": turn.as_message(PLACEHOLDER, VIDEO_PLACEHOLDER)["content"]}
        | _turn_keys(turn)
        for turn in sample.turns
    ]
    _check_marks(sample)
    return {"id": sample.id, **media_or_only, "conversations": turns, **_record_keys(sample)}


def to_messages(sample: Sample, image_folder: Path) -> Record:
    """Write a sample as chat messages, which `conversations.read_messages` reads: lists of items in their order.

    Raises:
        BadSample: an image has no file.
    """
    media = {f"{key}s": names for key, names in _media_values(sample, image_folder).items()}
    kinds = {ImageRef: "image", VideoRef: "video"}
    messages = []
    for turn in sample.turns:
        items = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": kinds[type(part)]}
            for part in turn.content
        ]
        messages.append({"role": turn.role, "content": items} | _turn_keys(turn))
    return {"id": sample.id, **media, "messages": messages, **_record_keys(sample)}


FORMS: dict[str, Callable[[Sample, Path], Record]] = {"llava": to_llava, "messages": to_messages}
"""Name of a form -> the function that writes it."""


def is_image_moved_by_llava(turn: Turn) -> bool:
    """Return whether LLaVA's form moves the only image of a user's turn to its start, since text is before it."""
    is_single = turn.role == "user" and sum(isinstance(part, ImageRef) for part in turn.content) == 1
    return is_single and not isinstance(turn.content[0], ImageRef)


def _record_keys(sample: Sample) -> Record:
    """Return the label, group, references, tools and objects of a sample that has them, under their keys."""
    references, tools = list(sample.references) or None, list(sample.tools) or None
    objects = [marked.as_record() for marked in sample.objects] or None
    values = {
        "label": sample.label,
        "group": sample.group,
        "references": references,
        "tools": tools,
        "objects": objects,
    }
    return {key: value for key, value in values.items() if value is not None}


def _media_values(sample: Sample, folder: Path) -> dict[str, list[str | Record]]:
    values: dict[str, list[str | Record]] = {
        "image": [image_cell_value(image_ref, folder, sample.id) for image_ref in sample.images],
        "video": [_video_value(video, folder, sample.id) for video in sample.videos],
    }
    return {key: names for key, names in values.items() if names}


def image_cell_value(image_ref: ImageRef, folder: Path, sample_id: str) -> str | Record:
    """Return the value for an image in a record: its path relative to a folder, or its bytes and name.

    Raises:
        BadSample: the image is a frame of a video.
    """
    if image_ref.content is not None:
        return {"bytes": image_ref.content, "path": None if image_ref.path is None else str(image_ref.path)}
    if image_ref.path is None or image_ref.frame is not None:
        raise BadSample(sample_id, f"image {image_ref} is not a file of its own, and records can only name files")
    return _relative_path(image_ref.path, folder)


def _video_value(video: VideoRef, folder: Path, sample_id: str) -> str | Record:
    """Return the value for a video in a record: its path, or its frames with their times."""
    if not video.frames:
        return _relative_path(video.path, folder)
    frames = [image_cell_value(frame, folder, sample_id) for frame in video.frames]
    return {"frames": frames, **({"times": list(video.times)} if video.rate is None else {"fps": video.rate})}


def _relative_path(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _turn_keys(turn: Turn) -> Record:
    """Return the keys of a turn besides its role and content: weight, thinking, calls, and the call it is a result of.

    Arguments of calls are JSON, since Parquet would give each of several calls the keys of all.
    """
    message = turn.as_message(PLACEHOLDER, VIDEO_PLACEHOLDER)
    keys = {key: value for key, value in message.items() if key not in ("role", "content")}
    if "tool_calls" in keys:
        keys["tool_calls"] = [_with_json_arguments(call) for call in keys["tool_calls"]]
    if not (turn.supervised or turn.is_blank):
        keys["weight"] = 0
    elif turn.weight != 1:
        keys["weight"] = turn.weight
    return keys


def _with_json_arguments(call: Record) -> Record:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def _check_marks(sample: Sample) -> None:
    """Raise BadSample if the texts of a sample would not be split again at the same marks."""
    shown = ("user", "tool") if sample.media else ("user",)
    contents = [turn.content for turn in sample.turns if turn.role in shown]
    kinds = {ImageRef: PLACEHOLDER, VideoRef: VIDEO_PLACEHOLDER}
    marked = [
        [part if isinstance(part, str) else Slot(kinds[type(part)], kinds[type(part)]) for part in content]
        for content in contents
    ]
    texts = ["".join(part if isinstance(part, str) else part.spelling for part in parts) for parts in marked]
    if not (
        word := MARK_PATTERN.search("\n".join(part for parts in marked for part in parts if isinstance(part, str)))
    ):
        return
    numbers = {PLACEHOLDER: len(sample.images), VIDEO_PLACEHOLDER: len(sample.videos)}
    try:
        is_same = split_at_marks(texts, numbers)[0] == marked
    except MarkError:
        is_same = False
    if not is_same:
        raise BadSample(
            sample.id,
            f"its text has {word[0]}, which LLaVA's format reads as an image or video; write messages (--to messages)",
        )
