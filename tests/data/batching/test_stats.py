"""What batches say of themselves, beside what the model reads."""

from typing import Any

import pytest
import torch

from vlm.data.batching.collator import Collator
from vlm.data.batching.stats import BATCH_STATS, BatchStats, compute_batch_stats, num_images
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.skipped import Skipped

DUMMY = ([7, 8], {"pixel_values": torch.ones(1, 3, 2, 2)})


def sample(length: int, prompt: int, images: int = 0) -> dict[str, Any]:
    """A sample of so many tokens, of which the first are its prompt."""
    row = {"input_ids": list(range(length)), "labels": [IGNORE_INDEX] * prompt + [1] * (length - prompt)}
    return row | ({"pixel_values": torch.zeros(images, 3, 2, 2)} if images else {})


def test_padding_dummies_and_records_left_out_are_not_counted():
    left_out = Skipped(3, "3", "no picture", None, "records.json")
    batch = Collator(0, DUMMY, with_stats=True)([sample(5, 2), left_out, sample(3, 1)])
    assert batch["input_ids"].shape == (2, 5)  # the dummy stands behind the shorter
    assert batch[BATCH_STATS] == BatchStats(
        samples=2, tokens=8, positions=10, supervised=5, images=0, squared_lengths=34
    )


def test_a_batch_of_which_nothing_is_left_has_positions_alone():
    left_out = Skipped(3, "3", "no picture", None, "records.json")
    assert Collator(0, DUMMY, with_stats=True)([left_out])[BATCH_STATS] == BatchStats(positions=3)


def test_only_who_asks_is_told():
    assert BATCH_STATS not in Collator(0)([sample(5, 2)])


def test_the_first_token_is_no_prediction():
    assert compute_batch_stats([sample(4, 0)], 4).supervised == 3


def test_facts_add_up():
    one, two = [sample(5, 2, images=2)], [sample(3, 1, images=1)]
    assert compute_batch_stats(one, 6) + compute_batch_stats(two, 4) == compute_batch_stats([*one, *two], 10)


@pytest.mark.parametrize(
    ("inputs", "number"),
    [
        ({}, 0),
        ({"pixel_values": None}, 0),
        ({"pixel_values": torch.zeros(2, 3, 4, 4)}, 2),
        ({"pixel_values": torch.zeros(2, 5, 3, 4, 4)}, 10),
        ({"pixel_values": torch.zeros(24, 588), "image_grid_thw": torch.ones(3, 3)}, 3),
        ({"pixel_values": torch.zeros(1, 3, 4, 4), "pixel_values_videos": torch.zeros(2, 8, 3, 4, 4)}, 17),
        ({"image_features": torch.zeros(2, 9, 4)}, 2),
        ({"pixel_values": torch.zeros(2, 3, 4, 4), "image_index": torch.tensor([0, 1, 1])}, 3),
    ],
)
def test_images_are_counted_as_the_encoder_reads_them(inputs: dict[str, Any], number: int):
    assert num_images(inputs) == number
