"""Readers: functions that turn one record into a `Sample`, whatever kind of file it came from.

The readers of LLaVA's form and of chat messages are in `conversations`. Imports siblings that need the standard library
only, since configurations are checked with it. To add a format, write a function
`(record, image_folder, **options) -> Sample` that raises `BadSample`, declare the keys that it reads with `keys.reads`,
and add it to `FORMATS`; a user's own function needs neither (`dataset.format=package.module:function`).
`dataset.options` may set its keyword parameters.
"""

import string
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

from vlm.config.named import import_named
from vlm.data.records.answers import find_choice_letter, read_answers, read_choices
from vlm.data.records.conversations import (
    ITEM_KEYS,
    make_sample,
    parse_llava,
    parse_messages,
    parse_messages_with_tools,
    read_llava,
    read_messages,
)
from vlm.data.records.fields import add_system_turn, first_present, read_group, read_id
from vlm.data.records.keys import Reader, reads
from vlm.data.records.media import MediaPlacer
from vlm.data.records.members import PAIR_KEYS, read_members
from vlm.data.records.preferences import PREFERENCE_KEYS, TURN_LIST_KEYS, read_sides
from vlm.data.records.rewrites import rewrite_alpaca, rewrite_cauldron, rewrite_minicpm
from vlm.data.records.text import text_from_value
from vlm.data.records.tool_turns import TOOL_KEYS, TOOL_TURN_KEYS
from vlm.data.sample import BadSample, KeyNeeded, Record, Sample, Turn

CHOICE_INSTRUCTION = "Answer with the option's letter from the given choices directly."


@reads("objects", key_options=("image_key", "caption_key"))
def read_caption(
    record: Record,
    image_folder: Path,
    *,
    image_key: str = "image",
    caption_key: str = "caption",
    prompt: str | list[str] | None = None,
) -> Sample:
    """Read an image and its caption: `{"image", "caption"}`.

    Args:
        record: the record.
        image_folder: what paths are relative to.
        image_key: the key of the image.
        caption_key: the key of the caption.
        prompt: the question after the image; from a list, each record gets one, chosen by its caption. None for no
            question, as the template `plain` expects.

    Raises:
        BadSample: the record has another form, or its image cannot be used.
    """
    sample_id = read_id(record)
    media = MediaPlacer(_rename_image(record, image_key), image_folder, sample_id)
    if not media.has_media:
        problem = f"`{image_key}` must name an image; it has {', '.join(record)}"
        raise BadSample(sample_id, problem) if image_key in record else KeyNeeded(sample_id, problem, "image_key")
    caption = _require_string(record, caption_key, sample_id, "caption_key")
    if isinstance(prompt, list):
        prompt = prompt[zlib.crc32(caption.encode()) % len(prompt)]
    asked = (*media.rest(), f"\n{prompt}") if prompt else media.rest()
    return make_sample(record, [Turn("user", asked), Turn("assistant", (caption,))], media)


@reads("question", "choices", "objects", key_options=("question_key", "answer_key"))
def read_question(
    record: Record,
    image_folder: Path,
    *,
    instruction: str | None = None,
    choice_instruction: str = CHOICE_INSTRUCTION,
    question_key: str = "question",
    answer_key: str | None = None,
) -> Sample:
    """Read a question with its answer: `{"image", "question", "answer", "choices": […] or absent}`.

    Choices are listed as `A. …`, and the answer is the letter of the choice that the record gives as its index (from
    0), letter or text. Without choices, the answer is a string, or a list of people's answers, of which the most
    common one counts. A question with a `label` needs no answer.

    Args:
        record: the record.
        image_folder: what paths are relative to.
        instruction: the last line of questions without choices.
        choice_instruction: the last line of questions with choices.
        question_key: the key of the question.
        answer_key: the key of the answer; defaults to `answer`, else `answers`.

    Raises:
        BadSample: the record has another form, or an image cannot be used.
    """
    sample_id = read_id(record)
    media = MediaPlacer(record, image_folder, sample_id)
    if answer_key is not None:
        record = {**record, "answer": record.get(answer_key)}
    lines = [_require_string(record, question_key, sample_id, "question_key")]
    if choices := record.get("choices"):
        choices = read_choices(choices, record.get("answer"), sample_id)
        if len(choices) > len(string.ascii_uppercase):
            raise BadSample(sample_id, f"{len(choices)} choices, but there are letters for 26")
        lines += [f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False)]
        lines.append(choice_instruction)
    elif instruction:
        lines.append(instruction)
    turns = [Turn("user", media.place_or_prepend("\n".join(lines)))]
    answer = first_present(record, "answer", "answers", "references")
    if answer is not None or record.get("label") is None:
        if choices:
            reply = find_choice_letter(record.get("answer"), choices, sample_id)
        else:
            reply = Counter(read_answers(answer, sample_id)).most_common(1)[0][0]  # the first of equally common ones
        turns.append(Turn("assistant", (reply,)))
    sample = make_sample(record, turns, media)
    return replace(sample, references=()) if choices else sample  # an answer is compared with the letter only


