"""Indices of rows are counted anew over the samples of a batch, and those below 0 stay."""

import torch

from vlm.data.batching.row_indices import shift_indices
from vlm.data.processor import SampleInputs


def test_indices_count_the_rows_of_the_samples_before_and_negative_ones_stay():
    items: list[SampleInputs] = [
        {"pixels": torch.zeros(2, 3, 5), "pooling": torch.tensor([[0, 1], [5, -1]])},
        {"pixels": None, "pooling": None},
        {},
        {"pixels": torch.zeros(1, 4, 5), "pooling": torch.tensor([[0, -1], [2, 3]])},
    ]
    first = items[0]["pooling"]
    shift_indices(items, {"pooling": ("pixels", 2)})
    assert torch.equal(items[0]["pooling"], torch.tensor([[0, 1], [5, -1]]))
    assert items[3]["pooling"].tolist() == [[8, -1], [10, 11]]  # behind 2 tiles, padded to 4 patches each
    assert torch.equal(first, torch.tensor([[0, 1], [5, -1]]))


def test_without_indices_nothing_changes():
    item: SampleInputs = {"pixels": torch.zeros(2, 3)}
    shift_indices([item], {})
    assert list(item) == ["pixels"]
