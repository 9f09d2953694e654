"""Keys of records: each reader declares those that it reads; keys that change what is trained on are never ignored.

A record is refused if it has a key that its reader does not read, that is in one of the tables below, and whose value
is not empty; the option `ignore_keys` of every reader allows such a key. Other keys are ignored, and `vlm data stats`
and `vlm data show` name them. The option `image_key` of every reader names the key of the images where it has another
name than `image`. Imports the standard library, `fields` and `sample` only.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path

from vlm.data.records.fields import SUPERVISION_KEYS, SYSTEM_KEYS, is_empty, read_id
from vlm.data.sample import BadSample, OptionNeeded, Record, Sample

Reader = Callable[..., Sample]

TOOLS = "tool calls are read in the formats messages and llava"
SOUND = "audio is not supported"
BOXES = "list boxes in the record's `objects`, and write <bbox> in its texts where they go"
THINKING = "it is part of a reply; write it into the reply's text"
FRAMES = "sizes and frames follow from the model and dataset.max_frames"
PLACED = "list images and videos in the record, or as items of the content of a turn"
WEIGHTS = "records have no weights; give a turn `weight` or `loss`, or a source `dataset.sources.….loss_weight`"
REFUSALS = "it is an alternative reply; write it as the text of the reply"

RECORD_KEYS = {
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), TOOLS),
    **dict.fromkeys(("audio", "audios"), SOUND),
    **dict.fromkeys(("objects", "bbox", "bboxes", "boxes"), BOXES),
    **dict.fromkeys(("weight", "loss", "loss_scale", "sample_weight"), WEIGHTS),
    "history": "earlier turns are not read in this format",
}
"""Keys of a record that change what is trained on -> why they are not read."""
TURN_KEYS = {
    **dict.fromkeys(("tools", "tool_calls", "function_call", "tool_call_id"), TOOLS),
    **dict.fromkeys(("audio", "audios"), SOUND),
    **dict.fromkeys(("objects", "bbox", "bboxes", "boxes"), BOXES),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), THINKING),
    "refusal": REFUSALS,
    **dict.fromkeys(("image", "images", "video", "videos"), PLACED),
    **dict.fromkeys(("train_detail", "training_detail"), "a run cannot train on parts of a reply"),
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
"""Extensions of images; such a name under a key that is not read is taken for an image that would be lost."""
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
        """The keys of a record, and the key of its turns unless an option names another one."""
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

    The reader then refuses records with other keys that change what is trained on.
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
        def checked(
            record: Record, image_folder: Path, *, ignore_keys: Sequence[str] = (), **options: object
        ) -> Sample:
            """Read a record, unless it has unread keys that change what is trained on and are not in `ignore_keys`."""
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

        signature = _with_options(signature, renames_image=renames_image)
        vars(checked).update(__signature__=signature, declared_keys=declared)
        return checked

    return declare


def _with_options(signature: inspect.Signature, *, renames_image: bool) -> inspect.Signature:
    """Return a reader's signature with the options that every reader has: `ignore_keys`, and `image_key`."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    options = [inspect.Parameter("ignore_keys", keyword, default=(), annotation=Sequence[str])]
    if renames_image:
        options.append(inspect.Parameter("image_key", keyword, default=None, annotation=str | None))
    return signature.replace(parameters=[*signature.parameters.values(), *options])


def _rename_image(record: Record, key: str) -> Record:
    """Return a record with its image, or list of images, under `image`; without one it is a record of text."""
    others = {name: value for name, value in record.items() if name not in (key, "image", "images")}
    return {**others, "image": record.get(key)}


@dataclass(frozen=True)
class _Level:
    """A record, turn or item: its place, its values, the keys that are read, and the keys for which it is refused."""

    prefix: str
    values: Record
    read: frozenset[str]
    refused: dict[str, str]

    def unread(self) -> Iterator[str]:
        """Yield the keys that are not read and whose value is not empty."""
        yield from (key for key, value in self.values.items() if key not in self.read and not is_empty(value))

    def check(self, ignored: set[str], sample_id: str) -> None:
        """Raise BadSample for a key that is not read and changes what is trained on."""
        for key in self.unread():
            is_neutral = self.refused.get(key) is WEIGHTS and self.values[key] in (1, [1])
            if key in self.refused and key not in ignored and not is_neutral:
                raise BadSample(sample_id, f"`{self.prefix}{key}` is not read: {self.refused[key]}. {_advice(key)}")

    def check_lost_media(self, ignored: set[str], sample_id: str) -> None:
        """Raise BadSample for a key that names an image if the record would be trained on without that image."""
        for key in self.unread():
            is_lost = key in LOST_MEDIA_KEYS or names_image(self.values[key])
            if is_lost and key not in ignored:
                problem = f"it shows no image, and `{key}` is not read"
                if key.startswith("video"):
                    problem = f"it shows no video, and `{key}` is not read; rename that key to `video`"
                    raise BadSample(sample_id, f"{problem}. {_advice(key)}")
                raise OptionNeeded(sample_id, problem, "image_key", key)


def names_image(value: object) -> bool:
    """Return whether a value is the name of an image, or a list of such names."""
    names = value if isinstance(value, list) and value else [value]
    return all(isinstance(name, str) and IMAGE_NAME.search(name) is not None for name in names)


def _without_ignored(record: Record, turns_keys: Sequence[str], ignored: set[str]) -> Record:
    """Return a record without ignored keys that change what is trained on, in its turns and their items, too."""
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
    record: Record, declared: DeclaredKeys, defaults: dict[str, object], options: dict[str, object]
) -> Iterator[_Level]:
    """Yield each record, turn and item that has a key that is not read.

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
    """Yield each turn, of a list or a single one, and each item of a turn that has a key that is not read."""
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


def unread_keys(reader: Reader, record: object, options: Mapping[str, object]) -> list[str]:
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
