"""Samples with their labels: as items, in batches, and divided."""

import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny_parts import IGNORE_INDEX, Parts, picture
from vlm.config.dataset_schema import DatasetConfig, MixtureSourceConfig
from vlm.data import token_counts as counts
from vlm.data.batching.collator import SKIPPED_KEY, Collator
from vlm.data.dataset import SampleDataset, load_dataset
from vlm.data.encoding.prompts import PromptEncoder
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.heads.dataset import (
    HeadCollator,
    HeadDataset,
    fold_by_label,
    prompt_mask,
    split_by_label,
    values_per_head,
)
from vlm.data.heads.labels import HeadLabels, resolve_labels, strata
from vlm.data.skipped import Skipped
from vlm.models import VLMProcessor

KIND = HeadLabels("kind", "multiclass", ("cat", "dog"))
TAGS = HeadLabels("tags", "multilabel", ("big", "old"))
SCORE = HeadLabels("score", "regression")
LEFT_OUT = Skipped(3, "x", "it is torn", "a.png", "records.json")


@pytest.fixture(scope="module")
def processor(parts: Parts) -> VLMProcessor:
    return parts.processor()


@pytest.fixture
def load(tmp_path: Path, processor: VLMProcessor) -> Callable[..., SampleDataset]:
    """`load(records, answers=False, **dataset)`: prompts of labelled records, whose image is `a.png`."""
    picture().save(tmp_path / "a.png")

    def make(records: list[dict[str, Any]], answers: bool = False, **dataset: Any) -> SampleDataset:
        (tmp_path / "records.json").write_text(json.dumps(records))
        config = DatasetConfig(**{"path": str(tmp_path / "records.json"), "format": "labelled", **dataset})
        return load_dataset(config, PromptEncoder(processor, 200, truncate=False, answers=answers), seed=1)

    return make


def asked(label: Any, number: int = 0, **more: Any) -> dict[str, Any]:
    return {"id": f"r{number}", "prompt": "what is it?" * (1 + number % 3), "label": label, **more}


RECORDS = [
    asked("dog", 0, image="a.png", group="x"), asked(None, 1), asked("cat", 2, group="y"), asked("cat", 3, group="x"),
]  # fmt: skip


# Labels of a data set


def test_labels_and_groups_are_known_beforehand(load):
    data = load(RECORDS)
    assert data.labels == ["dog", None, "cat", "cat"]
    assert data.groups == ["x", None, "y", "x"]
    part = data.subset([3, 1])
    assert (part.labels, part.groups) == (["cat", None], ["x", None])
    again = pickle.loads(pickle.dumps(data))
    assert (again.labels, again.groups) == (data.labels, data.groups)


def test_labels_are_read_back_from_the_cache(load, monkeypatch: pytest.MonkeyPatch):
    labels = [1.5, True, ["a", "b"], {"a": 1, "b": None}, "é\U0001f600", 0]
    records = [asked(label, number) for number, label in enumerate(labels)]
    assert load(records).labels == labels
    monkeypatch.setattr(counts, "count_record", lambda *a, **k: pytest.fail("counted again"))
    assert load(records).labels == labels


def test_numbers_that_are_none_are_kept_to_be_refused(load):
    data = load([asked(float("nan"), 0), asked(1.0, 1)])
    assert np.isnan(data.labels[0])
    with pytest.raises(ValueError, match=r"records.json: head score: regression needs a finite number, got nan \(1 of"):
        HeadDataset(data, [SCORE])


def test_another_column_is_counted_anew(load):
    records = [{"prompt": "what?", "a": 1, "b": 2}]
    assert load(records, options={"label_key": "a"}).labels == [1]
    assert load(records, options={"label_key": "b"}).labels == [2]
    assert load(records, options={"label_key": ["a", "b"]}).labels == [{"a": 1, "b": 2}]


def test_a_record_that_can_be_used_again_brings_its_label(load, tmp_path: Path):
    records = [*RECORDS, asked("dog", 4, image="late.png", group="z"), asked("cat", 5)]
    before = load(records, on_bad_sample="skip", max_skipped=1.0)
    assert before.labels == ["dog", None, "cat", "cat", "cat"]
    picture().save(tmp_path / "late.png")
    after = load(records, on_bad_sample="skip", max_skipped=1.0)
    assert after.labels == ["dog", None, "cat", "cat", "dog", "cat"]
    assert after.groups == ["x", None, "y", "x", "z", None]


