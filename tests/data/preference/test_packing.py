"""Packed preferences: a record's replies stand behind its prompt, all in one row."""

from typing import Any

import pytest

from tests.data.preference import test_dataset
from tests.data.preference.test_dataset import RECORDS_OF_PAIRS, Load, item_at
from vlm.data.batching.collator import SKIPPED_KEY, Collator
from vlm.data.batching.packing import KEY_INDEX
from vlm.data.batching.shared_prompt import BranchMerger
from vlm.data.batching.step_layout import SampleCosts, get_rows
from vlm.data.blank_images import dummy_image
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.preference.collator import RECORD_INDEX, RECORDS, ROLES, SEQUENCES
from vlm.data.preference.dataset import PreferenceDataset
from vlm.data.preference.packing import PackedPreferenceCollator, check_records_fit
from vlm.data.skipped import Skipped

load = test_dataset.load
"""A fixture."""


def make_collator(dataset: PreferenceDataset, **options: Any) -> PackedPreferenceCollator:
    processor = dataset.dataset.processor
    collate = Collator.of(processor, dummy_image(processor), with_stats=True)
    return PackedPreferenceCollator(collate, BranchMerger.of(processor), SampleCosts(1.0, 1.0), **options)


def read_sequences(row: dict[str, Any]) -> dict[tuple[int, int], list[int]]:
    """Record and role of each conversation of a row -> its supervised ids."""
    found = {}
    for number, key in enumerate(zip(row[RECORDS].tolist(), row[ROLES].tolist(), strict=True)):
        labels = row["labels"][row[SEQUENCES] == number]
        found[key] = labels[labels != IGNORE_INDEX].tolist()
    return found


def labels_of(item: Any) -> list[list[int]]:
    return [[label for label in side["labels"] if label != IGNORE_INDEX] for side in item["sides"]]


def test_all_replies_of_records_are_in_a_row(load: Load):
    dataset = load()
    skipped = Skipped(5, "5", "broken", None, "pairs")
    items = [item_at(dataset, index) for index in (2, 0, 3)]
    row: Any = make_collator(dataset)([items[0], skipped, *items[1:]])
    assert row[RECORD_INDEX].tolist() == [2, 0, 3]
    expected = {
        (place, role): labels
        for place, item in enumerate(items)
        for role, labels in zip(item["roles"], labels_of(item), strict=True)
    }
    assert read_sequences(row) == expected
    assert list(expected) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert row[SKIPPED_KEY] == [skipped]
    assert row["batch_stats"].samples == 3
    tokens = sum(len(side["input_ids"]) for item in items for side in item["sides"])
    assert KEY_INDEX in row
    assert row["input_ids"].numel() < tokens, "prompts are shared"
    assert len(row["pixel_values"]) == 1 + 3, "once for a shared prompt; the last record has images of its own"


def test_rows_hold_at_most_so_many_tokens(load: Load):
    dataset = load(RECORDS_OF_PAIRS[:3] * 2)
    items = [item_at(dataset, index) for index in range(6)]
    longest = max(make_collator(dataset)([item])["input_ids"].numel() for item in items)
    batch: Any = make_collator(dataset, max_tokens=longest + 10)(items)
    rows = get_rows(batch)
    assert len(rows) > 1
    assert sorted(index for row in rows for index in row[RECORD_INDEX].tolist()) == list(range(6))
    with pytest.raises(ValueError, match=r"does not fit into trainer\.max_tokens_per_batch=5"):
        make_collator(dataset, max_tokens=5)(items)


def test_rows_that_may_be_too_short_are_refused_before_training(load: Load):
    dataset = load()
    longest = int(dataset.lengths.max())
    check_records_fit(dataset, 2 * longest)
    with pytest.raises(ValueError, match=rf"max_tokens_per_batch={longest}: both replies of a record are in one row"):
        check_records_fit(dataset, longest)


def test_a_row_without_records_learns_nothing(load: Load):
    row: Any = make_collator(load())([])
    assert not len(row[ROLES])
    assert (row["labels"] == IGNORE_INDEX).all()
    assert row[SEQUENCES].shape == row["input_ids"].shape
