"""Measures out of the loss, per row."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.logits import supervised_losses
from tests.tiny_parts import IGNORE_INDEX, Parts, picture
from vlm.config.dataset_schema import DatasetConfig
from vlm.data.batching.collator import Collator
from vlm.data.dataset import SampleDataset, load_dataset
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.sample import Sample
from vlm.evaluation.loss import last_reply_text, loss_sums, replace_reply, row_losses

CAPTIONS = ("red", "a blue square", "two cats on a mat", "12", "a blue square")


@pytest.fixture
def data(parts: Parts, tmp_path: Path) -> SampleDataset:
    """Five images with captions, two of which read the same."""
    records = []
    for number, caption in enumerate(CAPTIONS):
        picture(number).save(tmp_path / f"{number}.png")
        records.append({"id": str(number), "image": f"{number}.png", "caption": caption})
    (tmp_path / "captions.json").write_text(json.dumps(records))
    config = DatasetConfig(path=str(tmp_path / "captions.json"), format="caption", options={"prompt": "what?"})
    return load_dataset(config, SampleEncoder(parts.model()[1], 200, truncate=False))


@pytest.fixture
def samples(data: SampleDataset) -> list[Sample]:
    return [data.sample(index) for index in range(len(data))]


def test_row_losses_are_those_of_each_row_alone(parts: Parts, data: SampleDataset):
    """Sums and counts; together they are the batch's loss."""
    model, processor = parts.model()
    collate = Collator(processor.tokenizer.pad_token_id)

    def make_batch(*rows: int) -> dict[str, Any]:
        batch = collate([data[row] for row in rows])
        return {**batch, "pixel_values": processor.normalise(batch["pixel_values"])}

    batch = make_batch(*range(5))
    with torch.no_grad():
        output = model.eval()(**batch)
        sums, counts = row_losses(supervised_losses(model, batch), batch["labels"])
        for row in range(5):
            alone = make_batch(row)
            assert counts[row] == (alone["labels"] != IGNORE_INDEX).sum()
            assert torch.allclose(sums[row] / counts[row], model(**alone).loss, atol=1e-5)
    assert torch.allclose(sums.sum() / counts.sum(), output.loss, atol=1e-5)


def test_a_row_without_supervision_counts_nothing():
    labels = torch.tensor([[IGNORE_INDEX, 1, 2], [IGNORE_INDEX] * 3])
    sums, counts = row_losses(torch.tensor([1.0, 2.0]), labels)
    assert counts.tolist() == [2, 0]
    assert sums.tolist() == [3, 0]


def test_a_reply_is_replaced(samples: list[Sample]):
    changed = replace_reply(samples[0], "green")
    assert (last_reply_text(samples[0]), last_reply_text(changed)) == ("red", "green")
    assert changed.images == samples[0].images


def test_losses_are_per_token_and_a_gain_is_of_samples_with_images():
    """Without any image there is the loss only."""
    sums, counts, blank = torch.tensor([2.0, 4.0, 9.0]), torch.tensor([2.0, 2.0, 3.0]), torch.tensor([4.0, 10.0, 9.0])
    found = loss_sums(sums, counts, blank, torch.tensor([True, True, False]))
    assert [found[name].value for name in ("loss", "blank_loss", "image_gain")] == pytest.approx([15 / 7, 23 / 7, 2])
    assert set(loss_sums(sums, counts, None, torch.zeros(3, dtype=torch.bool))) == {"loss"}
