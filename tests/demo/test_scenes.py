"""The generated scenes: nothing held out leaks into training, and the questions alone do not give the answers."""

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm.demo.scenes import (
    BACKGROUND,
    CELL,
    CELLS,
    COLOURS,
    CORNERS,
    HELD_OUT_PAIRS,
    NUMBER_WORDS,
    QUESTION_KINDS,
    SHAPES,
    Scene,
    caption,
    draw,
    questions,
    random_scene,
    write_scenes,
)
from vlm.demo.tiny_models import make_word_tokenizer

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
            assert image.size == (CELLS * CELL,) * 2


def test_held_out_records_ask_one_question_of_each_kind_alike(folder: Path) -> None:
    held_out = records(folder, "heldout")
    assert all(len(record["conversations"]) == 2 for record in held_out)
    assert Counter(record["kind"] for record in held_out) == dict.fromkeys(
        QUESTION_KINDS, len(held_out) // len(QUESTION_KINDS)
    )


def test_no_image_is_in_two_splits(folder: Path) -> None:
    captioned = {record["image"] for record in records(folder, "pretrain")}
    assert {record["image"] for record in records(folder, "finetune")} == captioned
    others = [{record["image"] for record in records(folder, split)} for split in ("val", "heldout")]
    assert not captioned & others[0]
    assert not (captioned | others[0]) & others[1]


def test_held_out_pairs_are_drawn_where_they_are_asked_for_alone() -> None:
    rng = random.Random(0)
    drawn = {held_out: [random_scene(rng, held_out=held_out) for _ in range(500)] for held_out in (True, False)}
    for held_out, found in drawn.items():
        assert {(scene.colour, scene.shape) in HELD_OUT_PAIRS for scene in found} == {held_out}
        assert {len(scene.cells) for scene in found} == {1, 2, 3, 4}
        assert {scene.place for scene in found} == set(CORNERS)
    pairs = {(scene.colour, scene.shape) for scene in drawn[False]}
    assert len(pairs) == len(COLOURS) * len(SHAPES) - len(HELD_OUT_PAIRS)


def test_things_lie_in_the_cells_that_are_told() -> None:
    """As many as counted, in one corner, each inside its cell."""
    rng = random.Random(0)
    for _ in range(50):
        scene = random_scene(rng, held_out=False)
        changed = np.any(np.asarray(draw(scene, rng)) != np.array(BACKGROUND), axis=2)
        seen = changed.reshape(CELLS, CELL, CELLS, CELL).sum(axis=(1, 3)) > 20
        assert sorted(zip(*(index.tolist() for index in seen.nonzero()), strict=True)) == sorted(scene.cells)
        assert questions(scene)["count"][1] == NUMBER_WORDS[len(scene.cells) - 1]
        assert {Scene(scene.colour, scene.shape, (cell,)).place for cell in scene.cells} == {scene.place}


@pytest.mark.parametrize("split", ["pretrain", "finetune", "val"])
def test_no_text_of_training_tells_both_colour_and_shape(folder: Path, split: str) -> None:
    for record in records(folder, split):
        words = set(re.findall(r"\w+", " ".join(said(record))))
        assert bool(words & set(COLOURS)) != bool(words & set(SHAPES))


def test_a_caption_goes_through_all_cells() -> None:
    rng = random.Random(0)
    scene = Scene("red", "circle", ((0, 2), (1, 3)))
    found = {caption(scene, rng).rpartition("? ")[2].partition(". ")[2] for _ in range(20)}
    assert found == {
        " ".join(word if cell in (2, 7) else "none" for cell in range(CELLS**2)) + "." for word in ("red", "circle")
    }


@pytest.mark.parametrize("kind", QUESTION_KINDS)
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
    tokenizer = make_word_tokenizer()
    spoken = {text for split in SPLITS for record in records(folder, split) for text in said(record)}
    texts = {text.removeprefix("<image>\n") for text in spoken}
    assert all(tokenizer.decode(tokenizer(text).input_ids) == text for text in texts)
    for word in {word.strip(".,:?") for text in texts for word in text.split()}:
        assert 1 in (len(tokenizer(word).input_ids), len(tokenizer(f" {word}").input_ids)), word
