"""Keys of records: each reader declares those that it reads; keys that change what is learned are never ignored.

A record is refused if it has a key that its reader does not read, that is in one of the tables below, and whose value
is not empty; the option `ignore_keys` of every reader allows such a key. Other keys are ignored, and `vlm data stats`
and `vlm data show` name them. The option `image_key` of every reader names the key of the images where it has another
name than `image`. Imports the standard library and `sample` only.
"""

import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any

from vlm.data.sample import BadSample, OptionNeeded, Record, Sample, Turn

Reader = Callable[..., Sample]

TOOLS = "calls of tools are read in the forms messages and llava"
SOUND = "sound is not trained on"
BOXES = "boxes stand in the record's `objects`, and <bbox> in the texts where they are written"
THINKING = "it is part of a reply; write it into the reply's text"
FRAMES = "sizes and frames follow from the model and dataset.max_frames"
PLACED = "images and videos of a turn are listed by the record, or are items of its content"
WEIGHTS = "records have no weights; a turn has `weight` or `loss`, a source `dataset.sources.….loss_weight`"
REFUSALS = "it is a reply in place of another; write it as the reply's text"

RECORD_KEYS = {
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), TOOLS),
    **dict.fromkeys(("audio", "audios"), SOUND),
    **dict.fromkeys(("objects", "bbox", "bboxes", "boxes"), BOXES),
    **dict.fromkeys(("weight", "loss", "loss_scale", "sample_weight"), WEIGHTS),
    "history": "earlier turns are not read in this form",
}
"""Keys of a record that change what is learned -> why they are not read."""
TURN_KEYS = {
    **dict.fromkeys(("tools", "tool_calls", "function_call", "tool_call_id"), TOOLS),
    **dict.fromkeys(("audio", "audios"), SOUND),
    **dict.fromkeys(("objects", "bbox", "bboxes", "boxes"), BOXES),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), THINKING),
    "refusal": REFUSALS,
    **dict.fromkeys(("image", "images", "video", "videos"), PLACED),
    **dict.fromkeys(("train_detail", "training_detail"), "parts of a reply cannot be trained on by themselves"),
}
"""Keys of a turn of a conversation, likewise."""
ITEM_KEYS = {
    **dict.fromkeys(("resized_height", "resized_width", "min_pixels", "max_pixels", "total_pixels"), FRAMES),
    **dict.fromkeys(("video_start", "video_end", "fps", "nframes", "sample_fps"), FRAMES),
    **dict.fromkeys(("min_frames", "max_frames"), FRAMES),
    **dict.fromkeys(("objects", "bbox", "bboxes", "boxes"), BOXES),
    **dict.fromkeys(("audio", "input_audio"), SOUND),
}
"""Keys of an item of a message's content, likewise."""
READ_WHERE_PRESENT = ("objects",)
"""Keys of a record that nearly every reader reads, and that `ignore_keys` leaves out before it does."""
IMAGE_NAME = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?|avif)$", re.IGNORECASE)
"""What the name of an image ends in: under a key that is not read, it is taken for an image that would be lost."""
MEDIA_KEYS = ("image", "images", "video", "videos")
"""Keys of a record that name its images and videos."""
LOST_MEDIA_KEYS = (
    "image_path",
    "image_paths",
    "image_file",
    "image_url",
    "img",
    "img_path",
    "picture",
    "photo",
    "video_path",
    "video_file",
    "video_url",
)
"""Keys that name an image or a video in records of other forms."""
NEUTRAL_TEXTS = ("", "[]", "{}")
SUPERVISION_KEYS = ("weight", "loss", "loss_scale", "train", "training")
"""Keys of a turn that say whether its reply is learned: of OpenAI's files, ms-swift's and axolotl's."""
SUPERVISION_KEY_SET = frozenset(SUPERVISION_KEYS)
SYSTEM_KEYS = ("system", "system_prompt")
COMMON_KEYS = (
    "id",
    "question_id",
    "image_id",
    "image",
    "images",
    "video",
    "videos",
    "fps",
    "sample_fps",
    "times",
    "timestamps",
    "label",
    "group",
    "answer",
    "answers",
    "references",
    *SYSTEM_KEYS,
)
"""Keys that all readers read; those of rates and times are of lists of extracted frames."""


@dataclass(frozen=True)
class DeclaredKeys:
    """The keys that a reader reads.

    Attributes:
        record: keys of a record.
        key_options: options of the reader whose values are keys of a record.
        turns: the key of its turns, unless the option `key` names another; None without turns that have keys.
        turn: keys of a turn.
        item: keys of an item of a turn's content.
        more_turns: further keys of lists of turns, or of single turns.
    """

    record: frozenset[str]
    key_options: tuple[str, ...] = ()
    turns: str | None = None
    turn: frozenset[str] = frozenset()
    item: frozenset[str] = frozenset()
    more_turns: tuple[str, ...] = ()

    @cached_property
    def record_and_turns(self) -> frozenset[str]:
        """The keys of a record, with that of its turns where no option names another."""
        return self.record if self.turns is None else self.record.union([self.turns])


