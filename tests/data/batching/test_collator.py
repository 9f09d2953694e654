"""Batches: padding, images in order, and a dummy image that nothing attends to."""

from typing import Any

import pytest
import torch

from tests.tiny_parts import IGNORE_INDEX, Parts, picture
from vlm.data.batching.collator import IMAGE_INDEX, SKIPPED_KEY, Collator
from vlm.data.blank_images import dummy_image, make_blank_image
from vlm.data.skipped import Skipped
from vlm.models import VLMForConditionalGeneration, VLMProcessor
from vlm.models.anyres import AnyRes, ImageNewline

PAD = 99

DEDUPLICATED = ("pixel_values", "image_features")
"""What equal images stand in once."""


def sample(ids: list[int], images: int = 0, first: int = 0) -> dict[str, Any]:
    """Ids of which the last two are supervised, and images filled with `first`, `first + 1` …"""
    pixels = torch.stack([torch.full((3, 2, 2), float(first + n)) for n in range(images)]) if images else None
    return {"input_ids": ids, "labels": [IGNORE_INDEX] * (len(ids) - 2) + ids[-2:], "pixel_values": pixels}


def test_rows_are_padded_on_the_right():
    batch = Collator(PAD)([sample([1, 2, 3, 4]), sample([5, 6])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, IGNORE_INDEX, 3, 4], [5, 6, IGNORE_INDEX, IGNORE_INDEX]]
    assert {value.dtype for value in batch.values()} == {torch.long}
    assert "pixel_values" not in batch


def test_the_mask_does_not_mistake_an_eos_for_padding():
    """Where padding and EOS share an id, the EOS of a reply is attended to and learnt."""
    batch = Collator(PAD)([sample([1, 2, PAD]), sample([3, 4])])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"][0].tolist() == [IGNORE_INDEX, 2, PAD]


def test_images_of_all_rows_stand_one_after_the_other():
    batch = Collator(PAD)([sample([1, 2], 2, 0), sample([3, 4]), sample([5, 6], 1, 2)])
    assert batch["pixel_values"].shape == (3, 3, 2, 2)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [0, 1, 2]


def test_the_samples_are_left_as_they_were():
    """A dataset in memory gives the same lists again."""
    one = sample([1, 2, 3])
    Collator(PAD, ([7, 7], {"pixel_values": torch.zeros(1, 3, 2, 2)}))([one])
    assert one["input_ids"] == [1, 2, 3]


def test_a_batch_without_images_gets_a_dummy():
    """In the shortest row, attended by nothing, not supervised."""
    batch = Collator(PAD, ([7, 8, 8, 9], {"pixel_values": torch.ones(1, 3, 2, 2)}))(
        [sample([1, 2, 3, 4]), sample([5, 6])]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, PAD, PAD], [5, 6, 7, 8, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert batch["labels"][1].tolist() == [5, 6, *[IGNORE_INDEX] * 4]
    assert torch.equal(batch["pixel_values"], torch.ones(1, 3, 2, 2))


def test_a_batch_with_images_gets_no_dummy():
    rows = [sample([1, 2], 1), sample([3, 4])]
    with_dummy = Collator(PAD, ([7, 8], {"pixel_values": torch.ones(1, 3, 2, 2)}))(rows)
    assert {name: value.tolist() for name, value in with_dummy.items()} == {
        name: value.tolist() for name, value in Collator(PAD)(rows).items()
    }


LEFT_OUT = Skipped(3, "x", "it is torn", "a.png", "records.json", "on_bad_sample")


def test_a_record_that_was_left_out_is_no_row():
    batch = Collator(PAD)([sample([1, 2]), LEFT_OUT, sample([3])])
    assert batch.pop(SKIPPED_KEY) == [LEFT_OUT]
    assert {name: value.tolist() for name, value in batch.items()} == {
        name: value.tolist() for name, value in Collator(PAD)([sample([1, 2]), sample([3])]).items()
    }


def test_a_batch_of_which_nothing_is_left_supervises_nothing():
    batch = Collator(PAD, ([7, 8], {"pixel_values": torch.ones(1, 3, 2, 2)}))([LEFT_OUT, LEFT_OUT])
    assert batch[SKIPPED_KEY] == [LEFT_OUT, LEFT_OUT]
    assert batch["input_ids"].tolist() == [[PAD, 7, 8]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0]]
    assert (batch["labels"] == IGNORE_INDEX).all()


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


