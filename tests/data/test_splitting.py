"""Conversations that are too long, in parts: every reply is learned once, with the images that it is about."""

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fixtures import losses
from tests.tiny_parts import Parts, picture, runs
from vlm.config.dataset_schema import DatasetConfig
from vlm.data.dataset import SampleDataset, load_dataset
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.holdout import split_off_eval
from vlm.data.sample import ImageRef, Sample, Turn
from vlm.data.splitting import split
from vlm.models import VLMProcessor

LONGEST = 90
IMAGE = ImageRef(Path("a.png"))


def ask(*content: Any) -> Turn:
    return Turn("user", content)


def reply(text: str, *, supervised: bool = True) -> Turn:
    return Turn("assistant", (text,), supervised)


def at_most(number: int) -> Callable[[Sample], bool]:
    """A sample of so many turns fits; images count as one more."""
    return lambda sample: len(sample.turns) + len(sample.media) <= number


def describe(sample: Sample, most: int) -> list[tuple[list[int], list[int]]] | None:
    """The turns of each part, and those that are learned."""
    parts = split(sample, at_most(most))
    if parts is None:
        return None
    learned = [
        [index for index, turn in zip(part.turns, part.of(sample).turns, strict=True) if turn.supervised and index % 2]
        for part in parts
    ]
    return [(list(part.turns), own) for part, own in zip(parts, learned, strict=True)]


def test_a_question_keeps_the_images_that_were_shown_last():
    turns = (ask(IMAGE, "1"), reply("a"), ask("2"), reply("b"), ask("3"), reply("c"), ask(IMAGE, "4"), reply("d"),
             ask("5"), reply("e"))  # fmt: skip
    assert describe(Sample("x", turns), 5) == [
        ([0, 1, 2, 3], [1, 3]),
        ([0, 1, 4, 5], [5]),
        ([6, 7, 8, 9], [7, 9]),
    ]
    assert describe(Sample("x", turns), 4) is None, "the second question needs the first one's image"
    assert describe(Sample("x", turns), 12) == [(list(range(10)), [1, 3, 5, 7, 9])]


def test_room_is_filled_with_the_turns_just_before():
    turns = tuple(chain.from_iterable((ask(str(number)), reply("a")) for number in range(5)))
    assert describe(Sample("x", turns), 6) == [([0, 1, 2, 3, 4, 5], [1, 3, 5]), ([4, 5, 6, 7, 8, 9], [7, 9])]
    assert describe(Sample("x", (ask(IMAGE, "1"), *turns[1:])), 7) == [
        ([0, 1, 2, 3, 4, 5], [1, 3, 5]),
        ([0, 1, 6, 7, 8, 9], [7, 9]),
    ]


def test_the_system_turn_is_in_every_part_and_unlearned_replies_end_none():
    turns = (Turn("system", ("s",)), ask("1"), reply("a", supervised=False), ask("2"), reply("b"), ask("3"), reply("c"),
             ask("4"), reply("d", supervised=False))  # fmt: skip
    parts = split(Sample("x", turns), at_most(5))
    assert parts is not None
    assert [part.turns for part in parts] == [(0, 1, 2, 3, 4), (0, 5, 6)]
    first, second = (part.of(Sample("x", turns, references=("r",))) for part in parts)
    assert [turn.supervised for turn in first.turns if turn.role == "assistant"] == [False, True]
    assert (first.id, second.id) == ("x, part 1", "x, part 2")
    assert first.references == second.references == (), "they are of a reply that is in no part"


def test_turns_of_agents_stay_together():
    turns = (ask("1"), reply("call"), Turn("tool", ("result",)), reply("a"), ask("2"), ask("3"), reply("b"))
    parts = split(Sample("x", turns), at_most(4))
    assert parts is not None
    assert [part.turns for part in parts] == [(0, 1, 2, 3), (4, 5, 6)]


# Records


@pytest.fixture(scope="module")
def processor(parts: Parts) -> VLMProcessor:
    return parts.processor("clip", "llama", template="chatml")


def make_record(name: str, images: list[int], replies: list[str]) -> dict[str, Any]:
    """A conversation with an image in each of some questions, by their numbers."""
    turns = []
    for number, text in enumerate(replies):
        mark = "<image>\n" if number in images else ""
        turns += [{"from": "human", "value": f"{mark}what of {number}?"}, {"from": "gpt", "value": text}]
    return {"id": name, "image": [f"{number}.png" for number in images], "conversations": turns}