@reads("source", "conversations", "objects")
def read_head(record: Record, image_folder: Path) -> Sample:
    """Read a prompt and answer: `{"source", "images", "videos", "system_prompt", "conversations": [prompt, answer]}`.

    Images replace `<image>` in the prompt, or come before a prompt without any. The label is the record's `label`;
    without one, it is 1 for an answer that begins with "yes" or is "1", else 0.

    Raises:
        BadSample: the record has another form, or an image cannot be used.
    """
    sample_id = read_id(record, "source")
    conversation = record.get("conversations")
    texts = list(map(text_from_value, conversation)) if isinstance(conversation, list) else []
    prompt, answer = texts if len(texts) == 2 else (None, None)
    if prompt is None or answer is None:
        raise BadSample(sample_id, "`conversations` must be a prompt and an answer, both strings")
    media = MediaPlacer(record, image_folder, sample_id)
    turns = [Turn("user", media.place_or_prepend(prompt)), Turn("assistant", (answer,))]
    sample = make_sample(record, turns, media)
    text = answer.strip().lower()
    return sample if sample.label is not None else replace(sample, label=int(text.startswith("yes") or text == "1"))


@reads(key_options=("image_key", "prompt_key", "label_key", "group_key"))
def read_labelled(
    record: Record,
    image_folder: Path,
    *,
    image_key: str = "image",
    prompt_key: str = "prompt",
    label_key: str | list[str] = "label",
    group_key: str = "group",
    prompt: str | None = None,
    label_separator: str | None = None,
) -> Sample:
    """Read an image, a prompt and a label for prediction heads: `{"image": path or list or absent, "prompt", "label"}`.

    Images replace `<image>` in the prompt, or come before a prompt without any. A record without a label is one to
    predict.

    Args:
        record: the record.
        image_folder: what paths are relative to.
        image_key: the key of the images; its value is null in a record without any.
        prompt_key: the key of the prompt.
        label_key: the key of the label; with a list of keys, the label is a mapping from those that are not null.
        group_key: the key of the group within which a ranking compares records.
        prompt: the prompt of records without one.
        label_separator: splits a label that is a string into a list of labels; an empty string is an empty list.

    Raises:
        BadSample: the record has another form, or an image cannot be used.
    """
    sample_id = read_id(record)
    if image_key != "image" and image_key not in record:
        raise KeyNeeded(sample_id, f"`{image_key}` is not there; it has {', '.join(record)}", "image_key")
    media = MediaPlacer(_rename_image(record, image_key), image_folder, sample_id)
    if record.get(prompt_key) is not None:
        question = _require_string(record, prompt_key, sample_id, "prompt_key")
    elif prompt is None:
        raise KeyNeeded(sample_id, f"it has no `{prompt_key}`, only {', '.join(record)}", "prompt_key")
    else:
        question = prompt
    content = media.place_or_prepend(question) if question else media.rest()
    if not content:
        raise BadSample(sample_id, "it has neither an image nor a prompt")
    turns = add_system_turn(record, [Turn("user", content)], sample_id)
    media.check_all_placed(turns)
    keys = [label_key] if isinstance(label_key, str) else label_key
    labels = {key: _split_label(record[key], label_separator) for key in keys if record.get(key) is not None}
    label = labels.get(label_key) if isinstance(label_key, str) else labels or None
    return Sample(sample_id, tuple(turns), label, read_group(record, group_key))


