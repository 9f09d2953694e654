"""The generated scenes: nothing held out leaks into training, and the questions alone do not give the answers."""

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.data import scenes
from vlm.data.scenes import HELD_OUT_PAIRS, KINDS, write_scenes
from vlm.tiny import word_tokenizer

SPLITS = ("pretrain", "finetune", "val", "heldout")
FEW = {"num_train": 60, "num_val": 20, "num_heldout": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set with few training scenes and as many held-out ones as the demo has."""
    path = tmp_path_factory.mktemp("scenes")
    write_scenes(path, num_train=200, num_val=50)
    return path


def records(folder: Path, split: str) -> list[dict[str, Any]]:
    return json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))


def said(record: dict[str, Any]) -> list[str]:
    return [turn["value"] for turn in record["conversations"]]


def digest(folder: Path) -> str:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@pytest.mark.parametrize("split", SPLITS)
def test_records_are_well_formed(folder: Path, split: str) -> None:
    for record in records(folder, split):
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns[0]["value"].startswith("<image>\n")
        assert sum(text.count("<image>") for text in said(record)) == 1
        assert all(text.strip() for text in said(record))
        with Image.open(folder / "images" / record["image"]) as image:
            assert image.size == (scenes.CELLS * scenes.CELL,) * 2


def test_held_out_records_ask_one_question_of_each_kind_alike(folder: Path) -> None:
    held_out = records(folder, "heldout")
    assert all(len(record["conversations"]) == 2 for record in held_out)
    assert Counter(record["kind"] for record in held_out) == dict.fromkeys(KINDS, len(held_out) // len(KINDS))


def test_questions_are_about_pictures_whose_captions_are_checked(folder: Path) -> None:
    """Captions tell each thing's pair, so that the test below sees a held-out pair in any training picture."""
    captioned = {record["image"] for record in records(folder, "pretrain")}
    assert {record["image"] for record in records(folder, "finetune")} == captioned
    assert not captioned & {record["image"] for record in records(folder, "heldout")}


def told(record: dict[str, Any]) -> list[tuple[str, str]]:
    """The questions and answers of a record, those in its caption too."""
    texts = said(record)
    if texts[0] == scenes.CAPTION_PROMPT:
        return re.findall(r"([^.?]+\?) ([^.?]+)\.", texts[1])
    return [
        (question.removeprefix("<image>\n"), answer) for question, answer in zip(texts[::2], texts[1::2], strict=True)
    ]


def pairs(record: dict[str, Any]) -> list[tuple[str, str]]:
    """The pairs of colour and shape that a record tells."""
    if cells := re.fullmatch(r"colours (.+)\. shapes (.+)\.", said(record)[1]):
        colours, shapes = (group.split() for group in cells.groups())
        return [pair for pair in zip(colours, shapes, strict=True) if pair != ("none", "none")]
    found = []
    for question, answer in told(record):
        if match := re.fullmatch(r"\s*What colour is the (\w+)\?", question):
            found.append((answer, match[1]))
        if match := re.fullmatch(r"\s*What shape is the (\w+) thing\?", question):
            found.append((match[1], answer))
    return found


@pytest.mark.parametrize("split", ["pretrain", "finetune", "val"])
def test_training_text_never_tells_a_held_out_pair(folder: Path, split: str) -> None:
    for record in records(folder, split):
        assert not HELD_OUT_PAIRS & set(pairs(record))
        if split == "pretrain" and (number := dict(told(record)).get("How many things are there?")):
            assert len(pairs(record)) == scenes.NUMBERS.index(number) + 1


def test_held_out_questions_say_whether_they_are_about_the_pair(folder: Path) -> None:
    for record in records(folder, "heldout"):
        assert record["about_held_out"] == bool(HELD_OUT_PAIRS & set(pairs(record)))


def test_all_things_lie_in_the_corner_that_is_told() -> None:
    rng = random.Random(0)
    for number in range(1, len(scenes.NUMBERS) + 1):
        things = scenes.random_scene(rng, number, held_out=False)
        assert len({thing.place for thing in things}) == 1
        assert len({(thing.row, thing.column) for thing in things}) == number
        assert ("place", None, "In which corner?", things[0].place) in scenes.questions(things)


@pytest.mark.parametrize("kind", KINDS)
def test_the_question_alone_does_not_answer(folder: Path, kind: str) -> None:
    """Always giving the commonest answer to each exact question is right in at most 40 of 100."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records(folder, "heldout"):
        if record["kind"] == kind:
            question, answer = said(record)
            answers[question][answer] += 1
    best = sum(max(counts.values()) for counts in answers.values())
    assert best / sum(counts.total() for counts in answers.values()) <= 0.40


def test_the_same_seed_writes_the_same_files(tmp_path: Path) -> None:
    for name, seed in {"a": 3, "b": 3, "c": 4}.items():
        write_scenes(tmp_path / name, **FEW, seed=seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_every_word_is_one_token(folder: Path) -> None:
    tokenizer = word_tokenizer()
    spoken = {text for split in SPLITS for record in records(folder, split) for text in said(record)}
    texts = {text.removeprefix("<image>\n") for text in spoken}
    assert all(tokenizer.decode(tokenizer(text).input_ids) == text for text in texts)
    for word in {word.strip(".,:?") for text in texts for word in text.split()}:
        assert 1 in (len(tokenizer(word).input_ids), len(tokenizer(f" {word}").input_ids)), word