REPLIES = [f"it is number {number}" for number in range(8)]
RECORDS = [
    make_record("short", [0], ["a cat"]),
    make_record("one image", [0], REPLIES),
    make_record("several images", [0, 2, 3, 6], REPLIES),
    make_record("none", [], REPLIES),
]


@pytest.fixture
def load(tmp_path: Path, processor: VLMProcessor) -> Callable[..., SampleDataset]:
    for number in range(8):
        picture(number).save(tmp_path / f"{number}.png")

    def make(records: list[Any], **keys: Any) -> SampleDataset:
        (tmp_path / "records.json").write_text(json.dumps(records))
        config = DatasetConfig(
            path=str(tmp_path / "records.json"), over_length="split", cache_dir=str(tmp_path / "cache"), **keys
        )
        return load_dataset(config, SampleEncoder(processor, LONGEST, truncate=False))

    return make


def test_each_reply_is_learned_exactly_once(load: Callable[..., SampleDataset], processor: VLMProcessor):
    for data in (load(RECORDS), load(RECORDS)):  # the second one from the cache
        learned: dict[str, list[str]] = {}
        for index in range(len(data)):
            item: Any = data[index]
            assert len(item["input_ids"]) == data.lengths[index] <= LONGEST
            sample = data.sample(index)
            assert data.num_images[index] == len(sample.media)
            assert item["input_ids"].count(processor.image_token_id) == processor.tokens_per_image * len(sample.media)
            texts = [str(processor.tokenizer.decode(run, skip_special_tokens=True)) for run in runs(item["labels"])]
            learned.setdefault(sample.id.partition(",")[0], []).extend(text.strip() for text in texts)
            assert data.sources[0].record_of(item["sample_ref"].record) == item["sample_ref"].record < len(RECORDS)
        assert learned == {"short": ["a cat"], **{str(record["id"]): REPLIES for record in RECORDS[1:]}}
        assert (len(data) > len(RECORDS), data.skipped, data.contributions[0].truncated) == (True, [], 0)
        assert data.contributions[0].samples == len(data)


def test_every_part_shows_the_image_that_it_is_asked_about(load: Callable[..., SampleDataset]):
    data = load([RECORDS[2]])
    for index in range(len(data)):
        sample = data.sample(index)
        shown, names = None, ["0.png", "0.png", "2.png", "3.png", "3.png", "3.png", "6.png", "6.png"]
        for turn in sample.turns:
            for part in turn.content:
                shown = part.path.name if isinstance(part, ImageRef) and part.path else shown
            if turn.role == "assistant" and turn.supervised:
                assert shown == names[REPLIES.index(str(turn.content[0]))]


def test_the_parts_of_a_record_are_on_one_side(load: Callable[..., SampleDataset]):
    data = load(RECORDS)
    rest, held = split_off_eval(data, 0.5, seed=0)
    sides = [{each.sample(index).id.partition(",")[0] for index in range(len(each))} for each in (rest, held)]
    assert sides[0].isdisjoint(sides[1])
    assert sum(map(len, sides)) == len(RECORDS)
    assert len(rest) + len(held) == len(data)


def test_what_cannot_be_split_ends_the_run(load: Callable[..., SampleDataset]):
    huge = make_record("huge", [0], ["word " * 200])
    with pytest.raises(
        ValueError, match=r"record 1: record 'huge': \d+ tokens: a reply .* has more than 90, or its temp"
    ):
        load([RECORDS[0], huge])
    assert np.array_equal(load([RECORDS[0]]).places, [[0, 0]])


def test_a_run_trains_on_parts(train: Callable[..., Path], tmp_path: Path):
    for number in range(8):
        picture(number).save(tmp_path / f"{number}.png")
    (tmp_path / "records.json").write_text(json.dumps(RECORDS))
    run = train(
        "finetune-smol", tmp_path / "run", f"dataset.path={tmp_path / 'records.json'}",
        f"dataset.image_folder={tmp_path}", "dataset.over_length=split", f"dataset.max_length={LONGEST}",
        "dataset.eval_split=0.3", "trainer.eval_strategy=epoch", "trainer.max_steps=2", "trainer.num_samples=1",
        f"dataset.cache_dir={tmp_path / 'cache'}", "trainer.save_strategy=no",
    )  # fmt: skip
    assert len(losses(run)) == 2
    assert "**answer**" in (run / "samples.md").read_text()
    assert not (run / "skipped.jsonl").exists() or not (run / "skipped.jsonl").read_text()