def test_each_sample_of_a_mixture_has_its_own_label(load, tmp_path: Path):
    for name in ("one", "two"):
        records = [asked(f"{name} {number}", number, group=str(number)) for number in range(4)]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    (tmp_path / "none.json").write_text(json.dumps([asked(None, 9)]))
    sources = {
        name: MixtureSourceConfig(path=str(tmp_path / f"{name}.json"), format="labelled", weight=weight)
        for name, weight in (("one", 2.5), ("none", 2), ("two", 0.5))
    }
    data = load([], path=None, sources=sources)
    assert len(data) == len(data.labels) == len(data.groups) == 14
    for index, (source, record) in enumerate(data.places.tolist()):
        expected = None if source == 1 else f"{('one', '', 'two')[source]} {record}"
        assert data.labels[index] == expected == data.sample(index).label
        assert data.groups[index] == (None if source == 1 else str(record))
    numbers = HeadDataset(
        data, [HeadLabels("kind", "multiclass", tuple(sorted({*data.labels} - {None})))]
    ).group_indices
    assert numbers[10:12].tolist() == [-1, -1]
    assert not {*numbers[:10].tolist()} & {*numbers[12:].tolist()}, "groups of two sources are others"


def test_a_run_that_learns_replies_asks_for_no_label(load, tmp_path: Path, processor: VLMProcessor):
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a cat"}]
    (tmp_path / "talk.json").write_text(json.dumps([{"conversations": turns, "label": 1, "group": "x"}] * 2))
    data = load_dataset(DatasetConfig(path=str(tmp_path / "talk.json")), SampleEncoder(processor, 200, truncate=False))
    assert (data.labels, data.groups) == ([None, None], [None, None])
    assert (data.subset([1]).labels, data.sample(0).label) == ([None], 1)


# What heads learn


def test_an_item_has_targets_and_a_group(load):
    data = load(RECORDS)
    heads = HeadDataset(data, [KIND])
    item = heads[0]
    assert isinstance(item, dict)
    assert item.pop("targets") == {"kind": [1.0]}
    assert item.pop("group") == heads.group_indices[3] != heads.group_indices[2]
    plain = data[0]
    assert item.keys() == plain.keys()
    assert item["input_ids"] == plain["input_ids"]
    assert np.isnan(heads[1]["targets"]["kind"][0])
    assert heads[1]["group"] == -1
    assert heads.values("kind") == ["dog", None, "cat", "cat"]
    np.testing.assert_array_equal(heads.targets("kind"), [[1], [np.nan], [0], [0]])


def test_it_is_otherwise_its_samples(load):
    data = load([*RECORDS, {"prompt": [3]}], on_bad_sample="skip", max_skipped=1.0)
    heads = HeadDataset(data, [KIND])
    assert len(heads) == 4
    assert heads.lengths is data.lengths
    assert heads.num_images is data.num_images
    assert heads.processor is data.processor
    assert [one.record for one in heads.dataset.skipped] == [4]
    assert heads.dataset is data
    part = heads.subset(np.array([2, 0]))
    assert part.values("kind") == ["cat", "dog"]
    assert part.targets("kind").tolist() == [[0], [1]]
    assert part.lengths.tolist() == data.lengths[[2, 0]].tolist()


def test_a_record_that_turns_out_to_be_unusable_has_no_target(load, tmp_path: Path):
    heads = HeadDataset(load(RECORDS), [KIND])
    (tmp_path / "a.png").unlink()
    assert isinstance(heads[0], Skipped)


def test_several_heads_read_a_mapping(load):
    labels = [{"kind": "cat", "tags": ["old"], "score": 2, "more": 1}, {"kind": None, "tags": []}, None]
    heads = HeadDataset(load([asked(label) for label in labels]), [KIND, TAGS, SCORE])
    assert heads[0]["targets"] == {"kind": [0], "tags": [0, 1], "score": [2]}
    assert heads.targets("tags").shape == (3, 2)
    assert heads.values("score") == [2, None, None]
    np.testing.assert_array_equal(heads.targets("tags"), [[0, 1], [0, 0], [np.nan, np.nan]])


def test_one_head_reads_a_value_or_a_mapping_with_its_name():
    assert values_per_head(["cat", {"kind": "dog"}, {"other": 1}, None], ["kind"]) == {
        "kind": ["cat", "dog", None, None]
    }
    assert values_per_head([["a"]], ["tags"]) == {"tags": [["a"]]}


@pytest.mark.parametrize("label", ["cat", 0, ["cat"]])
def test_several_heads_need_a_mapping(label: Any):
    with pytest.raises(ValueError, match=r"label .*: a mapping from the names of the heads, kind, tags"):
        values_per_head([None, {"kind": "cat"}, label], ["kind", "tags"])


