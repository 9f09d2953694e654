"""Batches: padding, pictures in order, and a dummy picture that nothing attends to."""

from typing import Any

import pytest
import torch

from tests.tiny_parts import IGNORED, Parts, picture
from vlm.data.collate import SKIPPED, Collator
from vlm.data.dataset import Skipped, blank_picture, dummy_image
from vlm.models import VLMForConditionalGeneration, VLMProcessor

PAD = 99


def sample(ids: list[int], images: int = 0, first: int = 0) -> dict[str, Any]:
    """Ids of which the last two are supervised, and pictures filled with `first`, `first + 1` …"""
    pixels = torch.stack([torch.full((3, 2, 2), float(first + n)) for n in range(images)]) if images else None
    return {"input_ids": ids, "labels": [IGNORED] * (len(ids) - 2) + ids[-2:], "pixel_values": pixels}


def test_rows_are_padded_on_the_right():
    batch = Collator(PAD)([sample([1, 2, 3, 4]), sample([5, 6])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 3, 4], [5, 6, IGNORED, IGNORED]]
    assert {value.dtype for value in batch.values()} == {torch.long}
    assert "pixel_values" not in batch


def test_the_mask_does_not_mistake_an_eos_for_padding():
    """Where padding and EOS share an id, the EOS of a reply is attended to and learnt."""
    batch = Collator(PAD)([sample([1, 2, PAD]), sample([3, 4])])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"][0].tolist() == [IGNORED, 2, PAD]


def test_pictures_of_all_rows_stand_one_after_the_other():
    batch = Collator(PAD)([sample([1, 2], 2, 0), sample([3, 4]), sample([5, 6], 1, 2)])
    assert batch["pixel_values"].shape == (3, 3, 2, 2)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [0, 1, 2]


def test_the_samples_are_left_as_they_were():
    """A dataset in memory gives the same lists again."""
    one = sample([1, 2, 3])
    Collator(PAD, ([7, 7], {"pixel_values": torch.zeros(1, 3, 2, 2)}))([one])
    assert one["input_ids"] == [1, 2, 3]


def test_a_batch_without_pictures_gets_a_dummy():
    """In the shortest row, attended by nothing, not supervised."""
    batch = Collator(PAD, ([7, 8, 8, 9], {"pixel_values": torch.ones(1, 3, 2, 2)}))(
        [sample([1, 2, 3, 4]), sample([5, 6])]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, PAD, PAD], [5, 6, 7, 8, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert batch["labels"][1].tolist() == [5, 6, *[IGNORED] * 4]
    assert torch.equal(batch["pixel_values"], torch.ones(1, 3, 2, 2))


def test_a_batch_with_pictures_gets_no_dummy():
    rows = [sample([1, 2], 1), sample([3, 4])]
    with_dummy = Collator(PAD, ([7, 8], {"pixel_values": torch.ones(1, 3, 2, 2)}))(rows)
    assert {name: value.tolist() for name, value in with_dummy.items()} == {
        name: value.tolist() for name, value in Collator(PAD)(rows).items()
    }


LEFT_OUT = Skipped(3, "x", "it is torn", "a.png", "records.json", "on_bad_sample")


def test_a_record_that_was_left_out_is_no_row():
    batch = Collator(PAD)([sample([1, 2]), LEFT_OUT, sample([3])])
    assert batch.pop(SKIPPED) == [LEFT_OUT]
    assert {name: value.tolist() for name, value in batch.items()} == {
        name: value.tolist() for name, value in Collator(PAD)([sample([1, 2]), sample([3])]).items()
    }


def test_a_batch_of_which_nothing_is_left_supervises_nothing():
    batch = Collator(PAD, ([7, 8], {"pixel_values": torch.ones(1, 3, 2, 2)}))([LEFT_OUT, LEFT_OUT])
    assert batch[SKIPPED] == [LEFT_OUT, LEFT_OUT]
    assert batch["input_ids"].tolist() == [[PAD, 7, 8]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0]]
    assert (batch["labels"] == IGNORED).all()


@pytest.fixture(scope="module")
def built(parts: Parts) -> tuple[VLMForConditionalGeneration, VLMProcessor]:
    return parts.model(start="<im_start>", end="<im_end>")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_dummy_changes_neither_loss_nor_gradients(built, attention: str):
    """All modules run, the connector's gradients are zero and not missing."""
    model, processor = built
    model.set_attn_implementation(attention)
    model.zero_grad()
    texts = ["a cat on the mat", "two", "what is it? a red circle"]
    rows = [sample(processor.tokenize(text)[0]) for text in texts]
    ids, inputs = dummy_image(processor)
    dummy = ids, {name: processor.normalise(value) for name, value in inputs.items()}
    found = []
    for collate in (Collator(PAD), Collator(PAD, dummy)):
        model.zero_grad()
        loss = model.train()(**collate(rows)).loss
        loss.backward()
        found.append((loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (plain, gradients), (with_dummy, others) = found
    assert torch.allclose(plain, with_dummy, atol=1e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, others[name], atol=1e-6), name
    connector = [gradient for name, gradient in others.items() if name.startswith("connector.")]
    assert connector
    assert all(gradient.abs().max() == 0 for gradient in connector)
    assert not any(name.startswith("connector.") for name in gradients)


def test_padding_changes_nothing(built):
    """A row's loss is the same beside a longer one."""
    model, processor = built
    rows = [sample(processor.tokenize(text)[0]) for text in ("two", "what is it? a red circle and a blue square")]
    collate = Collator(processor.tokenizer.pad_token_id)
    with torch.no_grad():
        apart = torch.cat([model.eval()(**collate([row])).logits for row in rows])
        together = model(**collate(rows)).logits
    assert torch.allclose(apart, together, atol=1e-5)


def test_a_blank_picture_is_the_processors_mean(built):
    """All but zero behind the normalisation, the same in every mode."""
    pixels = built[1].pixel_values([blank_picture(built[1])])
    assert pixels.shape == (1, 3, 24, 24)
    assert pixels.abs().max() < 0.02
    assert not torch.equal(pixels, built[1].pixel_values([picture()]))