@reads(*PAIR_KEYS, key_options=("query_key", "positive_key", "negative_key"))
def read_pair(
    record: Record,
    image_folder: Path,
    *,
    query_key: str | None = None,
    positive_key: str | None = None,
    negative_key: str | None = None,
) -> Sample:
    """Read what embeddings learn from: `{"query", "positive", "negatives": […] or absent}`, see `members.read_members`.

    Each is a text, a list of chat messages, or a mapping with `text`, `image` or `images`, and perhaps an `instruction`
    (its system turn). Records of sentence-transformers (`anchor`, `positive`, `negative`), ms-swift (`messages`,
    `positive_messages`, `negative_messages`) and VLM2Vec (`qry`, `qry_image_path`, `pos_text`, …) are read too.

    Args:
        record: the record.
        image_folder: what paths are relative to.
        query_key: the key of the query, where it has another name.
        positive_key: the key of the positive, likewise.
        negative_key: the key of the negative, or of a list of them, likewise.

    Raises:
        BadSample: the record has another form, or an image cannot be used.
    """
    sample_id = read_id(record)
    keys = {"query": query_key, "positive": positive_key, "negatives": negative_key}
    named = {name: record.get(key) for name, key in keys.items() if key is not None}
    return Sample(sample_id, read_members({**record, **named}, image_folder, sample_id, parse_messages))


@reads(
    "objects",
    *TOOL_KEYS,
    *PREFERENCE_KEYS,
    turns="messages",
    more_turns=TURN_LIST_KEYS,
    item=ITEM_KEYS,
    turn=("role", "content", "from", "value", *TOOL_TURN_KEYS),
)
def read_preference(record: Record, image_folder: Path) -> Sample:
    """Read a chosen and a rejected reply, or one reply with `label: true` or `false`; see `preferences.read_sides`.

    After `prompt`, `question`, `messages` or `conversations`, with the images of the record: `{"chosen", "rejected"}`,
    each a text, a turn, a list of turns, or a whole conversation; ms-swift's `rejected_response`, `rejected_messages`
    and `rejected_images`; TRL's `{"completion", "label"}`; RLHF-V's `text`, and LLaVA-RLHF's `output_1`, `output_2` and
    `preference`.

    Raises:
        BadSample: the record has another form, or an image cannot be used.
    """
    return read_sides(record, image_folder, read_id(record), parse_messages_with_tools, parse_llava)


@reads("instruction", "input", "output", "history", "objects")
def read_alpaca(record: Record, image_folder: Path) -> Sample:
    """Read `{"instruction", "input", "output"}` and images, see `rewrites.rewrite_alpaca`."""
    return parse_messages(rewrite_alpaca(record, read_id(record)), image_folder)


@reads("objects", turns="texts", turn=("user", "assistant"))
def read_cauldron(record: Record, image_folder: Path) -> Sample:
    """Read `{"images", "texts": [{"user", "assistant"}]}`, see `rewrites.rewrite_cauldron`."""
    return parse_messages(rewrite_cauldron(record, read_id(record)), image_folder)


@reads("objects", turns="conversations", turn=("role", "content"))
def read_minicpm(record: Record, image_folder: Path) -> Sample:
    """Read MiniCPM-V's `{"image", "conversations": [{"role", "content"}]}`, see `rewrites.rewrite_minicpm`."""
    return parse_messages(rewrite_minicpm(record, read_id(record)), image_folder)


def _rename_image(record: Record, image_key: str) -> Record:
    """Return a record with the images of another key as `image`."""
    return record if image_key == "image" else {**record, "image": record.get(image_key), "images": None}


def _require_string(record: Record, key: str, sample_id: str, option: str) -> str:
    """Return the text under a key; raise BadSample if there is none, with the option that names another key."""
    if (text := text_from_value(record.get(key))) is None:
        problem = f"`{key}` must be a string, got {record.get(key)!r:.60}; it has {', '.join(record)}"
        raise KeyNeeded(sample_id, problem, option) if record.get(key) is None else BadSample(sample_id, problem)
    return text


def _split_label(label: object, separator: str | None) -> object:
    """Split a label that is a string into a list of labels; return any other label unchanged."""
    if separator is None or not isinstance(label, str):
        return label
    return [part.strip() for part in label.split(separator) if part.strip()]


FORMATS: dict[str, Reader] = {
    "llava": read_llava,
    "messages": read_messages,
    "caption": read_caption,
    "question": read_question,
    "head": read_head,
    "pair": read_pair,
    "preference": read_preference,
    "labelled": read_labelled,
    "alpaca": read_alpaca,
    "cauldron": read_cauldron,
    "minicpm": read_minicpm,
}


def get_reader(name: str) -> Reader:
    """Return the reader that `dataset.format` names: one of `FORMATS`, or `package.module:function`.

    Raises:
        ValueError: there is no such function.
    """
    if name in FORMATS:
        return FORMATS[name]
    return import_named(name, "dataset.format")  # pyright: ignore[reportReturnType] - the user's function