def reads(
    *keys: str,
    key_options: Sequence[str] = (),
    turns: str | None = None,
    turn: Sequence[str] = (),
    item: Sequence[str] = (),
    more_turns: Sequence[str] = (),
) -> Callable[[Reader], Reader]:
    """Declare the keys that a reader reads, see `DeclaredKeys`; it gets the option `ignore_keys`.

    The reader then refuses records with other keys that change what is learned.
    """
    declared = DeclaredKeys(
        frozenset((*COMMON_KEYS, *keys, *more_turns)),
        tuple(key_options),
        turns,
        frozenset((*turn, *SUPERVISION_KEYS)),
        frozenset(item),
        tuple(more_turns),
    )

    def declare(reader: Reader) -> Reader:
        """Return the reader with a check of the record's keys before it."""
        signature = inspect.signature(reader)
        defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
        renames_image = "image_key" not in defaults

        @wraps(reader)
        def checked(record: Any, image_folder: Any, *, ignore_keys: Sequence[str] = (), **options: Any) -> Sample:
            """Read a record, unless it has unread keys that change what is learned and are not in `ignore_keys`."""
            sample_id = read_id(record)
            ignored = {ignore_keys} if isinstance(ignore_keys, str) else set(ignore_keys)
            if renames_image and (image_key := options.pop("image_key", None)) is not None:
                record = _rename_image(record, str(image_key))
            if ignored:
                turns_keys = str(options.get("key", declared.turns)), *declared.more_turns
                record = _without_ignored(record, turns_keys, ignored)
                record = {key: value for key, value in record.items() if key not in ignored & {*READ_WHERE_PRESENT}}
            levels = list(_levels_with_unread(record, declared, defaults, options))
            if not levels:
                return reader(record, image_folder, **options)
            for level in levels:
                level.check(ignored, sample_id)
            try:
                sample = reader(record, image_folder, **options)
            except BadSample as error:
                if levels[0].values is record and "<image>" in error.reason and not any(map(record.get, MEDIA_KEYS)):
                    levels[0].check_lost_media(ignored, sample_id)  # a better reason than a mark without its image
                raise
            if levels[0].values is record and not sample.media:
                levels[0].check_lost_media(ignored, sample_id)
            return sample

        option = inspect.Parameter("ignore_keys", inspect.Parameter.KEYWORD_ONLY, default=(), annotation=Sequence[str])
        image_key = inspect.Parameter("image_key", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=str | None)
        parameters = [*signature.parameters.values(), option, *([image_key] if renames_image else [])]
        vars(checked).update(__signature__=signature.replace(parameters=parameters), declared_keys=declared)
        return checked

    return declare


def _rename_image(record: Record, key: str) -> Record:
    """Return a record with its image, or list of images, under `image`; without one it is a record of text."""
    others = {name: value for name, value in record.items() if name not in (key, "image", "images")}
    return {**others, "image": record.get(key)}


@dataclass(frozen=True)
class _Level:
    """A record, a turn or an item: where it is, its values, the keys that are read, and those that refuse it."""

    prefix: str
    values: Record
    read: frozenset[str]
    refused: dict[str, str]

    def unread(self) -> Iterator[str]:
        """Yield the keys that are not read and whose value is not empty."""
        yield from (key for key, value in self.values.items() if key not in self.read and not is_empty(value))

    def check(self, ignored: set[str], sample_id: str) -> None:
        """Raise BadSample for a key that is not read and changes what is learned."""
        for key in self.unread():
            is_neutral = self.refused.get(key) is WEIGHTS and self.values[key] in (1, [1])
            if key in self.refused and key not in ignored and not is_neutral:
                raise BadSample(sample_id, f"`{self.prefix}{key}` is not read: {self.refused[key]}. {_advice(key)}")

    def check_lost_media(self, ignored: set[str], sample_id: str) -> None:
        """Raise BadSample for a key that names an image which the record would be learned without."""
        for key in self.unread():
            is_lost = key in LOST_MEDIA_KEYS or _names_image(self.values[key])
            if is_lost and key not in ignored:
                problem = f"it shows no image, and `{key}` is not read"
                if key.startswith("video"):
                    problem = f"it shows no video, and `{key}` is not read; rename that key to `video`"
                    raise BadSample(sample_id, f"{problem}. {_advice(key)}")
                raise OptionNeeded(sample_id, problem, "image_key", key)


def _names_image(value: object) -> bool:
    """Return whether a value is the name of an image, or a list of such names."""
    names = value if isinstance(value, list) and value else [value]
    return all(isinstance(name, str) and IMAGE_NAME.search(name) is not None for name in names)


