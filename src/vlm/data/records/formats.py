"""Readers: one record as a `Sample`, whatever kind of file it came from.

Imports the in-memory form and the standard library only, since configurations are checked with it. To add a format,
write a function `(record, image_folder, **options) -> Sample` that raises `BadSample`, and add it to `FORMATS`; a
user's own needs no line there (`dataset.format=package.module:function`). Its keyword parameters are what
`dataset.options` may set.
"""

import importlib
import string
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm.data.records.media import (
    FILE_KEYS,
    image_ref_from_value,
    image_refs_from_value,
    video_ref_from_value,
    video_refs_from_value,
)
from vlm.data.sample import (
    PLACEHOLDER,
    ROLES,
    VIDEO_PLACEHOLDER,
    BadSample,
    ContentPart,
    ImageRef,
    Sample,
    Turn,
    VideoRef,
)

LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
CHOICE_INSTRUCTION = "Answer with the option's letter from the given choices directly."


def read_llava(record: Any, image_folder: Path) -> Sample:
    """LLaVA's form: `{"id", "image": path or list or absent, "conversations": [{"from", "value"}, …]}`.

    `<image>` in what the human says stands for the pictures in order. A lone one is moved to the start of its turn.
    """
    sample_id = read_id(record)
    conversation = record.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise BadSample(sample_id, "`conversations` must be a list of at least one turn")
    media = MediaPlacer(record, image_folder, sample_id)
    turns = []
    for number, turn in enumerate(conversation, start=1):
        if not (isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)):
            raise BadSample(sample_id, f"turn {number}: `from` and `value` must be strings")
        if turn["from"] not in LLAVA_ROLES:
            raise BadSample(sample_id, f"turn {number}: from={turn['from']!r}; allowed are {', '.join(LLAVA_ROLES)}")
        role = LLAVA_ROLES[turn["from"]]
        content = media.within(_move_image_first(turn["value"])) if role == "user" else (turn["value"],)
        turns.append(Turn(role, content))
    return make_sample(record, turns, media)


def read_messages(record: Any, image_folder: Path, *, key: str = "messages") -> Sample:
    """Chat messages: `{"messages": [{"role", "content"}, …], "images": […]}`, order kept as it stands.

    `content` is a string, in which `<image>` stands for the pictures of `images` in order, or a list of
    `{"type": "text", "text"}`, `{"type": "image"}` (naming its picture as `image`, `path` or `url`, else the next of
    `images`), `{"type": "image_url", "image_url": {"url"}}` and `{"type": "video"}`.

    Args:
        record: the record.
        image_folder: what paths are relative to.
        key: where the messages stand.
    """
    sample_id = read_id(record)
    messages = record.get(key)
    if not isinstance(messages, list) or not messages:
        raise BadSample(sample_id, f"`{key}` must be a list of at least one message")
    media = MediaPlacer(record, image_folder, sample_id)
    turns = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise BadSample(sample_id, f"message {number}: role={role!r:.40}; allowed are {', '.join(ROLES)}")
        content = _parse_message_content(message.get("content"), message["role"], media, f"message {number}")
        turns.append(Turn(message["role"], content))
    return make_sample(record, turns, media)


def read_caption(
    record: Any, image_folder: Path, *, image_key: str = "image", caption_key: str = "caption",
    prompt: str | list[str] | None = None,
) -> Sample:  # fmt: skip
    """A picture and its caption: `{"image", "caption"}`.

    Args:
        record: the record.
        image_folder: what paths are relative to.
        image_key: where the picture stands.
        caption_key: where the caption stands.
        prompt: what is asked after the picture; of a list, each record gets one, chosen by its caption. None: nothing,
            as the template `plain` has it.
    """
    sample_id = read_id(record)
    pictures = image_refs_from_value(record.get(image_key), image_folder, sample_id, image_key)
    if not pictures:
        raise BadSample(sample_id, f"`{image_key}` must name a picture")
    caption = _require_string(record, caption_key, sample_id)
    if isinstance(prompt, list):
        prompt = prompt[zlib.crc32(caption.encode()) % len(prompt)]
    asked: tuple[ContentPart, ...] = (*pictures, f"\n{prompt}") if prompt else tuple(pictures)
    return Sample(
        sample_id, (Turn("user", asked), Turn("assistant", (caption,))), record.get("label"), read_group(record),
        read_references(record, sample_id),
    )  # fmt: skip


