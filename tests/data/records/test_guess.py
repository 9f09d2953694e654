"""What records of another form seem to be: every form names what reads it, and that reads it."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.data.records.formats import FORMATS
from vlm.data.records.guess import guess_form, with_hint
from vlm.data.records.keys import unread_keys
from vlm.data.records.positions import value_or_bad_sample
from vlm.data.sample import BadSample, OptionNeeded

ROLES = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that"}]
TURNS = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "that"}]
READ: dict[str, tuple[dict[str, Any], str]] = {
    "captions": ({"image": "a.png", "caption": "that"}, "dataset.format=caption"),
    "an image folder's metadata": (
        {"file_name": "a.png", "text": "that"},
        "dataset.format=caption dataset.options.image_key=file_name dataset.options.caption_key=text",
    ),
    "a table of files with captions": (
        {"file": "a.png", "text": "that"},
        "dataset.format=caption dataset.options.image_key=file dataset.options.caption_key=text",
    ),
    "captions of files under an unusual key": (
        {"what_i_saw": "a.png", "description": "that"},
        "dataset.format=caption dataset.options.image_key=what_i_saw dataset.options.caption_key=description",
    ),
    "questions about images under another key": (
        {"picture": "a.png", "question": "what?", "answer": "that"},
        "dataset.format=question dataset.options.image_key=picture",
    ),
    "labels without prompts": (
        {"path": "a.png", "label": "that"},
        "dataset.format=labelled dataset.options.image_key=path dataset.options.prompt='\"\"'",
    ),
    "messages": ({"messages": ROLES}, "dataset.format=messages"),
    "messages elsewhere": ({"conversations": ROLES}, "dataset.format=messages dataset.options.key=conversations"),
    "LLaVA's": ({"conversations": TURNS}, "dataset.format=llava"),
    "ShareGPT's": ({"system": "", "conversations": TURNS, "tools": ""}, "dataset.format=llava"),
    "a prompt and an answer": ({"conversations": ["what?", "that"]}, "dataset.format=head"),
    "alpaca's": ({"instruction": "what?", "input": "", "output": "that"}, "dataset.format=alpaca"),
    "the Cauldron's": (
        {"images": ["a.png"], "texts": [{"user": "what?", "assistant": "that"}]},
        "dataset.format=cauldron",
    ),
    "MiniCPM's": ({"image": {"<image_00>": "a.png"}, "conversations": ROLES}, "dataset.format=minicpm"),
    "VQAv2's": (
        {"image": "a.png", "question": "what?", "question_type": "what", "answers": [{"answer": "that"}]},
        "dataset.format=question",
    ),
    "queries": (
        {"query": "what?", "response": "that"},
        "dataset.format=question dataset.options.question_key=query dataset.options.answer_key=response",
    ),
    "pairs of replies": ({"prompt": "what?", "chosen": "that", "rejected": "b"}, "dataset.format=preference"),
    "ms-swift's pairs": ({"messages": ROLES, "rejected_response": "b"}, "dataset.format=preference"),
    "replies with labels": (
        {"prompt": "what?", "completion": "that", "label": True},
        "dataset.format=preference",
    ),
    "turns elsewhere": ({"dialog": TURNS}, "dataset.format=llava dataset.options.key=dialog"),
    "labels": (
        {"image": "a.png", "prompt": "what?", "class": "that"},
        "dataset.format=labelled dataset.options.label_key=class",
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    return tmp_path


@pytest.mark.parametrize("form", READ)
def test_what_is_named_reads_the_record(folder: Path, form: str):
    record, words = READ[form]
    guess = guess_form(record)
    assert guess is not None
    assert guess.hint().endswith(f": add {words}")
    assert guess.format is not None
    sample = FORMATS[guess.format](record, folder, **guess.options)
    told = sample.label if guess.format == "labelled" else sample.turns[-1].content
    assert told in ("that", ("that",))


def test_a_reader_that_refuses_a_record_is_told_its_form(folder: Path):
    """By every reader that needs something which the record has not."""
    told = 0
    for record, words in READ.values():
        for name, read in FORMATS.items():
            sample = value_or_bad_sample(lambda item, read=read: read(item, folder), record)
            if isinstance(sample, BadSample) and sample.file is None:
                hinted = with_hint(sample, record, name, {})
                if isinstance(sample, OptionNeeded):  # it has its own hint
                    continue
                assert hinted.reason.startswith(sample.reason)
                needed = words.removeprefix(f"dataset.format={name} ")  # which is given
                assert hinted.reason.endswith(f"add {needed}")
                told += 1
    assert told > 5 * len(READ)


UNREAD = {
    "boxes": (
        {"image": "a.png", "boxes": [[1, 2, 3, 4]], "labels": [1]},
        "a detection export (`boxes`): write its boxes as `objects` of records",
    ),
    "addresses": ({"url": "https://example.com/a.png", "caption": "a"}, "vlm data download TABLE FOLDER"),
}


@pytest.mark.parametrize("form", UNREAD)
def test_what_no_format_reads_is_named_too(form: str):
    record, said = UNREAD[form]
    guess = guess_form(record)
    assert guess is not None
    assert said in guess.hint()


@pytest.mark.parametrize("key", ["img", "image_path", "file_name", "my_photo"])
def test_the_option_that_reads_an_image_under_another_key_is_told(folder: Path, key: str):
    asked = {"from": "human", "value": "<image>\nwhat?"}
    record = {"id": "7", key: "a.png", "conversations": [asked, TURNS[1]]}
    sample = value_or_bad_sample(lambda item: FORMATS["llava"](item, folder), record)
    assert isinstance(sample, BadSample)
    told = with_hint(sample, record, "llava", {}).reason
    assert f"`{key}` is not read: add dataset.options.image_key={key}, or dataset.options.ignore_keys=[{key}]" in told
    assert f"add --option image_key={key}" in with_hint(sample, record, "llava", {}, "clean").reason
    assert FORMATS["llava"](record, folder, image_key=key).images[0].path == folder / "a.png"
    assert not FORMATS["llava"]({"id": "8", "conversations": TURNS}, folder, image_key=key).media
    assert unread_keys(FORMATS["llava"], record, {"image_key": key}) == []
    assert not FORMATS["llava"]({**record, "conversations": TURNS}, folder, ignore_keys=[key]).media


def test_a_record_of_no_known_form_is_told_its_keys():
    sample = value_or_bad_sample(lambda item: FORMATS["llava"](item, Path()), {"foo": 1, "bar": 2})
    assert isinstance(sample, BadSample)
    told = with_hint(sample, {"foo": 1, "bar": 2}, "llava", {}).reason
    assert told.startswith("it has no `conversations`; its keys are foo, bar; no format has these keys; write a reader")


def reason_for(
    record: dict[str, Any], format_name: str, folder: Path = Path(), tool: str = "run", **options: str
) -> str:
    """Return the message about a record that a format refuses."""
    sample = value_or_bad_sample(lambda item: FORMATS[format_name](item, folder, **options), record)
    assert isinstance(sample, BadSample)
    return with_hint(sample, record, format_name, options, tool).reason


def test_an_image_beside_a_key_without_meaning_may_have_a_caption_or_a_label(folder: Path):
    record = {"file": "a.png", "shape": "that"}
    told = reason_for(record, "llava")
    assert "it looks like an image (`file`) with `shape`: add dataset.format=caption" in told
    assert "dataset.options.caption_key=shape if that is a caption, or dataset.format=labelled" in told
    assert told.endswith("dataset.options.label_key=shape dataset.options.prompt='\"\"' if it is a label")
    told = reason_for(record, "caption")
    assert told.endswith(": add dataset.options.image_key=file dataset.options.caption_key=shape")
    sample = FORMATS["caption"](record, folder, image_key="file", caption_key="shape")
    assert sample.turns[1].content == ("that",)


def test_files_of_other_kinds_are_no_images():
    assert guess_form({"path": "main.py", "text": "import this"}) is None
    told = guess_form({"path": "images/0001", "text": "that"})
    assert told is not None
    assert told.options == {"image_key": "path", "caption_key": "text"}


def test_the_options_that_name_the_keys_are_told_where_nothing_is_recognised():
    told = reason_for({"a": "1", "b": "that"}, "caption")
    assert (
        told == "`image` must name an image; it has a, b; name the key of its image with dataset.options.image_key=KEY"
    )
    told = reason_for({"a": "1", "b": "that"}, "labelled", tool="clean")
    assert told.endswith(
        "name the key of its prompt with --option prompt_key=KEY, or give all records one with --option prompt=TEXT"
    )


def test_no_other_key_is_asked_for_where_the_value_is_wrong(folder: Path):
    assert reason_for({"image": "a.png", "caption": [3]}, "caption", folder).endswith("it has image, caption")
    assert reason_for({"image": [], "caption": "a"}, "caption", folder).endswith("it has image, caption")


def test_a_labelled_image_without_prompt_needs_one_option_more(folder: Path):
    record = {"image": "a.png", "shape": "that"}
    told = reason_for(record, "labelled", folder, label_key="shape")
    assert told == (
        "it has no `prompt`, only image, shape; it looks like an image (`image`) with `shape`: "
        "add dataset.options.prompt='\"\"'"
    )
    (turn,) = FORMATS["labelled"](record, folder, label_key="shape", prompt="").turns
    assert len(turn.content) == 1


def test_one_hint_in_the_words_of_the_command():
    told = reason_for({"picture": "a.png", "question": "what?", "answer": "that"}, "labelled", tool="clean")
    asked = reason_for({"picture": "a.png", "question": "what?"}, "labelled", tool="clean")
    assert asked.endswith("questions without answers: add --option prompt_key=question --option image_key=picture")
    assert told.endswith(
        "picture, question, answer; it looks like questions with answers: add --format question "
        "--option image_key=picture"
    )


def test_each_tool_is_told_in_its_own_words():
    guess = guess_form({"conversations": ROLES})
    assert guess is not None
    assert guess.hint("clean").endswith("--format messages --option key=conversations")
    assert guess.hint("convert").endswith("--from messages --option key=conversations")


def test_no_other_form_is_named_where_the_record_has_the_chosen_one():
    error = BadSample("7", "turn 1: from='robot'")
    assert with_hint(error, {"conversations": TURNS}, "llava", {}) is error
    assert with_hint(error, {"conversations": ROLES}, "messages", {"key": "conversations"}) is error
    assert with_hint(error, {"messages": ROLES}, "my_reader:read", {}) is error
    missing = BadSample("7", "image file a.png does not exist", "a.png")
    assert with_hint(missing, {"messages": ROLES}, "llava", {}) is missing
    assert with_hint(error, ["no mapping"], "llava", {}) is error
