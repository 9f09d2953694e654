"""Preferences as a data set: both sides are encoded as conversations, and images of both are prepared once."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.tiny_parts import Parts
from vlm.config.dataset_schema import DatasetConfig
from vlm.data.batching.batch import Batch
from vlm.data.batching.collator import SAMPLE_REFS, SKIPPED_KEY, Collator
from vlm.data.dataset import load_dataset
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.encoding.preference import CHOSEN, MISMATCHED, REJECTED, PreferenceEncoder
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.preference.collator import RECORD_INDEX, RECORDS, ROLES, PreferenceCollator
from vlm.data.preference.dataset import PreferenceDataset, PreferenceItem
from vlm.data.sample import BadSample
from vlm.data.skipped import Skipped

RECORDS_OF_PAIRS: list[dict[str, Any]] = [
    {"image": "0.png", "question": "which?", "chosen": "a red square", "rejected": "a circle of another colour"},
    {"image": "1.png", "question": "which?", "chosen": "a blue one", "rejected": "no"},
    {"question": "one?", "chosen": "1", "rejected": "2"},
    {"image": "0.png", "rejected_images": ["1.png", "0.png"], "question": "<image>", "chosen": "x", "rejected": "y"},
]
RECORDS_OF_PAIRS[3] |= {"question": None, "prompt": None} | {
    "chosen": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "x"}],
    "rejected": [{"role": "user", "content": "<image><image>"}, {"role": "assistant", "content": "y"}],
}
LABELLED: list[dict[str, Any]] = [
    {"image": "0.png", "question": "which?", "chosen": "red", "label": True},
    {"question": "which?", "chosen": "blue", "label": False},
    {"question": "which?", "chosen": "good", "rejected": "bad"},
]

Load = Callable[..., PreferenceDataset]


@pytest.fixture(scope="module")
def load(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Load:
    folder = tmp_path_factory.mktemp("preferences")
    for number, colour in enumerate(("red", "blue")):
        image = Image.new("RGB", (24, 24), colour)
        image.putpixel((3, 3), (9, 9, 9))
        image.save(folder / f"{number}.png")
    _, processor = parts.model("clip", "llama")

    def load(records: list[dict[str, Any]] = RECORDS_OF_PAIRS, longest: int = 500, **fields: Any) -> PreferenceDataset:
        path = folder / f"{len(list(folder.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        options = {name: fields.pop(name) for name in ("labelled", "rejects_image") if name in fields}
        encoder = PreferenceEncoder(processor, longest, truncate=False, **options)
        config = DatasetConfig(path=str(path), format="preference", cache_dir=str(folder / "cache"))
        return PreferenceDataset(load_dataset(config, encoder), **fields)

    return load


def item_at(dataset: PreferenceDataset, index: int) -> PreferenceItem:
    item = dataset[index]
    assert not isinstance(item, Skipped)
    return item


def collator(dataset: PreferenceDataset) -> Callable[..., Batch]:
    processor = dataset.dataset.processor
    return PreferenceCollator(Collator.of(processor, deduplicate=("pixel_values",), with_stats=True))


def test_sides_are_encoded_as_conversations_are(load: Load):
    dataset = load()
    plain = SampleEncoder(dataset.dataset.processor, 500, truncate=False)
    for index in range(len(dataset)):
        item, sample = item_at(dataset, index), dataset.dataset.sample(index)
        assert sample.rejected is not None
        assert (item["roles"], item["index"]) == ([CHOSEN, REJECTED], index)
        for inputs, side in zip(item["sides"], (sample.chosen, sample.rejected), strict=True):
            encoded = plain(side)
            assert (inputs["input_ids"], inputs["labels"]) == (encoded.input_ids, encoded.labels)
        lengths = [len(inputs["input_ids"]) for inputs in item["sides"]]
        assert dataset.lengths[index] == max(lengths)
    assert dataset.num_images.tolist() == [1, 1, 0, 3]


def test_images_of_both_sides_are_prepared_once_and_others_are_their_own(load: Load):
    dataset = load()
    shared, own = item_at(dataset, 0)["sides"], item_at(dataset, 3)["sides"]
    assert shared[0]["pixel_values"] is shared[1]["pixel_values"]
    assert [len(inputs["pixel_values"]) for inputs in own] == [1, 2]
    assert torch.equal(own[0]["pixel_values"][0], own[1]["pixel_values"][1])


def test_a_batch_has_the_chosen_rows_first(load: Load):
    dataset = load()
    skipped = Skipped(5, "5", "broken", None, "pairs")
    batch: Any = collator(dataset)([dataset[2], skipped, dataset[0], dataset[1]])
    assert batch[ROLES].tolist() == [0, 0, 0, 1, 1, 1]
    assert batch[RECORDS].tolist() == [0, 1, 2, 0, 1, 2]
    assert batch[RECORD_INDEX].tolist() == [2, 0, 1]
    assert len(batch["input_ids"]) == 6
    assert len(batch["pixel_values"]) == 2, "equal images stand once"
    assert batch[SKIPPED_KEY] == [skipped]
    assert [ref.record for ref in batch[SAMPLE_REFS]] == [2, 0, 1]
    assert batch["batch_stats"].samples == 3
    empty: Any = collator(dataset)([skipped])
    assert len(empty["input_ids"]) == 1
    assert len(empty[ROLES]) == len(empty[RECORD_INDEX]) == 0


@pytest.mark.parametrize("how", ["blank", "cropped"])
def test_the_rejected_side_may_have_images_that_tell_less(load: Load, how: str):
    plain, dataset = load(), load(rejected_image=how)
    chosen, rejected = item_at(dataset, 0)["sides"]
    before = item_at(plain, 0)["sides"]
    assert torch.equal(chosen["pixel_values"], before[0]["pixel_values"])
    assert rejected["pixel_values"].shape == chosen["pixel_values"].shape
    assert not torch.equal(rejected["pixel_values"], chosen["pixel_values"])
    assert rejected["input_ids"] == before[1]["input_ids"]
    again = item_at(dataset, 0)["sides"][1]
    assert torch.equal(again["pixel_values"], rejected["pixel_values"]), "the same in every epoch"


def test_a_reply_may_be_preferred_to_itself_on_other_images(load: Load):
    records = [{"image": "0.png", "question": "which?", "chosen": "red"}]
    chosen, rejected = item_at(load(records, rejects_image=True, rejected_image="blank"), 0)["sides"]
    assert chosen["input_ids"] == rejected["input_ids"]
    assert not torch.equal(chosen["pixel_values"], rejected["pixel_values"])
    with pytest.raises(ValueError, match="it has no rejected reply"):
        load(records)


def test_labelled_replies_are_sides_by_themselves(load: Load):
    dataset = load(LABELLED, labelled=True)
    assert [item_at(dataset, index)["roles"] for index in range(3)] == [[CHOSEN], [REJECTED], [CHOSEN, REJECTED]]
    batch: Any = collator(dataset)([dataset[index] for index in range(3)])
    assert batch[ROLES].tolist() == [CHOSEN, CHOSEN, REJECTED, REJECTED]
    assert batch[RECORDS].tolist() == [0, 2, 1, 2]
    with pytest.raises(ValueError, match="loss=kto reads labels"):
        load(LABELLED)
    with pytest.raises(ValueError, match="neither a rejected reply nor a label"):
        load([{"question": "a", "chosen": "b"}], labelled=True)


def test_mismatched_rows_have_the_reply_of_the_record_before(load: Load):
    dataset = load(LABELLED, labelled=True, mismatches=True)
    processor = dataset.dataset.processor
    for index in range(3):
        item, sample = item_at(dataset, index), dataset.dataset.sample(index)
        assert item["roles"][-1] == MISMATCHED
        other = dataset.dataset.sample(index - 1)
        mixed = replace(sample.chosen, turns=(sample.turns[0], other.turns[1]))
        expected = SampleEncoder(processor, 500, truncate=False)(mixed)
        inputs = item["sides"][-1]
        assert (inputs["input_ids"], inputs["labels"]) == (expected.input_ids, expected.labels)
        assert ("pixel_values" in inputs) == (index == 0)


def test_a_side_that_is_too_long_is_never_cut(load: Load):
    with pytest.raises(ValueError, match="tokens, at most 20 are allowed"):
        load([{"question": "a", "chosen": "b", "rejected": "c" * 50}], longest=20)


def test_records_of_conversations_are_refused(load: Load):
    dataset = load().dataset
    dataset.sources[0].encoder = SampleEncoder(dataset.processor, 500, truncate=False)
    with pytest.raises(TypeError, match="encodes no preferences"):
        PreferenceDataset(dataset)


def test_a_missing_image_is_skipped(load: Load, tmp_path: Any):
    dataset = load()
    dataset.dataset.sources[0].folder = tmp_path
    assert isinstance(dataset[0], Skipped)
    with pytest.raises(BadSample):
        dataset.dataset.sample(0)


def test_supervised_tokens_are_of_the_last_replies(load: Load):
    turns = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "1111"}]
    records = [{"prompt": [*turns, {"role": "user", "content": "two?"}], "chosen": "2222", "rejected": "3333"}]
    dataset = load(records)
    processor = dataset.dataset.processor
    for inputs, text in zip(item_at(dataset, 0)["sides"], ("2222", "3333"), strict=True):
        learned = [token for token in inputs["labels"] if token != IGNORE_INDEX]
        assert text in processor.tokenizer.decode(learned)
        assert "1111" not in processor.tokenizer.decode(learned)