def read_question(
    record: Any, image_folder: Path, *, instruction: str | None = None, choice_instruction: str = CHOICE_INSTRUCTION
) -> Sample:
    """A question with its answer: `{"image", "question", "answer", "choices": […] or absent}`.

    With choices, they are listed as `A. …` and the answer is a letter; it is given as the number of the choice (from
    0), its letter or its text. Without, it is a string, or a list of people's answers, of which the commonest counts.
    A question with a `label` needs none.

    Args:
        record: the record.
        image_folder: what paths are relative to.
        instruction: a last line of questions without choices.
        choice_instruction: a last line of questions with choices.
    """
    sample_id = read_id(record)
    media = MediaPlacer(record, image_folder, sample_id)
    lines = [_require_string(record, "question", sample_id)]
    answer = _first_present(record, "answer", "answers")
    replies = answer is not None or record.get("label") is None
    if choices := record.get("choices"):
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise BadSample(sample_id, "`choices` must be a list of strings")
        if len(choices) > len(string.ascii_uppercase):
            raise BadSample(sample_id, f"{len(choices)} choices, but there are letters for 26")
        lines += [f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False)]
        lines.append(choice_instruction)
        said = [_choice_letter(record.get("answer"), choices, sample_id)] if replies else []
    else:
        lines += [instruction] if instruction else []
        said = [_most_common_answer(answer, sample_id)] if replies else []
    asked = media.place_or_prepend("\n".join(lines))
    sample = make_sample(record, [Turn("user", asked), *(Turn("assistant", (text,)) for text in said)], media)
    return replace(sample, references=()) if choices else sample  # the letter is what counts


def read_head(record: Any, image_folder: Path) -> Sample:
    """A prompt and an answer: `{"source", "images", "videos", "system_prompt", "conversations": [prompt, answer]}`.

    Pictures stand where `<image>` does in the prompt, or before it where it has none. The label is the record's
    `label`; where it has none, 1 for an answer that begins with "yes" or is "1", else 0.
    """
    sample_id = read_id(record, "source")
    conversation = record.get("conversations")
    if not (isinstance(conversation, list) and len(conversation) == 2
            and all(isinstance(text, str) for text in conversation)):  # fmt: skip
        raise BadSample(sample_id, "`conversations` must be a prompt and an answer, both strings")
    media = MediaPlacer(record, image_folder, sample_id)
    prompt, answer = conversation
    system = record.get("system_prompt")
    turns = [Turn("system", (system,))] if isinstance(system, str) and system else []
    turns += [Turn("user", media.place_or_prepend(prompt)), Turn("assistant", (answer,))]
    sample = make_sample(record, turns, media)
    said = answer.strip().lower()
    return sample if sample.label is not None else replace(sample, label=int(said.startswith("yes") or said == "1"))


def read_labelled(
    record: Any, image_folder: Path, *, image_key: str = "image", prompt_key: str = "prompt",
    label_key: str | list[str] = "label", group_key: str = "group", prompt: str | None = None,
    label_separator: str | None = None,
) -> Sample:  # fmt: skip
    """A picture, a prompt and what a prediction head learns: `{"image": path or list or absent, "prompt", "label"}`.

    Pictures stand where `<image>` does in the prompt, or before it where it has none. Without a label, the record is
    there to be predicted.

    Args:
        record: the record.
        image_folder: what paths are relative to.
        image_key: where the pictures stand; a record without any has null there.
        prompt_key: where the prompt stands.
        label_key: where the label stands; of a list, the label is a mapping of those that are not null.
        group_key: where it stands which records a ranking compares.
        prompt: what is asked where the record has no prompt.
        label_separator: splits a label that is a string into a list of labels; a string without any is an empty list.
    """
    sample_id = read_id(record)
    given = record
    if image_key != "image":
        if image_key not in record:
            raise BadSample(sample_id, f"`{image_key}` is not there; it has {', '.join(record)}")
        given = {**record, "image": record[image_key], "images": None}
    media = MediaPlacer(given, image_folder, sample_id)
    asked = (
        prompt
        if prompt is not None and record.get(prompt_key) is None
        else _require_string(record, prompt_key, sample_id)
    )
    content = media.place_or_prepend(asked) if asked else media.rest()
    if not content:
        raise BadSample(sample_id, "it has neither a picture nor a prompt")
    media.check_all_placed()
    keys = [label_key] if isinstance(label_key, str) else label_key
    found = {key: _split_label(record[key], label_separator) for key in keys if record.get(key) is not None}
    label = found.get(label_key) if isinstance(label_key, str) else found or None
    return Sample(sample_id, (Turn("user", content),), label, read_group(record, group_key))


