"""Measures out of the loss: per row, and whether an image's own caption is the likeliest."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_parts import IGNORE_INDEX, Parts, picture
from vlm.config.schema import DatasetConfig
from vlm.data.batching.collator import Collator
from vlm.data.dataset import SampleDataset, load_dataset
from vlm.data.encoding.labels import encode
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.sample import Sample
from vlm.evaluation.loss import caption_retrieval, last_reply_text, replace_reply, row_losses

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
        sums, counts = row_losses(output.logits, batch["labels"])
        for row in range(5):
            alone = make_batch(row)
            assert counts[row] == (alone["labels"] != IGNORE_INDEX).sum()
            assert torch.allclose(sums[row] / counts[row], model(**alone).loss, atol=1e-5)
    assert torch.allclose(sums.sum() / counts.sum(), output.loss, atol=1e-5)


def test_a_row_without_supervision_counts_nothing():
    labels = torch.tensor([[IGNORE_INDEX, 1, 2], [IGNORE_INDEX] * 3])
    sums, counts = row_losses(torch.zeros(2, 4), labels)
    assert counts.tolist() == [2, 0]
    assert torch.allclose(sums, torch.tensor([2 * torch.log(torch.tensor(4.0)), 0.0]))


class FakeModel:
    """A model whose loss is low where the pixels' mean is the caption's place in `known`."""

    device = torch.device("cpu")

    def __init__(self, known: dict[float, list[int]]):
        self.known = known

    def __call__(self, pixel_values: torch.Tensor, labels: torch.Tensor, image_index: torch.Tensor, **_: torch.Tensor):
        assert len(pixel_values) == 1  # the image is encoded once, whatever it is asked about
        targets = torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
        logits = []
        for row, pixels in enumerate(pixel_values[image_index]):
            wanted = [target for target in targets[row].tolist() if target != IGNORE_INDEX]
            own = self.known[round(pixels.mean().item(), 4)] == wanted
            logits += [torch.nn.functional.one_hot(torch.tensor(t), 512) * (9.0 if own else 1.0) for t in wanted]
        return type("Output", (), {"logits": torch.stack(logits)})


def test_captions_are_found_by_a_model_that_knows_them(parts: Parts, samples: list[Sample]):
    """Never set against one that reads the same; one that knows another image's is wrong."""
    processor = parts.processor()
    known = {}
    for sample in samples:
        pixels = processor.pixel_values([picture(int(sample.id))])
        ids = [label for label in encode(processor, sample).labels if label != IGNORE_INDEX]
        known[round(pixels.mean().item(), 4)] = ids
    assert caption_retrieval(FakeModel(known), processor, samples, ways=4) == [True] * 5
    keys = list(known)
    known[keys[0]] = known[keys[2]]
    assert caption_retrieval(FakeModel(known), processor, samples, ways=4) == [False, *[True] * 4]


def test_retrieval_is_the_same_for_a_seed(parts: Parts, samples: list[Sample]):
    model, processor = parts.model()
    first = caption_retrieval(model.eval(), processor, samples, ways=3, seed=1)
    assert first == caption_retrieval(model, processor, samples, ways=3, seed=1)


def test_a_reply_is_replaced(samples: list[Sample]):
    changed = replace_reply(samples[0], "green")
    assert (last_reply_text(samples[0]), last_reply_text(changed)) == ("red", "green")
    assert changed.images == samples[0].images