def test_a_blank_image_is_the_processors_mean(built):
    """All but zero behind the normalisation, the same in every mode."""
    pixels = built[1].pixel_values([make_blank_image(built[1])])
    assert pixels.shape == (1, 3, 24, 24)
    assert pixels.abs().max() < 0.02
    assert not torch.equal(pixels, built[1].pixel_values([picture()]))


def test_equal_images_stand_once():
    rows = [sample([1, 2], 2, 0), sample([3, 4]), sample([5, 6], 3, 0)]
    batch = Collator(PAD, deduplicate=DEDUPLICATED)(rows)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [0, 1, 2]
    assert batch[IMAGE_INDEX].tolist() == [0, 1, 0, 1, 2]
    assert len(rows[2]["pixel_values"]) == 3, "the samples are left as they were"
    whole = Collator(PAD)(rows)
    assert IMAGE_INDEX not in whole
    assert torch.equal(batch["pixel_values"][batch[IMAGE_INDEX]], whole["pixel_values"])


def test_a_row_may_have_nothing_but_images_of_others():
    batch = Collator(PAD, deduplicate=DEDUPLICATED)([sample([1, 2], 1, 7), sample([3, 4], 1, 7)])
    assert batch["pixel_values"].shape == (1, 3, 2, 2)
    assert batch[IMAGE_INDEX].tolist() == [0, 0]


def test_images_that_differ_in_one_place_are_two():
    one, other = sample([1, 2], 1), sample([3, 4], 1)
    other["pixel_values"][0, 2, 1, 1] += 1e-6
    batch = Collator(PAD, deduplicate=DEDUPLICATED)([one, other])
    assert len(batch["pixel_values"]) == 2
    assert IMAGE_INDEX not in batch


@pytest.mark.parametrize("trains", [("connector",), ("visual_encoder", "connector", "language_model")])
@pytest.mark.parametrize("connector", ["mlp", "qformer"])
def test_images_that_stand_once_train_as_all_of_them_do(parts: Parts, connector: str, trains: tuple[str, ...]):
    """Loss and gradients; with dropout too, which falls anew on each of equal images."""
    options = {"num_queries": 4, "hidden_dim": 16, "num_layers": 1, "num_heads": 2} if connector == "qformer" else {}
    model, processor = parts.model(connector=connector, options=options)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trains))
    model.train()
    seen: list[int] = []
    model.visual_encoder.register_forward_hook(
        lambda module, given, named, output: seen.append(len(named["pixel_values"])), with_kwargs=True
    )
    rows = [pictured_row(processor, 1, 2), pictured_row(processor), pictured_row(processor, 2, 1, 1)]
    found = []
    for deduplicate in ((), DEDUPLICATED):
        model.zero_grad()
        torch.manual_seed(1)
        loss = model(**Collator.of(processor, deduplicate=deduplicate)(rows)).loss
        loss.backward()
        found.append((loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    assert seen == ([5, 5] if "visual_encoder" in trains else [5, 2])
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-6)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-6)


def pictured_row(processor: VLMProcessor, *pictures: int) -> dict[str, Any]:
    """A supervised row with these images of noise."""
    ids, _ = processor.tokenize("<image>" * len(pictures) + "what is it? a red circle")
    inputs = processor.image_inputs([picture(number) for number in pictures])
    return sample(ids) | {name: processor.normalise(value) for name, value in inputs.items()}


def test_equal_tiles_stand_once(parts: Parts):
    """A blank image's tiles are all alike; what is laid out is the same."""
    model, processor = parts.model()
    tiling = {"grids": [[1, 2], [2, 1]], "tile_size": 24, "tokens_side": 3}
    model.config.anyres = processor.anyres = tiling
    model.image_newline = ImageNewline(AnyRes(**tiling), model.config.text_config.hidden_size)
    rows = []
    for one in (make_blank_image(processor, (24, 48)), picture(1, (48, 24)), make_blank_image(processor, (24, 48))):
        size = (one.height, one.width)
        ids, _ = processor.tokenize("<image>what is it?", (), [size])
        inputs = processor.image_inputs([one], [size])
        rows.append(sample(ids) | inputs | {"pixel_values": processor.normalise(inputs["pixel_values"])})
    whole, deduplicate = (
        Collator.of(processor)(rows),
        Collator.of(processor, deduplicate=DEDUPLICATED)(rows),
    )
    assert len(whole["pixel_values"]) == 9
    assert len(deduplicate["pixel_values"]) < 6
    with torch.no_grad():
        torch.testing.assert_close(model(**deduplicate).loss, model(**whole).loss, rtol=0, atol=1e-6)
