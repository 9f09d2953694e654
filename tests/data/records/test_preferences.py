"""Every form of preferences is read, and only replies in which the sides differ are learned."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.data.records.formats import get_reader
from vlm.data.sample import BadSample, ImageRef, Sample, ToolCallTurn

read = get_reader("preference")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def turn(speaker: str, value: str) -> dict[str, Any]:
    return {"from": speaker, "value": value}


ASKED = [message("user", "what?")]
IMAGE_ITEM = [{"type": "image"}, {"type": "text", "text": "\nwhat?"}]
PAIRS: dict[str, dict[str, Any]] = {
    "LLaVA-NeXT": {"prompt": "<image>\nwhat?", "image": "a.png", "answer": "c", "chosen": "c", "rejected": "r"},
    "LLaMA-Factory": {
        "conversations": [turn("human", "<image>what?")], "chosen": turn("gpt", "c"), "rejected": turn("gpt", "r"),
        "images": ["a.png"],
    },
    "LLaVA's turns": {
        "conversations": [turn("human", "what?\n<image>")], "chosen": "c", "rejected": "r", "image": "a.png",
    },
    "LLaVA-RLHF": {
        "conversations": [turn("human", "<image>\nwhat?")], "image": "a.png", "output_1": turn("llava", "r"),
        "output_2": turn("llava", "c"), "preference": 2,
    },
    "TRL, conversations": {
        "images": ["a.png"], "chosen": [message("user", IMAGE_ITEM), message("assistant", "c")],
        "rejected": [message("user", IMAGE_ITEM), message("assistant", "r")],
    },
    "TRL, prompt": {
        "images": ["a.png"], "prompt": ASKED, "chosen": [message("assistant", "c")],
        "rejected": [message("assistant", "r")],
    },
    "RLHF-V": {"image": "a.png", "text": json.dumps({"question": "what?", "chosen": "c", "rejected": "r"})},
    "RLAIF-V": {"ds_name": "d", "image": "a.png", "question": "what?", "chosen": "c", "rejected": "r", "idx": 3},
    "ms-swift": {
        "messages": [message("user", "<image>\nwhat?"), message("assistant", "c")], "rejected_response": "r",
        "images": ["a.png"],
    },
    "ms-swift, messages": {
        "messages": [message("user", "<image>\nwhat?"), message("assistant", "c")], "images": ["a.png"],
        "rejected_messages": [message("user", "<image>\nwhat?"), message("assistant", "r")],
    },
}  # fmt: skip


def texts(sample: Sample) -> list[str]:
    return ["".join(map(str, turn.content)) for turn in sample.turns]


@pytest.mark.parametrize("form", PAIRS)
def test_every_form_of_pairs_is_read(form: str, images: Path):
    sample = read(PAIRS[form], images)
    assert sample.rejected is not None
    image = images / "a.png"
    assert texts(sample) == [f"{image}\nwhat?", "c"]
    assert texts(sample.rejected) == [texts(sample)[0], "r"]
    assert sample.media == [ImageRef(image)], "one image, though both sides have it"
    assert sample.label is None


LABELLED: dict[str, dict[str, Any]] = {
    "TRL": {"prompt": ASKED, "completion": [message("assistant", "c")], "label": True},
    "TRL, texts": {"prompt": "what?", "completion": "c", "label": True},
    "ms-swift": {"messages": [*ASKED, message("assistant", "c")], "label": True},
    "LLaMA-Factory": {"conversations": [turn("human", "what?"), turn("gpt", "c")], "kto_tag": True},
    "number": {"question": "what?", "chosen": "c", "label": 1},
}


@pytest.mark.parametrize("form", LABELLED)
def test_every_form_of_labelled_replies_is_read(form: str, images: Path):
    sample = read(LABELLED[form], images)
    assert (texts(sample), sample.label, sample.rejected) == (["what?", "c"], True, None)
    key = "kto_tag" if "kto_tag" in LABELLED[form] else "label"
    assert read({**LABELLED[form], key: False}, images).label is False


def test_only_replies_that_differ_are_learned(images: Path):
    before = [message("user", "one?"), message("assistant", "1"), message("user", "two?")]
    record = {"prompt": before, "chosen": "2", "rejected": "3"}
    sample = read(record, images)
    assert [turn.content for turn in sample.replies] == [("2",)]
    assert [turn.content for turn in sample.rejected.replies] == [("3",)]
    alone = read({"messages": [*before, message("assistant", "2")], "label": False}, images)
    assert [turn.content for turn in alone.replies] == [("2",)]


def test_sides_may_differ_from_the_first_reply_on_and_in_their_calls(images: Path):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    calling = [{**message("assistant", None), "tool_calls": [call]}, message("tool", "5"), message("assistant", "five")]
    record = {"prompt": ASKED, "chosen": calling, "rejected": "five", "tools": [{"name": "f", "parameters": {}}]}
    sample = read(record, images)
    assert isinstance(sample.turns[1], ToolCallTurn)
    assert len(sample.replies) == 2
    assert sample.tools == sample.rejected.tools
    assert sample.tools


def test_sides_may_have_images_of_their_own(images: Path):
    record = {"question": "what?", "chosen": "c", "rejected": "c", "image": "a.png", "rejected_images": ["b.png"]}
    sample = read(record, images)
    assert [medium.path.name for medium in sample.media] == ["a.png", "b.png"]
    assert [medium.path.name for medium in sample.rejected.media] == ["b.png"]
    assert [medium.path.name for medium in sample.chosen.media] == ["a.png"]
    assert len(sample.replies) == len(sample.rejected.replies) == 1


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "the same": ({"question": "q", "chosen": "c", "rejected": "c"}, "are the same"),
    "no chosen reply": ({"question": "q", "rejected": "c"}, "no chosen reply"),
    "one begins with the other": (
        {"prompt": ASKED, "chosen": "c", "rejected": [message("assistant", "c"), *ASKED, message("assistant", "d")]},
        "its chosen side has no reply",
    ),
    "label and rejected": ({"question": "q", "chosen": "c", "rejected": "d", "label": True}, "leave one of them out"),
    "label": ({"question": "q", "chosen": "c", "label": "good"}, "label='good': true"),
    "tie": ({"conversations": [turn("human", "q")], "output_1": "a", "output_2": "b", "preference": 0}, "preference=0"),
    "form of a side": ({"question": "q", "chosen": {"text": "c"}, "rejected": "d"}, "`chosen` must be a text or"),
    "RLHF-V": ({"image": None, "text": "{}"}, "`text` must be JSON"),
    "key of a turn": (
        {"prompt": ASKED, "chosen": [{**message("assistant", "c"), "audio": "x"}], "rejected": "d"},
        "`chosen[].audio` is not read",
    ),
    "key of a single turn": (
        {"prompt": ASKED, "chosen": {**message("assistant", "c"), "audio": "x"}, "rejected": "d"},
        "`chosen.audio` is not read",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_records_are_refused(case: str, images: Path):
    record, words = BROKEN[case]
    with pytest.raises(BadSample) as error:
        read(record, images)
    assert words in str(error.value)


def test_keys_of_sides_may_be_ignored(images: Path):
    record = {"prompt": ASKED, "chosen": [{**message("assistant", "c"), "audio": "x"}], "rejected": "d"}
    assert texts(read(record, images, ignore_keys=["audio"])) == ["what?", "c"]