class MediaPlacer:
    """The pictures and videos that a record lists, handed out in order to the placeholders in its text.

    Args:
        record: the record, with `image` or `images`, `video` or `videos`.
        folder: what paths are relative to.
        sample_id: for messages.
    """

    def __init__(self, record: dict[str, Any], folder: Path, sample_id: str):
        self.folder, self.sample_id = folder, sample_id
        pictures = image_refs_from_value(_first_present(record, "image", "images"), folder, sample_id)
        videos = video_refs_from_value(_first_present(record, "video", "videos"), folder, sample_id)
        self.number = len(pictures) + len(videos)
        self.unplaced: dict[str, Iterator[ImageRef | VideoRef]] = {
            PLACEHOLDER: iter(pictures), VIDEO_PLACEHOLDER: iter(videos)
        }  # fmt: skip

    def next(self, placeholder: str) -> ImageRef | VideoRef:
        """The next picture or video.

        Raises:
            BadSample: there is none left.
        """
        found = next(self.unplaced[placeholder], None)
        if found is None:
            things = "images" if placeholder == PLACEHOLDER else "videos"
            raise BadSample(self.sample_id, f"more {placeholder} in its text than {things}")
        return found

    def rest(self) -> tuple[ImageRef | VideoRef, ...]:
        """All that are left: videos first, as they are longer."""
        return (*self.unplaced[VIDEO_PLACEHOLDER], *self.unplaced[PLACEHOLDER])

    def within(self, text: str) -> tuple[ContentPart, ...]:
        """A text, its placeholders replaced by pictures and videos."""
        content: list[ContentPart] = []
        for number, piece in enumerate(text.split(PLACEHOLDER)):
            content += [self.next(PLACEHOLDER)] if number else []
            for place, rest in enumerate(piece.split(VIDEO_PLACEHOLDER)):
                content += [self.next(VIDEO_PLACEHOLDER)] if place else []
                content += [rest] if rest else []
        return tuple(content)

    def place_or_prepend(self, text: str) -> tuple[ContentPart, ...]:
        """A question, its placeholders replaced; where it has none, everything stands before it."""
        if PLACEHOLDER in text or VIDEO_PLACEHOLDER in text:
            return self.within(_move_image_first(text))
        return (*self.rest(), f"\n{text}" if self.number else text)

    def check_all_placed(self) -> None:
        """Raise BadSample where a picture or video is left over, which stands nowhere in the text."""
        if left := len(self.rest()):
            raise BadSample(self.sample_id, f"{left} more image(s) than {PLACEHOLDER} in its text")


def make_sample(record: dict[str, Any], turns: list[Turn], media: MediaPlacer) -> Sample:
    """The sample, with the record's label, group and references, once nothing that it lists is left over.

    Raises:
        BadSample: a picture stands nowhere in the text, or `answers` are no texts.
    """
    media.check_all_placed()
    references = read_references(record, media.sample_id)
    return Sample(media.sample_id, tuple(turns), record.get("label"), read_group(record), references)


def read_group(record: dict[str, Any], key: str = "group") -> str | None:
    """The group in which a ranking compares a record."""
    return None if record.get(key) is None else str(record[key])


def read_references(record: dict[str, Any], sample_id: str) -> tuple[str, ...]:
    """What people answered: a record's `answers`, or several that stand in its `answer`; none where it has neither.

    Raises:
        BadSample: they are no texts.
    """
    given = record.get("answers")
    if given is None and isinstance(record.get("answer"), list):
        given = record["answer"]
    return () if given is None else tuple(_read_answers(given, sample_id))


def read_id(record: Any, *names: str) -> str:
    """A record's own name: its `id`, or one of the other keys.

    Raises:
        BadSample: the record is no mapping.
    """
    if not isinstance(record, dict):
        raise BadSample("?", f"a mapping is needed, got {type(record).__name__}")
    found = (record[name] for name in ("id", "question_id", "image_id", *names) if record.get(name) is not None)
    return str(next(found, "?"))


