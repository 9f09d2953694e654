"""States as targets: errors, which sample a token belongs to, and what a decoder reads of images."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.tiny_parts import Parts, picture
from vlm.data.batching.packing import SEQUENCE_STARTS
from vlm.data.dataset import model_inputs
from vlm.data.encoding.labels import encode
from vlm.data.sample import ImageRef, Sample, Turn
from vlm.train.distillation.targets import (
    HIDDEN_STATES,
    IMAGE_FEATURES,
    PROJECTIONS,
    StateTargets,
    TeacherStates,
    capture_image_inputs,
    number_samples,
    relative_errors,
    spread_over_samples,
)
from vlm.train.parts import Part


def test_errors_are_shares_of_the_targets_norm():
    targets = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    torch.testing.assert_close(relative_errors(torch.zeros(2, 2), targets), torch.ones(2))
    torch.testing.assert_close(relative_errors(targets, targets), torch.zeros(2))
    torch.testing.assert_close(relative_errors(targets.bfloat16() * 2, targets), torch.ones(2))


def test_tokens_belong_to_rows_or_to_packed_samples():
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert number_samples({"input_ids": ids}).tolist() == [[0] * 3, [1] * 3]
    packed = {"input_ids": ids[:1].repeat(1, 2), SEQUENCE_STARTS: torch.tensor([0, 1, 4, 6], dtype=torch.int32)}
    assert number_samples(packed).tolist() == [[0, 1, 1, 1, 2, 2]]


def test_images_count_as_much_as_the_supervised_tokens_of_their_sample():
    """Two images tokens of sample 0, one of sample 2, none of sample 1; sample 3 is a dummy without a position."""
    errors = torch.tensor([1.0, 3.0, 5.0, 100.0], requires_grad=True)
    spread = spread_over_samples(errors, torch.tensor([0, 0, 2, 3]), torch.tensor([0, 1, 1, 2, 2]), 4)
    assert spread.tolist() == [2, 0, 0, 5, 5]
    (gradient,) = torch.autograd.grad(spread.sum(), errors)
    assert gradient.tolist() == [0.5, 0.5, 2, 0]


def batch_of(parts: Parts, template: str = "chatml"):
    """A model, its processor and a batch of a sample with an image and a reply."""
    model, processor = parts.model("clip", "llama", template=template)
    sample = Sample("x", (Turn("user", (ImageRef(Path()), "what?")), Turn("assistant", ("red",))))
    item = model_inputs(processor, encode(processor, sample), [picture()])
    inputs = {name: torch.as_tensor(item[name])[None] for name in ("input_ids", "labels")}
    return model, processor, inputs | {"pixel_values": processor.normalise(item["pixel_values"])}


def test_a_decoder_reads_the_connectors_output_at_image_tokens(parts: Parts):
    model, processor, inputs = batch_of(parts)
    places, found = inputs["input_ids"] == processor.image_token_id, []
    with torch.no_grad(), capture_image_inputs(model, inputs["input_ids"], places, found.append):
        model(**{name: value for name, value in inputs.items() if name != "labels"})
    with torch.no_grad():
        torch.testing.assert_close(found[0], model.get_image_features(inputs["pixel_values"])[0])
    assert not model.get_decoder()._forward_pre_hooks


def test_embeddings_of_tokens_are_no_images(parts: Parts):
    model, processor, inputs = batch_of(parts)
    ids = inputs["input_ids"]
    with (
        pytest.raises(
            ValueError, match="image_features_weight: model_type=vlm does not put image features at the image tokens"
        ),
        capture_image_inputs(model, ids, ids == processor.image_token_id, lambda features: None),
    ):
        model(input_ids=ids)


@pytest.mark.parametrize("width", [32, 48])
def test_a_student_is_mapped_to_its_teachers_width(parts: Parts, width: int):
    """A matrix where widths differ: it trains with the connector, and is not saved."""
    model, processor, inputs = batch_of(parts)
    connector = Part("connector", "mlp", {}, True, 1e-3, 0.0)
    args = SimpleNamespace(seed=0, deepspeed=None)
    weights = {HIDDEN_STATES: 1.0, IMAGE_FEATURES: 1.0}
    targets = StateTargets.attach(model, [connector], weights, width, args)
    assert len(connector.parameters) == (0 if width == 32 else 2)
    assert set(connector.parameters) == {n for n, _ in model.named_parameters() if n.startswith(PROJECTIONS)}
    assert set(connector.parameters) == {n for n in model._keys_to_ignore_on_save or () if n.startswith(PROJECTIONS)}
    with targets.watching(inputs, processor) as watched:
        model(**inputs)
    number = int((inputs["labels"] != -100).sum())
    assert watched.hidden_states.shape == (number, width)
    assert watched.image_features.shape == (9, width)
    read = TeacherStates(torch.ones(number, width), nn.Identity(), torch.ones(9, width))
    losses = targets.losses(watched, read, inputs, processor)
    assert {name: tuple(values.shape) for name, values in losses.items()} == dict.fromkeys(weights, (number,))
    sum(values.sum() for values in losses.values()).backward()
    assert all(parameter.grad is not None for parameter in connector.parameters.values())
    read = TeacherStates(torch.ones(number, width), nn.Identity(), torch.ones(4, width))
    with pytest.raises(ValueError, match="the teacher has 4 image tokens in a batch, the model that trains has 9"):
        targets.losses(watched, read, inputs, processor)