def test_a_label_that_a_head_does_not_know_is_refused_at_once(load):
    with pytest.raises(
        ValueError, match=r"records.json: head kind: 'cow' is not one of its labels.* \(1 of 2 records\)"
    ):
        HeadDataset(load([asked("cow"), asked("cat")]), [KIND])


# Batches


def item(ids: list[int], supervised: int = 0, **targets: Any) -> dict[str, Any]:
    """An item of which the last ids are supervised."""
    labels = [IGNORE_INDEX] * (len(ids) - supervised) + ids[len(ids) - supervised :]
    return {"input_ids": ids, "labels": labels, "targets": targets, "group": targets.pop("group", -1)}


def test_targets_stand_beside_the_rows():
    collate = HeadCollator(Collator(99), [KIND, TAGS])
    rows = [item([1, 2, 3], kind=[1.0], tags=[0.0, 1.0], group=4), item([4], kind=[float("nan")], tags=[1.0, 0.0])]
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 99, 99]]
    assert batch["labels"]["kind"].dtype == batch["labels"]["tags"].dtype == torch.float32
    assert torch.equal(batch["labels"]["tags"], torch.tensor([[0.0, 1], [1, 0]]))
    assert batch["labels"]["kind"].shape == (2, 1)
    assert batch["labels"]["kind"][1].isnan().all()
    assert (batch["groups"].tolist(), batch["groups"].dtype) == ([4, -1], torch.int64)
    assert batch.keys() == {"input_ids", "attention_mask", "labels", "groups"}
    assert rows[0].keys() == {"input_ids", "labels", "targets", "group"}, "items are left as they were"


@pytest.mark.parametrize("left", [False, True])
def test_the_prompt_is_what_stands_before_the_reply(left: bool):
    """Not the padding, not the dummy image behind the shortest row, and all of a row without a reply."""
    dummy = [7, 8], {"pixel_values": torch.zeros(1, 3, 2, 2)}
    collate = HeadCollator(Collator(99, dummy, left=left), [SCORE])
    batch = collate([item([1, 2, 3, 4, 5], 2, score=[1.0]), item([1, 2], 1, score=[2.0]), item([6] * 3, score=[3.0])])
    assert batch["text_labels"].shape == batch["prompt_mask"].shape == (3, 5)
    assert batch["prompt_mask"].dtype == torch.int64
    expected = {
        False: [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]],
        True: [[1, 1, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 1, 1]],
    }
    assert batch["prompt_mask"].tolist() == expected[left]
    assert (batch["prompt_mask"] <= batch["attention_mask"]).all()
    assert collate([item([1, 2], score=[1.0])]).keys().isdisjoint({"text_labels", "prompt_mask"})


def test_the_mask_of_one_prompt():
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 5, IGNORE_INDEX, 6]])
    assert prompt_mask(labels, torch.tensor([[0, 1, 1, 1, 1]])).tolist() == [[0, 1, 0, 0, 0]]


def test_a_record_that_was_left_out_has_no_row():
    collate = HeadCollator(Collator(99), [KIND, TAGS])
    batch = collate([LEFT_OUT, item([1, 2], kind=[1.0], tags=[0.0, 1.0], group=3)])
    assert batch[SKIPPED_KEY] == [LEFT_OUT]
    assert (batch["labels"]["kind"].tolist(), batch["groups"].tolist()) == ([[1.0]], [3])
    nothing = collate([LEFT_OUT])
    assert nothing["input_ids"].tolist() == [[99]]
    assert {name: target.shape for name, target in nothing["labels"].items()} == {"kind": (1, 1), "tags": (1, 2)}
    assert all(target.isnan().all() for target in nothing["labels"].values())
    assert nothing["groups"].tolist() == [-1]
    assert "text_labels" not in nothing


