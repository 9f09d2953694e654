"""Readers: records of every format as samples, and errors that name the record."""

import base64
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.data.records.test_conversations import read, talk
from vlm.config.named import permit_names
from vlm.data.records.conversations import read_llava
from vlm.data.records.formats import (
    CHOICE_INSTRUCTION,
    FORMATS,
    get_reader,
    read_caption,
    read_head,
    read_labelled,
    read_question,
)
from vlm.data.records.guess import with_hint
from vlm.data.records.index import parse_record
from vlm.data.sample import BadSample, ImageRef, OverLong, Sample, Turn, VideoRef
from vlm.data.tools.forms import FORMS


def test_errors_are_value_errors():
    assert issubclass(OverLong, BadSample)
    assert issubclass(BadSample, ValueError)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("record", [None, 3, "text", ["x"]])
def test_what_is_no_mapping_is_refused_by_every_reader(name: str, record: Any, folder: Path):
    with pytest.raises(BadSample, match=f"each record must be a JSON object, got {type(record).__name__}"):
        FORMATS[name](record, folder)


WHOLE: dict[str, dict[str, Any]] = {
    "llava": {"conversations": talk("<image>\nwhat?", "that")},
    "messages": {"messages": [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "that"}]},
    "caption": {"caption": "that"},
    "question": {"question": "what?", "answer": "that"},
    "head": {"conversations": ["what?", "that"]},
    "labelled": {"prompt": "what?", "label": "that"},
    "alpaca": {"instruction": "what?", "input": "", "output": "that"},
    "cauldron": {"texts": [{"user": "what?", "assistant": "that", "source": "x"}]},
    "minicpm": {"conversations": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that"}]},
}


@pytest.mark.parametrize("name", WHOLE)
def test_images_come_in_every_form_to_every_reader(name: str, folder: Path):
    content = (folder / "a.png").read_bytes()
    given = [
        ("a.png", ImageRef(folder / "a.png")),
        (["deep/c.png"], ImageRef(folder / "deep/c.png")),
        (f"data:image/png;base64,{base64.b64encode(content).decode()}", ImageRef(None, content)),
        ({"bytes": content, "path": None}, ImageRef(None, content)),
        ({"bytes": content, "path": "x.png"}, ImageRef(Path("x.png"), content)),
        ({"bytes": None, "path": "a.png"}, ImageRef(folder / "a.png")),
        (content, ImageRef(None, content)),
        ([content], ImageRef(None, content)),
        (base64.b64encode(content).decode(), ImageRef(None, content)),
        (base64.encodebytes(content).decode(), ImageRef(None, content)),
        (base64.urlsafe_b64encode(content).decode().rstrip("="), ImageRef(None, content)),
        ({"bytes": base64.b64encode(content).decode()}, ImageRef(None, content)),
        (f"data:;base64,{base64.b64encode(content).decode()}", ImageRef(None, content)),
    ]
    for value, found in given:
        sample = FORMATS[name]({**WHOLE[name], "image": value}, folder)
        assert sample.images == [found]
        if name == "labelled":
            assert (sample.turns[-1].role, sample.label) == ("user", "that")
        else:
            assert sample.turns[-1] == Turn("assistant", ("that",))