def _without_ignored(record: Record, turns_keys: Sequence[str], ignored: set[str]) -> Record:
    """Return a record without ignored keys that change what is learned: of its own, of its turns and of their items."""
    kept = _without(record, RECORD_KEYS, ignored)
    for key in turns_keys:
        if isinstance(turns := kept.get(key), list):
            kept[key] = [_without_ignored_of_turn(turn, ignored) if isinstance(turn, dict) else turn for turn in turns]
        elif isinstance(turns, dict):
            kept[key] = _without_ignored_of_turn(turns, ignored)
    return kept


def _without_ignored_of_turn(turn: Record, ignored: set[str]) -> Record:
    kept = _without(turn, TURN_KEYS, ignored)
    if isinstance(content := kept.get("content"), list):
        kept["content"] = [_without(item, ITEM_KEYS, ignored) if isinstance(item, dict) else item for item in content]
    return kept


def _without(values: Record, refused: dict[str, str], ignored: set[str]) -> Record:
    return {key: value for key, value in values.items() if key not in refused or key not in ignored}


def _advice(key: str) -> str:
    return f"Leave the key out, or allow it with the option ignore_keys=[{key}]"


def _levels_with_unread(
    record: Record, declared: DeclaredKeys, defaults: dict[str, Any], options: dict[str, Any]
) -> Iterator[_Level]:
    """Yield the record, its turns and their items, of those that have a key that is not read.

    `defaults` are those of the reader's parameters.
    """
    turns_key, read = declared.turns, declared.record_and_turns
    if turns_key is not None and "key" in options:
        turns_key = str(options["key"])
        read = declared.record.union([turns_key])
    if options.get("image_key") is not None:
        read = read.union([str(options["image_key"])])
    if declared.key_options:
        named = [options.get(name, defaults.get(name)) for name in declared.key_options]
        read = read.union(str(key) for value in named for key in (value if isinstance(value, list) else [value]))
    if not record.keys() <= read:
        yield _Level("", record, read, RECORD_KEYS)
    for key in declared.more_turns if turns_key is None else (turns_key, *declared.more_turns):
        yield from _levels_of_turns(record.get(key), key, declared)


def _levels_of_turns(turns: object, key: str, declared: DeclaredKeys) -> Iterator[_Level]:
    """Yield the turns of a list, or a single one, and their items, of those that have a key that is not read."""
    place = key if isinstance(turns, dict) else f"{key}[]"
    for turn in turns if isinstance(turns, list) else [turns]:
        if not isinstance(turn, dict):
            continue
        if not turn.keys() <= declared.turn:
            yield _Level(f"{place}.", turn, declared.turn, TURN_KEYS)
        content = turn.get("content")
        for item in content if isinstance(content, list) and declared.item else ():
            if isinstance(item, dict) and not item.keys() <= declared.item:
                yield _Level(f"{place}.content[].", item, declared.item, ITEM_KEYS)


def unread_keys(reader: Reader, record: object, options: dict[str, Any]) -> list[str]:
    """Return the keys of a record that its reader does not read, with those of its turns and items; each once.

    There are none for a reader that declares no keys, such as a user's own.
    """
    declared = getattr(reader, "declared_keys", None)
    if declared is None or not isinstance(record, dict):
        return []
    options = {name: value for name, value in options.items() if name != "ignore_keys"}
    defaults = {name: parameter.default for name, parameter in inspect.signature(reader).parameters.items()}
    levels = _levels_with_unread(record, declared, defaults, options)
    return list(dict.fromkeys(f"{level.prefix}{key}" for level in levels for key in level.unread()))


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
    """Return the first value of a record's keys that is not None; None where there is none."""
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


def read_turn_list(record: Record, key: str, sample_id: str, kind: str) -> list[Any]:
    """Return the turns of a record; `kind` is what messages call one of them.

    Raises:
        BadSample: there are none, or the value is no list.
    """
    if key not in record:
        raise BadSample(sample_id, f"it has no `{key}`; its keys are {', '.join(map(str, record))}")
    turns = record[key]
    if not isinstance(turns, list) or not turns:
        raise BadSample(sample_id, f"`{key}` must be a list of at least one {kind}")
    return turns


def read_supervision(turn: Record, role: str, where: str, sample_id: str) -> tuple[bool, float]:
    """Read whether a turn is learned, and how much its loss counts: by default it is, and counts 1.

    The value of one of `SUPERVISION_KEYS` is true or false, or a number from 0 on; 0 and false are the same.

    Raises:
        BadSample: a value is neither, the values contradict each other, or a turn that is no reply is to be learned.
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
    """Return turns behind the system turn that a record has beside them, as `system` or `system_prompt`.

    Raises:
        BadSample: it is no text, or there is another system turn.
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
    """Raise BadSample where a conversation begins with the assistant."""
    first = next((turn for turn in turns if turn.role != "system"), None)
    if first is not None and first.role == "assistant":
        raise BadSample(sample_id, "it begins with the assistant; a question must come before the first reply")


def read_group(record: Record, key: str = "group") -> str | None:
    """Read the group within which a ranking compares a record."""
    return None if record.get(key) is None else str(record[key])