def _move_image_first(text: str) -> str:
    """A lone placeholder is moved to the start of its turn, as LLaVA does."""
    texts = text.split(PLACEHOLDER)
    if len(texts) != 2:
        return text
    rest = "".join(texts).strip()
    return f"{PLACEHOLDER}\n{rest}" if rest else PLACEHOLDER


def _parse_message_content(content: Any, role: str, media: MediaPlacer, where: str) -> tuple[ContentPart, ...]:
    """What a message says: texts joined, pictures and videos in their places."""
    if isinstance(content, str):
        return media.within(content) if role == "user" else (content,)
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise BadSample(media.sample_id, f"{where}: `content` must be a string or a list of items")
    parts: list[ContentPart] = []
    for item in content:
        part = _parse_item(item, media, where)
        if not isinstance(part, str) and role != "user":
            raise BadSample(media.sample_id, f"{where}: only the user shows pictures, here it is the {role}")
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        else:
            parts.append(part)
    return tuple(parts) if role == "user" else tuple(parts) or ("",)


def _parse_item(item: dict[str, Any], media: MediaPlacer, where: str) -> ContentPart:
    """One item of a message's list. Tables hold None where a row lacks a key, so None means absent."""
    kind = item.get("type")
    if kind == "text" and isinstance(item.get("text"), str):
        return item["text"]
    if kind == "image_url":
        inner = item.get("image_url")
        return image_ref_from_value(
            inner.get("url") if isinstance(inner, dict) else inner, media.folder, media.sample_id, kind
        )
    if kind in ("image", "video"):
        named = [item[key] for key in FILE_KEYS if item.get(key) is not None]
        if not named:
            return media.next(PLACEHOLDER if kind == "image" else VIDEO_PLACEHOLDER)
        return (image_ref_from_value if kind == "image" else video_ref_from_value)(
            named[0], media.folder, media.sample_id, kind
        )
    raise BadSample(
        media.sample_id, f"{where}: type={kind!r}; allowed are text (with a string), image, image_url and video"
    )


def _first_present(record: dict[str, Any], one: str, many: str) -> Any:
    return record.get(one) if record.get(one) is not None else record.get(many)


def _require_string(record: dict[str, Any], key: str, sample_id: str) -> str:
    if not isinstance(value := record.get(key), str):
        raise BadSample(sample_id, f"`{key}` must be a string, got {value!r:.60}; it has {', '.join(record)}")
    return value


def _split_label(label: Any, separator: str | None) -> Any:
    """A label that is a string, split into those that it lists; any other label as it is."""
    if separator is None or not isinstance(label, str):
        return label
    return [part.strip() for part in label.split(separator) if part.strip()]


def _choice_letter(answer: Any, choices: list[str], sample_id: str) -> str:
    """The letter of a choice that is given by number, letter or text."""
    letters = string.ascii_uppercase[: len(choices)]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(letters):
        return letters[answer]
    if isinstance(answer, str) and answer in choices:
        return letters[choices.index(answer)]
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        return answer
    raise BadSample(sample_id, f"answer={answer!r:.60}; it must be one of the choices, its number from 0 or its letter")


def _most_common_answer(answer: Any, sample_id: str) -> str:
    """A string, or the commonest of several; of equally common ones the first."""
    return Counter(_read_answers(answer, sample_id)).most_common(1)[0][0]


def _read_answers(given: Any, sample_id: str) -> list[str]:
    """One answer or several, as strings or as VQA has them (`{"answer": "a cat"}`)."""
    answers = [one.get("answer") if isinstance(one, dict) else one for one in (
        given if isinstance(given, list) else [given]
    )]  # fmt: skip
    texts = [one for one in answers if isinstance(one, str)]
    if not texts or len(texts) < len(answers):
        raise BadSample(sample_id, f"`answer` must be a string or a list of strings, got {given!r:.60}")
    return texts


Reader = Callable[..., Sample]
FORMATS: dict[str, Reader] = {
    "llava": read_llava,
    "messages": read_messages,
    "caption": read_caption,
    "question": read_question,
    "head": read_head,
    "labelled": read_labelled,
}


def get_reader(name: str) -> Reader:
    """The reader that `dataset.format` names: one of `FORMATS`, or a function `package.module:function`.

    Raises:
        ValueError: there is no such function.
    """
    if name in FORMATS:
        return FORMATS[name]
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"dataset.format={name}: {error}") from error