REFUSED_PATHS = {
    "https://example.com/a.png": "addresses are not fetched in training",
    "../outside.png": "leaves the image folder",
    "z.png": "z.png does not exist",
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("path", REFUSED_PATHS)
def test_every_reader_refuses_a_path_that_is_no_image_of_the_folder(name: str, path: str, folder: Path):
    with pytest.raises(BadSample, match=REFUSED_PATHS[path]) as caught:
        FORMATS[name]({**WHOLE[name], "id": 12, "image": path}, folder)
    assert (caught.value.sample_id, caught.value.file) == ("12", path)


@pytest.mark.parametrize("written", ["3", "-7", "2.50", "1e-07", "0.1", "12345678901234567890", "1.0"])
def test_a_number_in_place_of_a_text_is_read_as_it_is_written(written: str):
    """In turns, messages and their items, pairs and answers; truth values and what is no finite number are not."""
    forms = {
        "llava": '{"conversations": [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": %s}]}',
        "messages": '{"messages": [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": %s}]}',
        "minicpm": '{"conversations": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": %s}]}',
        "cauldron": '{"texts": [{"user": "how many?", "assistant": %s}]}',
        "head": '{"conversations": ["how many?", %s]}',
        "question": '{"question": "how many?", "answer": %s}',
    }
    for name, form in forms.items():
        for number, accepted in ((written, True), ("true", False), ("NaN", False), ("1e999", False)):
            record = parse_record((form % number).encode())
            if accepted:
                assert FORMATS[name](record, Path()).turns[-1].content == (written,), name
            else:
                with pytest.raises(BadSample):
                    FORMATS[name](record, Path())
    item = [{"role": "user", "content": [{"type": "text", "text": parse_record(written.encode())}]}]
    assert FORMATS["messages"]({"messages": item}, Path()).turns[0].content == (written,)


# Captions


def test_a_caption_is_a_reply_to_its_image(folder: Path):
    record = {"image_id": 9, "jpg": ["a.png", "b.png"], "text": "two"}
    seen = (ImageRef(folder / "a.png"), ImageRef(folder / "b.png"))
    bare = read_caption(record, folder, image_key="jpg", caption_key="text")
    assert bare == Sample("9", (Turn("user", seen), Turn("assistant", ("two",))))
    asked = read_caption(record, folder, image_key="jpg", caption_key="text", prompt="Describe it.")
    assert asked.turns[0].content == (*seen, "\nDescribe it.")


def test_one_of_several_prompts_is_drawn_by_the_caption(folder: Path):
    prompts = ["a", "b", "c"]

    def asked(caption: str) -> Any:
        return read_caption({"image": "a.png", "caption": caption}, folder, prompt=prompts).turns[0].content[1]

    drawn = [asked(str(number)) for number in range(60)]
    assert {*drawn} == {"\na", "\nb", "\nc"}
    assert drawn == [asked(str(number)) for number in range(60)]


BAD_CAPTIONS = {
    "no picture": ({"caption": "a"}, "`image` must name an image"),
    "an empty list": ({"image": [], "caption": "a"}, "`image` must name an image"),
    "a number": ({"image": 3, "caption": "a"}, "`image` must be a path or a list of paths, got 3"),
    "no caption": ({"image": "a.png", "text": "a"}, "`caption` must be a string, got None; it has id, image, text"),
    "captions": ({"image": "a.png", "caption": ["a"]}, "`caption` must be a string, got ['a']"),
}


@pytest.mark.parametrize("name", BAD_CAPTIONS)
def test_a_caption_that_cannot_be_used_says_why(folder: Path, name: str):
    record, said = BAD_CAPTIONS[name]
    with pytest.raises(BadSample) as caught:
        read_caption({"id": 7, **record}, folder)
    assert said in caught.value.reason


# Questions


def asked(folder: Path, options: dict[str, Any] | None = None, **record: Any) -> tuple[Any, str]:
    """What the user says, and the reply."""
    sample = read_question({"question": "which?", **record}, folder, **options or {})
    assert [turn.role for turn in sample.turns] == ["user", "assistant"]
    (reply,) = sample.turns[1].content
    assert isinstance(reply, str)
    return sample.turns[0].content, reply


CHOICES = {"number": 1, "letter": "B", "text": "dog"}


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_given_by_number_letter_or_text(folder: Path, name: str):
    said, reply = asked(folder, image="a.png", choices=["cat", "dog"], answer=CHOICES[name])
    assert said == (ImageRef(folder / "a.png"), f"\nwhich?\nA. cat\nB. dog\n{CHOICE_INSTRUCTION}")
    assert reply == "B"


def test_a_number_that_counts_no_choice_is_the_text_of_one(folder: Path):
    assert asked(folder, choices=["10", "20"], answer=20)[1] == "B"
    assert asked(folder, choices=["1", "0"], answer=1)[1] == "B", "its number counts first"


def test_a_choice_whose_text_is_a_letter_is_meant_by_its_text(folder: Path):
    assert asked(folder, choices=["B", "A"], answer="B")[1] == "A"


def test_the_last_line_of_a_question_can_be_set(folder: Path):
    options = {"instruction": "One word.", "choice_instruction": "Letter!"}
    assert asked(folder, options, answer="x")[0] == ("which?\nOne word.",)
    assert asked(folder, options, answer="x", choices=["x"])[0] == ("which?\nA. x\nLetter!",)
    assert asked(folder, answer="x")[0] == ("which?",)


ANSWERS: dict[str, tuple[dict[str, Any], str]] = {
    "a string": ({"answer": "two"}, "two"),
    "a list": ({"answer": ["one", "two", "two"]}, "two"),
    "the first of equals": ({"answers": ["b", "a", "a", "b"]}, "b"),
    "as VQA has them": ({"answer": None, "answers": [{"answer": "x", "answer_id": 1}, {"answer": "x"}]}, "x"),
    "no choices": ({"answer": "two", "choices": []}, "two"),
    "choices of a table": ({"answer": "two", "choices": None}, "two"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_of_several_answers_the_commonest_counts(folder: Path, name: str):
    record, reply = ANSWERS[name]
    assert asked(folder, **record) == (("which?",), reply)


def test_what_people_answered_are_references_beside_the_reply(folder: Path):
    """In every form but `labelled`; a single answer is none, nor is the text of a choice, whose letter counts."""
    turns = {"conversations": [{"from": "human", "value": "which?"}, {"from": "gpt", "value": "two"}]}
    messages = {"messages": [{"role": "user", "content": "which?"}, {"role": "assistant", "content": "two"}]}
    forms = {
        "llava": turns, "messages": messages, "question": {"question": "which?"},
        "caption": {"image": "a.png", "caption": "two"}, "head": {"conversations": ["which?", "two"]},
    }  # fmt: skip
    for name, record in forms.items():
        given = {**record, "answers": [{"answer": "two"}, {"answer": "2"}]}
        assert FORMATS[name](given, folder).references == ("two", "2"), name
        without = {**record, "answer": "two"}
        assert FORMATS[name](without, folder).references == (), name
    asked_of_many = {"question": "which?", "answer": ["two", "2", "two"]}
    assert FORMATS["question"](asked_of_many, folder).references == ("two", "2", "two")
    choice = {"question": "which?", "answer": 0, "answers": ["two"], "choices": ["two", "three"]}
    assert FORMATS["question"](choice, folder).references == ()
    with pytest.raises(BadSample, match="must be a string or a list of strings"):
        FORMATS["llava"]({**turns, "answers": [None]}, folder)


NUMBERS: list[tuple[Any, str]] = [
    (3, "3"),
    (2.5, "2.5"),
    (-0.1, "-0.1"),
    (1e-7, "1e-07"),
    (10**25, "1" + "0" * 25),
    (Decimal("2.50"), "2.50"),
    ("2.50", "2.50"),
]


@pytest.mark.parametrize(("number", "text"), NUMBERS)
def test_a_number_is_the_text_that_writes_it(folder: Path, number: Any, text: str):
    """Where a string is needed: as Parquet and JSON hold captions, answers and choices that are numbers."""
    caption = FORMATS["caption"]({"image": "a.png", "caption": number}, folder)
    answer = FORMATS["question"]({"question": number, "answer": number}, folder)
    of_many = FORMATS["question"]({"question": "how many?", "answers": [{"answer": number}, number]}, folder)
    chosen = FORMATS["question"]({"question": "how many?", "choices": [number, "x"], "answer": text}, folder)
    assert caption.turns[-1].content == answer.turns[-1].content == answer.turns[0].content == (text,)
    assert of_many.references == (text, text)
    assert chosen.turns[-1].content == ("A",)


def test_a_number_of_32_bits_has_the_digits_that_tell_it(folder: Path):
    column = pa.array([0.1, 2.5, 1e10, 2.0**32, 123456.789, 3.4e38], pa.float32()).to_pylist()
    captions = [
        FORMATS["caption"]({"image": "a.png", "caption": number}, folder).turns[-1].content for number in column
    ]
    assert captions == [("0.1",), ("2.5",), ("10000000000.0",), ("4294967296.0",), ("123456.79",), ("3.4e+38",)]


@pytest.mark.parametrize("value", [True, None, float("nan"), [1], {"a": 1}, b"x"])
def test_what_is_neither_text_nor_number_is_no_caption(folder: Path, value: Any):
    with pytest.raises(BadSample, match="`caption` must be a string, got"):
        FORMATS["caption"]({"image": "a.png", "caption": value}, folder)


def test_question_and_answer_may_stand_under_other_keys(folder: Path):
    record = {"query": "what?", "response": "that", "answer": "another"}
    sample = FORMATS["question"](record, folder, question_key="query", answer_key="response")
    assert [turn.content for turn in sample.turns] == [("what?",), ("that",)]


def test_images_stand_before_a_question_or_within_it(folder: Path):
    a, b, v = ImageRef(folder / "a.png"), ImageRef(folder / "b.png"), VideoRef(folder / "v.mp4")
    both = {"images": ["a.png", "b.png"], "answer": "x"}
    assert asked(folder, **both, video="v.mp4")[0] == (v, a, b, "\nwhich?")
    assert asked(folder, **both, question="is <image> or <image>?")[0] == ("is ", a, " or ", b, "?")
    assert asked(folder, image="a.png", answer="x", question="is it this?\n<image>")[0] == (a, "\nis it this?")


BAD_QUESTIONS = {
    "no question": ({"question": None, "answer": "a"}, "`question` must be a string, got None"),
    "no answer": ({}, "`answer` must be a string or a list of strings, got None"),
    "empty list": ({"answer": []}, "`answer` must be a string or a list of strings, got []"),
    "truth values": ({"answer": [True]}, "`answer` must be a string or a list of strings, got [True]"),
    "answers without text": ({"answers": [{"text": "a"}]}, "`answer` must be a string or a list of strings"),
    "choices of no list": ({"choices": "cat", "answer": 0}, "`choices` must be a list of strings"),
    "choices of lists": ({"choices": [[1], [2]], "answer": 0}, "`choices` must be a list of strings"),
    "a choice or its number": (
        {"choices": [1, 2], "answer": 1},
        "answer=1 is one of the choices and the number of another",
    ),
    "too many choices": ({"choices": ["x"] * 27, "answer": 0}, "27 choices, but there are letters for 26"),
    "beyond": ({"choices": ["cat", "dog"], "answer": 2}, "answer=2; it must be one of the choices, its number from 0"),
    "before": ({"choices": ["cat", "dog"], "answer": -1}, "answer=-1; it must be one of the choices"),
    "true": ({"choices": ["cat", "dog"], "answer": True}, "answer=True; it must be one of the choices"),
    "another letter": ({"choices": ["cat", "dog"], "answer": "C"}, "answer='C'; it must be one of the choices"),
    "two letters": ({"choices": ["cat", "dog"], "answer": "AB"}, "answer='AB'; it must be one of the choices"),
    "nothing": ({"choices": ["cat", "dog"], "answer": ""}, "answer=''; it must be one of the choices"),
    "too many images": (
        {"question": "<image>?", "answer": "a", "images": ["a.png", "b.png"]},
        "but the record has 2 images",
    ),
    "too few images": ({"question": "<image><image>?", "answer": "a", "image": "a.png"}, "its text has 2 <image>"),
}


@pytest.mark.parametrize("name", BAD_QUESTIONS)
def test_a_question_that_cannot_be_used_says_why(folder: Path, name: str):
    record, said = BAD_QUESTIONS[name]
    with pytest.raises(BadSample) as caught:
        read_question({"question_id": 7, "question": "which?", **record}, folder)
    assert said in caught.value.reason
    assert caught.value.sample_id == "7"


# Prompt and answer


def test_a_labelled_record_without_a_prompt_is_told_what_gives_it_one(folder: Path):
    record = {"image": "a.png", "label": 1}
    with pytest.raises(BadSample, match="has no `prompt`, only image, label") as caught:
        read_labelled(record, folder)
    told = with_hint(caught.value, record, "labelled", {}).reason
    assert told.endswith("""add dataset.options.prompt='""'""")
    with pytest.raises(BadSample, match=r"`prompt` must be a string, got \[3\]"):
        read_labelled({**record, "prompt": [3]}, folder)
    assert read_labelled(record, folder, prompt="Sharp?").turns[0].content[1] == "\nSharp?"


def test_a_prompt_and_its_answer(folder: Path):
    a, b, v = ImageRef(folder / "a.png"), ImageRef(folder / "b.png"), VideoRef(folder / "v.mp4")
    record = {"source": "s1", "images": ["a.png", "b.png"], "videos": ["v.mp4"], "conversations": ["which?", "that"]}
    assert read_head(record, folder) == Sample(
        "s1", (Turn("user", (v, a, b, "\nwhich?")), Turn("assistant", ("that",))), label=0
    )
    within = {**record, "conversations": ["<video> <image>, <image>?", "that"], "system_prompt": "be brief"}
    assert read_head(within, folder).turns[:2] == (
        Turn("system", ("be brief",)),
        Turn("user", (v, " ", a, ", ", b, "?")),
    )


@pytest.mark.parametrize("prompt", [None, ""])
def test_an_empty_system_prompt_is_none(folder: Path, prompt: str | None):
    record = {"conversations": ["which?", "that"], "system_prompt": prompt, "images": [], "videos": []}
    assert read_head(record, folder) == Sample("?", (Turn("user", ("which?",)), Turn("assistant", ("that",))), 0)


@pytest.mark.parametrize("turns", [None, "ab", ["a"], ["a", "b", "c"], ["a", None], talk("a", "b")])
def test_a_prompt_without_its_answer_is_refused(folder: Path, turns: Any):
    with pytest.raises(BadSample, match="`conversations` must be a prompt and an answer, both strings"):
        read_head({"conversations": turns}, folder)


# Labels


UNANSWERED: dict[str, dict[str, Any]] = {
    "llava": {"conversations": talk("what?")},
    "messages": {"messages": [{"role": "user", "content": "what?"}]},
    "question": {"question": "what?"},
    "question with choices": {"question": "what?", "choices": ["a cat", "a dog"]},
    "labelled": {"prompt": "what?"},
}


@pytest.mark.parametrize("name", UNANSWERED)
@pytest.mark.parametrize("label", [0, False, "", [], 1.5, {"a": 1, "b": None}])
def test_a_record_with_a_label_needs_no_reply(folder: Path, name: str, label: Any):
    sample = FORMATS[name.split()[0]]({**UNANSWERED[name], "label": label, "group": 3}, folder)
    assert [turn.role for turn in sample.turns] == ["user"]
    assert (sample.label, sample.group) == (label, "3")


@pytest.mark.parametrize("name", WHOLE)
def test_every_reader_takes_label_and_group(folder: Path, name: str):
    record = {**WHOLE[name], "image": "a.png", "label": "x", "group": "g"}
    assert (FORMATS[name](record, folder).label, FORMATS[name](record, folder).group) == ("x", "g")
    assert FORMATS[name]({**record, "group": None}, folder).group is None


@pytest.mark.parametrize("name", ["llava", "messages", "caption", "question"])
def test_without_a_label_there_is_none(folder: Path, name: str):
    sample = FORMATS[name]({**WHOLE[name], "image": "a.png", "label": None}, folder)
    assert (sample.label, sample.group) == (None, None)


@pytest.mark.parametrize(
    ("answer", "label"),
    [("yes", 1), (" Yes, it is.", 1), ("1", 1), (" 1\n", 1), ("10", 0), ("no", 0), ("", 0), ("oh yes", 0)],
)
def test_an_answer_of_yes_or_1_is_the_positive_label(folder: Path, answer: str, label: int):
    assert read_head({"conversations": ["which?", answer]}, folder).label == label
    assert read_head({"conversations": ["which?", answer], "label": 0.5}, folder).label == 0.5


def test_a_prompt_with_its_label(folder: Path):
    a, b = ImageRef(folder / "a.png"), ImageRef(folder / "b.png")
    record = {"id": 7, "image": ["a.png", "b.png"], "prompt": "which?", "label": "cat", "group": 1}
    assert read_labelled(record, folder) == Sample("7", (Turn("user", (a, b, "\nwhich?")),), "cat", "1")
    within = {"image": ["a.png", "b.png"], "prompt": "is <image> like <image>?"}
    assert read_labelled(within, folder) == Sample("?", (Turn("user", ("is ", a, " like ", b, "?")),))
    assert read_labelled({"prompt": "which?"}, folder) == Sample("?", (Turn("user", ("which?",)),))
    assert read_labelled({"image": "a.png", "prompt": ""}, folder).turns == (Turn("user", (a,)),)
    assert read_labelled({"images": ["b.png"], "prompt": "which?"}, folder).images == [b]


def test_columns_of_other_names(folder: Path):
    keys = {"image_key": "photo", "prompt_key": "asked", "label_key": "kind", "group_key": "who"}
    record = {"photo": "a.png", "asked": "which?", "kind": 2, "who": "x", "image": "z.png", "label": 9, "group": 9}
    sample = read_labelled(record, folder, **keys)
    assert sample == Sample("?", (Turn("user", (ImageRef(folder / "a.png"), "\nwhich?")),), 2, "x")
    assert read_labelled({**record, "photo": None}, folder, **keys).turns == (Turn("user", ("which?",)),)


def test_a_prompt_for_records_that_have_none(folder: Path):
    for record in ({"image": "a.png"}, {"image": "a.png", "prompt": None}):
        assert read_labelled(record, folder, prompt="Describe.").turns[0].content[1] == "\nDescribe."
    assert read_labelled({"prompt": "which?"}, folder, prompt="Describe.").turns[0].content == ("which?",)


def test_several_columns_are_a_mapping(folder: Path):
    def label(**record: Any) -> Any:
        return read_labelled({"prompt": "which?", **record}, folder, label_key=["a", "b"]).label

    assert label(a=0, b="x", c=1) == {"a": 0, "b": "x"}
    assert label(a=None, b="x") == {"b": "x"}
    assert label(c=1) is None


@pytest.mark.parametrize(
    ("text", "label"), [("a;b", ["a", "b"]), (" a ; b;", ["a", "b"]), ("a", ["a"]), ("", []), (";", []), (3, 3)]
)
def test_a_label_of_text_is_split(folder: Path, text: Any, label: Any):
    record = {"prompt": "which?", "label": text}
    assert read_labelled(record, folder, label_separator=";").label == label
    assert read_labelled(record, folder).label == text
    several = read_labelled({**record, "other": "x"}, folder, label_key=["label", "other"], label_separator=";")
    assert several.label == {"label": label, "other": ["x"]}


@pytest.mark.parametrize("form", FORMS)
def test_label_and_group_are_written_and_read_back(folder: Path, form: str):
    record = {"id": "7", "image": "a.png", "prompt": "<image>\nwhich?", "label": ["x"], "group": "g"}
    sample = read_labelled(record, folder)
    assert FORMATS[form](FORMS[form](sample, folder), folder) == sample
    assert not {"label", "group"} & FORMS[form](read(folder, "what?", "that"), folder).keys()


BAD_LABELLED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no prompt": ({"image": "a.png"}, {}, "it has no `prompt`, only id, image"),
    "a prompt of another kind": ({"prompt": [3]}, {"prompt": "x"}, "`prompt` must be a string, got [3]"),
    "nothing": ({"prompt": ""}, {}, "it has neither an image nor a prompt"),
    "no column": ({"image": "a.png", "prompt": "x"}, {"image_key": "photo"}, "`photo` is not there; it has id, image,"),
    "too many images": ({"image": ["a.png", "b.png"], "prompt": "<image>?"}, {}, "but the record has 2 images"),
    "too few images": ({"image": "a.png", "prompt": "<image><image>"}, {}, "its text has 2 <image>"),
}


@pytest.mark.parametrize("name", BAD_LABELLED)
def test_a_labelled_record_that_cannot_be_used_says_why(folder: Path, name: str):
    record, options, said = BAD_LABELLED[name]
    with pytest.raises(BadSample) as caught:
        read_labelled({"id": 7, **record}, folder, **options)
    assert said in caught.value.reason
    assert caught.value.sample_id == "7"


# Which reader


def test_a_reader_of_the_users_own_is_named_by_its_function():
    permit_names(["vlm.data.records.formats:read_llava"])
    assert get_reader("llava") is read_llava
    assert get_reader("vlm.data.records.formats:read_llava") is read_llava


@pytest.mark.parametrize("name", ["no.such.module:read", "vlm.data.records.formats:read_nothing"])
def test_a_reader_that_does_not_exist_is_refused_by_key(name: str):
    permit_names([name])
    with pytest.raises(ValueError, match=f"dataset.format={name}: "):
        get_reader(name)