def test_a_batch_of_records(load, processor: VLMProcessor):
    """What stands before the reply is what is encoded without it."""
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]
    records = [
        {"image": "a.png", "conversations": turns, "label": "cat"},
        {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nwhat is it?"}], "label": "dog"},
    ]
    collate = HeadCollator(Collator.of(processor), [KIND])
    answered = HeadDataset(load(records, answers=True, format="llava"), [KIND])
    bare = HeadDataset(load(records, format="llava"), [KIND])
    with_replies, prompts = (collate([data[0], data[1]]) for data in (answered, bare))
    assert with_replies["pixel_values"].shape[0] == 2
    for row in range(2):
        found = with_replies["input_ids"][row][with_replies["prompt_mask"][row] == 1]
        assert torch.equal(found, prompts["input_ids"][row][prompts["attention_mask"][row] == 1])
    assert "text_labels" not in prompts
    learnt = with_replies["text_labels"][with_replies["text_labels"] != IGNORE_INDEX]
    assert processor.tokenizer.decode(learnt) == "a cat<|im_end|>"


# Divided


def ids(data: SampleDataset) -> list[str]:
    return [data.sample(index).id for index in range(len(data))]


@pytest.fixture
def repeated(load, tmp_path: Path) -> SampleDataset:
    """Forty records, each of them twice: thirty cats, ten dogs, and one bad record."""
    records = [asked("dog" if number % 4 == 0 else "cat", number) for number in range(40)]
    (tmp_path / "r.json").write_text(json.dumps([*records, ["x"]]))
    source = MixtureSourceConfig(path=str(tmp_path / "r.json"), format="labelled", weight=2)
    return load([], path=None, sources={"r": source}, on_bad_sample="skip", max_skipped=1.0)


def test_a_repeated_record_is_on_one_side_with_its_label(repeated: SampleDataset):
    of = strata(KIND, repeated.labels)
    rest, held = split_by_label(repeated, of, 0.2, seed=0)
    assert (len(rest), len(held)) == (64, 8)
    assert not set(ids(rest)) & set(ids(held))
    assert Counter(held.labels) == {"cat": 6, "dog": 2}
    assert Counter(rest.labels) == {"cat": 48, "dog": 16}
    assert rest.labels == [rest.sample(index).label for index in range(len(rest))]
    assert (len(rest.skipped), len(rest.contributions), held.skipped, held.contributions) == (1, 1, [], [])
    assert ids(split_by_label(repeated, of, 0.2, seed=0)[1]) == ids(held)
    assert ids(split_by_label(repeated, of, 0.2, seed=1)[1]) != ids(held)


def test_each_record_is_held_out_in_one_fold(repeated: SampleDataset):
    parts = fold_by_label(repeated, strata(KIND, repeated.labels), 5, seed=0)
    assert sorted(one for _, held in parts for one in ids(held)) == sorted(set(ids(repeated)))
    for rest, held in parts:
        assert (len(rest), Counter(held.labels)) == (64, {"cat": 6, "dog": 2})
        assert not set(ids(rest)) & set(ids(held))


def test_a_group_is_on_one_side(load):
    records = [asked(number % 2, number, group=str(number // 4)) for number in range(24)] + [asked(0, 30), asked(1, 31)]
    data = load(records)
    of = np.zeros(len(data), dtype=np.int64)
    for rest, held in [split_by_label(data, of, 0.3, seed=0), *fold_by_label(data, of, 4, seed=0)]:
        assert not {*rest.groups} & {*held.groups} - {None}
        assert len(rest) + len(held) == 26
        assert len(held)


def test_a_label_of_one_record_cannot_be_divided(load):
    data = load([asked("cat", 0), asked("cat", 1), asked("dog", 2)])
    of = strata(KIND, data.labels)
    with pytest.raises(ValueError, match=r"dataset.eval_split=0.5: .* at least 2 records of each label.*; 'dog' has 1"):
        split_by_label(data, of, 0.5, 0, KIND.labels)
    with pytest.raises(ValueError, match=r"3 folds: one for each, so at least 3 records of each .*; 'dog' has 1"):
        fold_by_label(data, of, 3, 0, KIND.labels)


def test_labels_of_a_table_are_classes_as_written(tmp_path: Path, load):
    """Several heads: what looks missing is a class, only an empty cell is no label."""
    rows = [("None", "good", "1.50"), ("NA", "None", "2"), ("", "good", ""), ("007", "n/a", "-3"), ("7", "", "0")]
    lines = ["image,prompt,defect,quality,size", *(",".join(("a.png", "what?", *row)) for row in rows)]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    keys = ["defect", "quality", "size"]
    data = load([], path=str(tmp_path / "a.csv"), options={"label_key": keys})
    values = values_per_head(data.labels, keys)
    assert values["defect"] == ["None", "NA", None, "007", "7"]
    assert resolve_labels("defect", "multiclass", None, values["defect"]).labels == ("007", "7", "NA", "None")
    assert resolve_labels("quality", "multiclass", None, values["quality"]).labels == ("None", "good", "n/a")
    size = resolve_labels("size", "regression", None, values["size"])
    heads = HeadDataset(data, [size])
    assert heads.targets("size")[[0, 1, 3, 4], 0].tolist() == [1.5, 2, -3, 0]
    assert np.isnan(heads.targets("size")[2, 0])
