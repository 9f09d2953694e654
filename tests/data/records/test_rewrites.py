"""Records of other tools: their images and texts in order, and what does not fit."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.data.records.formats import FORMATS
from vlm.data.sample import BadSample, ImageRef, Sample


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def contents(sample: Sample) -> list[tuple[str, list[str]]]:
    """Role and content of each turn, with the names of images in brackets."""

    def shown(part: Any) -> str:
        return f"[{part.path.name}]" if isinstance(part, ImageRef) else part

    return [(turn.role, [shown(part) for part in turn.content]) for turn in sample.turns]


def test_alpaca(folder: Path):
    asked = {"instruction": "Look.", "input": "What is it?", "output": "A cat."}
    record = {**asked, "system": "Be brief.", "images": ["a.png", "b.png"], "history": [["Hello", "Yes?"]]}
    assert contents(FORMATS["alpaca"](record, folder)) == [
        ("system", ["Be brief."]),
        ("user", ["[a.png]", "[b.png]", "\nHello"]),
        ("assistant", ["Yes?"]),
        ("user", ["Look.\nWhat is it?"]),
        ("assistant", ["A cat."]),
    ]
    placed = {"instruction": "Is <image> like <image>?", "output": "No", "images": ["a.png", "b.png"]}
    assert contents(FORMATS["alpaca"](placed, folder))[0] == ("user", ["Is ", "[a.png]", " like ", "[b.png]", "?"])


def test_the_cauldron(folder: Path):
    texts = [{"user": "One?", "assistant": "1"}, {"user": "Two?", "assistant": "2"}]
    assert contents(FORMATS["cauldron"]({"images": ["a.png", "b.png"], "texts": texts}, folder)) == [
        ("user", ["[a.png]", "[b.png]", "\nOne?"]),
        ("assistant", ["1"]),
        ("user", ["Two?"]),
        ("assistant", ["2"]),
    ]


def test_minicpm_names_its_images(folder: Path):
    turns = [{"role": "user", "content": "Is <image_01> like <image_00>?"}, {"role": "assistant", "content": "No"}]
    record = {"image": {"<image_00>": "a.png", "<image_01>": "b.png"}, "conversations": turns}
    assert contents(FORMATS["minicpm"](record, folder))[0] == ("user", ["Is ", "[b.png]", " like ", "[a.png]", "?"])
    single = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That"}]
    assert contents(FORMATS["minicpm"]({"image": "a.png", "conversations": single}, folder))[0] == (
        "user",
        ["[a.png]", "\nWhat?"],
    )
    assert turns[0]["content"] == "Is <image_01> like <image_00>?"


def test_minicpm_names_its_only_image_within_a_sentence(folder: Path):
    turns = [{"role": "user", "content": "Is <image_00> a cat?"}, {"role": "assistant", "content": "No"}]
    record = {"image": {"<image_00>": "a.png"}, "conversations": turns}
    assert contents(FORMATS["minicpm"](record, folder))[0] == ("user", ["Is ", "[a.png]", " a cat?"])
    of_a_table = {"image": {"<image_00>": "a.png", "<image_01>": None}, "conversations": turns}
    assert FORMATS["minicpm"](of_a_table, folder) == FORMATS["minicpm"](record, folder)


PAIR = [{"role": "user", "content": "<image_00>?"}, {"role": "assistant", "content": "a"}]
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no output": ("alpaca", {"instruction": "a"}, "`output` must be a string, got None; it has instruction"),
    "a history of texts": ("alpaca", {"instruction": "a", "output": "b", "history": ["c"]}, "`history` must be a"),
    "no texts": ("cauldron", {"texts": []}, "`texts` must be a list of at least one mapping"),
    "a text without a reply": ("cauldron", {"texts": [{"user": "a"}]}, "`assistant` must be a string, got None"),
    "no conversation": ("minicpm", {"conversations": "a"}, "`conversations` must be a list of mappings"),
    "another image": ("minicpm", {"image": {"<image_01>": "a.png"}, "conversations": PAIR}, "<image_00> in its text"),
    "an image without a place": (
        "minicpm",
        {"image": {"<image_00>": "a.png", "<image_01>": "b.png"}, "conversations": PAIR},
        "<image_01> of its images does not occur",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused(folder: Path, kind: str):
    name, record, said = REFUSED[kind]
    with pytest.raises(BadSample, match=said.replace("[", r"\[")):
        FORMATS[name](record, folder)
